//! Files and directories below the shared one, by descriptors.
//!
//! A fid is a descriptor (O_PATH) of the file itself, so what it means does not change when somebody
//! renames something. From a directory the way goes by openat2(2) with one name at a time, never
//! through a symbolic link and never out (RESOLVE_BENEATH): links are the guest's to follow, and lead
//! it through its own mount. A file is opened to read or write through its descriptor in
//! /proc/self/fd, and only if it is a regular file or a directory: a FIFO or a device of the host is
//! not the guest's to touch.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};

use super::wire::{Errno, Qid};

/// Bits of a mode that a guest can set. Not those by which a program of the host would get rights of
/// whoever runs rhyve.
pub const MODE: u32 = 0o1777;

/// /proc/self/fd.
pub struct Descriptors(OwnedFd);

impl Descriptors {
    /// # Errors
    /// There is no /proc.
    pub fn open() -> io::Result<Self> {
        Ok(Self(File::open("/proc/self/fd")?.into()))
    }

    /// The directory, and the name in it that stands for `node`'s file.
    pub fn path(&self, node: &Node) -> (BorrowedFd<'_>, String) {
        (self.0.as_fd(), node.0.as_raw_fd().to_string())
    }

    /// Where the file is now, as the host sees it; something that does not exist if it was removed.
    pub fn place(&self, node: &Node) -> Result<Vec<u8>, Errno> {
        let (dir, name) = self.path(node);
        Ok(readlinkat(dir, name.as_str())?.into_vec())
    }

    /// Opens the file itself.
    pub fn reopen(&self, node: &Node, flags: OFlag) -> Result<File, Errno> {
        if !matches!(node.kind()?, SFlag::S_IFREG | SFlag::S_IFDIR) {
            return Err(Errno::EACCES);
        }
        let (dir, name) = self.path(node);
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        Ok(openat(dir, name.as_str(), flags, Mode::empty())?.into())
    }
}

/// A file of any kind.
#[derive(Debug)]
pub struct Node(OwnedFd);

impl Node {
    /// The shared directory.
    ///
    /// # Errors
    /// It is none.
    pub fn root(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self(nix::fcntl::open(path, flags, Mode::empty())?))
    }

    /// The same once more.
    pub fn duplicate(&self) -> Result<Self, Errno> {
        let duplicate = self.0.try_clone();
        Ok(Self(duplicate.map_err(|_| Errno::EMFILE)?))
    }

    /// What the name stands for in this directory.
    pub fn child(&self, name: &[u8]) -> Result<Self, Errno> {
        self.open(name, OFlag::O_PATH | OFlag::O_NOFOLLOW, 0)
            .map(Self)
    }

    /// Makes (or finds) a regular file in this directory and opens it.
    pub fn create(&self, name: &[u8], flags: OFlag, mode: u32) -> Result<(Self, File), Errno> {
        let flags = flags | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = self.open(name, flags | OFlag::O_NOCTTY, mode & MODE)?;
        let node = Self(file.try_clone().map_err(|_| Errno::EMFILE)?);
        // It may have been there, and be anything.
        if node.kind()? != SFlag::S_IFREG {
            return Err(Errno::EACCES);
        }
        Ok((node, file.into()))
    }

    fn open(&self, name: &[u8], flags: OFlag, mode: u32) -> Result<OwnedFd, Errno> {
        // The last part may be a link, which O_PATH with O_NOFOLLOW opens as such.
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .mode(Mode::from_bits_truncate(mode))
            .resolve(resolve);
        for _ in 0..8 {
            match openat2(&self.0, name, how) {
                // Somebody renamed something meanwhile (openat2(2)).
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                // No path leads out.
                Err(Errno::EXDEV) => return Err(Errno::ENOENT),
                other => return other,
            }
        }
        Err(Errno::EAGAIN)
    }

    /// What is known of it.
    pub fn stat(&self) -> Result<FileStat, Errno> {
        fstat(&self.0)
    }

    /// What kind of file it is.
    pub fn kind(&self) -> Result<SFlag, Errno> {
        Ok(SFlag::from_bits_truncate(
            self.stat()?.st_mode & SFlag::S_IFMT.bits(),
        ))
    }

    /// What identifies it.
    pub fn qid(&self) -> Result<Qid, Errno> {
        self.stat().map(|stat| qid(&stat))
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What identifies a file of which this is known.
pub fn qid(stat: &FileStat) -> Qid {
    Qid {
        kind: qid_kind(stat.st_mode),
        version: (stat.st_mtime as u32) ^ (stat.st_mtime_nsec as u32) ^ (stat.st_size as u32),
        // Files of another file system that is mounted below have numbers of their own.
        path: stat.st_ino ^ stat.st_dev.rotate_right(16),
    }
}

pub fn qid_kind(mode: u32) -> u8 {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => 0x80,
        libc::S_IFLNK => 0x02,
        _ => 0,
    }
}
