//! The threads that work on a card's queues.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use super::bell::Bell;
use super::shared::Shared;
use super::waiter::Waiter;
use crate::net::Port;
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

impl Worker {
    /// Starts a thread with this name and its pair's number that does `run`.
    pub fn start(name: &str, work: Work, run: fn(Work, Waiter) -> Virtqueue) -> io::Result<Self> {
        let bell = Arc::new(Bell::new()?);
        let waiter = Waiter::new(bell.clone(), &work.queue)?;
        let queue = work.queue.index();
        let thread = crate::thread::builder(format!("{name}-{}", work.pair)).spawn(move || {
            let (shared, interrupts) = (work.shared.clone(), work.interrupts.clone());
            let ran = catch_unwind(AssertUnwindSafe(|| run(work, waiter)));
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
        self.bell.ring();
    }

    /// Ends it; the queue, for another one.
    pub fn finish(mut self) -> Option<Virtqueue> {
        self.end()
    }

    fn end(&mut self) -> Option<Virtqueue> {
        self.bell.stop();
        // A panic was caught, and told, on the thread itself.
        self.thread.take()?.join().ok().flatten()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}
