//! The disks of copies: each copy of a machine has files of its own in place of the images that the
//! machine writes to.
//!
//! For an image `DISK` and a copy of the name NAME they are beside the image: `DISK.NAME.base`, what was
//! on the disk, and `DISK.NAME`, a qcow2 image over it that takes what the copy writes. The base is
//! copied once, when the disk was an image of its own; a copy of a copy has a hard link to the same
//! base and a copy of the other's layer. Nobody writes to a base, so it is there, unchanged, as long as
//! one of them is.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::{LockedVm, VmError, errno, layer};
use crate::memory::next_data;
use crate::name::VmName;
use crate::state::{DiskFormat, OwnDisk, VmState, WrittenDisk};

/// Who keeps others from writing to the images while they are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Images {
    /// This process has them locked, and does not write meanwhile.
    Held,
    /// They are to be locked.
    Free,
}

impl LockedVm {
    /// Makes the disks of this object as those are now that a machine in the state `from` writes to, and
    /// puts them into `state`.
    ///
    /// # Errors
    ///
    /// An image is no regular file, in use or not known; there are such files, or there is no room for
    /// them. Whatever was made is on record, to be removed with the object.
    pub(super) fn copy_disks(
        &mut self,
        from: &VmState,
        state: &mut VmState,
        images: Images,
    ) -> Result<(), VmError> {
        state.machine.disks.clear();
        let Some(run) = &mut state.machine.run else {
            return Ok(());
        };
        if run.has_unknown_disks() {
            return Err(VmError::UnknownDisks);
        }
        let mut record = VmState::created();
        for disk in run.disks.iter_mut().flatten() {
            let mut theirs = from.machine.disks.iter();
            let theirs = theirs.find(|own| own.layer == disk.path);
            let own = files(disk, &self.name)?;
            let made = Files::create(&own, theirs)?;
            record.machine.disks.push(own.clone());
            self.store(&mut record)?;
            match theirs {
                Some(theirs) => made.like(&own, &theirs.layer),
                None => made.of(&own, disk, images),
            }?;
            disk.path = own.layer;
            disk.format = DiskFormat::Qcow2;
        }
        state.machine.disks = record.machine.disks;
        Ok(())
    }

    /// Removes the files of its disks.
    pub(super) fn remove_disks(&self, state: &VmState) -> Result<(), VmError> {
        let disks = state.machine.disks.iter();
        disks
            .flat_map(|own| [&own.layer, &own.base])
            .try_for_each(|path| match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(failed("remove this disk", path)(error))
                }
                _ => Ok(()),
            })
    }
}

/// Where the files of a copy of this name are.
fn files(disk: &WrittenDisk, name: &VmName) -> Result<OwnDisk, VmError> {
    let named = &disk.named;
    // Beside the image, not beside a link to it, which may be anywhere.
    let real = fs::canonicalize(named).or_else(|_| fs::canonicalize(&disk.path));
    let real = real.map_err(failed("find this disk image", named))?;
    // A block device's copy would not be beside its node; where it should be, nobody knows.
    if !real.is_file() {
        return Err(VmError::NotAFile(named.clone()));
    }
    let beside = |end: &str| {
        let mut file = named.file_name().unwrap_or_default().to_owned();
        file.push(format!(".{name}{end}"));
        real.with_file_name(file)
    };
    Ok(OwnDisk {
        named: named.clone(),
        layer: beside(""),
        base: beside(".base"),
        blocks: disk.blocks,
    })
}

/// New files, empty but for a base that is shared.
struct Files {
    layer: File,
    base: Option<File>,
}

impl Files {
    /// Makes both or none.
    fn create(own: &OwnDisk, theirs: Option<&OwnDisk>) -> Result<Self, VmError> {
        let layer = create(&own.layer)?;
        let base = match theirs {
            Some(theirs) => fs::hard_link(&theirs.base, &own.base)
                .map(|()| None)
                .map_err(failed("make a hard link for a disk", &own.base)),
            None => create(&own.base).map(Some),
        };
        match base {
            Ok(base) => Ok(Self { layer, base }),
            Err(error) => {
                // The first error counts.
                let _ = fs::remove_file(&own.layer);
                Err(error)
            }
        }
    }

    /// Over a shared base: another layer with what is in theirs.
    fn like(self, own: &OwnDisk, theirs: &Path) -> Result<(), VmError> {
        let from = File::open(theirs).map_err(failed("open this disk", theirs))?;
        let copied = copy(&from, &self.layer);
        copied
            .and_then(|()| layer::rename_below(&self.layer, file_name(&own.base)?))
            .map_err(failed("copy a disk to", &own.layer))
    }

    /// An empty layer over a copy of an image.
    fn of(self, own: &OwnDisk, disk: &WrittenDisk, images: Images) -> Result<(), VmError> {
        let image = File::open(&disk.path).map_err(failed("open this disk image", &disk.path))?;
        if images == Images::Free {
            lock(&image).map_err(|_| VmError::ImageInUse(disk.path.clone()))?;
        }
        let Some(base) = self.base else {
            return Ok(());
        };
        let made = copy(&image, &base).and_then(|()| {
            let size = match disk.format {
                DiskFormat::Raw => base.metadata()?.len(),
                DiskFormat::Qcow2 => {
                    let below = layer::below(&base)?.map(PathBuf::from);
                    if let Some(below) = below.filter(|below| below.is_relative()) {
                        // It may be relative to another directory than where the copy is.
                        let below = disk.path.with_file_name("").join(below);
                        let below = below.to_str().ok_or(io::ErrorKind::InvalidFilename)?;
                        layer::rename_below(&base, below)?;
                    }
                    layer::size(&base)?
                }
            };
            base.set_permissions(Permissions::from_mode(0o400))?;
            let size = size & !u64::from(disk.blocks.0.max(1) - 1);
            layer::make(&self.layer, size, file_name(&own.base)?, disk.format)
        });
        made.map_err(failed("copy a disk to", &own.base))
    }
}

fn file_name(path: &Path) -> io::Result<&str> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.ok_or_else(|| io::ErrorKind::InvalidFilename.into())
}

/// A file that was not there.
fn create(path: &Path) -> Result<File, VmError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options
        .open(path)
        .map_err(failed("make this file for a disk", path))
}

/// Keeps everybody from writing who locks the images that he writes to, as rhyve and QEMU do.
fn lock(file: &File) -> Result<(), Errno> {
    let whole = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole)).map(drop)
}

/// Makes an empty file the same as another: by sharing its blocks where the file system can (XFS,
/// Btrfs, bcachefs), otherwise by copying all but its holes.
fn copy(mut from: &File, mut to: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let len = from.metadata()?.len();
    to.set_len(len)?;
    let mut at = 0;
    while let Some(data) = next_data(from, at, len)? {
        from.seek(SeekFrom::Start(data.start))?;
        to.seek(SeekFrom::Start(data.start))?;
        // By copy_file_range(2), without a way through this process.
        let copied = io::copy(&mut io::Read::take(from, data.end - data.start), &mut to)?;
        if copied != data.end - data.start {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = data.end;
    }
    Ok(())
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VmError {
    move |error| match error.raw_os_error() {
        Some(_) => VmError::Io {
            action,
            path: path.to_owned(),
            source: errno(&error),
        },
        None => VmError::Disk {
            path: path.to_owned(),
            source: error,
        },
    }
}
