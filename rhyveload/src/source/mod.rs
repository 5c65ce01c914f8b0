//! Where bytes come from: files, memory when they had to be decompressed, and whole file systems.
//!
//! [`Source`] is bytes at offsets. [`BootFs`] is a file system that a loader reads `/boot` from: a
//! directory of the host ([`dir`]), or what [`disk`] finds on a disk image by [`partition`] and
//! reads by [`ufs`], [`ext4`] or [`fat`]. [`devices`] is all of them under their names. All of it is
//! read-only, without root and without a mount.

pub mod devices;
pub mod dir;
pub mod disk;
pub mod ext4;
pub mod fat;
pub mod partition;
pub mod ufs;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

/// Bytes that can be read at any offset.
pub trait Source: std::fmt::Debug {
    /// How many there are.
    fn size(&self) -> u64;

    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    ///
    /// There are fewer bytes, or reading failed.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// The file that has these bytes at the same offsets, if there is one.
    fn file(&self) -> Option<&File> {
        None
    }

    /// The first bytes, `limit` at most.
    ///
    /// # Errors
    ///
    /// Reading failed.
    fn head(&self, limit: usize) -> io::Result<Vec<u8>> {
        let len = usize::try_from(self.size()).map_or(limit, |size| size.min(limit));
        let mut head = vec![0; len];
        self.read(0, &mut head)?;
        Ok(head)
    }
}

impl Source for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(bytes.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(from);
        Ok(())
    }
}

impl Source for Vec<u8> {
    fn size(&self) -> u64 {
        self.as_slice().size()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.as_slice().read(offset, bytes)
    }
}

/// A regular file, with the length that it had when it was opened.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    size: u64,
}

impl FileSource {
    /// Takes an open file.
    ///
    /// # Errors
    ///
    /// It cannot be looked at, or it is not a regular file (a directory, a pipe): loaders read
    /// their files in no particular order.
    pub fn new(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok(Self {
            size: metadata.len(),
            file,
        })
    }
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

/// Reads a source from its beginning to its end.
#[derive(Debug)]
pub struct Stream<'a> {
    source: &'a dyn Source,
    position: u64,
}

impl<'a> Stream<'a> {
    /// All of a source.
    pub fn new(source: &'a dyn Source) -> Self {
        Self {
            source,
            position: 0,
        }
    }
}

impl io::Read for Stream<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.source.size() - self.position;
        let len = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
        self.source.read(self.position, &mut bytes[..len])?;
        self.position += len as u64;
        Ok(len)
    }
}

/// A part of something larger: a partition of a disk.
#[derive(Clone, Debug)]
pub struct Slice {
    whole: Rc<dyn Source>,
    start: u64,
    len: u64,
}

impl Slice {
    /// `len` bytes from `start` on, less where the whole is shorter.
    pub fn new(whole: Rc<dyn Source>, start: u64, len: u64) -> Self {
        let len = len.min(whole.size().saturating_sub(start));
        Self { whole, start, len }
    }
}

impl Source for Slice {
    fn size(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.whole.read(self.start + offset, bytes)
    }
}

/// What a name in a file system stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link; only listings show them, everything else follows them.
    Symlink,
    /// A device, a socket, a pipe.
    Other,
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name; bytes that are not UTF-8 are replaced.
    pub name: String,
    /// What it stands for.
    pub kind: FileKind,
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// What it is, never a symbolic link.
    pub kind: FileKind,
    /// Its length in bytes.
    pub size: u64,
}

/// Why a file of a [`BootFs`] cannot be had. Whoever asked for it knows its path.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// There is no such name.
    #[error("No such file or directory")]
    NotFound,
    /// The path goes through a file, or a file was to be listed.
    #[error("Not a directory")]
    NotDirectory,
    /// A directory or device was to be opened.
    #[error("not a regular file")]
    NotFile,
    /// Symbolic links without end.
    #[error("Too many levels of symbolic links")]
    Loop,
    /// The file system contradicts itself.
    #[error("the file system is damaged: {0}")]
    Damaged(String),
    /// Reading failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A file system to load from. Paths have slashes and begin at its root; symbolic links are followed
/// inside of it, wherever they point.
pub trait BootFs: std::fmt::Debug {
    /// Opens a regular file.
    ///
    /// # Errors
    ///
    /// See [`FsError`].
    fn open(&self, path: &str) -> Result<Box<dyn Source>, FsError>;

    /// Lists a directory, without `.` and `..`, sorted by name.
    ///
    /// # Errors
    ///
    /// See [`FsError`].
    fn read_dir(&self, path: &str) -> Result<Vec<DirEntry>, FsError>;

    /// Looks at a file.
    ///
    /// # Errors
    ///
    /// See [`FsError`].
    fn stat(&self, path: &str) -> Result<Stat, FsError>;

    /// Reads a whole small file, `limit` bytes at most.
    ///
    /// # Errors
    ///
    /// See [`FsError`]; a longer file is an [`FsError::Io`].
    fn read_file(&self, path: &str, limit: u64) -> Result<Vec<u8>, FsError> {
        let file = self.open(path)?;
        if file.size() > limit {
            let text = format!("it has {} bytes, more than {limit}", file.size());
            return Err(io::Error::other(text).into());
        }
        let mut bytes = vec![0; file.size() as usize];
        file.read(0, &mut bytes)?;
        Ok(bytes)
    }
}
