//! A mapping of a part of a file, laid out for huge pages.
//!
//! KVM maps 2 MiB at once into a guest only where guest-physical address, host address and file
//! offset agree modulo 2 MiB, and mmap(2) alone does not make them agree. A fault of a guest costs
//! some thousand cycles, and ten times that where the host is a guest itself; a kernel's boot takes
//! ten thousand faults of 4 KiB.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;

use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// A huge page of x86-64: what one entry of a page directory maps.
pub(crate) const HUGE: usize = 2 << 20;

/// A mapping, readable and writable, that ends with this value.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: this is an address range, and unmapping it is not bound to a thread.
unsafe impl Send for Mapping {}
// SAFETY: shared, it gives out nothing but its address.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes at `offset`, both multiples of 4 KiB, shared or private.
    pub(crate) fn new(file: &File, offset: u64, len: usize, sharing: MapFlags) -> io::Result<Self> {
        // hugetlbfs tells the size of its pages, which a mapping has to be aligned to.
        let block = usize::try_from(file.metadata()?.blksize()).unwrap_or(HUGE);
        let align = block.max(HUGE);
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let space = len.checked_add(align).and_then(NonZeroUsize::new);
        let space = Self::reserve(space.ok_or_else(invalid)?)?;
        let phase = usize::try_from(offset % align as u64).unwrap_or(0);
        let skip = phase.wrapping_sub(space.start.addr().get()) % align;
        let at = space.start.addr().saturating_add(skip);
        let length = NonZeroUsize::new(len).ok_or_else(invalid)?;
        let offset = libc::off_t::try_from(offset).map_err(|_| invalid())?;
        let flags = sharing | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the range is inside `space`, which is ours and which nothing points into.
        let start = unsafe { mmap(Some(at), length, access, flags, file.as_fd(), offset)? };
        space.keep(skip, len);
        // As the host's policy for shared memory allows; a kernel without huge pages refuses it.
        // SAFETY: this advice changes no content.
        let _ = unsafe { madvise(start, len, MmapAdvise::MADV_HUGEPAGE) };
        Ok(Self { start, len })
    }

    /// Address space that nothing is in.
    fn reserve(len: NonZeroUsize) -> io::Result<Self> {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, flags)? };
        Ok(Self {
            start,
            len: len.get(),
        })
    }

    /// Gives up all but `len` bytes from `skip`.
    fn keep(self, skip: usize, len: usize) {
        let ends = [(0, skip), (skip + len, self.len - skip - len)];
        for (at, len) in ends.into_iter().filter(|&(_, len)| len != 0) {
            // SAFETY: the range is inside this mapping, and nothing points into it. Unmapping the
            // whole pages of a mapping does not fail.
            let _ = unsafe { munmap(self.start.byte_add(at), len) };
        }
        std::mem::forget(self);
    }

    /// The first byte.
    pub(crate) fn start(&self) -> NonNull<c_void> {
        self.start
    }

    /// The huge pages around `len` bytes at `at`, as far as they are whole in this mapping.
    pub(crate) fn huge_pages(&self, at: usize, len: usize) -> Range<usize> {
        let phase = self.start.addr().get() % HUGE;
        let whole = phase.next_multiple_of(HUGE)..(phase + self.len) / HUGE * HUGE;
        let start = ((phase + at) / HUGE * HUGE).max(whole.start);
        let end = (phase + at + len).next_multiple_of(HUGE).min(whole.end);
        start - phase..end.max(start) - phase
    }

    /// Backs a range that [`Mapping::huge_pages`] gave with huge pages, whatever the host's policy,
    /// and keeps what is there; whether it did. Before Linux 6.1, on a full file system, or without
    /// memory in one piece, small pages stay.
    pub(crate) fn collapse(&self, range: Range<usize>) -> bool {
        let advise = |at, len, advice| {
            // SAFETY: the range is inside this mapping; this moves pages but changes no content.
            unsafe { libc::madvise(self.start.byte_add(at).as_ptr(), len, advice) }
        };
        // The kernel collapses only what has a small page, and a page table, already.
        for page in range.clone().step_by(HUGE) {
            advise(page, 4096, libc::MADV_POPULATE_WRITE);
        }
        advise(range.start, range.len(), libc::MADV_COLLAPSE) == 0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody uses the range any more: its owner drops what points into it before.
        // Unmapping a whole mapping does not fail.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_agree_with_offsets() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(16 << 20).unwrap();
        for (offset, len) in [(0, 16 << 20), (0x1000, 0x5000), (0x3f_f000, 5 << 20)] {
            let mapping = Mapping::new(&file, offset, len, MapFlags::MAP_SHARED).unwrap();
            let phase = mapping.start().addr().get() % HUGE;
            assert_eq!(phase, usize::try_from(offset).unwrap() % HUGE);
        }
    }

    #[test]
    fn huge_pages_are_whole() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(16 << 20).unwrap();
        let mapping = Mapping::new(&file, 0, 7 << 20, MapFlags::MAP_SHARED).unwrap();
        assert_eq!(mapping.huge_pages(HUGE + 1, 1), HUGE..2 * HUGE);
        assert_eq!(mapping.huge_pages(HUGE - 1, 2), 0..2 * HUGE);
        assert_eq!(mapping.huge_pages(5 << 20, 2 << 20), 2 * HUGE..3 * HUGE);
        assert!(mapping.huge_pages(3 * HUGE, 1 << 20).is_empty());
        let mapping = Mapping::new(&file, 1 << 20, 2 << 20, MapFlags::MAP_SHARED).unwrap();
        assert!(mapping.huge_pages(0, 2 << 20).is_empty());
    }
}
