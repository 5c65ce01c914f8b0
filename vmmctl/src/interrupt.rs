//! Signals that end this program wait while it has something to put back: a guest that it holds, a
//! terminal.

use std::os::fd::AsFd as _;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::Error;

/// While this exists, no signal but KILL and QUIT ends the program. One that came does when it is
/// dropped, unless [`Interrupt::came`] has taken it.
pub struct Interrupt {
    signals: SigSet,
    fd: SignalFd,
}

impl Interrupt {
    /// # Errors
    ///
    /// Signals cannot be blocked.
    pub fn new() -> Result<Self, Error> {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signals.add(signal);
        }
        signals.thread_block().map_err(Error::Signals)?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let fd = SignalFd::with_flags(&signals, flags).map_err(Error::Signals)?;
        Ok(Self { signals, fd })
    }

    /// Takes a signal that came.
    pub fn came(&self) -> bool {
        matches!(self.fd.read_signal(), Ok(Some(_)))
    }

    /// Whether one came, which is not taken.
    pub fn waits(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        // It was possible to block them.
        let _ = self.signals.thread_unblock();
    }
}
