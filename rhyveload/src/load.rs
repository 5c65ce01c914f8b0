//! A load from beginning to end: open, plan, take the VM, copy, store.
//!
//! The order is what keeps a VM whole. The kernel is opened and planned before the object is
//! touched, so a bad kernel changes nothing. From the first change until everything is in place the
//! object says `created` and has no memory on record: whoever finds it after a `kill -9`, or after
//! the file system ran full, can load it again or destroy it.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use serde::Serialize;
use vmm_api::memory::{GuestRam, MemoryError, MemoryLayout};
use vmm_api::name::VmName;
use vmm_api::root::{Root, RootError};
use vmm_api::state::{BootInfo, Phase, VcpuState, VmState};
use vmm_api::vm::{LockedVm, MemorySetup, Vm, VmError};

use crate::copy::{CopyError, copy};
use crate::freebsd::env::EnvVar;
use crate::image::Image;
use crate::plan::{Boot, LoadPlan, PlanError, Protocol, Request, Segment, plan};
use crate::progress::Progress;
use crate::source::{FileSource, Source};

/// Who holds the lock while a VM is loaded.
const PROGRAM: &str = "rhyveload";

/// A kernel file may have this much more than what it loads: headers, and gaps for alignment.
const SLACK: u64 = 64 << 20;

/// What the user wants.
#[derive(Clone, Debug)]
pub struct Job {
    /// The VM.
    pub name: VmName,
    /// Its memory.
    pub memory: MemorySetup,
    /// The kernel file.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The command line.
    pub cmdline: Option<String>,
    /// FreeBSD kernel environment.
    pub env: Vec<EnvVar>,
    /// The boot protocol.
    pub boot: Boot,
}

/// What was loaded, for `--json`.
#[derive(Clone, Debug, Serialize)]
pub struct Loaded {
    /// The VM.
    pub vm: VmName,
    /// The kernel file.
    pub kernel: String,
    /// How it will be entered.
    pub protocol: Protocol,
    /// bhyveload's `text=0x... data=0x...`.
    pub summary: String,
    /// Where the first vCPU starts.
    pub entry: u64,
    /// What was copied out of the kernel file.
    pub segments: Vec<Segment>,
    /// The initial RAM disk.
    pub initrd: Option<Initrd>,
    /// The command line.
    pub cmdline: Option<String>,
    /// The VM's RAM.
    pub memory: MemoryLayout,
}

/// Where an initial RAM disk lies.
#[derive(Clone, Debug, Serialize)]
pub struct Initrd {
    /// Its file.
    pub path: String,
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
}

/// Why a VM could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The root of all objects.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The object.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A file cannot be opened.
    #[error("{}: cannot open it", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The initial RAM disk has no bytes.
    #[error("{}: the initial RAM disk is empty", .0.display())]
    EmptyInitrd(PathBuf),
    /// There is no RAM to load into.
    #[error("a VM needs some lowmem: give it more than 0 with -m")]
    NoMemory,
    /// The kernel cannot be loaded.
    #[error("{}", path.display())]
    Plan {
        /// The kernel file.
        path: PathBuf,
        /// What is wrong.
        source: PlanError,
    },
    /// A file's bytes did not get into guest memory.
    #[error("{}", path.display())]
    Copy {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: CopyError,
    },
    /// The loader's own bytes did not get into guest memory.
    #[error("vm_load({0})")]
    Write(VmName, #[source] MemoryError),
}

/// Loads a VM.
///
/// # Errors
///
/// Something is wrong with the kernel, the request or the VM. A VM that did not exist before does
/// not exist then; one that did is as it was, or, if copying had begun, `created` without memory.
pub fn load(root: &Root, job: &Job, progress: &mut Progress) -> Result<Loaded, LoadError> {
    let existing = match Vm::open(root, &job.name).and_then(|vm| vm.lock(PROGRAM)) {
        Ok(vm) => Some(vm),
        Err(VmError::NotFound(_)) => None,
        Err(error) => return Err(error.into()),
    };
    if job.memory.layout.lowmem == 0 {
        return Err(LoadError::NoMemory);
    }
    let memory = absolute(&job.memory)?;
    let kernel = open_kernel(job, progress)?;
    let initrd = match &job.initrd {
        Some(path) => Some((path, open(path)?)),
        None => None,
    };
    if let Some((path, file)) = &initrd
        && file.size() == 0
    {
        return Err(LoadError::EmptyInitrd((*path).clone()));
    }
    let request = Request {
        layout: job.memory.layout,
        boot: job.boot,
        kernel: &job.kernel.to_string_lossy(),
        cmdline: job.cmdline.as_deref(),
        env: &job.env,
        initrd: initrd.as_ref().map(|(_, file)| file.size()),
    };
    let plan = plan(&kernel, &request).map_err(|source| LoadError::Plan {
        path: job.kernel.clone(),
        source,
    })?;

    let fresh = existing.is_none();
    let mut vm = match existing {
        Some(vm) => vm,
        None => Vm::create(root, &job.name, PROGRAM)?,
    };
    let files = Files {
        kernel: &kernel,
        initrd: initrd.as_ref().map(|(_, file)| file),
    };
    if let Err(error) = vm.check_memory(&memory) {
        // A VM that was there keeps what it holds.
        if fresh {
            vm.destroy()?;
        }
        return Err(error.into());
    }
    let filled = fill(&mut vm, job, &memory, &plan, &files, progress);
    if let Err(error) = filled {
        abandon(vm, fresh);
        return Err(error);
    }
    Ok(report(job, plan, files.initrd))
}

