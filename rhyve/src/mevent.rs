//! The I/O event thread: bhyve's `mevent`.
//!
//! One thread waits for every host descriptor the devices care about and runs their callbacks, one
//! at a time. A device registers a descriptor ([`Mevent::add`]) or makes a [`Timer`]; what it gets
//! back is a handle whose drop ends the registration.
//!
//! It waits with poll(2) rather than epoll(7): there are a dozen descriptors at most, standard input
//! may well be a regular file or /dev/null, which epoll refuses (EPERM), and handles may change from
//! any thread without a system call unless the thread has something new to wait for.
//!
//! **Locks.** The list of sources is the innermost lock: handles may be used with a device's lock
//! held. No lock of this module but the callback's own is held while a callback runs, so it takes
//! whatever locks it needs, in the machine's order (bus < pci config < device < queue < irq).
//! Dropping a handle does not wait: a callback that has begun on the event thread ends after it.
//!
//! A callback that panics is reported and its source removed; the thread lives on.

use std::any::Any;
use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bitflags::bitflags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

bitflags! {
    /// What a descriptor is waited for, and what it is ready for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Ready: u8 {
        /// A read would not block; also at end of file.
        const READ = 1;
        /// A write would not block.
        const WRITE = 2;
        /// The peer is gone, or the descriptor is in error. Reported whenever anything is waited for.
        const HANGUP = 4;
    }
}

type Callback = Box<dyn FnMut(Ready) + Send>;

struct Entry {
    name: String,
    fd: OwnedFd,
    /// [`Ready`] bits waited for; none: not waited for at all.
    interest: AtomicU8,
    removed: AtomicBool,
    /// `None` once it can run no more: what it captured is let go of then.
    callback: Mutex<Option<Callback>>,
}

impl Entry {
    fn interest(&self) -> Ready {
        Ready::from_bits_truncate(self.interest.load(Ordering::Acquire))
    }
}

struct Shared {
    entries: Mutex<Vec<Arc<Entry>>>,
    wake: EventFd,
    stop: AtomicBool,
}

impl Shared {
    fn entries(&self) -> MutexGuard<'_, Vec<Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the thread look at its list again.
    fn wake(&self) {
        // The one failure, a counter at its maximum, means that a wake-up is pending already.
        let _ = self.wake.write(1);
    }

    fn remove(&self, entry: &Arc<Entry>) {
        entry.removed.store(true, Ordering::Release);
        entry.interest.store(0, Ordering::Release);
        self.entries().retain(|other| !Arc::ptr_eq(other, entry));
    }
}

/// The event thread.
pub struct Mevent {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Mevent {
    /// Starts the thread, named "mevent".
    ///
    /// # Errors
    /// The host is out of descriptors or threads.
    pub fn start() -> io::Result<Arc<Self>> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Shared {
            entries: Mutex::default(),
            wake,
            stop: AtomicBool::new(false),
        });
        let thread = crate::thread::builder("mevent").spawn({
            let shared = Arc::clone(&shared);
            move || run(&shared)
        })?;
        Ok(Arc::new(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// Runs `callback` on the event thread whenever `fd` is ready for `interest`, which may be empty
    /// for now. Readiness is a level: a callback that leaves data unread is called again.
    pub fn add(
        &self,
        name: &str,
        fd: OwnedFd,
        interest: Ready,
        callback: impl FnMut(Ready) + Send + 'static,
    ) -> Source {
        let entry = Arc::new(Entry {
            name: name.to_owned(),
            fd,
            interest: AtomicU8::new(interest.bits()),
            removed: AtomicBool::new(false),
            callback: Mutex::new(Some(Box::new(callback))),
        });
        self.shared.entries().push(Arc::clone(&entry));
        self.shared.wake();
        Source {
            shared: Arc::clone(&self.shared),
            entry,
        }
    }

    /// A timer, not armed, which runs `callback` on the event thread.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn timer(
        &self,
        name: &str,
        mut callback: impl FnMut() + Send + 'static,
    ) -> io::Result<Timer> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = Arc::new(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?);
        let fd = timer.as_fd().try_clone_to_owned()?;
        let expired = Arc::clone(&timer);
        let source = self.add(name, fd, Ready::READ, move |_| {
            // An error means that it was armed anew in between: not expired any more.
            if expired.wait().is_ok() {
                callback();
            }
        });
        Ok(Timer {
            timer,
            _source: source,
        })
    }

