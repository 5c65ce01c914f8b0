//! qcow2 images, with backing files, through the `imago` crate.
//!
//! Every file of the chain is locked as a raw image is ([`super::raw`]): the image itself for its
//! use, its backing files for reading.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use imago::file::File as Storage;
use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::ImplicitOpenGate;
use imago::format::{Format, PreallocateMode};
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2 as Driver;
use imago::{FormatAccess, Mapping, StorageExt, StorageOpenOptions};
use vm_memory::VolatileSlice;

use super::raw::open_locked;
use super::{Backend, BlockError, Extent, Info, SECTOR, zeros};
use crate::config::BlockSpec;

/// A qcow2 image.
pub struct Qcow2 {
    /// Held for writing while space is given back: imago may not be asked for anything else then.
    image: RwLock<FormatAccess<Storage>>,
    info: Info,
    /// Each change is on stable storage before it completes: what is written, by the files' flags,
    /// and where it is, which imago keeps to itself otherwise.
    sync: bool,
    /// Bytes now: an image can grow.
    capacity: AtomicU64,
}

impl Qcow2 {
    /// Opens and locks it, with whatever it is based on.
    ///
    /// # Errors
    /// It is no image, or not this VM's; or one of the files under it is not to be had.
    pub fn open(spec: &BlockSpec) -> Result<Self, BlockError> {
        let path = &spec.path;
        let read_only = spec.read_only || spec.snapshot;
        let options = StorageOpenOptions::new()
            .filename(path)
            .write(!read_only)
            .direct(spec.nocache);
        let storage = open_storage(path, &options, spec.sync)?;
        refuse_encrypted(path)?;
        let image = Driver::<Storage>::builder(storage)
            .write(!read_only)
            .storage_open_options(options)
            .open(LockedFiles { sync: spec.sync })
            .map_err(BlockError::io("read", path))?;
        let image = FormatAccess::new(image);
        let (logical, physical) = spec.block_size.unwrap_or((SECTOR as u32, 4096));
        let info = Info {
            capacity: image.size() & !u64::from(logical - 1),
            logical,
            physical,
            read_only: spec.read_only,
            discard: !read_only && !spec.nodelete,
        };
        if info.capacity == 0 {
            return Err(BlockError::Empty(path.clone()));
        }
        Ok(Self {
            image: RwLock::new(image),
            info,
            sync: spec.sync,
            capacity: info.capacity.into(),
        })
    }

    /// Gives space back to the image, whose other clusters can have it, and to the host; what was
    /// there reads as zeros then.
    ///
    /// # Errors
    /// `Unsupported` by images of version 2: what the host was given back does not tell.
    fn give_back(&self, extent: Extent) -> io::Result<()> {
        // Nobody may be given a cluster that is going to be a hole.
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        let mut at = extent.offset;
        while at < extent.end() {
            let (mapping, len) = image.get_mapping(at, extent.end() - at)?;
            // What a snapshot has as well, or a file under this one, is not writable.
            if let Mapping::Raw {
                storage,
                offset,
                writable: true,
                ..
            } = mapping
            {
                storage.discard(offset, len)?;
            }
            if len == 0 {
                break;
            }
            at += len;
        }
        image.discard_to_zero(extent.offset, extent.len)
    }

    /// Something was changed.
    fn settle(&self, durable: bool) -> io::Result<()> {
        if durable || self.sync {
            self.flush()
        } else {
            Ok(())
        }
    }

    fn image(&self) -> RwLockReadGuard<'_, FormatAccess<Storage>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Qcow2 {
    fn info(&self) -> Info {
        Info {
            capacity: self.capacity.load(Ordering::SeqCst),
            ..self.info
        }
    }

    fn read(&self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        // The guard keeps the memory mapped while the vector is in use.
        let (vector, _guard) = IoVectorMut::from_volatile_slice(to);
        self.image().readv(vector, offset)
    }

    fn write(&self, offset: u64, from: &[VolatileSlice<'_>], durable: bool) -> io::Result<()> {
        let (vector, _guard) = IoVector::from_volatile_slice(from);
        self.image().writev(vector, offset)?;
        self.settle(durable)
    }

    fn flush(&self) -> io::Result<()> {
        let image = self.image();
        // First from imago's caches to the file, then from the file to the disk.
        image.flush()?;
        image.sync()
    }

    fn discard(&self, extent: Extent) -> io::Result<()> {
        match self.give_back(extent) {
            // It may read as anything.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            given => given.and_then(|()| self.settle(false)),
        }
    }

    fn write_zeroes(&self, extent: Extent, may_discard: bool) -> io::Result<()> {
        let made = if may_discard && self.info.discard {
            self.give_back(extent)
        } else {
            self.image().write_zeroes(extent.offset, extent.len)
        };
        match made {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                zeros::write(extent, |zeros, at| self.image().write(zeros, at))?;
            }
            made => made?,
        }
        self.settle(false)
    }

    fn resize(&self, capacity: Option<u64>) -> io::Result<()> {
        // Nobody but this process makes it larger: it is locked.
        let capacity = capacity.unwrap_or(self.info().capacity);
        self.info().check_growth(capacity)?;
        let image = self.image();
        image.resize_grow(capacity, PreallocateMode::None)?;
        image.flush()?;
        self.capacity.store(capacity, Ordering::SeqCst);
        Ok(())
    }
}

/// Opens the files that a qcow2 image names.
#[derive(Clone, Copy, Debug)]
struct LockedFiles {
    sync: bool,
}

impl ImplicitOpenGate<Storage> for LockedFiles {
    fn open_format<F: FormatDriverBuilder<Storage>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<Storage>> {
        if F::FORMAT == Format::Qcow2
            && let Some(path) = builder.get_image_path()
        {
            refuse_encrypted(&path).map_err(told)?;
        }
        Ok(FormatAccess::new(builder.open(*self)?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Storage> {
        let path = options.get_filename().map(Path::to_owned);
        let path = path.ok_or(io::ErrorKind::InvalidFilename)?;
        open_storage(&path, &options, self.sync).map_err(told)
    }
}

/// All of it in one text: imago prints an error, and loses what it came from.
fn told(error: BlockError) -> io::Error {
    io::Error::other(crate::chain(&error))
}

/// imago reads and writes an encrypted image as if it were a plain one.
fn refuse_encrypted(path: &Path) -> Result<(), BlockError> {
    // Where a header of any version has its crypt_method (QEMU's docs/interop/qcow2.rst), of big-endian
    // 32 bits; 0 is none.
    const METHOD: u64 = 32;
    let mut method = [0; 4];
    let file = File::open(path).map_err(BlockError::io("open", path))?;
    match file.read_exact_at(&mut method, METHOD) {
        Ok(()) if method != [0; 4] => Err(BlockError::Encrypted(path.to_owned())),
        // What is too short is no image, which imago says.
        _ => Ok(()),
    }
}

fn open_storage(
    path: &Path,
    options: &StorageOpenOptions,
    sync: bool,
) -> Result<Storage, BlockError> {
    let (direct, read_only) = (options.get_direct(), !options.get_writable());
    let image = open_locked(path, read_only, direct, sync)?;
    let storage = Storage::from_open_file(image.file, options.clone());
    storage.map_err(BlockError::io("open", path))
}
