//! Disk images: where the sectors of a disk device are on the host.
//!
//! A device does not know images, and an image does not know devices. What is between them is a
//! [`Request`], whose buffers are slices of guest memory. A device opens a [`Channel`] for each of
//! its queues, on the thread that works on that queue, submits requests there and collects what
//! became of them; behind the channel is an [`engine`], which has a [`Backend`] serve them: [`raw`],
//! [`qcow2`], or an [`overlay`] over one of them.
//!
//! A request completes once and in any order. A flush covers the writes that had completed when it
//! was submitted.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use vm_memory::VolatileSlice;
use vmm_api::scatter::Slices;

use crate::config::{BlockSpec, ImageFormat};

pub mod engine;
pub mod overlay;
pub mod qcow2;
pub mod raw;
#[cfg(test)]
mod tests;
pub mod uring;
mod zeros;

/// Unit of a disk's addresses, whatever its block size (virtio 1.3, 5.2.6).
pub const SECTOR: u64 = 512;

/// What a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Bytes; a multiple of [`SECTOR`].
    pub capacity: u64,
    /// Bytes of the smallest block that can be read or written: a power of two, at least 512.
    pub logical: u32,
    /// Bytes of the block which is written without reading it first: a power of two, at least
    /// `logical`.
    pub physical: u32,
    /// Nothing can be changed.
    pub read_only: bool,
    /// Space can be given back.
    pub discard: bool,
}

/// A range of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// What a device wants.
#[derive(Debug)]
pub enum Operation<'m> {
    /// Read from this byte on into guest memory.
    Read(u64, Slices<'m>),
    /// Write to this byte on from guest memory.
    Write(u64, Slices<'m>),
    /// Put every write that has completed on stable storage.
    Flush,
    /// Give back space: what is there reads as anything.
    Discard(Vec<Extent>),
    /// Make it read as zeros; what has `true` may give back its space.
    WriteZeroes(Vec<(Extent, bool)>),
}

/// One request of a device.
#[derive(Debug)]
pub struct Request<'m> {
    /// What is wanted. Ranges lie within the disk and are multiples of [`SECTOR`].
    pub operation: Operation<'m>,
    /// A change is to be on stable storage when it completes.
    pub durable: bool,
    /// What was submitted before is to complete first, and what comes after waits for this.
    pub barrier: bool,
}

/// Who a completion is for: a channel hands it back as it came.
pub type Token = u64;

/// Serves requests, each before it returns; called on several threads at a time.
///
/// An error concerns this request only. What a failed write or discard left behind is unknown.
pub trait Backend: Send + Sync {
    /// What the disk is, at this moment.
    fn info(&self) -> Info;

