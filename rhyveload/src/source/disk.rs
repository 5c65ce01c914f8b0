//! Disk images (`-d`): which file systems are on them, and which one is booted from.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::fcntl::OFlag;

use super::ext4::Ext4Fs;
use super::partition::{Partition, partitions};
use super::ufs::Ufs;
use super::{BootFs, FsError, Slice, Source};

/// bhyveload takes as many disks.
pub const DISKS_MAX: usize = 32;

/// Why there is nothing to boot from on a disk.
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
    /// A format with a structure of its own.
    #[error(
        "{}: a qcow2 image, which is not supported yet: make a raw one with \
        `qemu-img convert -O raw`", .0.display()
    )]
    Qcow2(PathBuf),
    /// Nothing that can be read.
    #[error(
        "{}: no UFS or ext2/3/4 file system found (looked at {looked_at})", path.display()
    )]
    NoFileSystem {
        /// The image.
        path: PathBuf,
        /// The names of the partitions.
        looked_at: String,
    },
}

/// A file system on a disk.
#[derive(Debug)]
pub struct DiskVolume {
    /// Its name as FreeBSD's loader has it: `disk0p2:`.
    pub name: String,
    /// What is in it.
    pub fs: Box<dyn BootFs>,
}

/// Finds the file systems of a disk image, those of FreeBSD partitions first.
///
/// # Errors
///
/// The image cannot be read, or there is none.
pub fn volumes(path: &Path, unit: usize) -> Result<Vec<DiskVolume>, DiskError> {
    let read = |source| DiskError::Read {
        path: path.to_owned(),
        source,
    };
    let disk: Rc<dyn Source> = Rc::new(DiskFile::open(path).map_err(|source| DiskError::Open {
        path: path.to_owned(),
        source,
    })?);
    if disk.head(4).map_err(read)? == *b"QFI\xfb" {
        return Err(DiskError::Qcow2(path.to_owned()));
    }
    let mut parts = partitions(&*disk).map_err(read)?;
    parts.sort_by_key(|part| !part.freebsd);
    let mut found = Vec::new();
    for part in &parts {
        // The whole disk is looked at only if there is nothing in its partitions.
        if part.name.is_empty() && !found.is_empty() {
            continue;
        }
        if let Some(fs) = mount(&disk, part).map_err(read)? {
            let name = format!("disk{unit}{}:", part.name);
            found.push(DiskVolume { name, fs });
        }
    }
    if found.is_empty() {
        let names = parts.iter().map(|part| format!("disk{unit}{}:", part.name));
        return Err(DiskError::NoFileSystem {
            path: path.to_owned(),
            looked_at: names.collect::<Vec<_>>().join(" "),
        });
    }
    Ok(found)
}

/// Recognizes a file system.
type Probe = fn(&Slice) -> Result<Option<Box<dyn BootFs>>, FsError>;

/// What file system is in a partition. A damaged one is none: another may be whole.
fn mount(disk: &Rc<dyn Source>, part: &Partition) -> io::Result<Option<Box<dyn BootFs>>> {
    let slice = Slice::new(disk.clone(), part.start, part.len);
    let probes: [Probe; 2] = [
        |slice| Ok(Ufs::probe(slice)?.map(|fs| Box::new(fs) as _)),
        |slice| Ok(Ext4Fs::probe(slice)?.map(|fs| Box::new(fs) as _)),
    ];
    for probe in probes {
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
