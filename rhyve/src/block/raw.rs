//! Raw images: a regular file or a block device whose bytes are the disk's.
//!
//! The image is locked for as long as it is open (an OFD lock, fcntl(2)): for writing by one VM, or
//! for reading by many. QEMU takes the same kind of lock, so it is kept out as well.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::libc;
use nix::sys::stat::{major, minor};
use vm_memory::VolatileSlice;
use vmm_api::{blockdev, scatter};

use super::{Backend, BlockError, Extent, Info, Plain, SECTOR, part, total_len, zeros};
use crate::config::{BlockSpec, ImageFormat};

/// Bytes that are copied at a time where the guest's buffers do not suit O_DIRECT.
const BOUNCE: u64 = 1 << 20;

/// A raw image.
pub struct Raw {
    file: File,
    /// A block device.
    is_device: bool,
    info: Info,
    /// Bytes now: an image can grow.
    capacity: AtomicU64,
    /// With O_DIRECT: buffers begin and end at multiples of this.
    alignment: Option<usize>,
}

impl Raw {
    /// Opens and locks it.
    ///
    /// # Errors
    /// It is no image, or not this VM's.
    pub fn open(spec: &BlockSpec) -> Result<Self, BlockError> {
        let path = &spec.path;
        let read_only = spec.read_only || spec.snapshot;
        let image = open_locked(path, read_only, spec.nocache, spec.sync)?;
        let looked_at = spec.format == Some(ImageFormat::Raw) || spec.nocache;
        if !looked_at && begins_like_qcow2(&image.file) {
            return Err(BlockError::LooksLikeQcow2(path.clone()));
        }
        let (logical, physical) = block_size(spec, &image)?;
        let size = image.size & !u64::from(logical - 1);
        if size == 0 {
            return Err(BlockError::Empty(path.clone()));
        }
        let info = Info {
            capacity: size,
            logical,
            physical,
            read_only: spec.read_only,
            discard: !read_only && !spec.nodelete && can_discard(&image),
        };
        let alignment = spec.nocache.then_some(image.transfer as usize);
        Ok(Self {
            is_device: !image.metadata.is_file(),
            file: image.file,
            info,
            capacity: size.into(),
            alignment,
        })
    }

