//! Copies a file's bytes into guest memory.
//!
//! Through pwrite, not through the mapping: pages that are written whole are not cleared before,
//! there are no page faults, and a full tmpfs is an error and not a SIGBUS.

use vmm_api::memory::{GuestRam, MemoryError};

use crate::source::Source;

/// Fits in a second-level cache, so that what was read is still there when it is written.
const CHUNK: usize = 256 << 10;

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

/// Copies `len` bytes at `offset` of `from` to the guest-physical address `gpa`.
///
/// # Errors
///
/// The file cannot be read, or the file system that holds guest memory is full.
pub fn copy(
    from: &(impl Source + ?Sized),
    offset: u64,
    len: u64,
    ram: &GuestRam,
    gpa: u64,
) -> Result<(), CopyError> {
    let mut buffer = vec![0; usize::try_from(len).map_or(CHUNK, |len| len.min(CHUNK))];
    let mut done = 0;
    while done < len {
        let left = usize::try_from(len - done).unwrap_or(CHUNK);
        let chunk = &mut buffer[..left.min(CHUNK)];
        let at = offset + done;
        from.read(at, chunk).map_err(|source| CopyError::Read {
            offset: at,
            len: chunk.len(),
            source,
        })?;
        ram.write(gpa + done, chunk)?;
        done += chunk.len() as u64;
    }
    Ok(())
}
