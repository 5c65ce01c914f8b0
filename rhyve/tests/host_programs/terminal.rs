//! A user's terminal is raw while the guest runs, and afterwards as it was.
//!
//! Only SIGKILL leaves it raw: a process can do nothing about that.

use std::fs::File;
use std::os::fd::OwnedFd;

use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::guests::{load, load_code, probe};
use crate::support::{Console, Ended, Place, Process, VM};

const COOKED: LocalFlags = LocalFlags::ICANON
    .union(LocalFlags::ECHO)
    .union(LocalFlags::ISIG);

/// rhyve on a terminal.
struct Session {
    guest: Process,
    terminal: OwnedFd,
    before: Termios,
}

impl Session {
    fn start(place: &Place, options: &str) -> Self {
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        assert!(before.local_flags.contains(COOKED));
        let mut command = place.command(&format!("rhyve {options} -l com1,stdio {VM}"));
        command.stdin(pty.slave.try_clone().unwrap());
        command.stdout(pty.slave.try_clone().unwrap());
        let master = File::from(pty.master);
        let console = Console::new(master.try_clone().unwrap(), master);
        Self {
            guest: Process::with_console(command, console),
            terminal: pty.slave,
            before,
        }
    }

    /// Waits for rhyve's end, after which the terminal has to be what it was.
    fn wait(mut self) -> Ended {
        self.guest.exit_status();
        let after = tcgetattr(&self.terminal).unwrap();
        assert_eq!(after, self.before);
        // Our end closes when nobody has the terminal open any more.
        drop(self.terminal);
        self.guest.wait()
    }
}

/// Runs the probe on a terminal and ends it.
fn ended_by(end: impl FnOnce(&mut Process, &OwnedFd)) -> Ended {
    let place = Place::new();
    load(&place, "-m 64M", &probe(&place));
    let mut session = Session::start(&place, "");
    session.guest.console.expect("probe> ");
    let raw = tcgetattr(&session.terminal).unwrap();
    assert!(!raw.local_flags.intersects(COOKED));
    end(&mut session.guest, &session.terminal);
    session.wait()
}

#[test]
fn it_is_restored_after_the_guests_end() {
    assert_eq!(
        ended_by(|guest, _| guest.console.send("fault")).status,
        Some(3)
    );
}

#[test]
fn it_is_restored_after_signals() {
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        assert_eq!(ended_by(|guest, _| guest.signal(signal)).status, Some(1));
    }
}

#[test]
fn it_is_restored_after_the_escape_and_control_c_is_the_guests() {
    let ended = ended_by(|guest, _| {
        guest.console.send("echo hello~.\x03");
        guest.console.expect("probe> ");
        guest.console.send("");
        guest.console.send("~?");
        guest.console.expect("~.   stop the virtual machine");
        guest.console.send("\r~.");
    });
    assert_eq!(ended.status, Some(1), "{ended:?}");
    assert!(ended.errors.contains("console escape"), "{ended:?}");
}

#[test]
fn it_is_restored_after_an_error() {
    let place = Place::new();
    // out 0x77, al, which is fatal with -e
    load_code(&place, b"\xe6\x77\xf4");
    assert_eq!(Session::start(&place, "-e").wait().status, Some(4));
}

#[test]
fn it_is_cooked_while_rhyve_is_stopped() {
    ended_by(|guest, terminal| {
        guest.signal(Signal::SIGTSTP);
        let stopped = waitpid(guest.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert_eq!(stopped, WaitStatus::Stopped(guest.pid(), Signal::SIGSTOP));
        assert!(tcgetattr(terminal).unwrap().local_flags.contains(COOKED));
        guest.signal(Signal::SIGCONT);
        guest.console.send("echo back again");
        guest.console.expect("\nback again");
        guest.console.send("hlt");
    });
}
