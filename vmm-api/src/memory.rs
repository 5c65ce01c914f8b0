//! Guest RAM: sizes, where it lies in guest-physical space, and the file that holds it.
//!
//! One sparse file has lowmem at offset 0 and highmem right behind it. It is mapped shared by the
//! loader and by `rhyve`; `vmmctl` reads it with `pread` ([`MemFile`]), because reading a hole of a
//! tmpfs file through a mapping would allocate it.

use std::ffi::c_void;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::str::FromStr;
use std::sync::Arc;

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::MmapAdvise;
use nix::sys::statfs::HUGETLBFS_MAGIC;
use nix::unistd::Whence;
use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use crate::mapping::{HUGE, Mapping};

/// Lowmem ends here at the latest; from here to [`HIGHMEM_BASE`] is the PCI hole.
pub const LOWMEM_LIMIT: u64 = 3 << 30;

/// Guest-physical address of highmem's first byte.
pub const HIGHMEM_BASE: u64 = 4 << 30;

const MIB: u64 = 1 << 20;

/// A memory size in bytes, as libvmmapi's vm_parse_memsize reads it: a plain number below 1 MiB
/// counts MiB, a larger one bytes; a suffix of K, M, G or T (in either case) says the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemSize(pub u64);

/// Why a text is no memory size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemSizeError {
    /// Not a number with an optional suffix.
    #[error("'{0}' is no memory size: give a number, with K, M, G or T behind it if it is not MiB")]
    Syntax(String),
    /// More bytes than 64 bits can count.
    #[error("memory size '{0}' is out of range")]
    Overflow(String),
    /// Not a whole number of pages.
    #[error("memory size '{0}' is not a multiple of 4 KiB")]
    Unaligned(String),
}

impl FromStr for MemSize {
    type Err = MemSizeError;

    fn from_str(s: &str) -> Result<Self, MemSizeError> {
        let syntax = || MemSizeError::Syntax(s.to_owned());
        let (digits, unit) = match s.char_indices().last() {
            Some((at, c)) if !c.is_ascii_digit() => (&s[..at], Some(c.to_ascii_lowercase())),
            _ => (s, None),
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(syntax());
        }
        let overflow = || MemSizeError::Overflow(s.to_owned());
        let number: u64 = digits.parse().map_err(|_| overflow())?;
        let unit = match unit {
            None if number < MIB => MIB,
            None | Some('b') => 1,
            Some('k') => 1 << 10,
            Some('m') => MIB,
            Some('g') => 1 << 30,
            Some('t') => 1 << 40,
            Some(_) => return Err(syntax()),
        };
        let bytes = number.checked_mul(unit).ok_or_else(overflow)?;
        if bytes % 4096 != 0 {
            return Err(MemSizeError::Unaligned(s.to_owned()));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MemSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
        let exact = units
            .iter()
            .find(|(shift, _)| self.0 != 0 && self.0.is_multiple_of(1 << shift));
        match exact {
            Some((shift, unit)) => f.pad(&format!("{}{unit}", self.0 >> shift)),
            None => f.pad(&self.0.to_string()),
        }
    }
}

/// How much RAM lies where. Both lengths are in bytes and multiples of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLayout {
    /// From guest-physical 0, at most [`LOWMEM_LIMIT`].
    pub lowmem: u64,
    /// From [`HIGHMEM_BASE`].
    pub highmem: u64,
}

impl MemoryLayout {
    /// Splits one size as bhyve does: up to 3 GiB of lowmem, the rest from 4 GiB.
    pub fn split(size: MemSize) -> Self {
        let lowmem = size.0.min(LOWMEM_LIMIT);
        Self {
            lowmem,
            highmem: size.0 - lowmem,
        }
    }

    /// All RAM in bytes.
    pub fn total(&self) -> u64 {
        self.lowmem.saturating_add(self.highmem)
    }

