//! A virtqueue as its device sees it: requests come out, answers go in (2.7).
//!
//! What a device would otherwise have to do by itself is done here: whole chains, checked before a device
//! sees them; interrupts that the driver wants, and no others; and an end to a queue whose driver broke it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use nix::sys::eventfd::EventFd;
use vm_memory::{GuestMemoryError, GuestMemoryMmap};

use self::ring::Ring;
use super::{Chain, Interrupts};

mod ring;
mod walk;

/// Where a driver has put a queue, in guest-physical addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rings {
    /// Descriptors: a power of two up to the queue's maximum.
    pub size: u16,
    /// The descriptor table, a multiple of 16.
    pub descriptors: u64,
    /// The available ring, a multiple of 2.
    pub available: u64,
    /// The used ring, a multiple of 4.
    pub used: u64,
    /// RING_EVENT_IDX was negotiated.
    pub event_index: bool,
}

/// Rings that cannot be.
#[derive(Debug, thiserror::Error)]
#[error("queue {queue} of {} descriptors at {:#x}, {:#x}, {:#x}: {problem}",
    .rings.size, .rings.descriptors, .rings.available, .rings.used)]
pub struct RingsError {
    /// Which queue.
    pub queue: u16,
    /// What the driver said.
    pub rings: Rings,
    /// What is wrong with it.
    pub problem: String,
}

/// What a queue has done, for whoever looks from outside.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Requests answered.
    pub requests: AtomicU64,
    /// Interrupts sent.
    pub interrupts: AtomicU64,
    /// Available ring index up to which requests were taken.
    pub next_avail: AtomicU16,
    /// Used ring index up to which requests were answered.
    pub next_used: AtomicU16,
}

/// How far a queue got: ring indices, which wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Position {
    /// Up to where requests were taken.
    pub next_avail: u16,
    /// Up to where requests were answered.
    pub next_used: u16,
}

impl QueueCounters {
    /// How far it got.
    pub fn position(&self) -> Position {
        Position {
            next_avail: self.next_avail.load(Ordering::Relaxed),
            next_used: self.next_used.load(Ordering::Relaxed),
        }
    }
}

/// A queue that its driver has set up, for the one thread that serves it.
///
/// Nothing a driver writes makes a method fail: a ring that makes no sense (an index that jumps, a
/// chain that loops, leads out of RAM or mixes its directions) is reported once, sets
/// DEVICE_NEEDS_RESET and leaves the queue broken, and from then on it is empty and swallows
/// answers.
pub struct Virtqueue {
    index: u16,
    ring: Ring,
    kick: Arc<EventFd>,
    interrupts: Arc<dyn Interrupts>,
    counters: Arc<QueueCounters>,
    /// Requests taken and not answered: never more than the ring has, whatever the driver says.
    in_flight: u16,
    /// There are answers the driver was not told of.
    unsignalled: bool,
    /// The used index when the driver's wish was last looked at, with event index.
    looked_at: u16,
    broken: bool,
}

impl Virtqueue {
    /// The queue `index` with these rings in `memory`.
    ///
    /// # Errors
    /// The size is none, the rings are not aligned or are not RAM.
    pub fn new(
        index: u16,
        rings: Rings,
        memory: GuestMemoryMmap,
        kick: Arc<EventFd>,
        interrupts: Arc<dyn Interrupts>,
    ) -> Result<Self, RingsError> {
        let problem = |problem: String| RingsError {
            queue: index,
            rings,
            problem,
        };
        let ring = Ring::new(&rings, memory).map_err(problem)?;
        Ok(Self {
            index,
            ring,
            kick,
            interrupts,
            counters: Arc::default(),
            in_flight: 0,
            unsignalled: false,
            looked_at: 0,
            broken: false,
        })
    }

    /// Goes on where another process left off. To be called before anything is popped.
    pub fn resume_at(&mut self, position: Position) {
        self.ring.set_position(position);
        self.looked_at = position.next_used;
        self.count();
    }

