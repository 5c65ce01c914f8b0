//! File I/O into and out of guest memory that does not wait: io_uring(7).
//!
//! A [`Ring`] belongs to one file and one guest's memory, and owns both: whatever becomes of the
//! ring, the kernel never writes to memory that is not mapped any more.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use io_uring::squeue::Entry;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode};
use nix::libc;
use vm_memory::{
    GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress, VolatileSlice,
};

use crate::scatter::{MAX_BUFFERS, advance};

/// What a ring is asked for.
#[derive(Debug)]
pub enum Transfer<'s, 'm> {
    /// Fill the slices from this byte of the file on.
    Read(u64, &'s [VolatileSlice<'m>]),
    /// Write the slices from this byte of the file on.
    Write(u64, &'s [VolatileSlice<'m>]),
    /// The same, and to stable storage (RWF_DSYNC).
    WriteDurably(u64, &'s [VolatileSlice<'m>]),
    /// Put what was written on stable storage (fdatasync(2)).
    Sync,
}

/// A file's ring, for one thread. Dropping it waits for what is under way.
pub struct Ring {
    ring: IoUring,
    file: OwnedFd,
    memory: GuestMemoryMmap,
    /// What is under way, by the number the kernel gives back.
    slots: Vec<Option<Slot>>,
    done: VecDeque<(u64, io::Result<()>)>,
}

/// A transfer under way. The kernel reads `buffers` where they lie: they stay, wherever the slot is
/// moved to.
struct Slot {
    token: u64,
    kind: Kind,
    offset: u64,
    buffers: Vec<libc::iovec>,
    /// Buffers that are done with.
    first: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write { durable: bool },
    Sync,
}

impl Ring {
    /// A ring for `depth` transfers at a time, a power of two.
    ///
    /// # Errors
    ///
    /// This host has no io_uring, forbids it (io_uring_disabled, seccomp), or lacks memory for it.
    pub fn new(depth: u32, file: OwnedFd, memory: GuestMemoryMmap) -> io::Result<Self> {
        Ok(Self {
            ring: IoUring::new(depth)?,
            file,
            memory,
            slots: Vec::new(),
            done: VecDeque::new(),
        })
    }

