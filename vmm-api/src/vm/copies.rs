//! Copies of an object: snapshots, which have memory of their own, and clones, which share it.
//!
//! The memory file of an object that is cloned becomes a base, which nobody changes any more: a hard link
//! to it is in the directory of each clone and of the original, beside a sparse file with the pages that
//! each of them has written since. The base is there as long as one of them is. Disks that are written to
//! are copied in the same way ([`disks`](super::disks)).

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, renameat};
use nix::unistd::linkat;

use super::{BASE, Images, LockedVm, MEMORY, MEMORY_NEW, MemorySetup, Vm, VmError, errno};
use crate::memory::{MemFile, MemoryError};
use crate::name::VmName;
use crate::root::Root;
use crate::state::{Phase, VmState};

const PAGE: usize = 4096;

/// Makes an object with a copy of `memory`, without pages of zeros, in this state, and with copies of the
/// disks that its guest writes to.
///
/// # Errors
///
/// There is one of this name, there is no room for another memory or disk, or a disk is none that can
/// be copied: nothing is left of it then.
pub fn snapshot(
    root: &Root,
    name: &VmName,
    program: &str,
    memory: &MemFile,
    state: &VmState,
    images: Images,
) -> Result<(), VmError> {
    let mut copy = Vm::create(root, name, program)?;
    let filled = fill(&mut copy, memory, state, images);
    if filled.is_err() {
        copy.destroy()?;
    }
    filled
}

fn fill(
    copy: &mut LockedVm,
    memory: &MemFile,
    from: &VmState,
    images: Images,
) -> Result<(), VmError> {
    let mut state = of_its_own(from);
    copy.copy_disks(from, &mut state, images)?;
    let setup = MemorySetup {
        layout: memory.layout(),
        ..MemorySetup::default()
    };
    copy.setup_memory(&mut state, &setup)?;
    let file = copy.memory_file(&state, OFlag::O_RDWR)?;
    let copied = memory.pieces(|bytes, at| {
        for (page, at) in bytes.chunks(PAGE).zip((at..).step_by(PAGE)) {
            if page.iter().any(|&byte| byte != 0) {
                write(&file, page, at)?;
            }
        }
        Ok::<_, MemoryError>(())
    });
    copied.map_err(|source| copy.memory_error(source))?;
    copy.store(&mut state)
}

impl LockedVm {
    /// Makes an object that goes on from where this one is, by its side, and shares its memory until one
    /// of them writes to it. It gets addresses of its own for what is to differ between machines.
    ///
    /// # Errors
    ///
    /// Nothing is loaded or suspended here, the memory is elsewhere, a disk that is written to is none
    /// that can be copied, or there is an object of this name.
    pub fn clone_to(&self, root: &Root, name: &VmName, program: &str) -> Result<(), VmError> {
        let state = self.load_state()?;
        let not = |why| VmError::NotCloned {
            name: self.name.clone(),
            why,
        };
        match state.phase {
            Phase::Loaded | Phase::Suspended => {}
            Phase::Created => return Err(not("nothing is loaded in it")),
            Phase::Stopped { .. } => {
                return Err(not(
                    "its guest has ended; load it again, or suspend a running one",
                ));
            }
        }
        if state.machine.mem_path.is_some() {
            return Err(not(
                "its memory is in a directory of its own; clone a snapshot of it",
            ));
        }
        self.share_memory(&state)?;
        let mut copy = Vm::create(root, name, program)?;
        let made = self.link_to(&mut copy, &state);
        if made.is_err() {
            copy.destroy()?;
        }
        made
    }

    /// Makes the memory file a base, if it is none yet.
    fn share_memory(&self, state: &VmState) -> Result<(), VmError> {
        if self.base_file()?.is_some() {
            return Ok(());
        }
        self.memory_file(state, OFlag::O_RDONLY)?;
        self.empty(MEMORY_NEW, state)?;
        // At each moment there is a memory file, and all of memory can be read.
        linkat(&self.dir, MEMORY, &self.dir, BASE, AtFlags::empty())
            .map_err(|e| self.io("make", BASE, e))?;
        renameat(&self.dir, MEMORY_NEW, &self.dir, MEMORY)
            .map_err(|e| self.io("replace", MEMORY, e))
    }

    /// Makes a memory file that is one hole.
    fn empty(&self, name: &str, state: &VmState) -> Result<File, VmError> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_TRUNC;
        let file = self.open_file(name, flags);
        let file = file.map_err(|e| self.io("make", name, e))?;
        file.set_len(state.machine.memory.total())
            .map_err(|e| self.io("make", name, errno(&e)))?;
        Ok(file)
    }

    fn link_to(&self, copy: &mut LockedVm, state: &VmState) -> Result<(), VmError> {
        linkat(&self.dir, BASE, &copy.dir, BASE, AtFlags::empty())
            .map_err(|e| copy.io("make", BASE, e))?;
        let to = copy.empty(MEMORY, state)?;
        // What this one has written since it became a clone itself.
        let own = self.memory_file(state, OFlag::O_RDONLY)?;
        let own = MemFile::new(own, state.machine.memory);
        let copied = own.and_then(|own| own.pieces(|bytes, at| write(&to, bytes, at)));
        copied.map_err(|source| copy.memory_error(source))?;
        let mut own = of_its_own(state);
        copy.copy_disks(state, &mut own, Images::Free)?;
        copy.store(&mut own)
    }
}

/// The state for a machine that is to live beside the one it was taken of.
fn of_its_own(state: &VmState) -> VmState {
    let mut state = state.clone();
    state.generation = 0;
    state.machine.wired = false;
    state.machine.mem_path = None;
    if let Some(run) = &mut state.machine.run {
        run.forget_identity();
    }
    state
}

fn write(file: &File, bytes: &[u8], at: u64) -> Result<(), MemoryError> {
    file.write_all_at(bytes, at).map_err(|e| match errno(&e) {
        Errno::ENOSPC => MemoryError::Full { gpa: at },
        source => MemoryError::Io {
            gpa: at,
            source: source.into(),
        },
    })
}
