//! A load from beginning to end: open, plan, take the VM, copy, store.
//!
//! A kernel file is planned by [`crate::plan`], a boot file system (`-h`, `-d`) is gone through by
//! [`crate::freebsd::loader`]; both come to a list of what is copied where.
//!
//! The order is what keeps a VM whole. The kernel is opened and planned before the object is
//! touched, so a bad kernel changes nothing. From the first change until everything is in place the
//! object says `created` and has no memory on record: whoever finds it after a `kill -9`, or after
//! the file system ran full, can load it again or destroy it.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::fcntl::OFlag;
use serde::Serialize;
use vmm_api::memory::{GuestRam, MemoryError, MemoryLayout};
use vmm_api::name::VmName;
use vmm_api::root::{Root, RootError};
use vmm_api::state::{BootInfo, Phase, VcpuState, VmState};
use vmm_api::vm::{LockedVm, MemorySetup, Vm, VmError};

use vmm_api::regs::Registers;

use crate::boot::{BootError, BootJob};
use crate::bulk::{Job as BulkJob, Room, bring};
use crate::copy::CopyError;
use crate::freebsd::console::Console;
use crate::freebsd::env::EnvVar;
use crate::image::Image;
use crate::plan::{Blob, Boot, PlanError, Protocol, Request, Segment, plan};
use crate::progress::Progress;
use crate::source::{FileSource, Source};

/// Who holds the lock while a VM is loaded.
const PROGRAM: &str = "rhyveload";

/// A huge page of x86-64.
const HUGE: u64 = 2 << 20;

/// A kernel file may have this much more than what it loads: headers, and gaps for alignment.
const SLACK: u64 = 64 << 20;

/// What the user wants.
#[derive(Clone, Debug)]
pub struct Job {
    /// The VM.
    pub name: VmName,
    /// Its memory.
    pub memory: MemorySetup,
    /// FreeBSD kernel environment.
    pub env: Vec<EnvVar>,
    /// What to load.
    pub from: From,
}

impl Job {
    /// Whether there is something to ask a user.
    pub fn asks(&self) -> bool {
        matches!(self.from, From::Boot(_))
    }
}

/// Where a guest is loaded from.
#[derive(Clone, Debug)]
pub enum From {
    /// A kernel file.
    Kernel(KernelJob),
    /// `/boot` of a directory or of disks, as FreeBSD's loader does it.
    Boot(BootJob),
}

/// A kernel file and what goes with it.
#[derive(Clone, Debug)]
pub struct KernelJob {
    /// The kernel file.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The command line.
    pub cmdline: Option<String>,
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
    /// Modules and other files that a FreeBSD kernel finds in memory.
    pub modules: Vec<Module>,
    /// The command line.
    pub cmdline: Option<String>,
    /// The VM's RAM.
    pub memory: MemoryLayout,
}

