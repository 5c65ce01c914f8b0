//! An object that one process alone may change: its state, its memory, its end.

use std::fs::File;
use std::io::Write as _;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::{
    BASE, CONTROL, LOCK, MEMORY, MEMORY_NEW, REPORT, STATE, STATE_NEW, Vm, VmError, errno,
    external_memory,
};
use crate::memory::{GuestRam, MemoryLayout, allocate, capacity, check_huge_pages};
use crate::state::{StateError, VmState};

/// An object that only this process may change, until the value is dropped.
#[derive(Debug)]
pub struct LockedVm {
    pub(super) vm: Vm,
    // Closing the file drops the lock.
    pub(super) _lock: File,
    pub(super) reserve: u64,
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
    /// when the file system has filled up in the meantime. With 0 the next one uses what was set
    /// aside, and nothing is set aside for another.
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
        let name = self.name.clone();
        let memory = |source| VmError::Memory {
            name: name.clone(),
            source,
        };
        let layout = setup.layout;
        layout.validate().map_err(memory)?;
        // What can never fit is refused while the old memory is still there.
        self.check_memory(setup)?;
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
        let made = file.set_len(layout.total()).map_err(|e| io(errno(&e)));
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

    /// Checks that memory of this size can lie where it is to lie at all, changing nothing.
    ///
    /// # Errors
    ///
    /// It is larger than its file system, or no whole number of its huge pages.
    pub fn check_memory(&self, setup: &MemorySetup) -> Result<(), VmError> {
        let layout = setup.layout;
        let path = setup.path.as_ref().unwrap_or(&self.path);
        let io = |source| VmError::Io {
            action: "look at this directory",
            path: path.clone(),
            source,
        };
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let place = nix::fcntl::open(path, flags, Mode::empty()).map_err(io)?;
        if let Some(room) = capacity(&place).map_err(io)?
            && layout.total() > room
        {
            return Err(VmError::TooLarge {
                segment: if layout.lowmem > room {
                    "lowmem"
                } else {
                    "highmem"
                },
                needed: layout.total() >> 20,
                available: room >> 20,
                path: path.clone(),
            });
        }
        check_huge_pages(&place, layout).map_err(|source| VmError::Memory {
            name: self.name.clone(),
            source,
        })
    }

    /// Maps the RAM, writable.
    ///
    /// # Errors
    ///
    /// There is none, or its file does not fit the state.
    pub fn map_memory(&self, state: &VmState) -> Result<GuestRam, VmError> {
        let file = self.memory_file(state, OFlag::O_RDWR)?;
        let ram = match self.base_file()? {
            None => GuestRam::map(file, state.machine.memory),
            Some(base) => GuestRam::map_clone(file, base, state.machine.memory),
        };
        ram.map_err(|source| self.memory_error(source))
    }

    /// Removes the control socket that a killed `rhyve` left behind.
    ///
    /// # Errors
    ///
    /// It is there and cannot be removed.
    pub fn remove_control(&self) -> Result<(), VmError> {
        self.remove(CONTROL)
    }

    /// Writes a report of a guest that ended badly, in place of an older one; where it is.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn write_report(&self, text: &[u8]) -> Result<PathBuf, VmError> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC;
        let file = self.open_file(REPORT, flags);
        let mut file = file.map_err(|e| self.io("open", REPORT, e))?;
        let written = file.write_all(text);
        written.map_err(|e| self.io("write", REPORT, errno(&e)))?;
        Ok(self.path.join(REPORT))
    }

    /// Removes the report of an earlier guest, if there is one.
    ///
    /// # Errors
    ///
    /// It is there and cannot be removed.
    pub fn remove_report(&self) -> Result<(), VmError> {
        self.remove(REPORT)
    }

    /// libvmmapi's vm_destroy: removes the object and all that is in it, and the disks that a copy of a
    /// machine has of its own.
    ///
    /// # Errors
    ///
    /// Something in it cannot be removed.
    pub fn destroy(self) -> Result<(), VmError> {
        if let Ok(state) = self.load_state() {
            self.remove_memory(&state)?;
            self.remove_disks(&state)?;
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
        // The base last: without it, what is over it would be taken for the whole.
        for file in [MEMORY_NEW, MEMORY, BASE] {
            self.remove(file)?;
        }
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
