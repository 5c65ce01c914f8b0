//! The memory of a clone while it runs: mapped privately over a base.
//!
//! A page that is only read is the base's, one copy for all clones; the first write gives the clone one
//! of its own, which no file has. Linux tells which pages those are (Documentation/admin-guide/mm/
//! pagemap.rst), and [`GuestRam::keep`] writes them to the clone's own file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::sys::mman::MmapAdvise;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::look::next_data;
use super::{GuestRam, MemFile, MemoryError};
use crate::scatter;

const PAGE: u64 = 4096;

/// An entry of /proc/self/pagemap: the page is in memory; it is swapped out; it is a file's, or shared.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// Entries that are read at once.
const ENTRIES: usize = 8192;

impl GuestRam {
    /// Whether it is a clone's: what is written is in no file before [`GuestRam::keep`].
    pub fn is_clone(&self) -> bool {
        self.base.is_some()
    }

    /// Writes the pages that a clone has written to its own file, where others find them; anything
    /// else has them there already. Whoever is to find all pages as of one moment sees to it that
    /// nobody writes meanwhile.
    ///
    /// # Errors
    ///
    /// The file system is full, or Linux does not tell which pages they are.
    pub fn keep(&self) -> Result<(), MemoryError> {
        if !self.is_clone() {
            return Ok(());
        }
        for (gpa, len, offset) in self.layout.segments() {
            let io = |source| MemoryError::Io { gpa, source };
            let (start, _) = self.mapping(gpa, len)?;
            for range in written(start.addr().get() as u64, len).map_err(io)? {
                let bytes = (range.end - range.start) as usize;
                let slice = self
                    .memory
                    .get_slice(GuestAddress(gpa + range.start), bytes);
                let slice = slice.map_err(|e| io(io::Error::other(e)))?;
                let at = offset + range.start;
                scatter::write_all_at(&*self.file, &[slice], at, false).map_err(|e| {
                    match e.kind() {
                        io::ErrorKind::StorageFull => MemoryError::Full {
                            gpa: gpa + range.start,
                        },
                        _ => io(e),
                    }
                })?;
            }
        }
        Ok(())
    }

    /// All of it as it is now, to be looked at: see [`GuestRam::keep`].
    ///
    /// # Errors
    ///
    /// As there, or there are no descriptors left.
    pub fn look(&self) -> Result<MemFile, MemoryError> {
        self.keep()?;
        let file = self.file.try_clone().map_err(MemoryError::Map)?;
        match &self.base {
            None => MemFile::new(file, self.layout),
            Some(base) => {
                let base = base.try_clone().map_err(MemoryError::Map)?;
                MemFile::of_clone(file, base, self.layout)
            }
        }
    }

    /// Reads what an earlier run of a clone has kept.
    pub(super) fn take_own(&self) -> Result<(), MemoryError> {
        for (gpa, len, offset) in self.layout.segments() {
            let io = |e: nix::errno::Errno| MemoryError::Io {
                gpa,
                source: e.into(),
            };
            let mut at = offset;
            while let Some(data) = next_data(&self.file, at, offset + len).map_err(io)? {
                let to = gpa + (data.start - offset);
                self.read_file(to, data.end - data.start, &self.file, data.start)?;
                at = data.end;
            }
        }
        Ok(())
    }

    pub(super) fn read_mapped(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let len = bytes.len() as u64;
        self.layout
            .offset_of(gpa, len)
            .ok_or(MemoryError::NotRam { gpa, len })?;
        self.memory
            .read_slice(bytes, GuestAddress(gpa))
            .map_err(|e| MemoryError::Io {
                gpa,
                source: io::Error::other(e),
            })
    }

    /// Gives a clone's own pages back: they are the base's again.
    pub(super) fn drop_private(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        let (start, size) = self.mapping(gpa, len)?;
        // SAFETY: the range is inside a mapping of ours. Its content changes, as that of guest memory
        // may at any time: nobody holds a reference to it.
        unsafe { nix::sys::mman::madvise(start, size, MmapAdvise::MADV_DONTNEED) }.map_err(|e| {
            MemoryError::Io {
                gpa,
                source: e.into(),
            }
        })
    }
}