    /// Begins a transfer; the kernel hears of it with the next [`Ring::submit`]. `token` comes back
    /// with its end.
    ///
    /// # Errors
    ///
    /// A slice is not of this ring's memory, there are more than 1024 of them, or the kernel takes
    /// no more.
    pub fn push(&mut self, token: u64, transfer: Transfer<'_, '_>) -> io::Result<()> {
        let (kind, offset, slices) = match transfer {
            Transfer::Read(offset, to) => (Kind::Read, offset, to),
            Transfer::Write(offset, from) => (Kind::Write { durable: false }, offset, from),
            Transfer::WriteDurably(offset, from) => (Kind::Write { durable: true }, offset, from),
            Transfer::Sync => (Kind::Sync, 0, [].as_slice()),
        };
        if slices.len() > MAX_BUFFERS || !slices.iter().all(|slice| self.owns(slice)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let buffers = slices.iter().filter(|slice| !slice.is_empty());
        let buffers: Vec<_> = buffers
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        if buffers.is_empty() && kind != Kind::Sync {
            self.done.push_back((token, Ok(())));
            return Ok(());
        }
        let slot = Slot {
            token,
            kind,
            offset,
            buffers,
            first: 0,
        };
        self.begin(slot)
    }

    /// Lets the kernel begin what was pushed.
    ///
    /// # Errors
    ///
    /// The kernel lacks something at the moment; nothing is lost.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// A transfer that has ended, and how. A read that meets the end of the file is
    /// `UnexpectedEof`.
    pub fn pop(&mut self) -> Option<(u64, io::Result<()>)> {
        if self.done.is_empty() {
            self.reap();
        }
        self.done.pop_front()
    }

    /// Waits until nothing is under way; what has ended is kept for [`Ring::pop`].
    pub fn drain(&mut self) {
        loop {
            self.reap();
            if self.slots.iter().all(Option::is_none) {
                return;
            }
            // EINTR, EBUSY: the next turn sees what there is.
            let _ = self.ring.submit_and_wait(1);
        }
    }

    /// Whether all of the slice is guest memory that this ring keeps mapped.
    fn owns(&self, slice: &VolatileSlice<'_>) -> bool {
        let start = slice.ptr_guard().as_ptr() as usize;
        let Some(end) = start.checked_add(slice.len()) else {
            return false;
        };
        self.memory.iter().any(|region| {
            let base = region.get_host_address(MemoryRegionAddress(0));
            base.is_ok_and(|base| {
                let base = base as usize;
                start >= base && end - base <= region.size()
            })
        })
    }

    fn begin(&mut self, slot: Slot) -> io::Result<()> {
        let free = self.slots.iter().position(Option::is_none);
        let number = free.unwrap_or(self.slots.len());
        let entry = slot.entry(Fd(self.file.as_raw_fd()), number as u64);
        if self.ring.submission().is_full() {
            self.submit()?;
        }
        // SAFETY: the descriptor and the memory belong to this ring and `buffers` to a slot in it,
        // all until the kernel has answered: `reap` alone takes slots away, and `drop` waits. Should
        // the ring be leaked, they are leaked with it.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(|_| io::Error::from_raw_os_error(libc::EBUSY))?;
        match self.slots.get_mut(number) {
            Some(place) => *place = Some(slot),
            None => self.slots.push(Some(slot)),
        }
        Ok(())
    }

    /// Takes the kernel's answers.
    fn reap(&mut self) {
        if self.ring.completion().is_empty() && self.ring.submission().cq_overflow() {
            // There were more than the ring has room for. The kernel keeps them, says so to poll(2) all the
            // time, and hands them out when it is called.
            let _ = self.ring.submit();
        }
        let answers: Vec<_> = self
            .ring
            .completion()
            .map(|answer| (answer.user_data(), answer.result()))
            .collect();
        // What the kernel wrote to memory comes before what is done next.
        fence(Ordering::Acquire);
        for (number, result) in answers {
            let slot = usize::try_from(number).ok();
            let slot = slot.and_then(|number| self.slots.get_mut(number));
            let Some(slot) = slot.and_then(Option::take) else {
                continue;
            };
            let token = slot.token;
            let ended = match slot.after(result) {
                Ok(None) => Ok(()),
                // A part of it is left.
                Ok(Some(rest)) => match self.begin(rest).and_then(|()| self.submit()) {
                    Ok(()) => continue,
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            };
            self.done.push_back((token, ended));
        }
    }
}

impl Slot {
    fn entry(&self, file: Fd, number: u64) -> Entry {
        let rest = self.buffers.get(self.first..).unwrap_or_default();
        let (at, count) = (rest.as_ptr(), rest.len() as u32);
        let entry = match self.kind {
            Kind::Read => opcode::Readv::new(file, at, count)
                .offset(self.offset)
                .build(),
            Kind::Write { durable } => opcode::Writev::new(file, at, count)
                .offset(self.offset)
                .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            Kind::Sync => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        };
        entry.user_data(number)
    }

    /// What is left to do after the kernel's answer.
    fn after(mut self, result: i32) -> io::Result<Option<Self>> {
        match usize::try_from(result) {
            Err(_) => match io::Error::from_raw_os_error(result.wrapping_neg()) {
                again if matches!(again.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                    Ok(Some(self))
                }
                error => Err(error),
            },
            Ok(_) if self.kind == Kind::Sync => Ok(None),
            Ok(0) => Err(match self.kind {
                Kind::Read => io::ErrorKind::UnexpectedEof.into(),
                _ => io::ErrorKind::WriteZero.into(),
            }),
            Ok(done) => {
                self.offset = self.offset.saturating_add(done as u64);
                let rest = self.buffers.get_mut(self.first..).unwrap_or_default();
                let left = advance(rest, done).len();
                self.first = self.buffers.len() - left;
                Ok((left > 0).then_some(self))
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.drain();
    }
}

/// Readable when there is something to pop.
impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the ring's, which lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 1 << 16),
            (GuestAddress(1 << 20), 1 << 16),
        ])
        .unwrap()
    }

    /// A ring, unless the host forbids it: then its absence is what is tested.
    fn ring(file: &File, memory: &GuestMemoryMmap) -> Option<Ring> {
        match Ring::new(8, file.try_clone().unwrap().into(), memory.clone()) {
            Ok(ring) => Some(ring),
            Err(error) => {
                let errno = error.raw_os_error();
                assert!(matches!(errno, Some(libc::ENOSYS | libc::EPERM)), "{error}");
                None
            }
        }
    }

