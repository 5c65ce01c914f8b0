//! A port: its wire, and its queues while a driver runs.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::Counters;
use crate::console::Console;
use crate::virtio::{Chain, Virtqueue, kicks};

/// Bytes that are moved at once: what a wire holds.
const PIECE: usize = 4096;

/// A port of the device.
pub struct Port {
    /// What the guest calls it.
    pub name: String,
    /// The guest is to take it for a console.
    pub console: bool,
    /// Where the host's end is, for whoever looks.
    pub place: String,
    /// The host's end.
    pub wire: Arc<Console>,
}

impl Port {
    /// Where it leads and who is there.
    pub(super) fn describe(&self, guest: bool) -> String {
        let open = |yes| if yes { "open" } else { "closed" };
        format!(
            "{} at {} (host {}, guest {})",
            self.name,
            self.place,
            open(self.wire.is_attended()),
            open(guest)
        )
    }
}

/// A port whose driver runs.
pub(super) struct PortState {
    receive: Option<Virtqueue>,
    transmit: Option<Virtqueue>,
    /// Output that the wire had no room for, and how much of it was taken.
    stalled: Option<(Chain, u32)>,
    /// As much of the next request's output was taken when it came before.
    pub(super) taken: u32,
    /// The driver has it.
    pub ready: bool,
    /// A program of the guest has it open.
    pub open: bool,
    /// What the driver was told last.
    pub told_open: Option<bool>,
    pub told_size: Option<(u16, u16)>,
}

impl PortState {
    pub fn new(receive: Option<Virtqueue>, transmit: Option<Virtqueue>, open: bool) -> Self {
        Self {
            receive,
            transmit,
            stalled: None,
            taken: 0,
            ready: open,
            open,
            told_open: None,
            told_size: None,
        }
    }

    /// Has it use this queue from here on, or none; what the one before held is forgotten.
    pub fn set_queue(&mut self, receives: bool, queue: Option<Virtqueue>) {
        if receives {
            self.receive = queue;
        } else {
            (self.stalled, self.taken) = (None, 0);
            self.transmit = queue;
        }
    }

    /// Puts a request that waits for room back, as if it had not come yet.
    pub fn unstall(&mut self) {
        if let (Some((_, done)), Some(queue)) = (self.stalled.take(), &mut self.transmit) {
            queue.give_back(1);
            self.taken = done;
        }
    }

    /// Its queues, as far as the driver has set them up.
    pub fn queues(&self) -> impl Iterator<Item = &Virtqueue> {
        self.receive.iter().chain(&self.transmit)
    }

    /// Moves output to the wire, as far as that has room; it calls again when it has more.
    pub fn transmit(&mut self, port: &Port, counters: &Counters) {
        let Some(queue) = &mut self.transmit else {
            return;
        };
        let _ = queue.kick().read();
        queue.disable_kicks();
        for _ in 0..queue.size() {
            let Some((chain, done)) = self
                .stalled
                .take()
                .or_else(|| Some((queue.pop()?, std::mem::take(&mut self.taken))))
            else {
                break;
            };
            let mut reader = chain.reader(queue.memory());
            let mut done = reader.skip(done);
            let mut bytes = [0; PIECE];
            let complete = loop {
                let room = port.wire.send_room().min(PIECE);
                let piece = bytes.get_mut(..room).unwrap_or_default();
                let read = reader.read(piece);
                let sent = port.wire.send_some(piece.get(..read).unwrap_or_default());
                done = done.saturating_add(sent as u32);
                counters.sent.fetch_add(sent as u64, Relaxed);
                // An emergency write of a vCPU may have taken the room.
                if sent < read {
                    break false;
                }
                if reader.remaining() == 0 {
                    break true;
                }
                if read == 0 {
                    break false;
                }
            };
            if !complete {
                self.stalled = Some((chain, done));
                break;
            }
            queue.add_used(chain.head(), 0);
        }
        queue.signal();
        if queue.enable_kicks() && self.stalled.is_none() {
            kicks::again(queue);
        }
    }

    /// Moves input to the driver, as far as there are buffers.
    pub fn receive(&mut self, port: &Port, counters: &Counters) {
        let Some(queue) = &mut self.receive else {
            return;
        };
        let _ = queue.kick().read();
        for _ in 0..queue.size() {
            // A plain port's input waits for a program that opens it.
            if !self.open || !port.wire.has_input() {
                break;
            }
            let Some(chain) = queue.pop() else { break };
            let room = (chain.writable_len() as usize).min(PIECE);
            let mut bytes = [0; PIECE];
            let piece = bytes.get_mut(..room).unwrap_or_default();
            let count = port.wire.receive_some(piece);
            let mut writer = chain.writer(queue.memory());
            writer.write(piece.get(..count).unwrap_or_default());
            queue.add_used(chain.head(), writer.done());
            counters.received.fetch_add(count as u64, Relaxed);
            if room == 0 {
                counters.bad.fetch_add(1, Relaxed);
            }
        }
        queue.signal();
        if queue.enable_kicks() && self.open && port.wire.has_input() {
            kicks::again(queue);
        }
    }
}
