//! The host's end of a console: moves bytes between a [`Console`] and host descriptors.
//!
//! All of it happens on the event thread: [`Driver::tick`] when the device asked for it,
//! [`Driver::input`] and [`Driver::accept`] when the host has something. The device's side only arms a
//! timer.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::endpoint::{self, Writer};
use super::escape::{Action, Escape, HELP};
use super::{COALESCE, Console, HostEnd, Wake};
use crate::mevent::{Mevent, Ready, Source, Timer};
use crate::suspend::{SuspendHow, SuspendSink};

/// How often a pseudo-terminal nobody has open is looked at.
const PTY_RETRY: Duration = Duration::from_millis(200);
/// How long the end waits for a reader to take the last output.
const FLUSH: Duration = Duration::from_millis(500);

/// What is at the other end, which decides what its disappearance means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    /// Each direction ends alone.
    Stdio,
    /// A file or a terminal: gone for good.
    Device,
    /// Somebody may open it again.
    Pty,
    /// The next client may come.
    Client,
}

struct Input {
    fd: OwnedFd,
    waiting: Source,
    /// Looks for escape sequences, on a terminal.
    escape: Option<Escape>,
}

struct Output {
    writer: Writer,
    waiting: Source,
}

struct Link {
    peer: Peer,
    input: Option<Input>,
    output: Option<Output>,
    /// Nobody has the pseudo-terminal open.
    absent: bool,
}

pub(super) struct Driver {
    name: String,
    mevent: Arc<Mevent>,
    console: Arc<Console>,
    suspend: Arc<dyn SuspendSink>,
    me: Weak<Self>,
    timer: OnceLock<Timer>,
    /// The timer is armed for a device's wake-up.
    armed: AtomicBool,
    /// Locked on the event thread, and by [`Driver::flush`]; never while a device is called.
    link: Mutex<Option<Link>>,
}

impl HostEnd for Driver {
    fn wake(&self, when: Wake) {
        let Some(timer) = self.timer.get() else {
            return;
        };
        match when {
            Wake::Now => {
                self.armed.store(true, Ordering::Release);
                timer.arm(Duration::ZERO);
            }
            Wake::Soon if !self.armed.swap(true, Ordering::AcqRel) => timer.arm(COALESCE),
            Wake::Soon => {}
        }
    }
}

impl Driver {
    pub(super) fn new(
        mevent: &Arc<Mevent>,
        name: &str,
        console: &Arc<Console>,
        suspend: Arc<dyn SuspendSink>,
    ) -> io::Result<Arc<Self>> {
        let driver = Arc::new_cyclic(|me| Self {
            name: name.to_owned(),
            mevent: Arc::clone(mevent),
            console: Arc::clone(console),
            suspend,
            me: me.clone(),
            timer: OnceLock::new(),
            armed: AtomicBool::new(false),
            link: Mutex::new(None),
        });
        let me = driver.me.clone();
        let timer = mevent.timer(name, move || {
            if let Some(driver) = me.upgrade() {
                driver.tick();
            }
        })?;
        // The first and only time.
        let _ = driver.timer.set(timer);
        Ok(driver)
    }

    fn link(&self) -> MutexGuard<'_, Option<Link>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A source that waits for nothing yet.
    fn source(&self, fd: OwnedFd, act: fn(&Self)) -> Source {
        let me = self.me.clone();
        self.mevent.add(&self.name, fd, Ready::empty(), move |_| {
            if let Some(driver) = me.upgrade() {
                act(&driver);
            }
        })
    }

    /// Connects the console to `input` and `output`.
    pub(super) fn connect(
        &self,
        peer: Peer,
        input: Option<OwnedFd>,
        writer: Writer,
        escape: Option<Escape>,
    ) -> io::Result<()> {
        let input = match input {
            None => None,
            Some(fd) => {
                let waiting = self.source(fd.try_clone()?, Self::input);
                Some(Input {
                    fd,
                    waiting,
                    escape,
                })
            }
        };
        let waiting = self.source(writer.duplicate()?, Self::tick);
        let output = Some(Output { writer, waiting });
        *self.link() = Some(Link {
            peer,
            input,
            output,
            absent: peer == Peer::Pty,
        });
        Ok(())
    }

    /// Waits for clients at `fd`.
    pub(super) fn listen(
        &self,
        fd: OwnedFd,
        accept: impl Fn() -> io::Result<OwnedFd> + Send + 'static,
    ) -> Source {
        let me = self.me.clone();
        self.mevent.add(&self.name, fd, Ready::READ, move |_| {
            if let Some(driver) = me.upgrade() {
                driver.accept(&accept);
            }
        })
    }