    fn wait(ring: &mut Ring) -> (u64, io::Result<()>) {
        ring.submit().unwrap();
        loop {
            if let Some(ended) = ring.pop() {
                return ended;
            }
            let mut fds = [PollFd::new(ring.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, PollTimeout::from(10_000u16)).unwrap(), 1);
        }
    }

    #[test]
    fn more_than_fits_is_written_and_reads_back() {
        let (file, memory) = (tempfile::tempfile().unwrap(), memory());
        let Some(mut ring) = ring(&file, &memory) else {
            return;
        };
        let slice = |gpa, len| memory.get_slice(GuestAddress(gpa), len).unwrap();
        for i in 0..32u64 {
            memory.write_obj(i + 1, GuestAddress(i * 8)).unwrap();
            let from = [slice(i * 8, 3), slice(i * 8 + 3, 5)];
            let transfer = if i % 2 == 0 {
                Transfer::Write(i * 8, &from)
            } else {
                Transfer::WriteDurably(i * 8, &from)
            };
            ring.push(i, transfer).unwrap();
        }
        ring.push(99, Transfer::Sync).unwrap();
        let mut tokens: Vec<u64> = (0..33)
            .map(|_| {
                let (token, result) = wait(&mut ring);
                result.unwrap();
                token
            })
            .collect();
        tokens.sort_unstable();
        assert_eq!(tokens, (0..32).chain([99]).collect::<Vec<_>>());
        let to = [slice((1 << 20) + 1, 200), slice(0x8000, 56)];
        ring.push(5, Transfer::Read(0, &to)).unwrap();
        assert!(matches!(wait(&mut ring), (5, Ok(()))));
        let mut found = vec![0u8; 256];
        to[0].copy_to(&mut found[..200]);
        to[1].copy_to(&mut found[200..]);
        let mut expected = vec![0; 256];
        file.read_exact_at(&mut expected, 0).unwrap();
        assert_eq!(found, expected);
        assert_eq!(expected[8], 2);
    }

    #[test]
    fn more_ends_than_the_ring_has_room_for_come_back() {
        let memory = memory();
        let file = File::open("/dev/zero").unwrap();
        let Some(mut ring) = ring(&file, &memory) else {
            return;
        };
        let slice = [memory.get_slice(GuestAddress(0), 16).unwrap()];
        for token in 0..100 {
            ring.push(token, Transfer::Read(0, &slice)).unwrap();
        }
        let mut tokens: Vec<u64> = (0..100).map(|_| wait(&mut ring).0).collect();
        tokens.sort_unstable();
        assert_eq!(tokens, (0..100).collect::<Vec<_>>());
        assert!(ring.pop().is_none());
    }

    #[test]
    fn errors_come_back_with_their_token() {
        let memory = memory();
        let file = File::open("/dev/null").unwrap();
        let Some(mut ring) = ring(&file, &memory) else {
            return;
        };
        let slice = [memory.get_slice(GuestAddress(0), 16).unwrap()];
        ring.push(1, Transfer::Read(0, &slice)).unwrap();
        let (token, result) = wait(&mut ring);
        assert_eq!(
            (token, result.unwrap_err().kind()),
            (1, io::ErrorKind::UnexpectedEof)
        );
        ring.push(2, Transfer::Write(0, &slice)).unwrap();
        let (token, result) = wait(&mut ring);
        assert_eq!(
            (token, result.unwrap_err().raw_os_error()),
            (2, Some(libc::EBADF))
        );
        ring.push(3, Transfer::Read(0, &[])).unwrap();
        assert!(matches!(wait(&mut ring), (3, Ok(()))));
        assert!(ring.pop().is_none());
    }

    #[test]
    fn memory_of_others_is_refused() {
        let (ours, theirs) = (memory(), memory());
        let Some(mut ring) = ring(&tempfile::tempfile().unwrap(), &ours) else {
            return;
        };
        let mut bytes = [0u8; 8];
        for slice in [
            theirs.get_slice(GuestAddress(0), 8).unwrap(),
            VolatileSlice::from(bytes.as_mut_slice()),
        ] {
            let refused = ring.push(0, Transfer::Write(0, &[slice])).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        }
        let last = ours.get_slice(GuestAddress((1 << 20) + 0xfff8), 8).unwrap();
        ring.push(0, Transfer::Write(0, &[last])).unwrap();
        assert!(wait(&mut ring).1.is_ok());
    }
}
