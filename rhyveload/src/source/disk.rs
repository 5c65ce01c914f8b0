//! Disk images (`-d`): their format, their partitions, and the file systems in these.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, StorageOpenOptions};
use nix::fcntl::OFlag;

use super::ext4::Ext4Fs;
use super::fat::Fat;
use super::partition::{Partition, partitions};
use super::ufs::Ufs;
use super::ufs::superblock::Version;
use super::{BootFs, FsError, Slice, Source};

/// bhyveload takes as many disks.
pub const DISKS_MAX: usize = 32;

/// The first bytes of a qcow2 image (qemu, docs/interop/qcow2.rst).
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image cannot be opened.
    #[error("{}: cannot open it", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The image cannot be read.
    #[error("{}: cannot read it", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Nothing that can be read.
    #[error(
        "{}: no UFS, ext2/3/4 or FAT file system found (looked at {looked_at})", path.display()
    )]
    NoFileSystem {
        /// The image.
        path: PathBuf,
        /// The names of the partitions.
        looked_at: String,
    },
}

/// How an image keeps a disk's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One by one, with holes or without.
    Raw,
    /// QEMU's format, with backing files.
    Qcow2,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    /// Its image.
    pub path: PathBuf,
    /// The image's format.
    pub format: Format,
    /// Bytes of the disk.
    pub size: u64,
    /// Its partitions, those of FreeBSD first, the whole disk last.
    pub volumes: Vec<Volume>,
}

/// A partition of a disk, or all of it.
#[derive(Debug)]
pub struct Volume {
    /// Its name as FreeBSD's loader has it: `disk0p2:`.
    pub name: String,
    /// Bytes in it.
    pub size: u64,
    /// What is in it.
    pub fs: Option<Mounted>,
}

/// A file system that can be read.
#[derive(Debug)]
pub struct Mounted {
    /// What it is: `UFS2`, `FAT32`.
    pub kind: &'static str,
    /// Its files.
    pub fs: Box<dyn BootFs>,
}

impl Disk {
    /// Opens an image and looks for file systems.
    ///
    /// # Errors
    ///
    /// The image cannot be opened or read.
    pub fn open(path: &Path, unit: usize) -> Result<Self, DiskError> {
        let wrong = |source| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        let read = |source| DiskError::Read {
            path: path.to_owned(),
            source,
        };
        let raw = DiskFile::open(path).map_err(wrong)?;
        let (format, disk): (_, Rc<dyn Source>) = match raw.head(4).map_err(read)? {
            head if head == QCOW2_MAGIC => (
                Format::Qcow2,
                Rc::new(DiskImage::open(path).map_err(wrong)?),
            ),
            _ => (Format::Raw, Rc::new(raw)),
        };
        let mut parts = partitions(&*disk).map_err(read)?;
        parts.sort_by_key(|part| !part.freebsd);
        let mut volumes: Vec<Volume> = Vec::new();
        for part in &parts {
            // The whole disk is looked at only if there is nothing in its partitions.
            let whole = part.name.is_empty();
            let fs = match whole && volumes.iter().any(|volume| volume.fs.is_some()) {
                true => None,
                false => mount(&disk, part).map_err(read)?,
            };
            volumes.push(Volume {
                name: format!("disk{unit}{}:", part.name),
                size: part.len,
                fs,
            });
        }
        Ok(Self {
            path: path.to_owned(),
            format,
            size: disk.size(),
            volumes,
        })
    }

    /// What is wrong with a disk that no file system is on.
    pub fn without_file_system(&self) -> DiskError {
        let names = self.volumes.iter().map(|volume| volume.name.as_str());
        DiskError::NoFileSystem {
            path: self.path.clone(),
            looked_at: names.collect::<Vec<_>>().join(" "),
        }
    }
}

/// Recognizes a file system.
type Probe = fn(&Slice) -> Result<Option<Mounted>, FsError>;

const PROBES: [Probe; 3] = [
    |slice| {
        Ok(Ufs::probe(slice)?.map(|fs| Mounted {
            kind: match fs.superblock().version {
                Version::Ufs1 => "UFS1",
                Version::Ufs2 => "UFS2",
            },
            fs: Box::new(fs),
        }))
    },
    |slice| {
        Ok(Ext4Fs::probe(slice)?.map(|fs| Mounted {
            kind: "ext2/3/4",
            fs: Box::new(fs),
        }))
    },
    |slice| {
        Ok(Fat::probe(slice)?.map(|fs| Mounted {
            kind: "FAT",
            fs: Box::new(fs),
        }))
    },
];

/// What file system is in a partition. A damaged one is none: another may be whole.
fn mount(disk: &Rc<dyn Source>, part: &Partition) -> io::Result<Option<Mounted>> {
    let slice = Slice::new(disk.clone(), part.start, part.len);
    for probe in PROBES {
        match probe(&slice) {
            Ok(Some(fs)) => return Ok(Some(fs)),
            Ok(None) => {}
            Err(FsError::Io(error)) => return Err(error),
            Err(_) => {}
        }
    }
    Ok(None)
}

/// A raw image, sparse or not, or a block device.
#[derive(Debug)]
struct DiskFile {
    file: File,
    size: u64,
}

impl DiskFile {
    fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)?;
        let metadata = file.metadata()?;
        let size = match metadata.file_type() {
            kind if kind.is_file() => metadata.len(),
            kind if kind.is_block_device() => file.seek(io::SeekFrom::End(0))?,
            _ => {
                return Err(io::Error::other(
                    "neither a regular file nor a block device",
                ));
            }
        };
        Ok(Self { file, size })
    }
}

impl Source for DiskFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }
}

/// An image with a structure of its own, read by the `imago` crate.
struct DiskImage(FormatAccess<Storage>);

impl DiskImage {
    fn open(path: &Path) -> io::Result<Self> {
        let options = StorageOpenOptions::new().filename(path).write(false);
        let image = Qcow2::<Storage>::builder_path(path)
            .write(false)
            .storage_open_options(options)
            .open(PermissiveImplicitOpenGate::default())?;
        Ok(Self(FormatAccess::new(image)))
    }
}

impl std::fmt::Debug for DiskImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DiskImage")
    }
}

impl Source for DiskImage {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        // The crate fills what is behind the end with zeros.
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.0.size()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.0.read(bytes, offset)
    }
}
