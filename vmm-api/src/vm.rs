//! The named VM object: a directory that holds `vm.json`, `mem`, `lock` and, while the VM runs,
//! `control.sock`.
//!
//! [`Vm`] is an opened object that may be looked at; [`LockedVm`] is one that this process alone
//! may change. That a VM runs is never a stored fact: it is that `rhyve` holds the lock.

use std::fs::File;
use std::io::Read;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::lock;
pub use crate::lock::Holder;
use crate::memory::{GuestRam, MemFile, MemoryError, MemoryLayout, allocate, capacity};
use crate::name::VmName;
use crate::root::{Root, RootError};
use crate::state::{StateError, VmState};

const STATE: &str = "vm.json";
const STATE_NEW: &str = "vm.json.new";
const MEMORY: &str = "mem";
const LOCK: &str = "lock";
const CONTROL: &str = "control.sock";

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

/// An object that only this process may change, until the value is dropped.
#[derive(Debug)]
pub struct LockedVm {
    vm: Vm,
    // Closing the file drops the lock.
    _lock: File,
    reserve: u64,
}

/// How memory is set up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemorySetup {
    /// Where RAM lies.
    pub layout: MemoryLayout,
    /// Allocate all of it now.
    pub wire: bool,
    /// Keep the memory file in this directory instead of in the object.
    pub path: Option<PathBuf>,
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
        MemFile::new(file, state.machine.memory).map_err(|source| VmError::Memory {
            name: self.name.clone(),
            source,
        })
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

impl Deref for LockedVm {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        &self.vm
    }
}

impl LockedVm {
    /// Writes the state whole or not at all, and counts its generation up.
    ///
    /// # Errors
    ///
    /// The file system is full; the former state is still there.
    pub fn store(&mut self, state: &mut VmState) -> Result<(), VmError> {
        state.generation += 1;
        let text = state.to_json().map_err(|e| VmError::State {
            path: self.path.join(STATE),
            source: StateError::Damaged(e),
        })?;
        let file = self
            .open_file(STATE_NEW, OFlag::O_WRONLY | OFlag::O_CREAT)
            .map_err(|e| self.io("make", STATE_NEW, e))?;
        let written = file
            .write_all_at(&text, 0)
            .and_then(|()| file.set_len(text.len() as u64))
            .and_then(|()| file.sync_all());
        written.map_err(|e| self.io("write", STATE_NEW, errno(&e)))?;
        renameat(&self.dir, STATE_NEW, &self.dir, STATE)
            .map_err(|e| self.io("replace", STATE, e))?;
        self.make_reserve()
    }

    /// Sets room aside for later states of up to `bytes`, so that [`LockedVm::store`] succeeds even
    /// when the file system has filled up in the meantime.
    ///
    /// # Errors
    ///
    /// There is not that much room now.
    pub fn reserve(&mut self, bytes: u64) -> Result<(), VmError> {
        self.reserve = bytes;
        self.make_reserve()
    }

    fn make_reserve(&self) -> Result<(), VmError> {
        if self.reserve == 0 {
            return Ok(());
        }
        self.open_file(STATE_NEW, OFlag::O_WRONLY | OFlag::O_CREAT)
            .and_then(|file| allocate(&file, 0, self.reserve))
            .map_err(|e| self.io("set room aside for", STATE, e))
    }

    /// libvmmapi's vm_setup_memory: makes the memory file anew, sparse unless wired, and notes it in
    /// `state`. What was in memory before is gone.
    ///
    /// # Errors
    ///
    /// It is larger than its file system, or it is wired and there is no room for it.
    pub fn setup_memory(
        &mut self,
        state: &mut VmState,
        setup: &MemorySetup,
    ) -> Result<(), VmError> {
        let memory = |source| VmError::Memory {
            name: self.name.clone(),
            source,
        };
        let layout = setup.layout;
        layout.validate().map_err(memory)?;
        self.remove_memory(state)?;
        state.machine.memory = MemoryLayout::default();
        state.machine.mem_path = setup.path.clone();
        if setup.path.is_some() {
            // On record before it is there: a memory file elsewhere is found even if its maker is
            // killed right after.
            self.store(state)?;
        }
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
        let (file, place) = match &setup.path {
            None => (self.open_file(MEMORY, flags), self.path.clone()),
            Some(dir) => {
                let mode = Mode::S_IRUSR | Mode::S_IWUSR;
                let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let path = external_memory(dir, &self.name);
                (
                    nix::fcntl::open(&path, flags, mode).map(File::from),
                    dir.clone(),
                )
            }
        };
        let io = |source| VmError::Io {
            action: "make the memory file in this directory",
            path: place.clone(),
            source,
        };
        let file = match file {
            Ok(file) => file,
            Err(error) => {
                // Whose file it is that is in the way is not known: forget it.
                if state.machine.mem_path.take().is_some() {
                    self.store(state)?;
                }
                return Err(io(error));
            }
        };
        let segment = |room: u64| {
            if layout.lowmem > room {
                "lowmem"
            } else {
                "highmem"
            }
        };
        let made = match capacity(&file).map_err(io)? {
            Some(room) if layout.total() > room => Err(VmError::TooLarge {
                segment: segment(room),
                needed: layout.total() >> 20,
                available: room >> 20,
                path: place.clone(),
            }),
            _ => file.set_len(layout.total()).map_err(|e| io(errno(&e))),
        };
        let made = made.and_then(|()| {
            if setup.wire {
                wire(&file, layout, &place)
            } else {
                Ok(())
            }
        });
        if let Err(error) = made {
            self.remove_memory(state)?;
            state.machine.mem_path = None;
            return Err(error);
        }
        state.machine.memory = layout;
        state.machine.wired = setup.wire;
        Ok(())
    }