    /// Ends the thread and waits for it; a callback that runs now is finished first. No callback
    /// runs afterwards. Called from a callback it does not wait.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the event thread had panicked");
        }
        let entries = mem::take(&mut *self.shared.entries());
        for entry in entries {
            // Locked only if `stop` was called by this very callback, which `call` drops then.
            if let Ok(mut callback) = entry.callback.try_lock() {
                *callback = None;
            }
        }
    }
}

impl Drop for Mevent {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A registered descriptor; its drop ends the registration.
pub struct Source {
    shared: Arc<Shared>,
    entry: Arc<Entry>,
}

impl Source {
    /// Changes what is waited for; nothing at all disables the source.
    pub fn set_interest(&self, interest: Ready) {
        let before = self.entry.interest.swap(interest.bits(), Ordering::AcqRel);
        // Less to wait for costs the thread one idle turn at most; more must be waited for now.
        if interest.bits() & !before != 0 {
            self.shared.wake();
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.shared.remove(&self.entry);
        // Lets the thread give up its reference and with it the descriptor.
        self.shared.wake();
    }
}

/// A one-shot timer on the monotonic clock.
pub struct Timer {
    timer: Arc<TimerFd>,
    _source: Source,
}

impl Timer {
    /// Lets it expire `after` from now, replacing what it was armed for.
    pub fn arm(&self, after: Duration) {
        // Zero would disarm.
        let after = Expiration::OneShot(TimeSpec::from(after.max(Duration::from_nanos(1))));
        if let Err(error) = self.timer.set(after, TimerSetTimeFlags::empty()) {
            tracing::error!(%error, "timer not armed");
        }
    }

    /// Takes back what it was armed for.
    pub fn disarm(&self) {
        if let Err(error) = self.timer.unset() {
            tracing::error!(%error, "timer not disarmed");
        }
    }
}

fn run(shared: &Shared) {
    while !shared.stop.load(Ordering::Acquire) {
        let waiting: Vec<(Arc<Entry>, Ready)> = shared
            .entries()
            .iter()
            .map(|entry| (Arc::clone(entry), entry.interest()))
            .filter(|(_, interest)| !interest.is_empty())
            .collect();
        let mut fds: Vec<PollFd<'_>> = waiting
            .iter()
            .map(|(entry, interest)| PollFd::new(entry.fd.as_fd(), poll_flags(*interest)))
            .chain([PollFd::new(shared.wake.as_fd(), PollFlags::POLLIN)])
            .collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                // Out of kernel memory, at worst: not a reason to give the devices up.
                tracing::error!(%error, "poll");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        }
        // Nothing to read is fine: the wake-up is only a hint.
        let _ = shared.wake.read();
        for ((entry, _), fd) in waiting.iter().zip(&fds) {
            let ready = ready(fd.revents().unwrap_or(PollFlags::empty()));
            // It may have been changed, even by a callback of this turn.
            let wanted = entry.interest();
            if ready.intersects(wanted | Ready::HANGUP) && !wanted.is_empty() {
                call(shared, entry, ready);
            }
        }
    }
}

fn call(shared: &Shared, entry: &Arc<Entry>, ready: Ready) {
    if shared.stop.load(Ordering::Acquire) || entry.removed.load(Ordering::Acquire) {
        return;
    }
    let mut slot = entry
        .callback
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let Some(callback) = slot.as_mut() else {
        return;
    };
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| callback(ready))) {
        tracing::error!(
            source = entry.name,
            panic = text(&*payload),
            "event callback removed"
        );
        shared.remove(entry);
    }
    if shared.stop.load(Ordering::Acquire) || entry.removed.load(Ordering::Acquire) {
        *slot = None;
    }
}