    /// Its number in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Descriptors the rings have.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        self.ring.memory()
    }

    /// Readable when the driver says that there are requests; reading it takes the news.
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// What it has done so far, also after it is gone.
    pub fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }

    /// Whether its driver has broken it.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The next request; none if there is none.
    pub fn pop(&mut self) -> Option<Chain> {
        if self.broken {
            return None;
        }
        match self.next_chain() {
            Ok(chain) => {
                if chain.is_some() {
                    self.in_flight += 1;
                    self.count();
                }
                chain
            }
            Err(problem) => {
                self.fail(&problem);
                None
            }
        }
    }

    /// Whether there is a request to pop.
    pub fn has_requests(&self) -> bool {
        !self.broken && self.ring.waiting().is_ok_and(|waiting| waiting != 0)
    }

    /// Answers the request with this [`Chain::head`], of whose writable part the first `written`
    /// bytes were written.
    pub fn add_used(&mut self, head: u16, written: u32) {
        self.add_used_together(&[(head, written)]);
    }

    /// Answers several requests at once: the driver sees all of these answers or none. A frame that
    /// takes several buffers wants that (5.1.6.4.1). Each is a [`Chain::head`] and bytes written.
    pub fn add_used_together(&mut self, answers: &[(u16, u32)]) {
        let count = answers.len() as u16;
        if self.broken || answers.is_empty() || answers.len() > self.size().into() {
            return;
        }
        self.in_flight = self.in_flight.saturating_sub(count);
        match self.ring.answer(answers) {
            Ok(()) => {
                self.unsignalled = true;
                let requests = &self.counters.requests;
                requests.fetch_add(count.into(), Ordering::Relaxed);
                self.count();
            }
            Err(error) => self.fail(&error.to_string()),
        }
    }

    /// Puts the last `count` requests that were popped back, not answered: they come again. All that
    /// were popped before them have to be answered.
    pub fn give_back(&mut self, count: usize) {
        let count = u16::try_from(count).unwrap_or(u16::MAX).min(self.in_flight);
        self.in_flight -= count;
        let mut position = self.ring.position();
        position.next_avail = position.next_avail.wrapping_sub(count);
        self.ring.set_position(position);
        self.count();
    }

    /// Tells the driver of answers since the last time, if it wants to hear of them.
    pub fn signal(&mut self) {
        if self.broken || !std::mem::take(&mut self.unsignalled) {
            return;
        }
        match self.wants_interrupt() {
            Ok(true) => {
                self.counters.interrupts.fetch_add(1, Ordering::Relaxed);
                self.interrupts.signal_queue(self.index);
            }
            Ok(false) => {}
            Err(error) => self.fail(&error.to_string()),
        }
    }

    /// Does the same, but the last answer alone stays untold ([`Virtqueue::has_untold`]) until one of them
    /// is called again: the driver may have found it by itself by then, which saves an interrupt. Without
    /// event index nothing says what it has found, and it is told.
    pub fn signal_lazily(&mut self) {
        if self.has_untold() && self.ring.event_index() {
            // The used index is written before the driver's wish is read.
            fence(Ordering::SeqCst);
            let last = self.ring.position().next_used.wrapping_sub(1);
            if self.ring.used_event().is_ok_and(|event| event == last) {
                return;
            }
        }
        self.signal();
    }

    /// Whether there are answers the driver was not told of.
    pub fn has_untold(&self) -> bool {
        self.unsignalled && !self.broken
    }

    /// Asks the driver not to kick: whoever serves the queue is looking anyway. It may do so
    /// nevertheless.
    pub fn disable_kicks(&mut self) {
        if !self.broken
            && let Err(error) = self.ring.want_kicks(false)
        {
            self.fail(&error.to_string());
        }
    }

    /// Asks the driver to kick from the next request on. True if there is a request already, for
    /// which no kick may come: pop it before waiting.
    #[must_use]
    pub fn enable_kicks(&mut self) -> bool {
        if self.broken {
            return false;
        }
        let waiting = self.ring.want_kicks(true).and_then(|()| {
            // The wish is written before the driver's index is read.
            fence(Ordering::SeqCst);
            self.ring.waiting()
        });
        match waiting {
            Ok(waiting) => waiting != 0,
            Err(error) => {
                self.fail(&error.to_string());
                false
            }
        }
    }

    /// Serves all requests there are: `answer` says how many bytes it wrote. For devices that
    /// answer at once. Ends after as many requests as the rings have, so that a driver cannot hold
    /// the thread for ever; true if there are more.
    pub fn serve(&mut self, mut answer: impl FnMut(&GuestMemoryMmap, &Chain) -> u32) -> bool {
        self.disable_kicks();
        for _ in 0..self.size() {
            let Some(chain) = self.pop() else { break };
            let written = answer(self.ring.memory(), &chain);
            self.add_used(chain.head(), written);
        }
        self.signal();
        self.enable_kicks()
    }

    fn next_chain(&mut self) -> Result<Option<Chain>, String> {
        let size = self.size();
        match self.ring.waiting() {
            Ok(0) => return Ok(None),
            Ok(waiting) if waiting > size => {
                return Err(format!("the available index is {waiting} ahead, of {size}"));
            }
            Ok(_) if self.in_flight >= size => {
                return Err("more requests are available than there are descriptors".into());
            }
            Ok(_) => {}
            Err(error) => return Err(error.to_string()),
        }
        let head = self.ring.take().map_err(|e| e.to_string())?;
        let table = self.ring.descriptors().map_err(|e| e.to_string())?;
        walk::chain(self.ring.memory(), table, head).map(Some)
    }

    fn wants_interrupt(&mut self) -> Result<bool, GuestMemoryError> {
        // The used index is written before the driver's wish is read.
        fence(Ordering::SeqCst);
        if !self.ring.event_index() {
            return self.ring.wants_interrupts();
        }
        // The driver wants to hear when its index was passed since the last look (2.7.7.2).
        let now = self.ring.position().next_used;
        let before = std::mem::replace(&mut self.looked_at, now);
        let event = self.ring.used_event()?;
        Ok(now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before))
    }

    /// Has others see how far it got.
    fn count(&self) {
        let Position {
            next_avail,
            next_used,
        } = self.ring.position();
        let counters = &self.counters;
        counters.next_avail.store(next_avail, Ordering::Relaxed);
        counters.next_used.store(next_used, Ordering::Relaxed);
    }

    fn fail(&mut self, problem: &str) {
        tracing::warn!(target: "rhyve::virtio", "queue {}: {problem}", self.index);
        self.broken = true;
        self.interrupts.needs_reset();
    }
}

/// What to wait for.
impl AsFd for Virtqueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }
}

#[cfg(test)]
mod tests;
