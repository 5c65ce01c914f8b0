//! One debugger's connection, from its first byte to its leaving.
//!
//! Bytes go into gdbstub's state machine one by one; between them the thread waits for whatever
//! comes first: more bytes, a vCPU that stopped, the machine's end.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine as State;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};

use super::Debugger;
use super::target::{GuestTarget, Inferior};

/// How long a debugger may take to read what it asked for.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection.
pub enum Wire {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
}

impl Wire {
    /// Has it wait for nobody for long.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                stream.set_nodelay(true)?;
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(PATIENCE))
            }
            Self::Unix(stream) => {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(PATIENCE))
            }
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(bytes),
            Self::Unix(stream) => stream.read(bytes),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => Write::write_all(stream, bytes),
            Self::Unix(stream) => Write::write_all(stream, bytes),
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

/// A [`Wire`] whose writes are gathered.
struct Gathered {
    wire: Wire,
    pending: Vec<u8>,
}

impl Connection for Gathered {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.pending.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.wire.write(&self.pending)?;
        self.pending.clear();
        Ok(())
    }
}

/// What comes first.
pub enum Event {
    /// The debugger has sent something, or left.
    Bytes,
    /// A vCPU has stopped.
    Stopped,
    /// The machine ends, with this status of rhyve's.
    Ended(u8),
    /// The server is to stop.
    Quit,
}

/// Why a session ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Leaving {
    /// The debugger has left, or what it said made no sense.
    Gone,
    /// The debugger wants the machine stopped for good.
    Kill,
    /// The machine has ended.
    Ended,
}

/// Serves a debugger until it leaves. The machine is held at the beginning; afterwards it may be
/// held or not, and breakpoints may be set. `wait` waits for the connection and the machine's end,
/// and for stops if it is told that the machine runs.
///
/// # Errors
///
/// What the debugger sent is not its protocol, its connection broke, or a vCPU does not answer.
pub fn serve<I: Inferior>(
    wire: Wire,
    target: &mut GuestTarget<I>,
    debugger: &Debugger,
    mut wait: impl FnMut(BorrowedFd<'_>, bool) -> io::Result<Event>,
) -> Result<Leaving, String> {
    let conn = Gathered {
        wire,
        pending: Vec::new(),
    };
    let started = GdbStub::new(conn).run_state_machine(target);
    let mut state = started.map_err(|e| e.to_string())?;
    // What was read, the last byte first.
    let mut bytes = Vec::new();
    loop {
        let next = match state {
            State::Idle(mut inner) => {
                if bytes.is_empty() {
                    let fd = inner.borrow_conn().wire.as_fd();
                    match wait(fd, false).map_err(|e| e.to_string())? {
                        Event::Ended(_) | Event::Quit => return Ok(Leaving::Ended),
                        Event::Bytes | Event::Stopped => {
                            bytes = read(&mut inner.borrow_conn().wire)?;
                        }
                    }
                }
                match bytes.pop() {
                    Some(byte) => inner.incoming_data(target, byte),
                    None => return Ok(Leaving::Gone),
                }
            }
            State::Running(mut inner) => {
                if let Some(byte) = bytes.pop() {
                    inner.incoming_data(target, byte)
                } else {
                    let fd = inner.borrow_conn().wire.as_fd();
                    match wait(fd, true).map_err(|e| e.to_string())? {
                        Event::Quit => return Ok(Leaving::Ended),
                        Event::Ended(status) => {
                            inner.report_stop(target, MultiThreadStopReason::Exited(status))
                        }
                        Event::Bytes => {
                            bytes = read(&mut inner.borrow_conn().wire)?;
                            if bytes.is_empty() {
                                return Ok(Leaving::Gone);
                            }
                            Ok(inner.into())
                        }
                        Event::Stopped => match stopped(target, debugger)? {
                            Some(reason) => inner.report_stop(target, reason),
                            None => Ok(inner.into()),
                        },
                    }
                }
            }
            State::CtrlCInterrupt(inner) => {
                target.hold().map_err(|e| e.to_string())?;
                let reason = Some(target.interrupted());
                inner.interrupt_handled(target, reason)
            }
            State::Disconnected(inner) => {
                return Ok(match inner.get_reason() {
                    DisconnectReason::Kill => Leaving::Kill,
                    DisconnectReason::Disconnect => Leaving::Gone,
                    _ => Leaving::Ended,
                });
            }
        };
        state = next.map_err(|e| e.to_string())?;
    }
}

/// Looks what a vCPU stopped for, and holds the machine if that is the debugger's affair.
fn stopped<I: Inferior>(
    target: &mut GuestTarget<I>,
    debugger: &Debugger,
) -> Result<Option<MultiThreadStopReason<u64>>, String> {
    while let Some(stop) = debugger.take() {
        if let Some(reason) = target.reason(&stop) {
            target.hold().map_err(|e| e.to_string())?;
            debugger.retain(|other| target.is_lasting(other));
            return Ok(Some(reason));
        }
        target.pass_on(&stop).map_err(|e| e.to_string())?;
    }
    Ok(None)
}

/// What has come, the last byte first; nothing at the end.
fn read(wire: &mut Wire) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; 4096];
    let len = wire.read(&mut bytes).map_err(|e| e.to_string())?;
    bytes.truncate(len);
    bytes.reverse();
    Ok(bytes)
}
