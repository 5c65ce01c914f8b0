//! The named VM object: a directory that holds `vm.json`, `mem`, `lock` and, while the VM runs,
//! `control.sock`. A clone's has `base` as well: a link to the memory file that it shares.
//!
//! [`Vm`] is an opened object that may be looked at; [`LockedVm`] is one that this process alone
//! may change. That a VM runs is never a stored fact: it is that `rhyve` holds the lock.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};

mod copies;
mod disks;
mod layer;
mod locked;

pub use self::copies::snapshot;
pub use self::disks::Images;
pub use self::locked::{LockedVm, MemorySetup};
use crate::lock;
pub use crate::lock::Holder;
use crate::memory::{MemFile, MemoryError};
use crate::name::VmName;
use crate::root::{Root, RootError};
use crate::state::{StateError, VmState};

const STATE: &str = "vm.json";
const STATE_NEW: &str = "vm.json.new";
const MEMORY: &str = "mem";
const MEMORY_NEW: &str = "mem.new";
const BASE: &str = "base";
const LOCK: &str = "lock";
const CONTROL: &str = "control.sock";
const REPORT: &str = "report.txt";

/// Larger state files are refused unread: 4096 vCPUs with room to spare.
const STATE_MAX: u64 = 128 << 20;

/// Why an object cannot be made, opened or changed. The texts begin with libvmmapi's function, as
/// bhyve's own messages do.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The root directory cannot be used.
    #[error(transparent)]
    Root(#[from] RootError),
    /// There is such a VM already.
    #[error("vm_create({0}): File exists: destroy it first with vmmctl --vm={0} --destroy")]
    Exists(VmName),
    /// There is no such VM.
    #[error(
        "vm_open({0}): No such file or directory: load it with rhyveload, or see vmmctl --list"
    )]
    NotFound(VmName),
    /// The VM runs, or another program works on it.
    #[error("{name} is in use by {program} (pid {pid}){mend}", program = .holder.program,
        pid = .holder.pid, mend = busy_mend(.name, .holder))]
    Busy {
        /// The VM.
        name: VmName,
        /// Who holds its lock.
        holder: Holder,
    },
    /// No memory was set up.
    #[error("{0} has no memory: load it with rhyveload, or vmmctl --vm={0} --set-lowmem=MB")]
    NoMemory(VmName),
    /// There is nothing that a clone could run.
    #[error("{name} cannot be copied: {why}")]
    NotCloned {
        /// The VM.
        name: VmName,
        /// Why not, and what to do.
        why: &'static str,
    },
    /// What disks its guest writes to was not stored.
    #[error("which disks the guest writes to is not known: run the VM and suspend it again")]
    UnknownDisks,
    /// A disk that is written to is no file.
    #[error("{}: only regular files are copied, so a machine that writes to this disk is not; attach it with ro", .0.display())]
    NotAFile(PathBuf),
    /// Somebody else writes to a disk.
    #[error("{}: another VM or program has this disk image open for writing", .0.display())]
    ImageInUse(PathBuf),
    /// A disk image is not what it should be.
    #[error("{}: this disk cannot be copied", path.display())]
    Disk {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        source: std::io::Error,
    },
    /// The memory is larger than the file system.
    #[error("vm_setup_memory({segment}): Cannot allocate memory: {needed} MiB, but {} holds {available} MiB in all", path.display())]
    TooLarge {
        /// `lowmem` or `highmem`: the first that does not fit.
        segment: &'static str,
        /// All RAM, in MiB.
        needed: u64,
        /// The file system's size, in MiB.
        available: u64,
        /// Where the memory would be.
        path: PathBuf,
    },
    /// Wired memory did not fit.
    #[error("vm_setup_memory({segment}): Cannot allocate memory: {} is full; free some room, or do not wire it", path.display())]
    Full {
        /// `lowmem` or `highmem`.
        segment: &'static str,
        /// Where the memory would be.
        path: PathBuf,
    },
    /// The memory file cannot be used.
    #[error("{name}: memory")]
    Memory {
        /// The VM.
        name: VmName,
        /// What is wrong.
        source: MemoryError,
    },
    /// vm.json cannot be used.
    #[error("{}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: StateError,
    },
    /// A system call on one of the object's files failed.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: Errno,
    },
}

