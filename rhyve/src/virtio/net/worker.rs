//! The threads that work on a card's queues.

use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::shared::Shared;
use crate::net::{Port, Wait};
use crate::virtio::{Interrupts, Virtqueue};

/// What a thread needs.
pub(super) struct Work {
    pub shared: Arc<Shared>,
    pub queue: Virtqueue,
    pub port: Arc<dyn Port>,
    /// Which pair of queues it is.
    pub pair: u16,
    /// Bytes of the header in front of each frame in the driver's buffers.
    pub header: usize,
    /// A frame may take several buffers.
    pub mergeable: bool,
    pub interrupts: Arc<dyn Interrupts>,
}

/// A running thread; its drop waits for its end, which takes no time.
pub(super) struct Worker {
    /// The queue's number.
    pub queue: u16,
    bell: Arc<Bell>,
    /// Returns its queue with nothing unanswered.
    thread: Option<JoinHandle<Option<Virtqueue>>>,
}

/// What calls a thread from its wait.
pub(super) struct Bell {
    stop: AtomicBool,
    event: EventFd,
}

impl Bell {
    /// Whether the thread is to end.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

impl Worker {
    /// Starts a thread with this name and its pair's number that does `run`.
    pub fn start(name: &str, work: Work, run: fn(Work, &Bell) -> Virtqueue) -> io::Result<Self> {
        let bell = Arc::new(Bell {
            stop: AtomicBool::new(false),
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        });
        let (queue, heard) = (work.queue.index(), bell.clone());
        let thread = crate::thread::builder(format!("{name}-{}", work.pair)).spawn(move || {
            let (shared, interrupts) = (work.shared.clone(), work.interrupts.clone());
            let ran = catch_unwind(AssertUnwindSafe(|| run(work, &heard)));
            if ran.is_err() {
                let label = shared.label();
                tracing::error!(target: "rhyve::virtio::net", "{label}: queue {queue} panicked");
                interrupts.needs_reset();
            }
            ran.ok()
        })?;
        Ok(Self {
            queue,
            bell,
            thread: Some(thread),
        })
    }

    /// Has it look at everything again.
    pub fn wake(&self) {
        // It fails only if the counter is full of wake-ups already.
        let _ = self.bell.event.write(1);
    }

    /// Ends it; the queue, for another one.
    pub fn finish(mut self) -> Option<Virtqueue> {
        self.end()
    }

    fn end(&mut self) -> Option<Virtqueue> {
        self.bell.stop.store(true, Ordering::Release);
        self.wake();
        // A panic was caught, and told, on the thread itself.
        self.thread.take()?.join().ok().flatten()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}

/// What a thread waits for besides its bell.
#[derive(Default)]
pub(super) struct For<'a> {
    /// The driver's kick.
    pub kick: Option<&'a Virtqueue>,
    /// A port, to read or to write.
    pub port: Option<(&'a Wait, PollFlags)>,
    /// The longest wait.
    pub timeout: Option<Duration>,
}

/// Waits for any of it.
pub(super) fn wait(bell: &Bell, what: &For<'_>) {
    let readable = PollFlags::POLLIN;
    let mut fds = vec![PollFd::new(bell.event.as_fd(), readable)];
    fds.extend(what.kick.map(|queue| PollFd::new(queue.as_fd(), readable)));
    let mut timeout = what.timeout;
    if let Some((wait, flags)) = what.port {
        fds.extend(wait.fd.as_ref().map(|fd| PollFd::new(fd.as_fd(), flags)));
        timeout = match (timeout, wait.timeout) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }
    let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
        PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX)
    });
    // Whatever it returns: the caller looks at everything.
    let _ = poll(&mut fds, timeout);
    let rang = |fd: Option<&PollFd<'_>>| fd.is_some_and(|fd| fd.any().unwrap_or(true));
    if rang(fds.first()) {
        let _ = bell.event.read();
    }
    if let Some(queue) = what.kick
        && rang(fds.get(1))
    {
        let _ = queue.kick().read();
    }
}