    /// Fills `to` from `offset` on.
    ///
    /// # Errors
    /// The host cannot read; there is nothing (an image that was cut) or guest memory cannot be had.
    fn read(&self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Writes `from` to `offset`; to stable storage if `durable`.
    ///
    /// # Errors
    /// The host cannot write, for one because it has no room.
    fn write(&self, offset: u64, from: &[VolatileSlice<'_>], durable: bool) -> io::Result<()>;

    /// Puts every write that has returned on stable storage.
    ///
    /// # Errors
    /// Something of it may be lost.
    fn flush(&self) -> io::Result<()>;

    /// Gives back the space of `extent`.
    ///
    /// # Errors
    /// The host cannot.
    fn discard(&self, extent: Extent) -> io::Result<()>;

    /// Makes `extent` read as zeros. Its space stays allocated unless it may be given back.
    ///
    /// # Errors
    /// The host cannot write.
    fn write_zeroes(&self, extent: Extent, may_discard: bool) -> io::Result<()>;

    /// Makes the disk larger, or without a size as large as its image has become.
    ///
    /// # Errors
    /// `InvalidInput` if it would lose what is behind its new end or is no whole number of blocks;
    /// the host has no room, or there is no other size for such a disk.
    fn resize(&self, capacity: Option<u64>) -> io::Result<()> {
        let _ = capacity;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whether something was written that ends with this process.
    fn is_fleeting(&self) -> bool {
        false
    }

    /// The file whose bytes are the disk's, one for one, if there is one that may be read and
    /// written without asking the backend.
    fn plain(&self) -> Option<Plain<'_>> {
        None
    }
}

/// A file that is a disk, byte for byte.
#[derive(Clone, Copy, Debug)]
pub struct Plain<'a> {
    /// The file.
    pub file: &'a File,
    /// Transfers and their buffers are at multiples of this, a power of two; 1 if it does not matter.
    pub alignment: usize,
}

/// One thread's way to a [`Backend`]; dropping it waits for what is under way.
///
/// `'m` is how long guest memory stays mapped.
pub trait Channel<'m> {
    /// Takes a request; it may complete before this returns.
    fn submit(&mut self, token: Token, request: Request<'m>);

    /// Lets the host see what was submitted; called after a batch.
    fn kick(&mut self) {}

    /// Something that completed, and how.
    fn complete(&mut self) -> Option<(Token, io::Result<()>)>;

    /// Readable when there is something to collect after a `complete` that found nothing; `None` if
    /// everything completes before `submit` returns.
    fn ready(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Why an image cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The host refuses.
    #[error("disk image {}: cannot {action}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The image.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It is something else.
    #[error("disk image {} is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Less than a sector.
    #[error("disk image {} has no whole sector: give it a size, as with truncate -s 1G", .0.display())]
    Empty(PathBuf),
    /// Somebody writes it.
    #[error(
        "disk image {} is in use: another VM or program has it open for writing, or this one would write what others read",
        .0.display()
    )]
    InUse(PathBuf),
    /// Blocks smaller than the host can transfer.
    #[error(
        "disk image {}: the host transfers blocks of {host} bytes here, not of {wanted}: \
         write sectorsize={host}{}",
        path.display(),
        if *is_file { ", or leave nocache out" } else { "" }
    )]
    BlockSize {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        wanted: u32,
        /// What the host needs.
        host: u32,
        /// It is a regular file, which has smaller blocks without `nocache`.
        is_file: bool,
    },
    /// It looks like qcow2, but nobody said that it is.
    #[error(
        "disk image {} begins like a qcow2 image: write format=qcow2, or format=raw if that is data",
        .0.display()
    )]
    LooksLikeQcow2(PathBuf),
    /// What is in it would be taken for the disk's sectors.
    #[error(
        "disk image {} is encrypted, which is not supported: qemu-img convert makes a plain one of it",
        .0.display()
    )]
    Encrypted(PathBuf),
    /// io_uring is asked for where there is no file whose bytes are the disk's.
    #[error(
        "disk image {}: io_uring serves raw images only, and no snapshot: leave aio= out",
        .0.display()
    )]
    NotPlain(PathBuf),
}

impl BlockError {
    fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// Opens and locks what `spec` names.
///
/// # Errors
/// It cannot be a disk, or not for this VM.
pub fn open(spec: &BlockSpec) -> Result<Arc<dyn Backend>, BlockError> {
    let base: Arc<dyn Backend> = match spec.format() {
        ImageFormat::Raw => Arc::new(raw::Raw::open(spec)?),
        ImageFormat::Qcow2 => Arc::new(qcow2::Qcow2::open(spec)?),
    };
    if !spec.snapshot {
        return Ok(base);
    }
    let overlay = overlay::Overlay::new(base);
    let overlay = overlay.map_err(BlockError::io("keep changes to", &spec.path))?;
    Ok(Arc::new(overlay))
}

impl Info {
    /// Checks a size that this disk is to have.
    fn check_growth(&self, capacity: u64) -> io::Result<()> {
        if capacity >= self.capacity && capacity.is_multiple_of(self.logical.into()) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }
}

impl Extent {
    /// One past its last byte.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

impl fmt::Display for Info {
    /// As a boot message of the seed's era has it: `400MB (819200 512 byte sectors)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sectors = self.capacity / u64::from(self.logical);
        write!(
            f,
            "{}MB ({sectors} {} byte sectors)",
            self.capacity >> 20,
            self.logical
        )
    }
}

/// Bytes in all of `slices`.
pub fn total_len(slices: &[VolatileSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// `len` bytes of `slices` from the byte `skip` on, as far as they reach.
fn part<'m>(slices: &[VolatileSlice<'m>], skip: u64, len: u64) -> Slices<'m> {
    let (mut skip, mut left) = (skip, len);
    let mut parts = Slices::new();
    for slice in slices {
        let size = slice.len() as u64;
        let start = skip.min(size);
        let now = (size - start).min(left);
        skip -= start;
        left -= now;
        // Both fit, being no more than the slice's own length.
        if now > 0
            && let Ok(part) = slice.subslice(start as usize, now as usize)
        {
            parts.push(part);
        }
    }
    parts
}
