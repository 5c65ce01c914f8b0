//! A virtqueue as its device sees it: requests come out, answers go in (2.7).
//!
//! Over [`virtio_queue::Queue`], which knows the rings. What is added here is what a device would
//! otherwise have to do by itself: whole chains, checked before a device sees them; the flag by
//! which a driver without event index says that it wants no interrupts; and an end to a queue whose
//! driver broke it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use nix::sys::eventfd::EventFd;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::chain::Segments;
use super::{Chain, Interrupts, Segment};

/// The longest chain: as many segments as preadv(2) takes (IOV_MAX).
const MAX_SEGMENTS: usize = 1024;

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
    ring: Queue,
    memory: GuestMemoryMmap,
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
        let mut ring = Queue::new(rings.size).map_err(|e| problem(e.to_string()))?;
        ring.try_set_desc_table_address(GuestAddress(rings.descriptors))
            .and_then(|()| ring.try_set_avail_ring_address(GuestAddress(rings.available)))
            .and_then(|()| ring.try_set_used_ring_address(GuestAddress(rings.used)))
            .map_err(|e| problem(e.to_string()))?;
        ring.set_event_idx(rings.event_index);
        ring.set_ready(true);
        // At 0 there is no driver's ring but a forgotten one.
        if rings.available == 0 || !ring.is_valid(&memory) {
            return Err(problem("not in RAM".into()));
        }
        Ok(Self {
            index,
            ring,
            memory,
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
        let Position {
            next_avail,
            next_used,
        } = position;
        self.ring.set_next_avail(next_avail);
        self.ring.set_next_used(next_used);
        self.looked_at = next_used;
        self.counters
            .next_avail
            .store(next_avail, Ordering::Relaxed);
        self.counters.next_used.store(next_used, Ordering::Relaxed);
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
        &self.memory
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
                    let next = self.ring.next_avail();
                    self.counters.next_avail.store(next, Ordering::Relaxed);
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
        !self.broken
            && self
                .ring
                .avail_idx(&self.memory, Ordering::Acquire)
                .is_ok_and(|index| index.0 != self.ring.next_avail())
    }

    /// Answers the request with this [`Chain::head`], of whose writable part the first `written`
    /// bytes were written.
    pub fn add_used(&mut self, head: u16, written: u32) {
        if self.broken {
            return;
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        match self.ring.add_used(&self.memory, head, written) {
            Ok(()) => {
                self.unsignalled = true;
                self.counters.requests.fetch_add(1, Ordering::Relaxed);
                let next = self.ring.next_used();
                self.counters.next_used.store(next, Ordering::Relaxed);
            }
            Err(error) => self.fail(&error.to_string()),
        }
    }

    /// Answers several requests at once: the driver sees all of these answers or none. A frame that
    /// takes several buffers wants that (5.1.6.4.1). Each is a [`Chain::head`] and bytes written.
    pub fn add_used_together(&mut self, answers: &[(u16, u32)]) {
        let Some((&(head, written), earlier)) = answers.split_last() else {
            return;
        };
        if self.broken || answers.len() > usize::from(self.size()) {
            return;
        }
        let first = self.ring.next_used();
        for (offset, &(head, written)) in (0..).zip(earlier) {
            let slot = first.wrapping_add(offset) % self.size();
            let at = self.ring.used_ring() + 4 + 8 * u64::from(slot);
            let element = u64::from(head) | u64::from(written) << 32;
            let stored = self.memory.write_obj(element.to_le(), GuestAddress(at));
            if let Err(error) = stored {
                self.fail(&error.to_string());
                return;
            }
        }
        let count = earlier.len() as u16;
        self.in_flight = self.in_flight.saturating_sub(count);
        self.ring.set_next_used(first.wrapping_add(count));
        self.add_used(head, written);
        self.counters
            .requests
            .fetch_add(count.into(), Ordering::Relaxed);
    }

    /// Puts the last `count` requests that were popped back, not answered: they come again. All that
    /// were popped before them have to be answered.
    pub fn give_back(&mut self, count: usize) {
        let count = u16::try_from(count).unwrap_or(u16::MAX).min(self.in_flight);
        self.in_flight -= count;
        let next = self.ring.next_avail().wrapping_sub(count);
        self.ring.set_next_avail(next);
        self.counters.next_avail.store(next, Ordering::Relaxed);
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
        if self.has_untold() && self.ring.event_idx_enabled() {
            // The used index is written before the driver's wish is read.
            fence(Ordering::SeqCst);
            let last = self.ring.next_used().wrapping_sub(1);
            if self.event().is_ok_and(|event| event == last) {
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
            && let Err(error) = self.ring.disable_notification(&self.memory)
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
        self.ring
            .enable_notification(&self.memory)
            .unwrap_or_else(|error| {
                self.fail(&error.to_string());
                false
            })
    }

    /// Serves all requests there are: `answer` says how many bytes it wrote. For devices that
    /// answer at once. Ends after as many requests as the rings have, so that a driver cannot hold
    /// the thread for ever; true if there are more.
    pub fn serve(&mut self, mut answer: impl FnMut(&GuestMemoryMmap, &Chain) -> u32) -> bool {
        self.disable_kicks();
        for _ in 0..self.size() {
            let Some(chain) = self.pop() else { break };
            let written = answer(&self.memory, &chain);
            self.add_used(chain.head(), written);
        }
        self.signal();
        self.enable_kicks()
    }

    fn next_chain(&mut self) -> Result<Option<Chain>, String> {
        if !self.has_requests() {
            return Ok(None);
        }
        // The iterator looks whether the driver's index is one it can have.
        let mut chains = self.ring.iter(&self.memory).map_err(|e| e.to_string())?;
        let chain = chains.next().ok_or("the available index went back")?;
        if self.in_flight >= self.ring.size() {
            return Err("more requests are available than there are descriptors".into());
        }
        collect(&self.memory, chain).map(Some)
    }

    fn wants_interrupt(&mut self) -> Result<bool, virtio_queue::Error> {
        // The used index is written before the driver's wish is read.
        fence(Ordering::SeqCst);
        if self.ring.event_idx_enabled() {
            // Not the ring's own count, which knows of no answers that are given together. The
            // driver wants to hear when its index was passed since the last look (2.7.7.2).
            let now = self.ring.next_used();
            let before = std::mem::replace(&mut self.looked_at, now);
            let event = self.event()?;
            let passed = now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before);
            return Ok(passed);
        }
        let flags = self.load(self.ring.avail_ring())?;
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// The answer of which the driver wants to hear, by its place in the used ring (`used_event`,
    /// 2.7.7).
    fn event(&self) -> Result<u16, virtio_queue::Error> {
        self.load(self.ring.avail_ring() + 4 + 2 * u64::from(self.ring.size()))
    }

    fn load(&self, at: u64) -> Result<u16, virtio_queue::Error> {
        let value: u16 = self
            .memory
            .load(GuestAddress(at), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u16::from_le(value))
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

/// Reads a chain, once.
fn collect(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> Result<Chain, String> {
    let head = chain.head_index();
    let mut segments = Segments::new();
    let mut readable = 0;
    let mut writing = false;
    // virtio_queue ends a chain it cannot follow (a loop, a table in a table, a table of no whole
    // descriptors, more bytes than 32 bits count) as if it were complete: it is not if its last
    // descriptor, or the one that led into a table, says that there is more.
    let mut complete = false;
    for descriptor in chain {
        complete = !descriptor.has_next();
        match (writing, descriptor.is_write_only()) {
            (true, false) => return Err("a readable descriptor follows a writable one".into()),
            (_, now) => writing = now,
        }
        let segment = Segment {
            address: descriptor.addr(),
            len: descriptor.len(),
        };
        // Nothing to read or write: Linux's vhost passes over it as well.
        if segment.len == 0 {
            continue;
        }
        if !memory.check_range(segment.address, segment.len as usize) {
            let (gpa, len) = (segment.address.0, segment.len);
            return Err(format!("{len:#x} bytes at {gpa:#x} are not RAM"));
        }
        if segments.len() == MAX_SEGMENTS {
            return Err(format!("a chain has more than {MAX_SEGMENTS} descriptors"));
        }
        segments.push(segment);
        readable += usize::from(!writing);
    }
    if complete {
        Ok(Chain::new(head, segments, readable))
    } else {
        Err("a chain of descriptors has no end".into())
    }
}

#[cfg(test)]
mod tests;