    /// Whether the buffers can be used as they are.
    fn suits(&self, slices: &[VolatileSlice<'_>]) -> bool {
        self.alignment.is_none_or(|alignment| {
            slices.iter().all(|slice| {
                slice.ptr_guard().as_ptr().align_offset(alignment) == 0
                    && slice.len().is_multiple_of(alignment)
            })
        })
    }

    /// Moves `slices` through a buffer that suits O_DIRECT, a part at a time.
    fn bounce(
        &self,
        offset: u64,
        slices: &[VolatileSlice<'_>],
        mut transfer: impl FnMut(u64, &[VolatileSlice<'_>], &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let alignment = self.alignment.unwrap_or(1);
        let len = total_len(slices);
        let mut buffer = vec![0; len.min(BOUNCE) as usize + alignment];
        let start = buffer.as_ptr().align_offset(alignment);
        let mut done = 0;
        while done < len {
            let now = (len - done).min(BOUNCE);
            let buffer = &mut buffer[start..start + now as usize];
            transfer(offset + done, &part(slices, done, now), buffer)?;
            done += now;
        }
        Ok(())
    }

    fn allocate(&self, mode: FallocateFlags, extent: Extent) -> Result<(), Errno> {
        let offset = libc::off_t::try_from(extent.offset).map_err(|_| Errno::EFBIG)?;
        let len = libc::off_t::try_from(extent.len).map_err(|_| Errno::EFBIG)?;
        if len == 0 {
            return Ok(());
        }
        loop {
            match fallocate(&self.file, mode, offset, len) {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
    }

    fn punch(&self, extent: Extent) -> Result<(), Errno> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.allocate(mode, extent)
    }
}

impl Backend for Raw {
    fn info(&self) -> Info {
        Info {
            capacity: self.capacity.load(Ordering::SeqCst),
            ..self.info
        }
    }

    fn read(&self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        if self.suits(to) {
            return scatter::read_exact_at(&self.file, to, offset);
        }
        self.bounce(offset, to, |offset, to, buffer| {
            self.file.read_exact_at(buffer, offset)?;
            let mut rest = &*buffer;
            for slice in to {
                let (now, later) = rest.split_at(slice.len());
                slice.copy_from(now);
                rest = later;
            }
            Ok(())
        })
    }

    fn write(&self, offset: u64, from: &[VolatileSlice<'_>], durable: bool) -> io::Result<()> {
        if self.suits(from) {
            return scatter::write_all_at(&self.file, from, offset, durable);
        }
        self.bounce(offset, from, |offset, from, buffer| {
            let mut rest = &mut *buffer;
            for slice in from {
                let (now, later) = rest.split_at_mut(slice.len());
                slice.copy_to(now);
                rest = later;
            }
            self.file.write_all_at(buffer, offset)
        })?;
        if durable { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        // Not `File::flush`, which does nothing.
        self.file.sync_data()
    }

    fn discard(&self, extent: Extent) -> io::Result<()> {
        if self.is_device {
            return blockdev::discard(&self.file, extent.offset, extent.len);
        }
        Ok(self.punch(extent)?)
    }

    fn write_zeroes(&self, extent: Extent, may_discard: bool) -> io::Result<()> {
        let made = if may_discard && self.info.discard {
            self.punch(extent)
        } else {
            let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            self.allocate(mode, extent)
        };
        match made {
            Err(Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS) => {
                zeros::write(extent, |zeros, at| self.file.write_all_at(zeros, at))
            }
            made => Ok(made?),
        }
    }

    fn resize(&self, capacity: Option<u64>) -> io::Result<()> {
        if let Some(capacity) = capacity {
            self.info().check_growth(capacity)?;
            if self.file.metadata()?.is_file() {
                self.file.set_len(capacity)?;
            }
        }
        // The position is nobody's: all else says where it reads and writes.
        let size = (&self.file).seek(SeekFrom::End(0))?;
        let size = size & !u64::from(self.info.logical - 1);
        self.capacity.store(size, Ordering::SeqCst);
        if capacity.is_some_and(|wanted| wanted > size) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(())
    }

    fn plain(&self) -> Option<Plain<'_>> {
        Some(Plain {
            file: &self.file,
            alignment: self.alignment.unwrap_or(1),
        })
    }
}

/// A file that may be a disk's.
pub(super) struct Image {
    /// The file, locked.
    pub file: File,
    metadata: Metadata,
    /// Bytes.
    size: u64,
    /// Bytes of the smallest transfer.
    transfer: u32,
}

/// Opens a regular file or a block device and takes the lock that belongs to what is done with it.
pub(super) fn open_locked(
    path: &Path,
    read_only: bool,
    direct: bool,
    sync: bool,
) -> Result<Image, BlockError> {
    // Looked at first: opening a FIFO would wait.
    let metadata = fs::metadata(path).map_err(BlockError::io("find", path))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(BlockError::Kind(path.to_owned()));
    }
    let mut flags = OFlag::empty();
    flags.set(OFlag::O_DIRECT, direct);
    flags.set(OFlag::O_DSYNC, sync);
    // On a block device: refused if it is mounted.
    flags.set(OFlag::O_EXCL, kind.is_block_device() && !read_only);
    let mut file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(flags.bits())
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => BlockError::InUse(path.to_owned()),
            _ => BlockError::io("open", path)(error),
        })?;
    lock(&file, read_only).map_err(|errno| match errno {
        Errno::EAGAIN | Errno::EACCES => BlockError::InUse(path.to_owned()),
        other => BlockError::io("lock", path)(other.into()),
    })?;
    let metadata = file.metadata().map_err(BlockError::io("look at", path))?;
    // A block device has no length in its metadata.
    let size = file.seek(SeekFrom::End(0));
    let size = size.map_err(BlockError::io("measure", path))?;
    let mut transfer = SECTOR as u32;
    if kind.is_block_device() {
        transfer = transfer.max(queue_limit(&metadata, "logical_block_size").unwrap_or(0));
    }
    if direct && !reads_blocks_of(&file, transfer as usize) {
        transfer = 4096;
    }
    Ok(Image {
        file,
        metadata,
        size,
        transfer,
    })
}

/// Takes the lock on the whole file: shared by readers, or a writer's alone.
fn lock(file: &File, read_only: bool) -> Result<(), Errno> {
    let kind = if read_only {
        libc::F_RDLCK
    } else {
        libc::F_WRLCK
    };
    let whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole)).map(drop)
}

/// Whether O_DIRECT takes blocks of this size here: an empty file reads none, but checks.
fn reads_blocks_of(file: &File, size: usize) -> bool {
    let mut buffer = vec![0; 2 * size];
    let start = buffer.as_ptr().align_offset(size);
    // Exactly this alignment, not one that is more than asked for.
    let start = if (buffer.as_ptr() as usize + start).is_multiple_of(2 * size) {
        start + size
    } else {
        start
    };
    buffer.resize(3 * size, 0);
    let buffer = buffer.get_mut(start..start + size);
    buffer.is_some_and(|buffer| file.read_at(buffer, 0).is_ok())
}

/// A number from a block device's request queue; a partition has its disk's.
fn queue_limit(metadata: &Metadata, name: &str) -> Option<u32> {
    let (major, minor) = (major(metadata.rdev()), minor(metadata.rdev()));
    let device = format!("/sys/dev/block/{major}:{minor}");
    ["queue", "../queue"].iter().find_map(|queue| {
        let text = fs::read_to_string(format!("{device}/{queue}/{name}")).ok()?;
        // Some limits are larger than 32 bits; that there is one is enough then.
        let number: u64 = text.trim().parse().ok()?;
        Some(u32::try_from(number).unwrap_or(u32::MAX))
    })
}

/// Logical and physical block size: what was asked for, as far as the host can transfer it.
fn block_size(spec: &BlockSpec, image: &Image) -> Result<(u32, u32), BlockError> {
    if let Some((logical, physical)) = spec.block_size {
        if logical < image.transfer {
            return Err(BlockError::BlockSize {
                path: spec.path.clone(),
                wanted: logical,
                host: image.transfer,
                is_file: image.metadata.is_file(),
            });
        }
        return Ok((logical, physical));
    }
    let physical = if image.metadata.file_type().is_block_device() {
        queue_limit(&image.metadata, "physical_block_size").unwrap_or(image.transfer)
    } else {
        u32::try_from(image.metadata.blksize()).unwrap_or(4096)
    };
    let sensible = physical.is_power_of_two() && physical <= 65536;
    let physical = if sensible { physical } else { 4096 };
    Ok((image.transfer, physical.max(image.transfer)))
}

fn can_discard(image: &Image) -> bool {
    if image.metadata.file_type().is_block_device() {
        return queue_limit(&image.metadata, "discard_max_bytes").is_some_and(|max| max > 0);
    }
    // Behind the end there is nothing to lose.
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let end = libc::off_t::try_from(image.size);
    end.is_ok_and(|end| fallocate(&image.file, mode, end, 4096).is_ok())
}

/// Whether the first bytes are qcow2's magic.
fn begins_like_qcow2(file: &File) -> bool {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).is_ok() && magic == *b"QFI\xfb"
}
