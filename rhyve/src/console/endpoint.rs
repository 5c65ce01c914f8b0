//! Opening the host's end of a console, without ever changing what other programs share.
//!
//! O_NONBLOCK belongs to an open file description, which standard input and output share with the
//! shell and with whatever runs next. So terminals and pipes are opened anew through /proc/self/fd,
//! with a description of their own; what cannot be (a socket, somebody else's terminal) is polled
//! before each write, and given no more than it is sure to take.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::stat::Mode;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{isatty, read, write};

/// What a descriptor that blocks takes at once when poll(2) calls it writable: a pipe PIPE_BUF bytes,
/// a socket more than that.
const BLOCKING_CHUNK: usize = 4096;

/// Where output goes.
pub(super) struct Writer {
    fd: OwnedFd,
    /// Set if a write could block: no more than this many bytes, after a poll.
    chunk: Option<usize>,
}

impl Writer {
    /// For a descriptor that is O_NONBLOCK, or a regular file.
    pub(super) fn nonblocking(fd: OwnedFd) -> Self {
        Self { fd, chunk: None }
    }

    /// For a descriptor others share.
    pub(super) fn shared(fd: BorrowedFd<'_>) -> io::Result<Self> {
        if let Some(own) = reopen(fd, OFlag::O_WRONLY) {
            return Ok(Self::nonblocking(own));
        }
        let chunk = if isatty(fd).unwrap_or(false) {
            1
        } else {
            BLOCKING_CHUNK
        };
        Ok(Self {
            fd: fd.try_clone_to_owned()?,
            chunk: Some(chunk),
        })
    }

    /// Writes what can be written without blocking; `Ok(0)` if nothing can.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = match self.chunk {
            None => bytes,
            Some(_) if !writable(self.fd.as_fd()) => return Ok(0),
            Some(chunk) => bytes.get(..chunk).unwrap_or(bytes),
        };
        match write(&self.fd, bytes) {
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
            result => Ok(result?),
        }
    }

    /// Its descriptor once more, to wait for.
    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }
}

/// Reads what is there: `Ok(None)` if nothing is, `Ok(Some(0))` at the end.
pub(super) fn read_some(fd: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Option<usize>> {
    match read(fd, into) {
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        result => Ok(Some(result?)),
    }
}

/// A descriptor to read what others share.
pub(super) fn shared_reader(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    match reopen(fd, OFlag::O_RDONLY) {
        Some(own) => Ok(own),
        None => fd.try_clone_to_owned(),
    }
}

/// Opens a terminal or pipe anew, O_NONBLOCK.
fn reopen(fd: BorrowedFd<'_>, access: OFlag) -> Option<OwnedFd> {
    let kind = File::from(fd.try_clone_to_owned().ok()?)
        .metadata()
        .ok()?
        .file_type();
    if !kind.is_fifo() && !isatty(fd).unwrap_or(false) {
        return None;
    }
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = access | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    open(path.as_str(), flags, Mode::empty()).ok()
}

/// Columns and rows of a terminal, if it is one and knows them.
pub(super) fn window_size(fd: BorrowedFd<'_>) -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(fd).ok()?;
    (size.ws_col != 0 && size.ws_row != 0).then_some((size.ws_col, size.ws_row))
}

fn writable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}

/// Whether the other side of a pseudo-terminal is closed.
pub(super) fn hung_up(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    polled.is_ok()
        && fds[0]
            .revents()
            .is_some_and(|got| got.contains(PollFlags::POLLHUP))
}

/// Makes a pseudo-terminal in raw mode; returns our side and the path of the other.
pub(super) fn make_pty() -> io::Result<(OwnedFd, String)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let master = posix_openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let path = ptsname_r(&master)?;
    // Opened and closed once, so that poll(2) says POLLHUP until somebody opens it.
    let slave = open_tty(Path::new(&path))?;
    let mut termios = tcgetattr(&slave)?;
    cfmakeraw(&mut termios);
    tcsetattr(&slave, SetArg::TCSANOW, &termios)?;
    Ok((master.as_fd().try_clone_to_owned()?, path))
}

/// Opens a terminal device without making it ours.
pub(super) fn open_tty(path: &Path) -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(path)?;
    Ok(file.into())
}

/// Opens a file to append to, readable by its owner only if it is new: a console may show secrets.
pub(super) fn open_log(path: &Path) -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    Ok(file.into())
}
