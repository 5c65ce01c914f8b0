//! Connecting a console to what the command line names.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use super::conf::ConsoleConf;
use super::driver::{Driver, Peer};
use super::endpoint::{self, Writer};
use super::escape::Escape;
use super::terminal::RawTerminal;
use super::{Console, HostEnd, Wake};
use crate::mevent::{Mevent, Source};
use crate::suspend::SuspendSink;
use crate::unix_socket::{self, SocketFile};

/// Why a console cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// Only one serial line can have the terminal.
    #[error("{name}: standard input and output are another console's already")]
    StdioTaken {
        /// The serial line.
        name: String,
    },
    /// The host refuses it.
    #[error("{name}: console {conf}")]
    Open {
        /// The serial line.
        name: String,
        /// What it was to be connected to.
        conf: ConsoleConf,
        /// The host's reason.
        source: io::Error,
    },
}

/// An attached console. Its drop writes out what is pending, for half a second at most if the reader
/// does not take it, restores the terminal and removes the socket.
pub struct Attached {
    driver: Arc<Driver>,
    location: Option<String>,
    _sources: Vec<Source>,
    _terminal: Option<RawTerminal>,
    _cleanup: Option<Cleanup>,
}

impl Attached {
    /// Where the user finds it, if there is something to tell: the path of a new pseudo-terminal, the
    /// path of a socket, the address of a port.
    pub fn location(&self) -> Option<&str> {
        self.location.as_deref()
    }
}

impl Attached {
    /// The terminal at this end may have another size now.
    pub fn resized(&self) {
        self.driver.wake(Wake::Now);
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.driver.close();
    }
}

/// What to undo at the end.
enum Cleanup {
    Stdio,
    Socket { _file: SocketFile },
}

static STDIO_TAKEN: AtomicBool = AtomicBool::new(false);

impl Drop for Cleanup {
    fn drop(&mut self) {
        match self {
            Self::Stdio => STDIO_TAKEN.store(false, Ordering::Release),
            Self::Socket { .. } => {}
        }
    }
}

/// Connects `console` to what `conf` names; `name` is the serial line's, for messages. Leaving by the
/// escape sequence (`stdio` only) calls `suspend` with [`Stop`](crate::suspend::SuspendHow::Stop).
///
/// # Errors
/// [`ConsoleError`], with nothing left behind.
pub fn attach(
    mevent: &Arc<Mevent>,
    name: &str,
    conf: &ConsoleConf,
    console: &Arc<Console>,
    suspend: Arc<dyn SuspendSink>,
) -> Result<Attached, ConsoleError> {
    let stdio = if *conf == ConsoleConf::Stdio {
        if STDIO_TAKEN.swap(true, Ordering::AcqRel) {
            return Err(ConsoleError::StdioTaken {
                name: name.to_owned(),
            });
        }
        Some(Cleanup::Stdio)
    } else {
        None
    };
    open(mevent, name, conf, console, suspend, stdio).map_err(|source| ConsoleError::Open {
        name: name.to_owned(),
        conf: conf.clone(),
        source,
    })
}

fn open(
    mevent: &Arc<Mevent>,
    name: &str,
    conf: &ConsoleConf,
    console: &Arc<Console>,
    suspend: Arc<dyn SuspendSink>,
    stdio: Option<Cleanup>,
) -> io::Result<Attached> {
    let driver = Driver::new(mevent, name, console, suspend)?;
    let mut attached = Attached {
        driver: Arc::clone(&driver),
        location: None,
        _sources: Vec::new(),
        _terminal: None,
        _cleanup: stdio,
    };
    match conf {
        ConsoleConf::Stdio => {
            let stdin = io::stdin();
            let input = endpoint::shared_reader(stdin.as_fd())?;
            let output = Writer::shared(io::stdout().as_fd())?;
            attached._terminal = RawTerminal::enter(stdin.as_fd())?;
            let escape = attached._terminal.as_ref().map(|_| Escape::new());
            driver.connect(Peer::Stdio, Some(input), output, escape)?;
        }
        ConsoleConf::Tty(path) => {
            let tty = endpoint::open_tty(path)?;
            attached._terminal = RawTerminal::enter(tty.as_fd())?;
            let output = Writer::nonblocking(tty.try_clone()?);
            driver.connect(Peer::Device, Some(tty), output, None)?;
        }
        ConsoleConf::Pty => {
            let (master, path) = endpoint::make_pty()?;
            let output = Writer::nonblocking(master.try_clone()?);
            driver.connect(Peer::Pty, Some(master), output, None)?;
            attached.location = Some(path);
        }
        ConsoleConf::File(path) => {
            let output = Writer::nonblocking(endpoint::open_log(path)?);
            driver.connect(Peer::Device, None, output, None)?;
        }
        ConsoleConf::Unix(path) => {
            let (listener, _file) = unix_socket::bind(path)?;
            attached._cleanup = Some(Cleanup::Socket { _file });
            attached.location = Some(path.display().to_string());
            let fd = listener.try_clone()?.into();
            let accept = move || {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(OwnedFd::from(stream))
            };
            attached._sources.push(driver.listen(fd, accept));
        }
        ConsoleConf::Tcp(address) => {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            attached.location = Some(listener.local_addr()?.to_string());
            let fd = listener.try_clone()?.into();
            let accept = move || {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                Ok(OwnedFd::from(stream))
            };
            attached._sources.push(driver.listen(fd, accept));
        }
    }
    let host: Weak<dyn HostEnd> = Arc::<Driver>::downgrade(&driver);
    console.connect_host(host);
    driver.wake(Wake::Now);
    Ok(attached)
}
