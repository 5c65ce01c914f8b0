//! `-c pty`: a new pseudo-terminal for the loader's menu and prompt, at a path that anybody can open
//! as if it were a serial line.
//!
//! ```text
//! whoever opens the path <-> outer terminal, raw <-thread-> inner terminal <-> standard input, output
//! ```
//!
//! The loader wants a terminal's end with its settings (keys one by one, new lines that return), and
//! so does whoever opens the path; a pseudo-terminal has only one such end, so there are two of them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{grantpt, openpty, posix_openpt, ptsname_r, unlockpt};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{dup2_stdin, dup2_stdout};

/// How often is looked whether somebody has come: the kernel does not tell.
const LOOK: Duration = Duration::from_millis(50);
/// How long the last words wait for a reader that is there.
const PATIENCE: Duration = Duration::from_millis(500);

/// The pseudo-terminal, which standard input and output are until this is dropped.
#[derive(Debug)]
pub struct Pty {
    path: PathBuf,
    outer: File,
    /// Ends with the thread.
    done: Receiver<()>,
}

impl Pty {
    /// Makes one, and makes it standard input and output.
    ///
    /// # Errors
    ///
    /// The system has no more of them.
    pub fn open() -> io::Result<Self> {
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = PathBuf::from(ptsname_r(&master)?);
        let outer = File::from(master.as_fd().try_clone_to_owned()?);
        // Opened and closed once, so that poll(2) says POLLHUP until somebody opens it.
        let device = open_device(&path)?;
        let mut settings = tcgetattr(&device)?;
        cfmakeraw(&mut settings);
        tcsetattr(&device, SetArg::TCSANOW, &settings)?;
        drop(device);
        let inner = openpty(None, None)?;
        dup2_stdin(&inner.slave)?;
        dup2_stdout(&inner.slave)?;
        let (sender, done) = channel();
        let between = Between {
            outer: outer.try_clone()?,
            inner: inner.master.into(),
            path: path.clone(),
            _done: sender,
        };
        thread::Builder::new()
            .name("pty".into())
            .spawn(move || between.carry())?;
        Ok(Self { path, outer, done })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until somebody opens it.
    pub fn wait(&self) {
        while hung_up(self.outer.as_fd()) {
            thread::sleep(LOOK);
        }
    }
}

impl Drop for Pty {
    /// Gives standard input and output up, and waits until whoever is there has read the rest.
    fn drop(&mut self) {
        let _ = io::stdout().flush();
        let null = OpenOptions::new().read(true).write(true).open("/dev/null");
        if let Ok(null) = null
            && dup2_stdin(&null).is_ok()
            && dup2_stdout(&null).is_ok()
        {
            let _ = self.done.recv_timeout(2 * PATIENCE);
        }
    }
}

/// Between the two terminals.
struct Between {
    outer: File,
    inner: File,
    path: PathBuf,
    _done: Sender<()>,
}

impl Between {
    /// Carries bytes both ways until the loader gives its terminal up. What is said while nobody is
    /// there is lost.
    fn carry(mut self) {
        let mut bytes = [0; 4096];
        loop {
            let mut fds = vec![PollFd::new(self.inner.as_fd(), PollFlags::POLLIN)];
            let mut timeout = PollTimeout::NONE;
            if hung_up(self.outer.as_fd()) {
                timeout = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
            } else {
                fds.push(PollFd::new(self.outer.as_fd(), PollFlags::POLLIN));
            }
            if poll(&mut fds, timeout).is_err() {
                continue;
            }
            let ready = |fd: Option<&PollFd<'_>>| fd.and_then(PollFd::any).unwrap_or(false);
            let (said, typed) = (ready(fds.first()), ready(fds.get(1)));
            if said {
                match self.inner.read(&mut bytes) {
                    Ok(len @ 1..) => {
                        let text = bytes.get(..len).unwrap_or_default();
                        // Somebody may have come in the meantime.
                        if !hung_up(self.outer.as_fd()) {
                            let _ = self.outer.write_all(text);
                        }
                    }
                    // Nobody has it open any more (EIO).
                    _ => break,
                }
            }
            // EIO: whoever was there has gone.
            if typed && let Ok(len) = self.outer.read(&mut bytes) {
                let _ = self.inner.write_all(bytes.get(..len).unwrap_or_default());
            }
        }
        if !hung_up(self.outer.as_fd()) {
            self.drain();
        }
    }

    /// Waits until everything is read: what is not is lost when our end closes.
    fn drain(&self) {
        let Ok(device) = open_device(&self.path) else {
            return;
        };
        let end = Instant::now() + PATIENCE;
        let mut fds = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
        while Instant::now() < end && poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0) {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Opens a terminal device without making it ours.
fn open_device(path: &Path) -> io::Result<File> {
    let flags = (OFlag::O_NOCTTY | OFlag::O_NONBLOCK).bits();
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
}

/// Whether nobody has the other end open.
fn hung_up(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    let [fd] = fds;
    let hung_up = |got: PollFlags| got.contains(PollFlags::POLLHUP);
    polled.is_ok() && fd.revents().is_some_and(hung_up)
}
