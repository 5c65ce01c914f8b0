//! Copies a file's bytes into guest memory.
//!
//! Through pwrite, not through the mapping: pages that are written whole are not cleared before,
//! there are no page faults, and a full tmpfs is an error and not a SIGBUS. Pages of zeros are not
//! written: guest memory is fresh, so they are there already, and a vmlinux has megabytes of them
//! (its bss lies before its last section).

use vmm_api::memory::{GuestRam, MemoryError};

/// Fits in a second-level cache, so that what was read is still there when it is written.
const CHUNK: usize = 256 << 10;

const PAGE: usize = 4096;

static ZEROS: [u8; PAGE] = [0; PAGE];

/// Why bytes did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Reading failed, or the file became shorter.
    #[error("cannot read 0x{len:x} bytes at offset {offset:#x}")]
    Read {
        /// Offset in the file.
        offset: u64,
        /// Number of bytes.
        len: usize,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Writing failed.
    #[error(transparent)]
    Write(#[from] MemoryError),
}

/// Copies `len` bytes at `offset`, where `read` gets them, to the guest-physical address `gpa`, where
/// memory was never written before. `step` is told how many bytes each step has copied.
///
/// # Errors
///
/// The file cannot be read, or the file system that holds guest memory is full.
pub fn copy(
    read: impl Fn(u64, &mut [u8]) -> std::io::Result<()>,
    (offset, len): (u64, u64),
    ram: &GuestRam,
    gpa: u64,
    mut step: impl FnMut(u64),
) -> Result<(), CopyError> {
    let mut buffer = vec![0; usize::try_from(len).map_or(CHUNK, |len| len.min(CHUNK))];
    let mut done = 0;
    while done < len {
        let left = usize::try_from(len - done).unwrap_or(CHUNK);
        // Chunks end at page boundaries of the guest, wherever the first one begins.
        let room = CHUNK - (gpa + done) as usize % PAGE;
        let chunk = &mut buffer[..left.min(room)];
        let at = offset + done;
        read(at, chunk).map_err(|source| CopyError::Read {
            offset: at,
            len: chunk.len(),
            source,
        })?;
        write_pages(chunk, ram, gpa + done)?;
        done += chunk.len() as u64;
        step(chunk.len() as u64);
    }
    Ok(())
}

/// Writes the pages that are not all zeros, neighbours in one go.
fn write_pages(bytes: &[u8], ram: &GuestRam, gpa: u64) -> Result<(), MemoryError> {
    let mut start = 0;
    let mut at = 0;
    while at < bytes.len() {
        let end = bytes.len().min(at + PAGE - (gpa as usize + at) % PAGE);
        if bytes[at..end] == ZEROS[..end - at] {
            write(&bytes[start..at], ram, gpa + start as u64)?;
            start = end;
        }
        at = end;
    }
    write(&bytes[start..], ram, gpa + start as u64)
}

fn write(bytes: &[u8], ram: &GuestRam, gpa: u64) -> Result<(), MemoryError> {
    if bytes.is_empty() {
        return Ok(());
    }
    ram.write(gpa, bytes)
}

#[cfg(test)]
mod tests {
    use vmm_api::memory::{MemFile, MemoryLayout};

    use super::*;
    use crate::source::Source;

    #[test]
    fn zeros_are_left_out_and_all_else_arrives() {
        let layout = MemoryLayout {
            lowmem: 4 << 20,
            highmem: 0,
        };
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(layout.total()).unwrap();
        let mem = MemFile::new(file.try_clone().unwrap(), layout).unwrap();
        let ram = GuestRam::map(file, layout).unwrap();
        // From the middle of a page: half a page, a zero page, bytes over two pages, many zeros.
        let mut from = vec![0; 1 << 20];
        from[0] = 1;
        from[2048 + 4096 + 100] = 2;
        from[2048 + 8192..2048 + 8200].fill(3);
        from[(1 << 20) - 1] = 4;
        let gpa = 0x10_0800;
        let read = |offset, bytes: &mut [u8]| from.read(offset, bytes);
        let mut told = 0;
        copy(read, (0, from.len() as u64), &ram, gpa, |copied| {
            told += copied
        })
        .unwrap();
        assert_eq!(told, from.len() as u64);
        let mut found = vec![9; from.len()];
        mem.read(gpa, &mut found).unwrap();
        assert_eq!(found, from);
        assert_eq!(mem.resident().unwrap(), 4 * 4096);
    }
}
