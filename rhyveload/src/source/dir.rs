//! A directory of the host as a file system, which is never left.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use super::{BootFs, DirEntry, FileKind, FileSource, FsError, Source, Stat};

/// A resolution is tried again this often when somebody renames directories meanwhile.
const TRIES: usize = 16;

/// A directory of the host.
#[derive(Debug)]
pub struct HostDir {
    root: OwnedFd,
}

impl HostDir {
    /// Opens the directory.
    ///
    /// # Errors
    ///
    /// The system's answer: it is not there, or no directory.
    pub fn new(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open(path, flags, Mode::empty())?;
        Ok(Self { root })
    }

    /// openat2(2) with RESOLVE_IN_ROOT takes the directory for `/`: neither `..` nor an absolute
    /// symbolic link leads out of it.
    fn open_fd(&self, path: &str, flags: OFlag) -> Result<OwnedFd, FsError> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let path = if path.is_empty() { "/" } else { path };
        let mut answer = Err(Errno::EAGAIN);
        for _ in 0..TRIES {
            answer = openat2(&self.root, path, how);
            if answer.as_ref().err() != Some(&Errno::EAGAIN) {
                break;
            }
        }
        answer.map_err(|errno| match errno {
            Errno::ENOENT => FsError::NotFound,
            Errno::ENOTDIR => FsError::NotDirectory,
            Errno::ELOOP => FsError::Loop,
            other => FsError::Io(other.into()),
        })
    }
}

impl BootFs for HostDir {
    fn open(&self, path: &str) -> Result<Box<dyn Source>, FsError> {
        // Without O_NONBLOCK a pipe would be waited for, only to be refused.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = File::from(self.open_fd(path, flags)?);
        if !file.metadata()?.is_file() {
            return Err(FsError::NotFile);
        }
        Ok(Box::new(FileSource::new(file)?))
    }

    fn read_dir(&self, path: &str) -> Result<Vec<DirEntry>, FsError> {
        let fd = self.open_fd(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        let mut dir = Dir::from_fd(fd).map_err(io::Error::from)?;
        let mut entries = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(io::Error::from)?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            entries.push(DirEntry {
                name: String::from_utf8_lossy(name).into_owned(),
                kind: match entry.file_type() {
                    Some(Type::File) => FileKind::File,
                    Some(Type::Directory) => FileKind::Directory,
                    Some(Type::Symlink) => FileKind::Symlink,
                    _ => FileKind::Other,
                },
            });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn stat(&self, path: &str) -> Result<Stat, FsError> {
        let metadata = File::from(self.open_fd(path, OFlag::O_PATH)?).metadata()?;
        Ok(Stat {
            kind: match metadata.file_type() {
                kind if kind.is_file() => FileKind::File,
                kind if kind.is_dir() => FileKind::Directory,
                _ => FileKind::Other,
            },
            size: metadata.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_stay_inside() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("root");
        fs::create_dir_all(root.join("boot")).unwrap();
        fs::write(tmp.path().join("secret"), "outside").unwrap();
        fs::write(root.join("secret"), "inside").unwrap();
        symlink("/secret", root.join("boot/absolute")).unwrap();
        symlink("../../../secret", root.join("boot/relative")).unwrap();
        symlink("/proc/self/root", root.join("boot/proc")).unwrap();
        symlink("loop", root.join("boot/loop")).unwrap();
        let fs = HostDir::new(&root).unwrap();
        for name in ["/boot/absolute", "boot/relative", "/../secret"] {
            assert_eq!(fs.read_file(name, 100).unwrap(), b"inside", "{name}");
        }
        assert!(matches!(fs.open("/boot/proc"), Err(FsError::NotFound)));
        assert!(matches!(fs.open("/boot/loop"), Err(FsError::Loop)));
        assert!(matches!(fs.open("/boot"), Err(FsError::NotFile)));
        let through = fs.stat("/secret/x").unwrap_err();
        assert!(matches!(through, FsError::NotDirectory), "{through:?}");
        let names: Vec<_> = fs.read_dir("/boot").unwrap();
        assert_eq!(names[0].name, "absolute");
        assert_eq!(names[0].kind, FileKind::Symlink);
        assert_eq!(fs.stat("/boot/absolute").unwrap().size, 6);
    }
}
