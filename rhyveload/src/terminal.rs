//! The terminal that a loader's menu and prompt are on: keys one by one, or lines with editing.
//!
//! It is always standard input and output: `-c DEVICE` puts the device there before anything else
//! ([`use_device`]), `-c pty` a new one ([`pty`](crate::pty)). Keys are read here; lines are rustyline's, which knows history, cursor keys and
//! Emacs's bindings.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal, stdin, stdout};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{
    LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr,
};
use nix::unistd::{dup2_stdin, dup2_stdout, read};
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Config, Editor};

/// Cursor keys send an escape and more; the escape key sends nothing more within this time.
const SEQUENCE: Duration = Duration::from_millis(50);

/// A key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Return.
    Enter,
    /// Escape, and nothing behind it.
    Escape,
    /// A letter or another ASCII character.
    Char(char),
    /// Control-C.
    Interrupt,
    /// Any other: a cursor key, a character that is not ASCII.
    Other,
}

/// What was entered at a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A line, without its end.
    Line(String),
    /// Control-C.
    Interrupted,
    /// Control-D on an empty line, or the terminal is gone.
    End,
}

/// Somebody at a terminal.
pub trait Terminal {
    /// Waits for a key for so long; none if there was none. Without a limit, waits for ever.
    ///
    /// # Errors
    ///
    /// The terminal is gone.
    fn key(&mut self, wait: Option<Duration>) -> io::Result<Option<Key>>;

    /// Asks for a line.
    ///
    /// # Errors
    ///
    /// The terminal does not work.
    fn line(&mut self, prompt: &str) -> io::Result<Entry>;
}

/// Makes a terminal device standard input and output.
///
/// # Errors
///
/// It cannot be opened, or it is no terminal.
pub fn use_device(path: &Path) -> io::Result<()> {
    // A serial line without a carrier would be waited for.
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags((OFlag::O_NOCTTY | OFlag::O_NONBLOCK).bits())
        .open(path)?;
    if !device.is_terminal() {
        return Err(io::Error::other("not a terminal device"));
    }
    let flags = OFlag::from_bits_retain(fcntl(&device, FcntlArg::F_GETFL)?);
    fcntl(&device, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    dup2_stdin(&device)?;
    dup2_stdout(&device)?;
    Ok(())
}

/// Standard input and output, which are a terminal.
pub struct Tty {
    editor: Editor<(), MemHistory>,
}

impl Tty {
    /// The terminal, if there is one.
    pub fn new() -> Option<Self> {
        if !stdin().is_terminal() || !stdout().is_terminal() {
            return None;
        }
        let config = Config::builder()
            .auto_add_history(true)
            .bracketed_paste(false)
            .build();
        let editor = Editor::with_history(config, MemHistory::new()).ok()?;
        Some(Self { editor })
    }
}

impl std::fmt::Debug for Tty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tty")
    }
}

/// Keys come at once and are not shown, until this is dropped.
struct Raw<'a> {
    fd: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> Raw<'a> {
    fn new(fd: BorrowedFd<'a>) -> nix::Result<Self> {
        let before = tcgetattr(fd)?;
        let mut raw = before.clone();
        raw.local_flags -= LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG;
        raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
        raw.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
        tcsetattr(fd, SetArg::TCSANOW, &raw)?;
        Ok(Self { fd, before })
    }
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        // A terminal that is gone needs no settings.
        let _ = tcsetattr(self.fd, SetArg::TCSANOW, &self.before);
    }
}

/// Waits until there is something to read.
fn wait_for(fd: BorrowedFd<'_>, wait: Option<Duration>) -> io::Result<bool> {
    let deadline = wait.map(|wait| Instant::now() + wait);
    loop {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = match left {
            None => PollTimeout::NONE,
            Some(left) => PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
        };
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            // Less than a millisecond was left over.
            Ok(0) if left.is_some_and(|left| !left.is_zero()) => {}
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn byte(fd: BorrowedFd<'_>) -> io::Result<u8> {
    let mut byte = [0];
    loop {
        match read(fd, &mut byte) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => return Ok(byte[0]),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

impl Terminal for Tty {
    fn key(&mut self, wait: Option<Duration>) -> io::Result<Option<Key>> {
        let stdin = stdin();
        let fd = stdin.as_fd();
        let _raw = Raw::new(fd)?;
        if !wait_for(fd, wait)? {
            return Ok(None);
        }
        Ok(Some(match byte(fd)? {
            b'\r' | b'\n' => Key::Enter,
            0x03 => Key::Interrupt,
            0x1b => {
                let mut key = Key::Escape;
                while wait_for(fd, Some(SEQUENCE))? {
                    byte(fd)?;
                    key = Key::Other;
                }
                key
            }
            byte @ b' '..=b'~' => Key::Char(byte.into()),
            _ => Key::Other,
        }))
    }

    fn line(&mut self, prompt: &str) -> io::Result<Entry> {
        match self.editor.readline(prompt) {
            Ok(line) => Ok(Entry::Line(line)),
            Err(ReadlineError::Interrupted) => Ok(Entry::Interrupted),
            Err(ReadlineError::Eof) => Ok(Entry::End),
            Err(ReadlineError::Io(error)) => Err(error),
            Err(error) => Err(io::Error::other(error)),
        }
    }
}
