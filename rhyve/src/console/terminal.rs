//! Raw mode of terminals, which always ends.
//!
//! A terminal left raw is a terminal the user has to type `reset` into blindly. So what it was like is
//! kept where everything that may end the process finds it: [`RawTerminal`]'s drop, a panic's hook,
//! exit(3), and handlers of those signals that would kill or stop the process. Handlers are installed
//! only where nobody else has one: a program that handles SIGTERM itself keeps its handler, and ends
//! through one of the other ways.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, Once, PoisonError};

use nix::errno::Errno;
use nix::libc::{self, c_int};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// A terminal in raw mode: how it was, and how it is.
struct Saved {
    terminal: OwnedFd,
    original: libc::termios,
    raw: libc::termios,
}

/// Standard input and the four COM ports.
const SLOTS: usize = 5;

/// Terminals in raw mode. Signal handlers only try the locks, and so never wait for the code they
/// interrupted.
static TERMINALS: [Mutex<Option<Saved>>; SLOTS] = [const { Mutex::new(None) }; SLOTS];

/// Holds a terminal in raw mode.
pub(super) struct RawTerminal {
    slot: usize,
}

impl RawTerminal {
    /// Puts `terminal` into raw mode; `None`, and nothing touched, if it is not a terminal.
    ///
    /// Output processing stays on, so that a message of rhyve's own begins at the left margin; a
    /// guest's `\r\n` looks the same with it.
    pub(super) fn enter(terminal: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let mut termios = match tcgetattr(terminal) {
            Ok(termios) => termios,
            Err(Errno::ENOTTY | Errno::EINVAL | Errno::ENODEV) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        install_once();
        let original = libc::termios::from(termios.clone());
        cfmakeraw(&mut termios);
        let mut raw = libc::termios::from(termios);
        raw.c_oflag |= original.c_oflag & (libc::OPOST | libc::ONLCR);
        let saved = Saved {
            terminal: terminal.try_clone_to_owned()?,
            original,
            raw,
        };
        let slot = claim(saved).ok_or_else(|| io::Error::other("too many raw terminals"))?;
        let guard = Self { slot };
        tcsetattr(terminal, SetArg::TCSANOW, &Termios::from(raw))?;
        Ok(Some(guard))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(slot) = TERMINALS.get(self.slot) {
            let saved = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(saved) = saved {
                saved.apply(&saved.original);
            }
        }
    }
}

impl Saved {
    fn apply(&self, mode: &libc::termios) {
        // A terminal that was hung up cannot be restored, and need not be.
        let _ = tcsetattr(
            self.terminal.as_fd(),
            SetArg::TCSANOW,
            &Termios::from(*mode),
        );
    }
}

fn claim(saved: Saved) -> Option<usize> {
    for (index, slot) in TERMINALS.iter().enumerate() {
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(saved);
            return Some(index);
        }
    }
    None
}

fn for_each(act: impl Fn(&Saved)) {
    for slot in &TERMINALS {
        if let Ok(slot) = slot.try_lock()
            && let Some(saved) = slot.as_ref()
        {
            act(saved);
        }
    }
}

/// Gives every terminal back as it was found. Safe to call at any time, as often as wanted, and
/// async-signal-safe.
pub fn restore_terminals() {
    for_each(|saved| saved.apply(&saved.original));
}

extern "C" fn restore_at_exit() {
    restore_terminals();
}

/// Restores and dies of the signal: SA_RESETHAND has put the default action back, and the signal is
/// blocked until this returns.
extern "C" fn on_fatal(signal: c_int) {
    restore_terminals();
    if let Ok(signal) = Signal::try_from(signal) {
        let _ = raise(signal);
    }
}

/// Restores and stops, as the terminal's own suspend character would have it.
extern "C" fn on_stop(_: c_int) {
    let errno = Errno::last_raw();
    restore_terminals();
    let _ = raise(Signal::SIGSTOP);
    Errno::set_raw(errno);
}

/// Goes on where it was stopped. In the background this stops again, with SIGTTOU, until `fg`.
extern "C" fn on_continue(_: c_int) {
    let errno = Errno::last_raw();
    for_each(|saved| saved.apply(&saved.raw));
    Errno::set_raw(errno);
}

fn install_once() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let default_hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore_terminals();
            default_hook(info);
        }));
        // SAFETY: the function is `extern "C"`, takes nothing, unwinds never and lives forever.
        if unsafe { libc::atexit(restore_at_exit) } != 0 {
            tracing::warn!("atexit: a terminal may stay raw after exit");
        }
        for signal in [
            Signal::SIGHUP,
            Signal::SIGINT,
            Signal::SIGQUIT,
            Signal::SIGABRT,
            Signal::SIGTERM,
        ] {
            install(signal, on_fatal, SaFlags::SA_RESETHAND);
        }
        install(Signal::SIGTSTP, on_stop, SaFlags::SA_RESTART);
        install(Signal::SIGCONT, on_continue, SaFlags::SA_RESTART);
    });
}

/// Handles `signal`, unless somebody does already or it is ignored.
fn install(signal: Signal, handler: extern "C" fn(c_int), flags: SaFlags) {
    let action = SigAction::new(SigHandler::Handler(handler), flags, SigSet::empty());
    // SAFETY: the handlers call async-signal-safe functions only: tcsetattr, raise, and try_lock,
    // which is one atomic operation. They preserve errno where they return to what they interrupted.
    let before = unsafe { sigaction(signal, &action) };
    match before {
        Ok(before) if matches!(before.handler(), SigHandler::SigDfl) => {}
        // SAFETY: puts back what was there a moment ago.
        Ok(before) => drop(unsafe { sigaction(signal, &before) }),
        Err(error) => tracing::warn!(%signal, %error, "no handler: a terminal may stay raw"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::pty::openpty;
    use nix::sys::termios::LocalFlags;

    #[test]
    fn raw_mode_ends_with_its_guard() {
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        assert!(
            before
                .local_flags
                .contains(LocalFlags::ICANON | LocalFlags::ECHO)
        );
        let guard = RawTerminal::enter(pty.slave.as_fd()).unwrap().unwrap();
        let raw = tcgetattr(&pty.slave).unwrap();
        assert!(
            !raw.local_flags
                .intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
        );
        assert_eq!(raw.output_flags, before.output_flags);
        // What the handlers of SIGTSTP and SIGCONT do, to this terminal alone.
        for (mode, expected) in [(true, &before), (false, &raw)] {
            let slot = TERMINALS[guard.slot].lock().unwrap();
            let saved = slot.as_ref().unwrap();
            saved.apply(if mode { &saved.original } else { &saved.raw });
            assert_eq!(tcgetattr(&pty.slave).unwrap(), *expected);
        }
        drop(guard);
        assert_eq!(tcgetattr(&pty.slave).unwrap(), before);
    }

    #[test]
    fn what_is_not_a_terminal_is_left_alone() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(RawTerminal::enter(null.as_fd()).unwrap().is_none());
    }
}
