//! From the backend to the driver.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::sys::epoll::EpollFlags;
use smallvec::SmallVec;
use vm_memory::{GuestMemoryMmap, VolatileSlice};
use vmm_api::scatter::Slices;

use super::filter::LOOKED_AT;
use super::pace::Pace;
use super::waiter::Waiter;
use super::worker::Work;
use crate::net::Wait;
use crate::virtio::Virtqueue;

/// The largest frame with its header: 64 KiB of packet, addresses, a tag, and some room.
const LARGEST: usize = (64 << 10) + 64;
/// Where a header says how many buffers a frame takes (5.1.6), if it is so long.
const NUM_BUFFERS: usize = 10;
/// Pieces of memory for one call; one more is for what does not fit.
const MAX_SLICES: usize = 1000;
/// How long to wait for more buffers than none.
const SHORT: Duration = Duration::from_millis(1);
/// While frames come one at a time, so many of them are not asked for a next one.
const UNASKED: u8 = 15;

/// A buffer of the driver's.
struct Room<'m> {
    head: u16,
    slices: Slices<'m>,
    len: usize,
}

struct Receiving<'m> {
    work: Work,
    memory: &'m GuestMemoryMmap,
    /// Buffers the driver has given and not got back, in its order.
    rooms: VecDeque<Room<'m>>,
    /// One behind them into which nothing can be received: it goes back in its turn.
    bad: Option<u16>,
    /// Their bytes and pieces.
    bytes: usize,
    pieces: usize,
    /// More of them were waited for.
    patient: bool,
    pace: Pace,
    /// Frames after which there was no look for another one.
    unasked: u8,
    /// Takes what the buffers that were offered have no room for.
    spill: Vec<u8>,
}

/// A receive thread's life. Returns its queue with no buffer taken out of it.
pub(super) fn run(work: Work, mut waiter: Waiter) -> Virtqueue {
    let memory = work.queue.memory().clone();
    let mut receiving = Receiving {
        work,
        memory: &memory,
        rooms: VecDeque::new(),
        bad: None,
        bytes: 0,
        pieces: 0,
        patient: false,
        pace: Pace::default(),
        unasked: 0,
        spill: vec![0; LARGEST],
    };
    receiving.work.queue.disable_kicks();
    while !waiter.stopped() {
        receiving.turn(&mut waiter);
    }
    let mut queue = receiving.work.queue;
    queue.give_back(receiving.rooms.len() + usize::from(receiving.bad.is_some()));
    queue
}

impl<'m> Receiving<'m> {
    /// Moves a frame, or waits: once, for a wait takes the bell's ring away. What is alone by habit is waited
    /// for and received in one.
    fn turn(&mut self, waiter: &mut Waiter) {
        let shared = &self.work.shared;
        if shared.is_lost() || self.work.pair >= shared.active_pairs.load(Relaxed) {
            waiter.wait(None, None);
            return;
        }
        if !shared.is_up() {
            waiter.come_back();
            let discarded = self.discard();
            return self.settle(discarded, waiter);
        }
        if !self.gather() && (self.rooms.is_empty() || !self.patient) {
            // With some room, the next frame may fit; it is asked for after a moment.
            self.patient = true;
            let timeout = (!self.rooms.is_empty()).then_some(SHORT);
            return self.wait(waiter, true, None, timeout);
        }
        self.patient = false;
        if self.pace.is_enough() && self.unasked < UNASKED && self.has_enough() {
            self.unasked += 1;
            self.waits();
            match self.receive(Some(waiter)) {
                // It may have been the bell that ended the wait.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.unasked = 0,
                received => self.settle(received, waiter),
            }
            return;
        }
        waiter.come_back();
        let received = self.receive(None);
        self.settle(received, waiter);
    }