fn busy_mend(name: &VmName, holder: &Holder) -> String {
    match holder.program.as_str() {
        "rhyve" => format!(": it runs; stop it with vmmctl --vm={name} --force-poweroff"),
        _ => ": try again when it is done".into(),
    }
}

/// An opened object.
#[derive(Debug)]
pub struct Vm {
    name: VmName,
    path: PathBuf,
    dir: OwnedFd,
    root: OwnedFd,
}

impl Vm {
    /// Makes an object and locks it; `program` is who will be named as its holder.
    ///
    /// # Errors
    ///
    /// It exists, or cannot be made.
    pub fn create(root: &Root, name: &VmName, program: &str) -> Result<LockedVm, VmError> {
        let path = root.path().join(name.as_str());
        match mkdirat(root, name.as_str(), Mode::S_IRWXU) {
            Ok(()) => {}
            Err(Errno::EEXIST) => return Err(VmError::Exists(name.clone())),
            Err(source) => {
                return Err(VmError::Io {
                    action: "make this directory",
                    path,
                    source,
                });
            }
        }
        let mut locked = Self::open(root, name)?.lock(program)?;
        locked.store(&mut VmState::created())?;
        Ok(locked)
    }

    /// Opens an object.
    ///
    /// # Errors
    ///
    /// There is none of this name.
    pub fn open(root: &Root, name: &VmName) -> Result<Self, VmError> {
        let path = root.path().join(name.as_str());
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let dir = openat(root, name.as_str(), flags, Mode::empty()).map_err(|e| match e {
            Errno::ENOENT => VmError::NotFound(name.clone()),
            source => VmError::Io {
                action: "open this VM",
                path: path.clone(),
                source,
            },
        })?;
        let root = root.as_fd().try_clone_to_owned().map_err(|e| VmError::Io {
            action: "open this VM",
            path: path.clone(),
            source: Errno::from_raw(e.raw_os_error().unwrap_or(0)),
        })?;
        Ok(Self {
            name: name.clone(),
            path,
            dir,
            root,
        })
    }

    /// The VM's name.
    pub fn name(&self) -> &VmName {
        &self.name
    }

