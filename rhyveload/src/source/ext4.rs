//! ext2, ext3 and ext4, read by the `ext4-view` crate.
//!
//! Its limit: in a file with a block map (ext2, ext3) a hole that is large enough to leave out a
//! block of pointers is reported as damage.

use std::cell::RefCell;
use std::error::Error;
use std::fmt;
use std::io;

use ext4_view::{Ext4, Ext4Error, Ext4Read, File, FileType};

use super::{BootFs, DirEntry, FileKind, FsError, Slice, Source, Stat};

/// An ext2, ext3 or ext4 file system.
#[derive(Debug)]
pub struct Ext4Fs(Ext4);

impl Ext4Fs {
    /// Recognizes a file system by its superblock.
    ///
    /// # Errors
    ///
    /// It is one, but damaged, or it has features that are not supported.
    pub fn probe(part: &Slice) -> Result<Option<Self>, FsError> {
        /// s_magic (Documentation/filesystems/ext4/super.rst).
        const MAGIC: (u64, [u8; 2]) = (1024 + 56, [0x53, 0xef]);
        let mut magic = [0; 2];
        if part.size() < 4096 {
            return Ok(None);
        }
        part.read(MAGIC.0, &mut magic)?;
        if magic != MAGIC.1 {
            return Ok(None);
        }
        let fs = Ext4::load(Box::new(Reader(part.clone()))).map_err(error)?;
        Ok(Some(Self(fs)))
    }
}

struct Reader(Slice);

impl Ext4Read for Reader {
    fn read(
        &mut self,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        Ok(self.0.read(offset, bytes)?)
    }
}

fn error(error: Ext4Error) -> FsError {
    match error {
        Ext4Error::NotFound => FsError::NotFound,
        Ext4Error::NotADirectory => FsError::NotDirectory,
        Ext4Error::IsADirectory | Ext4Error::IsASpecialFile => FsError::NotFile,
        Ext4Error::TooManySymlinks => FsError::Loop,
        other => FsError::Damaged(other.to_string()),
    }
}

fn kind(kind: FileType) -> FileKind {
    match kind {
        FileType::Regular => FileKind::File,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        _ => FileKind::Other,
    }
}

/// The crate takes absolute paths only.
fn absolute(path: &str) -> String {
    format!("/{}", path.trim_start_matches('/'))
}

impl BootFs for Ext4Fs {
    fn open(&self, path: &str) -> Result<Box<dyn Source>, FsError> {
        let file = self.0.open(&absolute(path)).map_err(error)?;
        Ok(Box::new(Open {
            size: file.metadata().len(),
            file: RefCell::new(file),
        }))
    }

    fn read_dir(&self, path: &str) -> Result<Vec<DirEntry>, FsError> {
        let mut entries = Vec::new();
        for entry in self.0.read_dir(&absolute(path)).map_err(error)? {
            let entry = entry.map_err(error)?;
            let name = entry.file_name();
            let name = String::from_utf8_lossy(name.as_ref()).into_owned();
            if name != "." && name != ".." {
                let kind = kind(entry.file_type().map_err(error)?);
                entries.push(DirEntry { name, kind });
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn stat(&self, path: &str) -> Result<Stat, FsError> {
        let metadata = self.0.metadata(&absolute(path)).map_err(error)?;
        Ok(Stat {
            kind: kind(metadata.file_type()),
            size: metadata.len(),
        })
    }
}

/// An open file. The crate's files have a position; a [`Source`] has none.
struct Open {
    size: u64,
    file: RefCell<File>,
}

impl fmt::Debug for Open {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Open").field("size", &self.size).finish()
    }
}

impl Source for Open {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, mut bytes: &mut [u8]) -> io::Result<()> {
        let mut file = self.file.borrow_mut();
        // Seeking walks over the blocks before, so a reader that goes on does not seek.
        if file.position() != offset {
            file.seek_to(offset).map_err(io::Error::other)?;
        }
        while !bytes.is_empty() {
            match file.read_bytes(bytes).map_err(io::Error::other)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => bytes = &mut bytes[n..],
            }
        }
        Ok(())
    }
}