fn text(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("panicked")
}

fn poll_flags(interest: Ready) -> PollFlags {
    let mut flags = PollFlags::empty();
    flags.set(PollFlags::POLLIN, interest.contains(Ready::READ));
    flags.set(PollFlags::POLLOUT, interest.contains(Ready::WRITE));
    flags
}

fn ready(flags: PollFlags) -> Ready {
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    let mut ready = Ready::empty();
    ready.set(Ready::READ, flags.contains(PollFlags::POLLIN));
    ready.set(Ready::WRITE, flags.contains(PollFlags::POLLOUT));
    ready.set(Ready::HANGUP, flags.intersects(gone));
    ready
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write, pipe};
    use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

    const LONG: Duration = Duration::from_secs(10);
    const SHORT: Duration = Duration::from_millis(30);

    fn reader() -> (Arc<Mevent>, Source, io::PipeWriter, Receiver<u8>) {
        let mevent = Mevent::start().unwrap();
        let (mut from, to) = pipe().unwrap();
        let (tx, rx) = channel();
        let fd = from.try_clone().unwrap().into();
        let source = mevent.add("pipe", fd, Ready::READ, move |_| {
            let mut byte = [0];
            from.read_exact(&mut byte).unwrap();
            tx.send(byte[0]).unwrap();
        });
        (mevent, source, to, rx)
    }

    #[test]
    fn a_readable_descriptor_runs_its_callback_until_disabled() {
        let (mevent, source, mut to, rx) = reader();
        to.write_all(b"ab").unwrap();
        assert_eq!(rx.recv_timeout(LONG), Ok(b'a'));
        assert_eq!(rx.recv_timeout(LONG), Ok(b'b'));
        source.set_interest(Ready::empty());
        to.write_all(b"c").unwrap();
        assert_eq!(rx.recv_timeout(SHORT), Err(RecvTimeoutError::Timeout));
        source.set_interest(Ready::READ);
        assert_eq!(rx.recv_timeout(LONG), Ok(b'c'));
        drop(source);
        // The callback, and the sender in it, went with the handle.
        assert_eq!(rx.recv_timeout(LONG), Err(RecvTimeoutError::Disconnected));
        mevent.stop();
    }

    #[test]
    fn a_panicking_callback_loses_its_source_only() {
        let (mevent, _source, to, rx) = reader();
        drop(to); // read_exact fails, and the unwrap of it panics
        assert_eq!(rx.recv_timeout(LONG), Err(RecvTimeoutError::Disconnected));
        let (tx, rx) = channel();
        let timer = mevent.timer("after", move || tx.send(()).unwrap()).unwrap();
        timer.arm(Duration::ZERO);
        assert_eq!(rx.recv_timeout(LONG), Ok(()));
    }

    #[test]
    fn timers_are_armed_replaced_and_disarmed() {
        let mevent = Mevent::start().unwrap();
        let (tx, rx) = channel();
        let timer = mevent.timer("test", move || tx.send(()).unwrap()).unwrap();
        timer.arm(LONG * 100);
        timer.arm(Duration::from_millis(1));
        assert_eq!(rx.recv_timeout(LONG), Ok(()));
        timer.arm(SHORT);
        timer.disarm();
        assert_eq!(rx.recv_timeout(SHORT * 2), Err(RecvTimeoutError::Timeout));
        mevent.stop();
        mevent.stop();
        timer.arm(Duration::ZERO);
        assert_eq!(rx.recv_timeout(SHORT), Err(RecvTimeoutError::Disconnected));
    }

    #[test]
    fn a_callback_may_stop_the_thread() {
        let mevent = Mevent::start().unwrap();
        let (tx, rx) = channel();
        let timer = mevent
            .timer("stop", {
                let mevent = Arc::clone(&mevent);
                move || {
                    mevent.stop();
                    tx.send(()).unwrap();
                }
            })
            .unwrap();
        timer.arm(Duration::ZERO);
        assert_eq!(rx.recv_timeout(LONG), Ok(()));
    }
}
