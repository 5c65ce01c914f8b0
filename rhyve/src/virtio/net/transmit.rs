//! From the driver to the backend.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use nix::poll::PollFlags;

use super::worker::{Bell, For, Work, wait};
use crate::net::Port;
use crate::virtio::{Chain, Virtqueue};

/// The shortest frame: its addresses and type.
const SHORTEST: u32 = 14;

/// A transmit thread's life. Returns its queue with every frame answered that it has taken.
pub(super) fn run(mut work: Work, bell: &Bell) -> Virtqueue {
    let port = work.port.clone();
    // Or a kick stops a vCPU that shares its processor with this before it has queued the next frame,
    // and each is moved on its own.
    if let Err(error) = crate::thread::patient() {
        let label = work.shared.label();
        tracing::debug!(target: "rhyve::virtio::net", "{label}: SCHED_BATCH: {error}");
    }
    while !bell.stopped() {
        work.queue.disable_kicks();
        while !bell.stopped()
            && let Some(chain) = work.queue.pop()
        {
            send(&work, &*port, &chain, bell);
            work.queue.add_used(chain.head(), 0);
            // With event index the driver hears of it only if it waits for room.
            work.queue.signal();
        }
        if !work.queue.enable_kicks() {
            let kick = For {
                kick: Some(&work.queue),
                ..For::default()
            };
            wait(bell, &kick);
        }
    }
    work.queue
}

/// Sends one frame, or drops it.
fn send(work: &Work, port: &dyn Port, chain: &Chain, bell: &Bell) {
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
                let room = For {
                    port: Some((&ready, PollFlags::POLLOUT)),
                    ..For::default()
                };
                wait(bell, &room);
                if bell.stopped() || !work.shared.is_up() {
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