    /// The object's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path for the control socket that is short enough for any root (`sun_path` has 108 bytes).
    pub fn control_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{CONTROL}", self.dir.as_raw_fd()))
    }

    /// Who holds the lock now; `rhyve` holds it as long as the VM runs.
    ///
    /// # Errors
    ///
    /// The lock file cannot be opened.
    pub fn holder(&self) -> Result<Option<Holder>, VmError> {
        match self.open_file(LOCK, OFlag::O_RDWR) {
            Ok(file) => lock::holder(&file).map_err(|e| self.io("ask for the lock of", LOCK, e)),
            Err(Errno::ENOENT) => Ok(None),
            Err(source) => Err(self.io("open", LOCK, source)),
        }
    }

    /// Takes the lock, without waiting.
    ///
    /// # Errors
    ///
    /// Somebody holds it, or the object was destroyed in the meantime.
    pub fn lock(self, program: &str) -> Result<LockedVm, VmError> {
        let file = match self.open_file(LOCK, OFlag::O_RDWR) {
            Ok(file) => file,
            Err(Errno::ENOENT) => {
                let file = self
                    .open_file(LOCK, OFlag::O_RDWR | OFlag::O_CREAT)
                    .map_err(|e| self.io("make", LOCK, e))?;
                lock::prepare(&file).map_err(|e| self.io("write", LOCK, errno(&e)))?;
                file
            }
            Err(source) => return Err(self.io("open", LOCK, source)),
        };
        let acquired = lock::try_acquire(&file, program).map_err(|e| self.io("lock", LOCK, e))?;
        if !acquired {
            let unknown = Holder {
                pid: 0,
                program: "another program".into(),
                since: 0,
            };
            let holder = lock::holder(&file).ok().flatten().unwrap_or(unknown);
            return Err(VmError::Busy {
                name: self.name,
                holder,
            });
        }
        if lock::is_orphan(&file) {
            return Err(VmError::NotFound(self.name));
        }
        Ok(LockedVm {
            vm: self,
            _lock: file,
            reserve: 0,
        })
    }

    /// Reads the settled state.
    ///
    /// # Errors
    ///
    /// There is none, it is damaged, or it was written by a newer rhyve.
    pub fn load_state(&self) -> Result<VmState, VmError> {
        let path = || self.path.join(STATE);
        let file = match self.open_file(STATE, OFlag::O_RDONLY) {
            Ok(file) => file,
            Err(Errno::ENOENT) => {
                let source = StateError::Value("it is missing".into());
                return Err(VmError::State {
                    path: path(),
                    source,
                });
            }
            Err(source) => return Err(self.io("open", STATE, source)),
        };
        let mut text = Vec::new();
        file.take(STATE_MAX)
            .read_to_end(&mut text)
            .map_err(|e| self.io("read", STATE, errno(&e)))?;
        VmState::from_json(&text).map_err(|source| VmError::State {
            path: path(),
            source,
        })
    }

    /// Opens the RAM to look at it.
    ///
    /// # Errors
    ///
    /// There is none, or its file does not fit the state.
    pub fn open_memory(&self, state: &VmState) -> Result<MemFile, VmError> {
        let file = self.memory_file(state, OFlag::O_RDONLY)?;
        let memory = match self.base_file()? {
            None => MemFile::new(file, state.machine.memory),
            Some(base) => MemFile::of_clone(file, base, state.machine.memory),
        };
        memory.map_err(|source| self.memory_error(source))
    }

    /// Whether its memory is shared with clones of it, or it is such a clone.
    ///
    /// # Errors
    ///
    /// The object cannot be looked at.
    pub fn is_clone(&self) -> Result<bool, VmError> {
        Ok(self.base_file()?.is_some())
    }

    fn base_file(&self) -> Result<Option<File>, VmError> {
        match self.open_file(BASE, OFlag::O_RDONLY) {
            Ok(file) => Ok(Some(file)),
            Err(Errno::ENOENT) => Ok(None),
            Err(source) => Err(self.io("open", BASE, source)),
        }
    }

    fn memory_error(&self, source: MemoryError) -> VmError {
        VmError::Memory {
            name: self.name.clone(),
            source,
        }
    }

    fn memory_file(&self, state: &VmState, mode: OFlag) -> Result<File, VmError> {
        if state.machine.memory.total() == 0 {
            return Err(VmError::NoMemory(self.name.clone()));
        }
        let (opened, path) = match &state.machine.mem_path {
            None => (self.open_file(MEMORY, mode), self.path.join(MEMORY)),
            Some(dir) => {
                let path = external_memory(dir, &self.name);
                let flags = mode | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                (
                    nix::fcntl::open(&path, flags, Mode::empty()).map(File::from),
                    path,
                )
            }
        };
        opened.map_err(|source| match source {
            Errno::ENOENT => VmError::NoMemory(self.name.clone()),
            source => VmError::Io {
                action: "open this memory file",
                path,
                source,
            },
        })
    }

    fn open_file(&self, file: &str, flags: OFlag) -> Result<File, Errno> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(&self.dir, file, flags, Mode::S_IRUSR | Mode::S_IWUSR).map(File::from)
    }

    fn io(&self, action: &'static str, file: &str, source: Errno) -> VmError {
        VmError::Io {
            action,
            path: self.path.join(file),
            source,
        }
    }
}

/// The memory file of `name` in a directory that other VMs may use as well.
fn external_memory(dir: &Path, name: &VmName) -> PathBuf {
    dir.join(format!("rhyve-{}-{name}.mem", nix::unistd::geteuid()))
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32))
}

#[cfg(test)]
mod tests;
