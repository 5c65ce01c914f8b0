//! A device that goes on in another process. Its connections are that process's descriptors and end
//! with it: the guest hears of that by an event (5.10.6.7), after which its programs see their
//! connections reset. Those that listen go on.

use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering::Relaxed;
use vmm_api::state::{DeviceState, StateError};

use super::{Running, Vsock};
use crate::lifecycle::{self, Lifecycle};
use crate::mevent::Ready;
use crate::virtio::{VirtioDevice, Virtqueue, kicks};

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;

/// There is nothing to be kept: the context id is the configuration's.
#[derive(Serialize, Deserialize)]
struct Saved {}

impl Running {
    fn queues(&self) -> impl Iterator<Item = &Virtqueue> {
        let queues = [&self.receive, &self.transmit, &self.events];
        queues.into_iter().flatten()
    }

    /// Tells the guest that its connections are no more, as soon as it has a buffer for that.
    pub(super) fn tell_moved(&mut self) {
        let Some(queue) = &mut self.events else {
            return;
        };
        let _ = queue.kick().read();
        if self.moved
            && let Some(chain) = queue.pop()
        {
            let mut writer = chain.writer(queue.memory());
            writer.write(&TRANSPORT_RESET.to_le_bytes());
            queue.add_used(chain.head(), writer.done());
            queue.signal();
            self.moved = false;
        }
    }
}

impl Lifecycle for Vsock {
    fn freeze(&self) {
        let mut running = self.lock();
        let Some(running) = running.as_mut() else {
            return;
        };
        running.frozen = true;
        if let (Some(_), Some(queue)) = (running.spare.take(), &mut running.receive) {
            // The last that was taken: whoever takes one takes the spare one first.
            queue.give_back(1);
        }
        let greetings = running.greetings.values().map(|(_, source)| source);
        let connections = running.connections.values().map(|c| &c.source);
        let sources = greetings.chain(connections).chain([&running.accept]);
        sources.for_each(|source| source.set_interest(Ready::empty()));
    }

    fn thaw(&self) {
        let mut running = self.lock();
        let Some(running) = running.as_mut() else {
            return;
        };
        running.frozen = false;
        let greetings = running.greetings.values().map(|(_, source)| source);
        let sources = greetings.chain([&running.accept]);
        sources.for_each(|source| source.set_interest(Ready::READ));
        let room = running.has_room();
        running.connections.values().for_each(|c| c.wait(room));
        running.queues().for_each(kicks::again);
    }

    fn save(&self) -> Result<DeviceState, String> {
        lifecycle::save(self.name(), 1, &Saved {})
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let Saved {} = lifecycle::load(self.name(), 1, state)?;
        self.moved.store(true, Relaxed);
        Ok(())
    }
}