/// Programs with other working directories look for the memory file, too.
fn absolute(memory: &MemorySetup) -> Result<MemorySetup, LoadError> {
    let path = match &memory.path {
        None => None,
        Some(dir) => Some(dir.canonicalize().map_err(|source| LoadError::Open {
            path: dir.clone(),
            source,
        })?),
    };
    Ok(MemorySetup {
        path,
        ..memory.clone()
    })
}

/// A kernel that loads more bytes than the VM has is refused before it is decompressed.
fn open_kernel(job: &Job, progress: &mut Progress) -> Result<Image, LoadError> {
    let limit = job.memory.layout.total().saturating_add(SLACK);
    let image = Image::new(open(&job.kernel)?, limit, progress);
    image.map_err(|source| LoadError::Plan {
        path: job.kernel.clone(),
        source: source.into(),
    })
}

fn open(path: &Path) -> Result<FileSource, LoadError> {
    // Without O_NONBLOCK a pipe that nobody writes to would be waited for, only to be refused.
    OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .and_then(FileSource::new)
        .map_err(|source| LoadError::Open {
            path: path.to_owned(),
            source,
        })
}

/// What is copied.
struct Files<'a> {
    kernel: &'a Image,
    initrd: Option<&'a FileSource>,
}

/// bhyve's vm_reinit and what follows: memory anew, everything copied, the state stored last.
fn fill(
    vm: &mut LockedVm,
    job: &Job,
    memory: &MemorySetup,
    plan: &LoadPlan,
    files: &Files<'_>,
    progress: &mut Progress,
) -> Result<(), LoadError> {
    // A damaged vm.json does not keep a VM from being loaded again.
    let old = vm.load_state().unwrap_or_else(|_| VmState::created());
    let mut state = emptied(&old);
    vm.store(&mut state)?;
    vm.setup_memory(&mut state, memory)?;
    let ram = vm.map_memory(&state)?;

    prepare(&ram, plan, files);
    let copied = |path: &Path| {
        let path = path.to_owned();
        move |source| LoadError::Copy { path, source }
    };
    for segment in &plan.segments {
        let range = (segment.offset, segment.filesz);
        copy(files.kernel, range, &ram, segment.gpa, progress).map_err(copied(&job.kernel))?;
    }
    if let (Some(path), Some(file), Some(gpa)) = (&job.initrd, files.initrd, plan.initrd) {
        copy(file, (0, file.size()), &ram, gpa, progress).map_err(copied(path))?;
    }
    for blob in &plan.blobs {
        ram.write(blob.gpa, &blob.bytes)
            .map_err(|source| LoadError::Write(job.name.clone(), source))?;
    }

    state.phase = Phase::Loaded;
    state.vcpus = vec![VcpuState {
        registers: plan.registers.clone(),
        ..VcpuState::reset()
    }];
    let path = std::path::absolute(&job.kernel).unwrap_or_else(|_| job.kernel.clone());
    state.machine.boot = Some(BootInfo {
        kernel: path.to_string_lossy().into_owned(),
        protocol: plan.protocol.to_string(),
        cmdline: job.cmdline.clone(),
    });
    vm.store(&mut state)?;
    Ok(vm.remove_control()?)
}

/// Puts huge pages where the guest will use memory densely: what is loaded, what a kernel allocates
/// behind itself while it boots, and what Linux keeps below the initial RAM disk (64 bytes for each
/// page, and as much again for all else). Debian's kernel then takes 600 faults to its init instead
/// of 11700.
fn prepare(ram: &GuestRam, plan: &LoadPlan, files: &Files<'_>) {
    let (mut size, mut end) = (0, 0);
    for segment in &plan.segments {
        ram.prepare(segment.gpa, segment.filesz);
        size += segment.filesz;
        end = end.max(segment.gpa + segment.memsz);
    }
    ram.prepare(end, size / 2);
    if let (Some(file), Some(gpa)) = (files.initrd, plan.initrd) {
        let below = (ram.layout().lowmem / 32).min(gpa);
        ram.prepare(gpa - below, below + file.size());
    }
}

/// A VM without memory and registers. It remembers where its memory file is, so that the file is
/// found when it is to be removed.
fn emptied(old: &VmState) -> VmState {
    let mut state = VmState::created();
    state.generation = old.generation;
    state.machine.mem_path = old.machine.mem_path.clone();
    state
}

/// Leaves a VM that could not be filled. What goes wrong here is not worth more than the error that
/// led here: the object stays `created`.
fn abandon(mut vm: LockedVm, fresh: bool) {
    if fresh {
        let _ = vm.destroy();
        return;
    }
    // Partly copied memory is of no use, and may be what fills the file system.
    if let Ok(state) = vm.load_state() {
        let mut state = emptied(&state);
        let none = MemorySetup::default();
        let _ = vm.setup_memory(&mut state, &none);
        let _ = vm.store(&mut state);
    }
}

fn report(job: &Job, plan: LoadPlan, initrd: Option<&FileSource>) -> Loaded {
    let place = job.initrd.as_ref().zip(initrd).zip(plan.initrd);
    Loaded {
        vm: job.name.clone(),
        kernel: job.kernel.to_string_lossy().into_owned(),
        protocol: plan.protocol,
        summary: plan.summary,
        entry: plan.registers.rip,
        segments: plan.segments,
        initrd: place.map(|((path, file), gpa)| Initrd {
            path: path.to_string_lossy().into_owned(),
            gpa,
            size: file.size(),
        }),
        cmdline: job.cmdline.clone(),
        memory: job.memory.layout,
    }
}
