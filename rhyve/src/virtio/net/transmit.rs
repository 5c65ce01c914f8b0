//! From the driver to the backend.

use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::sys::epoll::EpollFlags;

use super::pace::{Pace, SMALL};
use super::waiter::Waiter;
use super::worker::Work;
use crate::net::Port;
use crate::virtio::{Chain, Virtqueue};

/// The shortest frame: its addresses and type.
const SHORTEST: u32 = 14;

/// How late a driver hears that a small frame which is alone was sent. Nobody waits for the room it
/// takes, and the driver finds it with the next frame that goes or comes: mostly there is nothing left to
/// tell then, and an interrupt is saved for each.
const LATE: Duration = Duration::from_millis(4);
/// The same of a frame that an answer is to come for: the driver finds it sent with that one. Where a round
/// trip takes longer than [`LATE`], each would wake the thread a second time, for nothing.
const LATE_OF_QUESTION: Duration = Duration::from_millis(20);

/// A transmit thread's life. Returns its queue with every frame answered that it has taken.
pub(super) fn run(mut work: Work, mut waiter: Waiter) -> Virtqueue {
    let port = work.port.clone();
    let mut pace = Pace::default();
    let mut patient = true;
    be_patient(&work, patient);
    while !waiter.stopped() {
        work.queue.disable_kicks();
        while !waiter.stopped()
            && let Some(chain) = work.queue.pop()
        {
            // Of the one before it, if that has not been found: this one may wait for room.
            work.queue.signal();
            send(&work, &*port, &chain, &mut waiter);
            work.queue.add_used(chain.head(), 0);
            let len = chain.readable_len() as usize;
            pace.moved(len);
            // With event index the driver hears of it only if it waits for room.
            if len <= SMALL {
                work.queue.signal_lazily();
            } else {
                work.queue.signal();
            }
        }
        if work.queue.enable_kicks() {
            continue;
        }
        pace.waits();
        // A stream: a kick must not stop a vCPU that shares its processor with this before it has queued
        // the next frame, or each is moved on its own. An answer: nothing else is to come.
        let stream = !(pace.is_single() && work.shared.receives_single(work.pair));
        if stream != patient {
            patient = stream;
            be_patient(&work, patient);
        }
        let late = if stream { LATE } else { LATE_OF_QUESTION };
        if !waiter.wait(None, work.queue.has_untold().then_some(late)) {
            work.queue.signal();
        }
    }
    work.queue.signal();
    work.queue
}

/// Sets the thread's policy, or leaves it as it is.
fn be_patient(work: &Work, patient: bool) {
    if let Err(error) = crate::thread::be_patient(patient) {
        let label = work.shared.label();
        tracing::debug!(target: "rhyve::virtio::net", "{label}: SCHED_BATCH {patient}: {error}");
    }
}

/// Sends one frame, or drops it.
fn send(work: &Work, port: &dyn Port, chain: &Chain, waiter: &mut Waiter) {
    let counters = &work.shared.counters;
    let mut reader = chain.reader(work.queue.memory());
    let header = work.header as u32;
    let length = reader.remaining().saturating_sub(header);
    if length < SHORTEST || !chain.writable().is_empty() {
        counters.bad_requests.fetch_add(1, Relaxed);
        return;
    }
    if !work.shared.is_up() {
        counters.transmit_dropped.fetch_add(1, Relaxed);
        return;
    }
    if !work.shared.backend.info().header {
        // It says nothing: nothing was negotiated that it could say.
        reader.skip(header);
    }
    let slices = reader.slices(u32::MAX);
    loop {
        match port.send(&slices) {
            Ok(()) => {
                counters.transmitted.fetch_add(1, Relaxed);
                counters.bytes_transmitted.fetch_add(length.into(), Relaxed);
                return;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let ready = port.wait();
                waiter.wait(Some((&ready, EpollFlags::EPOLLOUT)), None);
                if waiter.stopped() || !work.shared.is_up() {
                    return;
                }
            }
            // A header that says what cannot be, or too many pieces.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                counters.bad_requests.fetch_add(1, Relaxed);
                return;
            }
            Err(error) => {
                counters.transmit_dropped.fetch_add(1, Relaxed);
                work.shared.complain(work.pair, "send", &error);
                return;
            }
        }
    }
}
