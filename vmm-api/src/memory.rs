//! Guest RAM and the file that holds it.
//!
//! One sparse file has lowmem at offset 0 and highmem right behind it. It is mapped shared by the
//! loader and by `rhyve`; `vmmctl` reads it with `pread` ([`MemFile`]), because reading a hole of a
//! tmpfs file through a mapping would allocate it.
//!
//! The memory of a clone has two files: a base that it shares with others of its kind, and one of its own
//! that holds the pages it has written instead. `rhyve` maps the base privately (`memory/private.rs`) and writes
//! what has changed to the other file when somebody is to see it ([`GuestRam::keep`]).

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise};
use nix::sys::statfs::HUGETLBFS_MAGIC;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use crate::mapping::{HUGE, Mapping};

/// Bytes of a huge page of x86-64: what one entry of a page directory maps.
pub const HUGE_PAGE: u64 = HUGE as u64;

mod layout;
mod look;
mod private;

pub use layout::{HIGHMEM_BASE, LOWMEM_LIMIT, MemSize, MemSizeError, MemoryLayout};
pub use look::MemFile;
pub(crate) use look::next_data;

/// Why guest RAM cannot be made, mapped or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The lengths cannot be.
    #[error(
        "lowmem {:#x} and highmem {:#x} are no layout: lowmem ends at 3 GiB, both are whole pages",
        .0.lowmem, .0.highmem
    )]
    Layout(MemoryLayout),
    /// The lengths cannot be on hugetlbfs.
    #[error(
        "lowmem {:#x} and highmem {:#x} are not whole huge pages, which have {page:#x} bytes where \
        the memory file is: give other sizes, or another directory",
        .layout.lowmem, .layout.highmem
    )]
    HugePages {
        /// The lengths.
        layout: MemoryLayout,
        /// Bytes in a huge page.
        page: u64,
    },
    /// The file's length is not what vm.json says.
    #[error("the memory file has {found:#x} bytes where vm.json says {expected:#x}: load again")]
    Length {
        /// What the file has.
        found: u64,
        /// What it should have.
        expected: u64,
    },
    /// The file cannot be mapped.
    #[error("cannot map guest memory")]
    Map(#[source] io::Error),
    /// The address range is not RAM.
    #[error("guest-physical {gpa:#x} (0x{len:x} bytes) is not RAM")]
    NotRam {
        /// First byte.
        gpa: u64,
        /// Number of bytes.
        len: u64,
    },
    /// The file system that holds the memory has no room left.
    #[error("no room for guest memory at {gpa:#x}: the file system that holds the VM is full")]
    Full {
        /// First byte of the range that was to be backed.
        gpa: u64,
    },
    /// The memory cannot be locked.
    #[error(
        "cannot lock guest memory at {gpa:#x}: raise the limit of locked memory (ulimit -l), or do not wire it"
    )]
    Lock {
        /// First byte of the segment.
        gpa: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file that was to be read into it.
    #[error("cannot read what goes there")]
    Source(#[source] io::Error),
    /// Reading or writing the file failed.
    #[error("guest memory at {gpa:#x}")]
    Io {
        /// First byte of the range.
        gpa: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// Guest RAM, mapped writable: shared, or in a clone private over what it shares with others.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    layout: MemoryLayout,
    file: Arc<File>,
    /// What a clone's pages come from until it writes them.
    base: Option<Arc<File>>,
    // What `memory` points into: one for each segment.
    mappings: Arc<[Mapping]>,
}

impl GuestRam {
    /// Maps a memory file whose length agrees with `layout`.
    ///
    /// # Errors
    ///
    /// The file has another length or cannot be mapped.
    pub fn map(file: File, layout: MemoryLayout) -> Result<Self, MemoryError> {
        Self::map_over(file, None, layout)
    }

    /// Maps a clone's memory: `base` as far as `own` has holes. Neither file is changed before
    /// [`GuestRam::keep`].
    ///
    /// # Errors
    ///
    /// One of them has another length, or cannot be mapped or read.
    pub fn map_clone(own: File, base: File, layout: MemoryLayout) -> Result<Self, MemoryError> {
        let ram = Self::map_over(own, Some(base), layout)?;
        ram.take_own()?;
        Ok(ram)
    }

    fn map_over(file: File, base: Option<File>, layout: MemoryLayout) -> Result<Self, MemoryError> {
        layout.validate()?;
        check_length(&file, layout)?;
        if let Some(base) = &base {
            check_length(base, layout)?;
        }
        let sharing = match base {
            Some(_) => MapFlags::MAP_PRIVATE,
            None => MapFlags::MAP_SHARED,
        };
        let mapped = base.as_ref().unwrap_or(&file);
        let (mut mappings, mut regions) = (Vec::new(), Vec::new());
        for (base, len, offset) in layout.segments() {
            let size = usize::try_from(len).map_err(|_| MemoryError::Layout(layout))?;
            let mapping = Mapping::new(mapped, offset, size, sharing).map_err(MemoryError::Map)?;
            let region = MmapRegionBuilder::new(size)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(sharing.bits() | libc::MAP_NORESERVE);
            let start = mapping.start().cast().as_ptr();
            // SAFETY: the mapping has this size and lives as long as `memory`, which is lent as a type
            // that can be cloned only by `for_devices`, which sees to it.
            let region = unsafe { region.with_raw_mmap_pointer(start) }
                .build()
                .map_err(|e| MemoryError::Map(io::Error::other(e)))?;
            let region = GuestRegionMmap::new(region, GuestAddress(base));
            regions.push(region.ok_or(MemoryError::Layout(layout))?);
            mappings.push(mapping);
        }
        let memory = GuestMemoryMmap::from_regions(regions)
            .map_err(|e| MemoryError::Map(io::Error::other(e)))?;
        Ok(Self {
            memory,
            layout,
            base: base.map(Arc::new),
            file: Arc::new(file),
            mappings: mappings.into(),
        })
    }

    /// The mapping, for vm-memory's accessors. Back a range with [`GuestRam::populate`] before its
    /// first write, or a full tmpfs is a SIGBUS.
    pub fn memory(&self) -> &(impl GuestMemoryBackend + use<>) {
        &self.memory
    }

    /// The mapping for devices, who keep clones of it and hand it to threads. It stays mapped until
    /// the process ends.
    pub fn for_devices(&self) -> GuestMemoryMmap {
        // A clone may outlive this, so the mappings it points into must outlive everything.
        std::mem::forget(Arc::clone(&self.mappings));
        self.memory.clone()
    }

    /// Where the RAM lies.
    pub fn layout(&self) -> MemoryLayout {
        self.layout
    }

    /// The file behind the mapping; in a clone, the one that it keeps its own pages in.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Backs `len` bytes at `gpa` with pages now, so that writing them cannot fail later.
    ///
    /// # Errors
    ///
    /// The range is not RAM, or its file system is full.
    pub fn populate(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        if len == 0 {
            return Ok(());
        }
        let offset = self
            .layout
            .offset_of(gpa, len)
            .ok_or(MemoryError::NotRam { gpa, len })?;
        if self.base.is_some() {
            // A clone's pages are its process's, not a file system's.
            return Ok(());
        }
        allocate(&self.file, offset, len).map_err(|errno| match errno {
            Errno::ENOSPC => MemoryError::Full { gpa },
            other => MemoryError::Io {
                gpa,
                source: other.into(),
            },
        })
    }

    /// Gives whole pages back to the file system: a hole in the file. Whoever touches them again finds
    /// zeros, or in a clone what they were before it wrote them.
    ///
    /// # Errors
    ///
    /// The range is not RAM, or the file system makes no holes.
    pub fn punch(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        if len == 0 {
            return Ok(());
        }
        let offset = self
            .layout
            .offset_of(gpa, len)
            .ok_or(MemoryError::NotRam { gpa, len })?;
        if self.base.is_some() {
            return self.drop_private(gpa, len);
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, flags, offset, len).map_err(|errno| MemoryError::Io {
            gpa,
            source: errno.into(),
        })
    }

    /// Prepares for `len` bytes at `gpa` to be written and run: huge pages are put around them, so
    /// that neither the writer nor the guest faults at every 4 KiB. Where there are none to be had,
    /// all stays as it is. Whether all of it is in huge pages now.
    ///
    /// It is for what is worth it: a part of something of at least [`HUGE_PAGE`] bytes.
    pub fn prepare(&self, gpa: u64, len: u64) -> bool {
        let (Ok(len), true) = (usize::try_from(len), self.base.is_none()) else {
            return false;
        };
        for ((base, size, _), mapping) in self.layout.segments().zip(&*self.mappings) {
            if (base..base + size).contains(&gpa) {
                let at = (gpa - base) as usize;
                let huge = mapping.huge_pages(at, len);
                let all = huge.start <= at && at + len <= huge.end;
                return !huge.is_empty() && mapping.collapse(huge) && all;
            }
        }
        false
    }

    /// Reads `len` bytes at `offset` of `file` straight into the memory at `gpa`: for what
    /// [`GuestRam::prepare`] has backed, since elsewhere each page is cleared first.
    ///
    /// # Errors
    ///
    /// The range is not RAM, its file system is full, or `file` is shorter or cannot be read
    /// ([`MemoryError::Source`]).
    pub fn read_file(
        &self,
        gpa: u64,
        len: u64,
        file: &File,
        offset: u64,
    ) -> Result<(), MemoryError> {
        self.layout
            .offset_of(gpa, len)
            .ok_or(MemoryError::NotRam { gpa, len })?;
        let (mut start, mut left) = self.mapping(gpa, len)?;
        let mut at = libc::off_t::try_from(offset)
            .map_err(|_| MemoryError::Source(io::ErrorKind::InvalidInput.into()))?;
        while left != 0 {
            // SAFETY: the range is inside a mapping of ours. No reference points into it: guest
            // memory is only ever reached through raw pointers.
            let read = unsafe { libc::pread(file.as_raw_fd(), start.as_ptr(), left, at) };
            let read = match Errno::result(read) {
                Ok(0) => return Err(MemoryError::Source(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => read,
                Err(Errno::EINTR) => continue,
                // The kernel found no page for what it was to write.
                Err(Errno::EFAULT) => return Err(MemoryError::Full { gpa }),
                Err(e) => return Err(MemoryError::Source(e.into())),
            };
            at += read as libc::off_t;
            left -= read.cast_unsigned();
            // SAFETY: at most the end of the range, since pread(2) read no more than was left.
            start = unsafe { start.byte_add(read.cast_unsigned()) };
        }
        Ok(())
    }

    /// Allocates all of it and locks it in RAM.
    ///
    /// # Errors
    ///
    /// Its file system is full, or RLIMIT_MEMLOCK is too low.
    pub fn wire(&self) -> Result<(), MemoryError> {
        for (gpa, len, _) in self.layout.segments() {
            self.populate(gpa, len)?;
            let (start, size) = self.mapping(gpa, len)?;
            // SAFETY: the range is a whole mapping of ours; locking changes nothing of its content.
            unsafe { nix::sys::mman::mlock(start, size) }.map_err(|e| MemoryError::Lock {
                gpa,
                source: e.into(),
            })?;
        }
        Ok(())
    }

    /// Puts guest memory into core dumps of this process, or leaves it out.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn set_dumped(&self, dumped: bool) -> Result<(), MemoryError> {
        let advice = if dumped {
            MmapAdvise::MADV_DODUMP
        } else {
            MmapAdvise::MADV_DONTDUMP
        };
        for (gpa, len, _) in self.layout.segments() {
            let (start, size) = self.mapping(gpa, len)?;
            // SAFETY: the range is a whole mapping of ours, and this advice changes no content.
            unsafe { nix::sys::mman::madvise(start, size, advice) }.map_err(|e| {
                MemoryError::Io {
                    gpa,
                    source: e.into(),
                }
            })?;
        }
        Ok(())
    }

    /// Where a segment is mapped.
    fn mapping(&self, gpa: u64, len: u64) -> Result<(NonNull<c_void>, usize), MemoryError> {
        let not_ram = MemoryError::NotRam { gpa, len };
        let host = self.memory.get_host_address(GuestAddress(gpa)).ok();
        let host = host.and_then(|host| NonNull::new(host.cast()));
        host.zip(usize::try_from(len).ok()).ok_or(not_ram)
    }

    /// Writes bytes through the file instead of the mapping: a full file system is an error here,
    /// not a signal, and pages that are overwritten whole are not cleared first.
    ///
    /// # Errors
    ///
    /// The range is not RAM, or its file system is full.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let len = bytes.len() as u64;
        let offset = self
            .layout
            .offset_of(gpa, len)
            .ok_or(MemoryError::NotRam { gpa, len })?;
        if self.base.is_some() {
            return self.write_mapped(gpa, bytes);
        }
        match self.file.write_all_at(bytes, offset) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::StorageFull => Err(MemoryError::Full { gpa }),
            // hugetlbfs has no write(2).
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => self.write_mapped(gpa, bytes),
            Err(source) => Err(MemoryError::Io { gpa, source }),
        }
    }

    fn write_mapped(&self, gpa: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        self.populate(gpa, bytes.len() as u64)?;
        self.memory
            .write_slice(bytes, GuestAddress(gpa))
            .map_err(|e| MemoryError::Io {
                gpa,
                source: io::Error::other(e),
            })
    }

    /// Reads bytes.
    ///
    /// # Errors
    ///
    /// The range is not RAM.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        if self.base.is_some() {
            return self.read_mapped(gpa, bytes);
        }
        read_at(&self.file, self.layout, gpa, bytes)
    }

    /// The next range at `gpa` or behind it that was ever written; in a clone, before it was cloned.
    /// None behind the last, or if the file cannot be looked at.
    pub(crate) fn next_written(&self, gpa: u64) -> Option<Range<u64>> {
        let file = self.base.as_ref().unwrap_or(&self.file);
        look::next_written(&[file], self.layout, gpa).ok()?
    }
}

