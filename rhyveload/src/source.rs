//! Where the bytes of a kernel come from: a file, or memory when they had to be decompressed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that can be read at any offset.
pub trait Source {
    /// How many there are.
    fn size(&self) -> u64;

    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    ///
    /// There are fewer bytes, or reading failed.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

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

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }
}
