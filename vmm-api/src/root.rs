//! Where VM objects live: one private directory on tmpfs, `$RHYVE_ROOT` or `/dev/shm/rhyve-$UID`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fstat, mode_t};
use nix::unistd::{geteuid, mkdir};

use crate::name::VmName;

/// Names the directory that holds the objects, in place of `/dev/shm/rhyve-$UID`.
pub const ROOT_VARIABLE: &str = "RHYVE_ROOT";

/// An opened root directory, known to be ours and private.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
    path: PathBuf,
}

/// Why the root directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A system call on the root directory failed.
    #[error("{}: cannot {action}; set {ROOT_VARIABLE} to a directory of yours on a tmpfs", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The root directory.
        path: PathBuf,
        /// The system's answer.
        source: Errno,
    },
    /// The root directory belongs to somebody else.
    #[error("{}: belongs to uid {owner}, not to you (uid {me}): others could change your VMs there; set {ROOT_VARIABLE} to a directory of yours", path.display())]
    Owner {
        /// The root directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The effective user id of this process.
        me: u32,
    },
    /// The root directory is open to group or others.
    #[error("{}: mode {mode:04o} lets others in; chmod 700 it, or set RHYVE_ROOT to a directory that nobody else uses", path.display())]
    Mode {
        /// The root directory.
        path: PathBuf,
        /// Its permission bits.
        mode: mode_t,
    },
}

impl Root {
    /// Opens the user's root, making it (mode 0700) if it is not there.
    ///
    /// # Errors
    ///
    /// The directory cannot be made or opened, is a symbolic link, belongs to another user, or is
    /// open to others.
    pub fn open() -> Result<Self, RootError> {
        let path = match std::env::var_os(ROOT_VARIABLE) {
            Some(dir) if !dir.is_empty() => PathBuf::from(dir),
            _ => PathBuf::from(format!("/dev/shm/rhyve-{}", geteuid())),
        };
        Self::open_at(&path)
    }

    /// Opens `path` as a root, making the directory itself, but not its parents, when absent.
    ///
    /// # Errors
    ///
    /// As [`Root::open`].
    pub fn open_at(path: &Path) -> Result<Self, RootError> {
        let io = |action| {
            move |source| RootError::Io {
                action,
                path: path.to_owned(),
                source,
            }
        };
        match mkdir(path, Mode::S_IRWXU) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(source) => return Err(io("make this directory")(source)),
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = open(path, flags, Mode::empty()).map_err(io("open this directory"))?;
        let stat = fstat(&fd).map_err(io("look at this directory"))?;
        let me = geteuid().as_raw();
        if stat.st_uid != me {
            return Err(RootError::Owner {
                path: path.to_owned(),
                owner: stat.st_uid,
                me,
            });
        }
        if stat.st_mode & 0o077 != 0 {
            return Err(RootError::Mode {
                path: path.to_owned(),
                mode: stat.st_mode & 0o7777,
            });
        }
        Ok(Self {
            fd,
            path: path.to_owned(),
        })
    }

    /// The directory's path, for messages and for the control socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all objects, sorted. Entries that are no objects are passed over.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<VmName>, RootError> {
        let io = |source| RootError::Io {
            action: "read this directory",
            path: self.path.clone(),
            source,
        };
        let mut dir =
            nix::dir::Dir::openat(&self.fd, ".", OFlag::O_RDONLY, Mode::empty()).map_err(io)?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(io)?;
            let name = std::ffi::OsStr::from_bytes(entry.file_name().to_bytes());
            if let Some(Ok(name)) = name.to_str().map(str::parse) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_root_is_made_private_and_reopened() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("root");
        Root::open_at(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert!(Root::open_at(&path).unwrap().list().unwrap().is_empty());
    }

    #[test]
    fn an_open_root_and_a_symbolic_link_are_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("root");
        Root::open_at(&path).unwrap();
        let link = tmp.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(matches!(Root::open_at(&link), Err(RootError::Io { .. })));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o750)).unwrap();
        assert!(matches!(
            Root::open_at(&path),
            Err(RootError::Mode { mode: 0o750, .. })
        ));
    }

    #[test]
    fn only_names_are_listed() {
        let tmp = tempfile::tempdir().unwrap();
        let root = Root::open_at(&tmp.path().join("root")).unwrap();
        for dir in ["b", "a", ".hidden", "not a name"] {
            std::fs::create_dir(root.path().join(dir)).unwrap();
        }
        let names: Vec<_> = root.list().unwrap().iter().map(|n| n.to_string()).collect();
        assert_eq!(names, ["a", "b"]);
    }
}