fn check_length(file: &File, layout: MemoryLayout) -> Result<(), MemoryError> {
    let found = file.metadata().map_err(MemoryError::Map)?.len();
    let expected = layout.total();
    if found == expected {
        Ok(())
    } else {
        Err(MemoryError::Length { found, expected })
    }
}

fn read_at(
    file: &File,
    layout: MemoryLayout,
    gpa: u64,
    bytes: &mut [u8],
) -> Result<(), MemoryError> {
    let len = bytes.len() as u64;
    let offset = layout
        .offset_of(gpa, len)
        .ok_or(MemoryError::NotRam { gpa, len })?;
    file.read_exact_at(bytes, offset)
        .map_err(|source| MemoryError::Io { gpa, source })
}

/// Allocates a range of a file without changing what it holds.
pub(crate) fn allocate(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
    fallocate(file, FallocateFlags::empty(), offset, len)
}

fn fallocate(file: &File, mode: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
    let range = libc::off_t::try_from(offset)
        .ok()
        .zip(libc::off_t::try_from(len).ok());
    let (offset, len) = range.ok_or(Errno::EFBIG)?;
    loop {
        match nix::fcntl::fallocate(file.as_fd(), mode, offset, len) {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// Bytes that the file system of `place` can hold in all, or none if it has no limit.
pub(crate) fn capacity(place: &impl AsFd) -> Result<Option<u64>, Errno> {
    let stat = nix::sys::statvfs::fstatvfs(place)?;
    let bytes = stat.blocks().saturating_mul(stat.fragment_size());
    Ok((bytes != 0).then_some(bytes))
}

/// Refuses lengths that hugetlbfs would answer with a bare EINVAL: it has only whole huge pages, and
/// highmem begins in the file where lowmem ends.
pub(crate) fn check_huge_pages(place: &impl AsFd, layout: MemoryLayout) -> Result<(), MemoryError> {
    let stat = nix::sys::statfs::fstatfs(place).map_err(|e| MemoryError::Map(e.into()))?;
    // hugetlbfs's block is its huge page (fs/hugetlbfs/inode.c, hugetlbfs_statfs).
    let page = u64::try_from(stat.block_size()).unwrap_or(0).max(1);
    let whole = layout.lowmem.is_multiple_of(page) && layout.highmem.is_multiple_of(page);
    if stat.filesystem_type() == HUGETLBFS_MAGIC && !whole {
        return Err(MemoryError::HugePages { layout, page });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ram(lowmem: u64, highmem: u64) -> GuestRam {
        let layout = MemoryLayout { lowmem, highmem };
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(layout.total()).unwrap();
        GuestRam::map(file, layout).unwrap()
    }

    #[test]
    fn holes_give_pages_back_and_read_as_zeros() {
        use std::os::unix::fs::MetadataExt;
        let ram = ram(4 << 20, 2 << 20);
        let used = || ram.file().metadata().unwrap().blocks() * 512;
        ram.populate(0, 4 << 20).unwrap();
        ram.populate(HIGHMEM_BASE, 2 << 20).unwrap();
        ram.write(0x2ff8, &[1; 16]).unwrap();
        let before = used();
        ram.punch(0x3000, 1 << 20).unwrap();
        ram.punch(HIGHMEM_BASE + 0x1000, 0x1000).unwrap();
        assert_eq!(before - used(), (1 << 20) + 0x1000);
        let mut bytes = [9; 16];
        ram.read(0x2ff8, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        for (gpa, len) in [(4 << 20, 1), ((4 << 20) - 4096, 8192), (u64::MAX, 2)] {
            let refused = ram.punch(gpa, len);
            assert!(
                matches!(refused, Err(MemoryError::NotRam { .. })),
                "{gpa:#x}"
            );
        }
    }

    #[test]
    fn both_segments_are_one_file() {
        let ram = ram(2 * MIB, MIB);
        ram.write(4096, b"low").unwrap();
        ram.write(HIGHMEM_BASE, b"high").unwrap();
        let mut bytes = [0; 4];
        ram.file().read_exact_at(&mut bytes, 2 * MIB).unwrap();
        assert_eq!(&bytes, b"high");
        ram.read(4096, &mut bytes[..3]).unwrap();
        assert_eq!(&bytes[..3], b"low");
        let hole = ram.write(2 * MIB - 1, b"xx").unwrap_err();
        assert!(matches!(hole, MemoryError::NotRam { .. }));
    }

    #[test]
    fn reading_leaves_holes_and_populating_fills_them() {
        let ram = ram(4 * MIB, 0);
        let mem = MemFile::new(ram.file().try_clone().unwrap(), ram.layout()).unwrap();
        let mut bytes = vec![1; 8192];
        mem.read(MIB, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&b| b == 0));
        assert_eq!(mem.resident().unwrap(), 0);
        ram.populate(MIB, 8192).unwrap();
        assert_eq!(mem.resident().unwrap(), 8192);
        assert!(matches!(
            ram.populate(4 * MIB - 1, 2),
            Err(MemoryError::NotRam { .. })
        ));
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(4096).unwrap();
        let layout = MemoryLayout {
            lowmem: 8192,
            highmem: 0,
        };
        assert!(matches!(
            GuestRam::map(file, layout),
            Err(MemoryError::Length { .. })
        ));
    }

    #[test]
    fn huge_pages_are_whole() {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let layout = |lowmem, highmem| MemoryLayout { lowmem, highmem };
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        let huge: File = memfd_create("mem", flags).unwrap().into();
        let check = |layout| check_huge_pages(&huge, layout).map_err(|e| e.to_string());
        assert_eq!(check(layout(4 << 20, 2 << 20)), Ok(()));
        for bad in [layout(3 << 20, 0), layout(3 << 20, 1 << 20)] {
            let text = check(bad).unwrap_err();
            assert!(
                text.contains("huge pages, which have 0x200000 bytes"),
                "{text}"
            );
        }
        let plain = tempfile::tempfile_in("/dev/shm").unwrap();
        check_huge_pages(&plain, layout(3 << 20, 0)).unwrap();
    }
}