    /// Maps the RAM, writable.
    ///
    /// # Errors
    ///
    /// There is none, or its file does not fit the state.
    pub fn map_memory(&self, state: &VmState) -> Result<GuestRam, VmError> {
        let file = self.memory_file(state, OFlag::O_RDWR)?;
        GuestRam::map(file, state.machine.memory).map_err(|source| VmError::Memory {
            name: self.name.clone(),
            source,
        })
    }

    /// Removes the control socket that a killed `rhyve` left behind.
    ///
    /// # Errors
    ///
    /// It is there and cannot be removed.
    pub fn remove_control(&self) -> Result<(), VmError> {
        self.remove(CONTROL)
    }

    /// libvmmapi's vm_destroy: removes the object and all that is in it.
    ///
    /// # Errors
    ///
    /// Something in it cannot be removed.
    pub fn destroy(self) -> Result<(), VmError> {
        if let Ok(state) = self.load_state() {
            self.remove_memory(&state)?;
        }
        let dir_error = |e| self.io("read", "", e);
        let mut dir =
            Dir::openat(&self.dir, ".", OFlag::O_RDONLY, Mode::empty()).map_err(dir_error)?;
        let mut files = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(dir_error)?;
            files.push(entry.file_name().to_string_lossy().into_owned());
        }
        // The lock goes last: until then nobody else can take this object for a whole one.
        files.retain(|file| file != "." && file != ".." && file != LOCK);
        for file in files.iter().map(String::as_str).chain([LOCK]) {
            self.remove(file)?;
        }
        unlinkat(&self.root, self.name.as_str(), UnlinkatFlags::RemoveDir)
            .map_err(|e| self.io("remove", "", e))
    }

    fn remove_memory(&self, state: &VmState) -> Result<(), VmError> {
        self.remove(MEMORY)?;
        let Some(dir) = &state.machine.mem_path else {
            return Ok(());
        };
        let path = external_memory(dir, &self.name);
        match nix::unistd::unlink(&path) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(source) => Err(VmError::Io {
                action: "remove this memory file",
                path,
                source,
            }),
        }
    }

    fn remove(&self, file: &str) -> Result<(), VmError> {
        match unlinkat(&self.dir, file, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(source) => Err(self.io("remove", file, source)),
        }
    }
}

/// The memory file of `name` in a directory that other VMs may use as well.
fn external_memory(dir: &Path, name: &VmName) -> PathBuf {
    dir.join(format!("rhyve-{}-{name}.mem", nix::unistd::geteuid()))
}