/// The pages of a private mapping that were written, as offsets into it.
fn written(start: u64, len: u64) -> io::Result<Vec<Range<u64>>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut entries = vec![0; ENTRIES * 8];
    let pages = len / PAGE;
    let mut page = 0;
    while page < pages {
        let count = (pages - page).min(ENTRIES as u64);
        let bytes = entries.get_mut(..count as usize * 8).unwrap_or_default();
        pagemap.read_exact_at(bytes, (start / PAGE + page) * 8)?;
        for (entry, at) in bytes.as_chunks().0.iter().zip(page..) {
            let entry = u64::from_ne_bytes(*entry);
            if entry & (PRESENT | SWAPPED) == 0 || entry & OF_FILE != 0 {
                continue;
            }
            let at = at * PAGE;
            match found.last_mut() {
                Some(last) if last.end == at => last.end += PAGE,
                _ => found.push(at..at + PAGE),
            }
        }
        page += count;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryLayout;

    const LAYOUT: MemoryLayout = MemoryLayout {
        lowmem: 8 << 20,
        highmem: 4 << 20,
    };
    const HIGH: u64 = crate::memory::HIGHMEM_BASE;

    fn file() -> File {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(LAYOUT.total()).unwrap();
        file
    }

    fn read(from: &MemFile, gpa: u64) -> [u8; 4] {
        let mut bytes = [0; 4];
        from.read(gpa, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn clones_share_what_they_do_not_write() {
        let (base, own) = (file(), file());
        base.write_all_at(b"base", 0x5000).unwrap();
        base.write_all_at(b"high", LAYOUT.lowmem + 0x1000).unwrap();
        let again = |file: &File| file.try_clone().unwrap();
        let ram = GuestRam::map_clone(again(&own), again(&base), LAYOUT).unwrap();
        let mut bytes = [0; 4];
        ram.read(0x5000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"base");
        ram.write(0x5ffe, b"mine").unwrap();
        ram.write(HIGH + 0x2000, b"mine").unwrap();
        ram.punch(0, 0x1000).unwrap();
        ram.populate(0, 0x1000).unwrap();
        assert_eq!(
            std::os::unix::fs::MetadataExt::blocks(&own.metadata().unwrap()),
            0
        );

        let seen = ram.look().unwrap();
        assert_eq!(&read(&seen, 0x5000), b"base");
        assert_eq!(&read(&seen, 0x5ffe), b"mine");
        assert_eq!(&read(&seen, HIGH + 0x1000), b"high");
        assert_eq!(&read(&seen, HIGH + 0x2000), b"mine");
        assert_eq!(seen.resident().unwrap(), 3 * PAGE);
        assert_eq!(seen.next_data(0).unwrap(), Some(0x5000..0x7000));
        // The base has nothing of it.
        let plain = MemFile::new(again(&base), LAYOUT).unwrap();
        assert_eq!(read(&plain, 0x5ffe), [0; 4]);
        // And what was kept is there in the next run.
        drop(ram);
        let ram = GuestRam::map_clone(again(&own), base, LAYOUT).unwrap();
        ram.read(0x5ffe, &mut bytes).unwrap();
        assert_eq!(&bytes, b"mine");
        ram.punch(0x5000, 0x2000).unwrap();
        ram.read(0x5ffe, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4], "the base's again");
    }

    #[test]
    fn pieces_are_all_that_was_written() {
        let (base, own) = (file(), file());
        base.write_all_at(&[1; 0x1800], 0x1000).unwrap();
        own.write_all_at(&[2; 0x1000], 0x2000).unwrap();
        own.write_all_at(&[3; 0x1000], LAYOUT.lowmem).unwrap();
        let memory = MemFile::of_clone(own, base, LAYOUT).unwrap();
        let copy = file();
        let given = memory
            .pieces::<MemoryError>(|bytes, at| {
                copy.write_all_at(bytes, at).unwrap();
                Ok(())
            })
            .unwrap();
        assert_eq!(given, 0x3000);
        let copy = MemFile::new(copy, LAYOUT).unwrap();
        for gpa in [
            0,
            0x1000,
            0x1ffe,
            0x2000,
            0x27fe,
            0x3000,
            HIGH,
            HIGH + 0x1000,
        ] {
            assert_eq!(read(&copy, gpa), read(&memory, gpa), "{gpa:#x}");
        }
        assert_eq!(read(&copy, 0x1ffe), [1, 1, 2, 2]);
        assert_eq!(read(&copy, HIGH), [3; 4]);
    }
}