/// Where a module lies.
#[derive(Clone, Debug, Serialize)]
pub struct Module {
    /// Its file.
    pub path: String,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: String,
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
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
    /// A boot file system.
    #[error(transparent)]
    Boot(#[from] BootError),
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

/// Loads a VM. What FreeBSD's loader says goes to `console`.
///
/// # Errors
///
/// Something is wrong with the kernel, the request or the VM. A VM that did not exist before does
/// not exist then; one that did is as it was, or, if copying had begun, `created` without memory.
pub fn load(
    root: &Root,
    job: &Job,
    console: &mut Console<'_>,
    progress: &mut Progress,
) -> Result<Loaded, LoadError> {
    let began = Instant::now();
    let existing = match Vm::open(root, &job.name).and_then(|vm| vm.lock(PROGRAM)) {
        Ok(vm) => Some(vm),
        Err(VmError::NotFound(_)) => None,
        Err(error) => return Err(error.into()),
    };
    if job.memory.layout.lowmem == 0 {
        return Err(LoadError::NoMemory);
    }
    let memory = absolute(&job.memory)?;
    let (filling, loaded) = match &job.from {
        From::Kernel(kernel) => plan_file(job, kernel, progress)?,
        From::Boot(boot) => boot.plan(job, console, progress)?,
    };
    let fresh = existing.is_none();
    let mut vm = match existing {
        Some(vm) => vm,
        None => Vm::create(root, &job.name, PROGRAM)?,
    };
    if let Err(error) = vm.check_memory(&memory) {
        // A VM that was there keeps what it holds.
        if fresh {
            vm.destroy()?;
        }
        return Err(error.into());
    }
    if let Err(error) = fill(&mut vm, &memory, filling, began, progress) {
        abandon(vm, fresh);
        return Err(error);
    }
    Ok(loaded)
}

/// Plans the load of a kernel file.
fn plan_file(
    job: &Job,
    files: &KernelJob,
    progress: &mut Progress,
) -> Result<(Filling, Loaded), LoadError> {
    let kernel = open_kernel(job, files, progress)?;
    let initrd = match &files.initrd {
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
        boot: files.boot,
        kernel: &files.kernel.to_string_lossy(),
        cmdline: files.cmdline.as_deref(),
        env: &job.env,
        initrd: initrd.as_ref().map(|(_, file)| file.size()),
    };
    let plan = plan(&kernel, &request).map_err(|source| LoadError::Plan {
        path: files.kernel.clone(),
        source,
    })?;
    let mut copies = vec![CopyJob {
        path: files.kernel.clone(),
        from: Box::new(kernel),
        segments: plan.segments.clone(),
    }];
    let mut place = None;
    if let (Some((path, file)), Some(gpa)) = (initrd, plan.initrd) {
        let size = file.size();
        place = Some(Initrd {
            path: path.to_string_lossy().into_owned(),
            gpa,
            size,
        });
        copies.push(CopyJob {
            path: path.clone(),
            from: Box::new(file),
            segments: vec![Segment {
                offset: 0,
                filesz: size,
                memsz: size,
                gpa,
            }],
        });
    }
    let absolute = std::path::absolute(&files.kernel);
    let path = absolute.unwrap_or_else(|_| files.kernel.clone());
    let filling = Filling {
        copies,
        ramdisk: place.as_ref().map(|initrd| (initrd.gpa, initrd.size)),
        blobs: plan.blobs,
        registers: plan.registers.clone(),
        boot: BootInfo {
            kernel: path.to_string_lossy().into_owned(),
            protocol: plan.protocol.to_string(),
            cmdline: files.cmdline.clone(),
            symbols: plan.symbols,
        },
    };
    let loaded = Loaded {
        vm: job.name.clone(),
        kernel: files.kernel.to_string_lossy().into_owned(),
        protocol: plan.protocol,
        summary: plan.summary,
        entry: plan.registers.rip,
        segments: plan.segments,
        initrd: place,
        modules: Vec::new(),
        cmdline: files.cmdline.clone(),
        memory: job.memory.layout,
    };
    Ok((filling, loaded))
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
fn open_kernel(job: &Job, files: &KernelJob, progress: &mut Progress) -> Result<Image, LoadError> {
    let limit = job.memory.layout.total().saturating_add(SLACK);
    let image = Image::new(Box::new(open(&files.kernel)?), limit, progress);
    image.map_err(|source| LoadError::Plan {
        path: files.kernel.clone(),
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

/// What goes into a VM.
#[derive(Debug)]
pub(crate) struct Filling {
    /// What is copied.
    pub copies: Vec<CopyJob>,
    /// Where an initial RAM disk is, one of these copies, and its length.
    pub ramdisk: Option<(u64, u64)>,
    /// What the loader adds.
    pub blobs: Vec<Blob>,
    /// The state in which vCPU 0 starts.
    pub registers: Registers,
    /// What the object remembers of it.
    pub boot: BootInfo,
}

/// Parts of a file that are copied.
#[derive(Debug)]
pub(crate) struct CopyJob {
    /// The file, for errors.
    pub path: PathBuf,
    /// Its bytes.
    pub from: Box<dyn Source>,
    /// Which of them go where.
    pub segments: Vec<Segment>,
}

impl CopyJob {
    fn job(&self) -> BulkJob<'_> {
        BulkJob {
            from: &*self.from,
            segments: &self.segments,
        }
    }
}

/// bhyve's vm_reinit and what follows: memory anew, everything copied, the state stored last.
fn fill(
    vm: &mut LockedVm,
    memory: &MemorySetup,
    filling: Filling,
    began: Instant,
    progress: &mut Progress,
) -> Result<(), LoadError> {
    // A damaged vm.json does not keep a VM from being loaded again.
    let old = vm.load_state().unwrap_or_else(|_| VmState::created());
    let mut state = emptied(&old);
    vm.store(&mut state)?;
    vm.setup_memory(&mut state, memory)?;
    let ram = vm.map_memory(&state)?;

    let jobs: Vec<BulkJob<'_>> = filling.copies.iter().map(CopyJob::job).collect();
    bring(&jobs, &rooms(&ram, &filling), &ram, progress).map_err(|(job, source)| {
        LoadError::Copy {
            path: filling.copies[job].path.clone(),
            source,
        }
    })?;
    for blob in &filling.blobs {
        ram.write(blob.gpa, &blob.bytes)
            .map_err(|source| LoadError::Write(vm.name().clone(), source))?;
    }

    state.phase = Phase::Loaded;
    state.vcpus = vec![VcpuState {
        registers: filling.registers,
        ..VcpuState::reset()
    }];
    state.machine.boot = Some(filling.boot);
    state.machine.load_us = u64::try_from(began.elapsed().as_micros()).ok();
    vm.store(&mut state)?;
    vm.remove_report()?;
    Ok(vm.remove_control()?)
}

/// Where a guest will use memory densely, beyond what is loaded: what a kernel allocates behind
/// itself while it boots, what Linux keeps below the initial RAM disk (64 bytes for each page, and as
/// much again for all else), and the first megabytes. Debian's kernel then takes 30 faults of its own
/// to its init instead of 11700. A small kernel is left its small pages.
fn rooms(ram: &GuestRam, filling: &Filling) -> Vec<Room> {
    let ramdisk = filling.ramdisk.map(|(gpa, _)| gpa);
    let segments = filling.copies.iter().flat_map(|copy| &copy.segments);
    let last = segments.filter(|segment| Some(segment.gpa) != ramdisk);
    let last = last.map(|segment| segment.gpa + segment.memsz).max();
    // The kernel is the first.
    let kernel = filling
        .copies
        .first()
        .map_or(&[][..], |copy| &copy.segments);
    let size: u64 = kernel.iter().map(|segment| segment.filesz).sum();
    if size < HUGE {
        return Vec::new();
    }
    let mut rooms = vec![Room { gpa: 0, len: HUGE }];
    rooms.extend(last.map(|gpa| Room {
        gpa,
        len: size / 8 * 5,
    }));
    rooms.extend(filling.ramdisk.map(|(gpa, size)| {
        let below = (ram.layout().lowmem / 32).min(gpa);
        Room {
            gpa: gpa - below,
            len: below + size,
        }
    }));
    rooms
}

/// A VM without memory and registers. It remembers where its memory file and its disks are, so that they
/// are found when they are to be removed.
fn emptied(old: &VmState) -> VmState {
    let mut state = VmState::created();
    state.generation = old.generation;
    state.machine.mem_path = old.machine.mem_path.clone();
    state.machine.disks = old.machine.disks.clone();
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