    /// The segments that have memory, as (guest-physical base, length, offset in the file).
    pub fn segments(&self) -> impl Iterator<Item = (u64, u64, u64)> + use<> {
        let all = [
            (0, self.lowmem, 0),
            (HIGHMEM_BASE, self.highmem, self.lowmem),
        ];
        all.into_iter().filter(|&(_, len, _)| len != 0)
    }

    /// Where `len` bytes at `gpa` are in the file, if all of them are RAM of one segment.
    pub fn offset_of(&self, gpa: u64, len: u64) -> Option<u64> {
        let end = gpa.checked_add(len)?;
        self.segments().find_map(|(base, size, offset)| {
            (gpa >= base && end <= base + size).then(|| offset + (gpa - base))
        })
    }

    /// Checks lengths that came from a user or from a file.
    ///
    /// # Errors
    ///
    /// Lowmem beyond its limit, a length that is not whole pages, or more than 2^46 bytes in all.
    pub fn validate(&self) -> Result<(), MemoryError> {
        let bad = self.lowmem > LOWMEM_LIMIT
            || self.highmem > 1 << 46
            || !(self.lowmem | self.highmem).is_multiple_of(4096);
        if bad {
            Err(MemoryError::Layout(*self))
        } else {
            Ok(())
        }
    }
}

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
    /// Reading or writing the file failed.
    #[error("guest memory at {gpa:#x}")]
    Io {
        /// First byte of the range.
        gpa: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// Guest RAM, mapped shared and writable.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    layout: MemoryLayout,
    file: Arc<File>,
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
        layout.validate()?;
        check_length(&file, layout)?;
        let (mut mappings, mut regions) = (Vec::new(), Vec::new());
        for (base, len, offset) in layout.segments() {
            let size = usize::try_from(len).map_err(|_| MemoryError::Layout(layout))?;
            let mapping = Mapping::new(&file, offset, size).map_err(MemoryError::Map)?;
            let region = MmapRegionBuilder::new(size)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE);
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

    /// The file behind the mapping.
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
        allocate(&self.file, offset, len).map_err(|errno| match errno {
            Errno::ENOSPC => MemoryError::Full { gpa },
            other => MemoryError::Io {
                gpa,
                source: other.into(),
            },
        })
    }

    /// Prepares for `len` bytes at `gpa` to be written and run: huge pages are put around them, so
    /// that neither the writer nor the guest faults at every 4 KiB. Less than one huge page stays
    /// as it is, and so does everything where there are none to be had.
    pub fn prepare(&self, gpa: u64, len: u64) {
        let (Ok(len), true) = (usize::try_from(len), len >= HUGE as u64) else {
            return;
        };
        for ((base, size, _), mapping) in self.layout.segments().zip(&*self.mappings) {
            if (base..base + size).contains(&gpa) {
                mapping.collapse(mapping.huge_pages((gpa - base) as usize, len));
            }
        }
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
        read_at(&self.file, self.layout, gpa, bytes)
    }
}

/// Guest RAM that is only looked at, without a mapping.
#[derive(Debug)]
pub struct MemFile {
    file: File,
    layout: MemoryLayout,
}

impl MemFile {
    /// Takes a memory file whose length agrees with `layout`.
    ///
    /// # Errors
    ///
    /// The file has another length.
    pub fn new(file: File, layout: MemoryLayout) -> Result<Self, MemoryError> {
        check_length(&file, layout)?;
        Ok(Self { file, layout })
    }

    /// Where the RAM lies.
    pub fn layout(&self) -> MemoryLayout {
        self.layout
    }