    /// Waits if there was no frame, and complains if there will be none.
    fn settle(&mut self, received: io::Result<()>, waiter: &mut Waiter) {
        match received {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.unasked = 0;
                self.wait_for_frame(waiter);
            }
            Err(error) => self.work.shared.complain(self.work.pair, "receive", &error),
        }
    }

    /// Nothing is to be done until there is a frame.
    fn waits(&mut self) {
        self.pace.waits();
        let (shared, pair) = (&self.work.shared, self.work.pair);
        shared.set_receives_single(pair, self.pace.is_single());
    }

    fn wait_for_frame(&mut self, waiter: &mut Waiter) {
        self.waits();
        let shared = &self.work.shared;
        let ready = self.work.port.wait();
        let more = shared.is_up() && !self.has_enough();
        self.wait(waiter, more, Some((&ready, EpollFlags::EPOLLIN)), None);
    }

    /// Waits for any of: more buffers, a frame, the time.
    fn wait(
        &mut self,
        waiter: &mut Waiter,
        buffers: bool,
        port: Option<(&Wait, EpollFlags)>,
        timeout: Option<Duration>,
    ) {
        if buffers && self.work.queue.enable_kicks() {
            // They are there already.
            return self.work.queue.disable_kicks();
        }
        waiter.wait(port, timeout);
        if buffers {
            self.work.queue.disable_kicks();
        }
    }

    /// Whether the largest frame fits, or all of a small ring is here, or all before one of no use.
    fn has_enough(&self) -> bool {
        if self.bad.is_some() {
            !self.rooms.is_empty()
        } else if self.work.mergeable {
            let most = MAX_SLICES.min(self.work.queue.size().into());
            self.bytes >= LARGEST || self.pieces >= most
        } else {
            !self.rooms.is_empty()
        }
    }

    /// Takes buffers until there are enough; false if there are not.
    fn gather(&mut self) -> bool {
        loop {
            if self.rooms.is_empty()
                && let Some(head) = self.bad.take()
            {
                self.work.shared.counters.bad_requests.fetch_add(1, Relaxed);
                self.work.queue.add_used(head, 0);
                self.work.queue.signal();
            }
            if self.has_enough() {
                return true;
            }
            let Some(chain) = self.work.queue.pop() else {
                return false;
            };
            let len = chain.writable_len() as usize;
            if len <= self.work.header || !chain.readable().is_empty() {
                self.bad = Some(chain.head());
                continue;
            }
            let slices = chain.writer(self.memory).slices(u32::MAX);
            self.bytes += len;
            self.pieces += slices.len();
            self.rooms.push_back(Room {
                head: chain.head(),
                slices,
                len,
            });
        }
    }

    /// Takes a frame that comes while the link is down: nobody is to find it when it is up again.
    fn discard(&mut self) -> io::Result<()> {
        let mut frame = vec![0; LARGEST];
        self.work.port.receive(&[frame.as_mut_slice().into()])?;
        let counters = &self.work.shared.counters;
        counters.receive_dropped.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Receives a frame into the buffers there are; waits for it with a waiter.
    fn receive(&mut self, waiter: Option<&mut Waiter>) -> io::Result<()> {
        let header = self.work.header;
        // Without headers in the backend, the driver's are written here.
        let ours = if self.work.shared.backend.info().header {
            0
        } else {
            header
        };
        // A frame of a driver without mergeable buffers has one. Many are costly to offer: while only
        // small frames come, the first one is enough.
        let rooms = if self.work.mergeable {
            self.rooms.len()
        } else {
            1
        };
        let offered = if self.pace.is_single() { 1 } else { rooms };
        let of = |rooms| self.rooms.iter().take(rooms).flat_map(|room| &room.slices);
        let mut slices = Slices::new();
        each(of(offered), ours, |slice| {
            slices.push(slice);
            slices.len() < MAX_SLICES
        });
        let taken = ours + slices.iter().map(VolatileSlice::len).sum::<usize>();
        slices.push(self.spill.as_mut_slice().into());
        let received = match waiter {
            Some(waiter) => waiter.receive(&self.work.port, &slices),
            None => self.work.port.receive(&slices),
        };
        let len = ours + received?;
        drop(slices);
        self.pace.moved(len);
        let counters = &self.work.shared.counters;
        // What the offered buffers had no room for goes into those behind them.
        let spilled = len.saturating_sub(taken);
        let fits = spilled == 0 || len <= of(rooms).map(VolatileSlice::len).sum();
        let spilled = self.spill.get(..spilled).filter(|_| fits);
        let Some(spilled) = spilled.filter(|_| len > header) else {
            counters.receive_dropped.fetch_add(1, Relaxed);
            return Ok(());
        };
        poke(of(rooms), taken, spilled);
        let mut start = [0; LOOKED_AT];
        peek(of(rooms), header, &mut start);
        if !self.work.shared.wants(&start) {
            counters.filtered.fetch_add(1, Relaxed);
            return Ok(());
        }
        let mut left = len;
        let mut answers: SmallVec<[_; 4]> = SmallVec::new();
        for room in &self.rooms {
            if left == 0 {
                break;
            }
            let written = room.len.min(left);
            left -= written;
            answers.push((room.head, written as u32));
        }
        if ours != 0 {
            poke(of(rooms), 0, &[0; NUM_BUFFERS]);
        }
        if header > NUM_BUFFERS {
            // Without mergeable buffers it is 1 (5.1.6.4).
            poke(
                of(rooms),
                NUM_BUFFERS,
                &(answers.len() as u16).to_le_bytes(),
            );
        }
        counters.received.fetch_add(1, Relaxed);
        let frame = (len - header) as u64;
        counters.bytes_received.fetch_add(frame, Relaxed);
        for room in self.rooms.drain(..answers.len()) {
            self.bytes -= room.len;
            self.pieces -= room.slices.len();
        }
        self.work.queue.add_used_together(&answers);
        self.work.queue.signal();
        Ok(())
    }
}

/// Copies what is at `offset`, or as much of it as there is.
fn peek<'s, 'm: 's>(
    slices: impl Iterator<Item = &'s VolatileSlice<'m>>,
    offset: usize,
    mut to: &mut [u8],
) {
    each(slices, offset, |slice| {
        let count = slice.copy_to(to);
        to = std::mem::take(&mut to).get_mut(count..).unwrap_or_default();
        !to.is_empty()
    });
}

/// Writes at `offset`, or as much as there is room for.
fn poke<'s, 'm: 's>(
    slices: impl Iterator<Item = &'s VolatileSlice<'m>>,
    offset: usize,
    mut from: &[u8],
) {
    each(slices, offset, |slice| {
        let count = slice.len().min(from.len());
        slice.copy_from(from);
        from = from.get(count..).unwrap_or_default();
        !from.is_empty()
    });
}

/// The slices from `offset` on, until there was enough.
fn each<'s, 'm: 's>(
    slices: impl Iterator<Item = &'s VolatileSlice<'m>>,
    mut offset: usize,
    mut more: impl FnMut(VolatileSlice<'m>) -> bool,
) {
    for slice in slices {
        let now = offset.min(slice.len());
        offset -= now;
        match slice.offset(now) {
            Ok(rest) if !rest.is_empty() && !more(rest) => break,
            _ => {}
        }
    }
}