    fn accept(&self, accept: &dyn Fn() -> io::Result<OwnedFd>) {
        let client = match accept() {
            Ok(client) => client,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                tracing::warn!(console = self.name, %error, "accept");
                // Out of descriptors: the connection stays pending, so do not spin.
                thread::sleep(Duration::from_millis(10));
                return;
            }
        };
        if self.link().is_some() {
            tracing::info!(console = self.name, "second client refused");
            return;
        }
        let output = client.try_clone().map(Writer::nonblocking);
        match output.and_then(|output| self.connect(Peer::Client, Some(client), output, None)) {
            Ok(()) => self.tick(),
            Err(error) => tracing::warn!(console = self.name, %error, "client refused"),
        }
    }

    /// Writes what is pending, waits for input if there is room, and lets the device look.
    fn tick(&self) {
        self.armed.store(false, Ordering::Release);
        self.drain();
        if let Some(link) = self.link().as_ref()
            && let Some(input) = &link.input
        {
            // An escape sequence that is none gives one byte more than was typed last.
            let room = !link.absent && self.console.input_room() > 1;
            input
                .waiting
                .set_interest(if room { Ready::READ } else { Ready::empty() });
        }
        self.look();
        self.console.notify_guest();
    }

    /// Tells the wire who is at this end. True if that is news.
    fn look(&self) -> bool {
        let guard = self.link();
        let link = guard.as_ref().filter(|link| !link.absent);
        let attended = link.is_some_and(|link| link.input.is_some() || link.output.is_some());
        let input = link.and_then(|link| link.input.as_ref());
        let size = input.and_then(|input| endpoint::window_size(input.fd.as_fd()));
        drop(guard);
        self.console.set_host(attended, size)
    }

    fn drain(&self) {
        let mut guard = self.link();
        let Some(link) = guard.as_mut() else {
            return self.console.discard_output();
        };
        if link.absent {
            let closed = link
                .input
                .as_ref()
                .is_none_or(|input| endpoint::hung_up(input.fd.as_fd()));
            if closed {
                self.console.discard_output();
                if let Some(timer) = self.timer.get() {
                    timer.arm(PTY_RETRY);
                }
                return;
            }
            link.absent = false;
        }
        let Some(output) = &link.output else {
            return self.console.discard_output();
        };
        match write_pending(&self.console, &output.writer) {
            Ok(drained) => {
                let interest = if drained {
                    Ready::empty()
                } else {
                    Ready::WRITE
                };
                output.waiting.set_interest(interest);
            }
            Err(error) => {
                tracing::info!(console = self.name, %error, "output ended");
                self.console.discard_output();
                match link.peer {
                    Peer::Stdio | Peer::Device => link.output = None,
                    Peer::Pty => self.lost_pty(link),
                    Peer::Client => *guard = None,
                }
            }
        }
    }

    fn lost_pty(&self, link: &mut Link) {
        link.absent = true;
        if let Some(input) = &link.input {
            input.waiting.set_interest(Ready::empty());
        }
        if let Some(output) = &link.output {
            output.waiting.set_interest(Ready::empty());
        }
        if let Some(timer) = self.timer.get() {
            timer.arm(PTY_RETRY);
        }
    }

    /// Reads as much as the wire takes.
    fn input(&self) {
        let mut bytes = [0; 512];
        let room = self.console.input_room().saturating_sub(1).min(bytes.len());
        let mut guard = self.link();
        let Some(link) = guard.as_mut() else { return };
        let Some(input) = link.input.as_mut() else {
            return;
        };
        if room == 0 {
            return input.waiting.set_interest(Ready::empty());
        }
        let typed = match endpoint::read_some(input.fd.as_fd(), &mut bytes[..room]) {
            Ok(None) => return,
            Ok(Some(count)) if count > 0 => &bytes[..count],
            ended => {
                tracing::info!(console = self.name, error = ?ended.err(), "input ended");
                match link.peer {
                    Peer::Stdio | Peer::Device => link.input = None,
                    Peer::Pty => self.lost_pty(link),
                    Peer::Client => *guard = None,
                }
                drop(guard);
                if self.look() {
                    self.console.notify_guest();
                }
                return;
            }
        };
        let mut pass = Vec::with_capacity(typed.len() + 1);
        let actions = match input.escape.as_mut() {
            Some(escape) => escape.filter(typed, &mut pass),
            None => {
                pass.extend_from_slice(typed);
                Vec::new()
            }
        };
        if actions.contains(&Action::Help)
            && let Some(output) = &link.output
        {
            // To the user, past the guest. On a terminal that is stopped it is lost.
            let _ = output.writer.write(HELP.as_bytes());
        }
        drop(guard);
        self.look();
        self.console.push_input(&pass);
        for action in actions {
            match action {
                Action::Help => {}
                Action::Stop => self.suspend.suspend(SuspendHow::Stop),
                Action::Suspend => {
                    // The whole job, as the terminal does it: rhyve may be one of several programs.
                    if let Err(error) = kill(Pid::from_raw(0), Signal::SIGTSTP) {
                        tracing::warn!(%error, "not suspended");
                    }
                }
            }
        }
    }

    /// Writes what is pending, and moves no byte afterwards.
    pub(super) fn close(&self) {
        self.flush();
        self.console.disconnect_host();
        *self.link() = None;
    }

    /// Writes what is pending, waiting for the reader for a while.
    fn flush(&self) {
        let deadline = Instant::now() + FLUSH;
        loop {
            match self.link().as_ref() {
                Some(Link {
                    output: Some(output),
                    absent: false,
                    ..
                }) => match write_pending(&self.console, &output.writer) {
                    Ok(false) if Instant::now() < deadline => {}
                    _ => return,
                },
                _ => return,
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Writes pending output until there is none (true) or no more can be written (false).
fn write_pending(console: &Console, writer: &Writer) -> io::Result<bool> {
    let mut bytes = [0; 1024];
    loop {
        let count = console.peek_output(&mut bytes);
        if count == 0 {
            return Ok(true);
        }
        match writer.write(bytes.get(..count).unwrap_or(&bytes))? {
            0 => return Ok(false),
            written => console.consume_output(written),
        }
    }
}