    /// Reads bytes; memory that was never written reads as zeros and stays unallocated.
    ///
    /// # Errors
    ///
    /// The range is not RAM.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        read_at(&self.file, self.layout, gpa, bytes)
    }

    /// The next range of its segment, at `gpa` or behind it, that was ever written; none if there is
    /// no more. A file system that knows no holes tells the whole segment.
    ///
    /// # Errors
    ///
    /// `gpa` is not RAM, or the file cannot be looked at.
    pub fn next_data(&self, gpa: u64) -> Result<Option<Range<u64>>, MemoryError> {
        let mut segments = self.layout.segments();
        let found = segments.find(|&(base, len, _)| gpa >= base && gpa - base < len);
        let (base, len, offset) = found.ok_or(MemoryError::NotRam { gpa, len: 1 })?;
        let end = offset + len;
        let seek = |from: u64, whence| {
            let from = i64::try_from(from).unwrap_or(i64::MAX);
            nix::unistd::lseek(&self.file, from, whence).map(|at| at as u64)
        };
        let error = |e: Errno| MemoryError::Io {
            gpa,
            source: e.into(),
        };
        let start = match seek(offset + (gpa - base), Whence::SeekData) {
            Ok(start) if start < end => start,
            Ok(_) | Err(Errno::ENXIO) => return Ok(None),
            Err(Errno::EINVAL) => return Ok(Some(gpa..base + len)),
            Err(e) => return Err(error(e)),
        };
        let until = seek(start, Whence::SeekHole).map_err(error)?.min(end);
        Ok(Some(base + (start - offset)..base + (until - offset)))
    }

    /// Bytes that are really allocated.
    ///
    /// # Errors
    ///
    /// The file cannot be looked at.
    pub fn resident(&self) -> io::Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::blocks(&self.file.metadata()?) * 512)
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
    let range = libc::off_t::try_from(offset)
        .ok()
        .zip(libc::off_t::try_from(len).ok());
    let (offset, len) = range.ok_or(Errno::EFBIG)?;
    let mode = nix::fcntl::FallocateFlags::empty();
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

    fn ram(lowmem: u64, highmem: u64) -> GuestRam {
        let layout = MemoryLayout { lowmem, highmem };
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(layout.total()).unwrap();
        GuestRam::map(file, layout).unwrap()
    }

    #[test]
    fn sizes_are_read_as_bhyve_reads_them() {
        let size = |s: &str| s.parse::<MemSize>().map(|m| m.0);
        assert_eq!(size("256"), Ok(256 << 20));
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("2g"), Ok(2 << 30));
        assert_eq!(size("1T"), Ok(1 << 40));
        assert_eq!(size("1048576"), Ok(1 << 20));
        assert!(matches!(size("5000001"), Err(MemSizeError::Unaligned(_))));
        for bad in ["", "M", "12X", "-1", "1.5G", "+4", "4 M"] {
            assert!(matches!(size(bad), Err(MemSizeError::Syntax(_))), "{bad}");
        }
        assert!(matches!(
            size("99999999999999999999"),
            Err(MemSizeError::Overflow(_))
        ));
        assert!(matches!(
            size("99999999999T"),
            Err(MemSizeError::Overflow(_))
        ));
        assert_eq!(MemSize(5 << 30).to_string(), "5G");
        assert_eq!(MemSize(1536 << 20).to_string(), "1536M");
    }

    #[test]
    fn memory_is_split_around_the_pci_hole() {
        let layout = MemoryLayout::split(MemSize(5 << 30));
        assert_eq!(
            layout,
            MemoryLayout {
                lowmem: 3 << 30,
                highmem: 2 << 30
            }
        );
        assert_eq!(layout.offset_of(HIGHMEM_BASE, 1), Some(3 << 30));
        assert_eq!(layout.offset_of(LOWMEM_LIMIT - 1, 1), Some((3 << 30) - 1));
        assert_eq!(layout.offset_of(LOWMEM_LIMIT - 1, 2), None);
        assert_eq!(layout.offset_of(u64::MAX, 2), None);
        assert!(
            MemoryLayout {
                lowmem: LOWMEM_LIMIT + 4096,
                highmem: 0
            }
            .validate()
            .is_err()
        );
        assert!(
            MemoryLayout {
                lowmem: 1,
                highmem: 0
            }
            .validate()
            .is_err()
        );
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