fn wire(file: &File, layout: MemoryLayout, place: &Path) -> Result<(), VmError> {
    let segments = [
        ("lowmem", 0, layout.lowmem),
        ("highmem", layout.lowmem, layout.highmem),
    ];
    for (segment, offset, len) in segments {
        if len != 0 {
            allocate(file, offset, len).map_err(|_| VmError::Full {
                segment,
                path: place.to_owned(),
            })?;
        }
    }
    Ok(())
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::memory::MemSize;
    use crate::state::{Phase, StopReason};

    struct Place {
        root: Root,
        _tmp: tempfile::TempDir,
    }

    fn place() -> Place {
        let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
        Place {
            root: Root::open_at(&tmp.path().join("root")).unwrap(),
            _tmp: tmp,
        }
    }

    fn name() -> VmName {
        "guest0".parse().unwrap()
    }

    fn setup(bytes: u64) -> MemorySetup {
        let layout = MemoryLayout::split(MemSize(bytes));
        MemorySetup {
            layout,
            ..MemorySetup::default()
        }
    }

    #[test]
    fn an_object_lives_from_create_to_destroy() {
        let place = place();
        let mut vm = Vm::create(&place.root, &name(), "test").unwrap();
        let mut state = vm.load_state().unwrap();
        assert_eq!(state.phase, Phase::Created);
        vm.setup_memory(&mut state, &setup(1 << 20)).unwrap();
        state.phase = Phase::Stopped {
            reason: StopReason::Reset,
            detail: Some("x".into()),
        };
        vm.store(&mut state).unwrap();
        vm.map_memory(&state)
            .unwrap()
            .write(0x1000, b"ram")
            .unwrap();
        drop(vm);

        let vm = Vm::open(&place.root, &name()).unwrap();
        assert_eq!(vm.load_state().unwrap(), state);
        assert_eq!(state.generation, 2);
        let mut bytes = [0; 3];
        vm.open_memory(&state)
            .unwrap()
            .read(0x1000, &mut bytes)
            .unwrap();
        assert_eq!(&bytes, b"ram");
        vm.lock("test").unwrap().destroy().unwrap();
        assert!(matches!(
            Vm::open(&place.root, &name()),
            Err(VmError::NotFound(_))
        ));
        assert!(place.root.list().unwrap().is_empty());
    }

    #[test]
    fn a_held_object_names_its_holder() {
        let place = place();
        let held = Vm::create(&place.root, &name(), "rhyve").unwrap();
        assert!(matches!(
            Vm::create(&place.root, &name(), "x"),
            Err(VmError::Exists(_))
        ));
        let other = Vm::open(&place.root, &name()).unwrap();
        let holder = other.holder().unwrap().unwrap();
        assert_eq!(
            (holder.pid, holder.program.as_str()),
            (std::process::id(), "rhyve")
        );
        let error = other.lock("rhyveload").unwrap_err();
        assert!(error.to_string().contains("--force-poweroff"), "{error}");
        drop(held);
        let free = Vm::open(&place.root, &name()).unwrap();
        assert_eq!(free.holder().unwrap(), None);
        free.lock("rhyveload").unwrap();
    }

    #[test]
    fn the_lock_of_a_destroyed_object_is_worth_nothing() {
        let place = place();
        let vm = Vm::create(&place.root, &name(), "a").unwrap();
        let late = Vm::open(&place.root, &name()).unwrap();
        vm.destroy().unwrap();
        assert!(late.lock("b").is_err());
    }

    #[test]
    fn memory_larger_than_its_file_system_is_refused() {
        let place = place();
        let mut vm = Vm::create(&place.root, &name(), "test").unwrap();
        let mut state = vm.load_state().unwrap();
        let error = vm.setup_memory(&mut state, &setup(1 << 45)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("vm_setup_memory(highmem): Cannot allocate memory"),
            "{text}"
        );
        assert!(!vm.path().join(MEMORY).exists());
        assert!(matches!(vm.map_memory(&state), Err(VmError::NoMemory(_))));
    }

    #[test]
    fn wired_memory_is_allocated_and_memory_elsewhere_goes_with_the_object() {
        let place = place();
        let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut vm = Vm::create(&place.root, &name(), "test").unwrap();
        let mut state = vm.load_state().unwrap();
        let wired = MemorySetup {
            wire: true,
            path: Some(elsewhere.path().to_owned()),
            ..setup(1 << 20)
        };
        vm.setup_memory(&mut state, &wired).unwrap();
        vm.store(&mut state).unwrap();
        assert_eq!(vm.open_memory(&state).unwrap().resident().unwrap(), 1 << 20);
        vm.destroy().unwrap();
        assert_eq!(elsewhere.path().read_dir().unwrap().count(), 0);
    }

    #[test]
    fn half_written_state_never_shows() {
        let place = place();
        let vm = Vm::create(&place.root, &name(), "test").unwrap();
        std::fs::write(vm.path().join(STATE_NEW), b"{\"format\":").unwrap();
        assert_eq!(vm.load_state().unwrap().phase, Phase::Created);
        std::fs::remove_file(vm.path().join(STATE)).unwrap();
        assert!(matches!(vm.load_state(), Err(VmError::State { .. })));
        vm.destroy().unwrap();
    }

    #[test]
    fn all_of_an_object_is_private() {
        let place = place();
        let mut vm = Vm::create(&place.root, &name(), "test").unwrap();
        let mut state = vm.load_state().unwrap();
        vm.setup_memory(&mut state, &setup(1 << 20)).unwrap();
        for entry in vm.path().read_dir().unwrap() {
            let mode = entry.unwrap().metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0);
        }
    }

    #[test]
    fn a_reserve_is_kept_for_the_next_state() {
        let place = place();
        let mut vm = Vm::create(&place.root, &name(), "test").unwrap();
        let mut state = vm.load_state().unwrap();
        vm.reserve(1 << 16).unwrap();
        for _ in 0..2 {
            let reserved = std::fs::metadata(vm.path().join(STATE_NEW)).unwrap();
            assert!(std::os::unix::fs::MetadataExt::blocks(&reserved) * 512 >= 1 << 16);
            vm.store(&mut state).unwrap();
        }
        assert_eq!(vm.load_state().unwrap(), state);
    }
}
