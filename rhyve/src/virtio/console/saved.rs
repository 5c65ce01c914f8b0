//! A console that goes on in another process: what its driver was told and is still to be told, and
//! input that nobody has fetched. The host's ends are new ones, and the driver hears who is there.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};
use vmm_api::state::{DeviceState, StateError};

use super::VirtioConsole;
use super::control::Message;
use super::port::PortState;
use crate::lifecycle::{self, Lifecycle};
use crate::virtio::{VirtioDevice, kicks};

#[derive(Serialize, Deserialize)]
pub(super) struct Saved {
    generation: u8,
    ports: Vec<SavedPort>,
    pending: VecDeque<Message>,
}

#[derive(Default, Serialize, Deserialize)]
struct SavedPort {
    ready: bool,
    open: bool,
    told_open: Option<bool>,
    told_size: Option<(u16, u16)>,
    /// Bytes of the next request that have gone out.
    taken: u32,
    #[serde(with = "lifecycle::bytes")]
    input: Vec<u8>,
}

impl Saved {
    /// What is to be told, once the ports are as they were.
    pub(super) fn resume(self, ports: &mut [PortState]) -> VecDeque<Message> {
        for (port, saved) in ports.iter_mut().zip(self.ports) {
            (port.ready, port.open) = (saved.ready, saved.open);
            (port.told_open, port.told_size) = (saved.told_open, saved.told_size);
            port.taken = saved.taken;
        }
        self.pending
    }
}

impl Lifecycle for VirtioConsole {
    fn freeze(&self) {
        let mut state = self.lock();
        state.frozen = true;
        let ports = state.running.iter_mut().flat_map(|r| &mut r.ports);
        ports.for_each(PortState::unstall);
    }

    fn thaw(&self) {
        let mut state = self.lock();
        state.frozen = false;
        // One is enough: whatever wakes it, it looks at everything.
        let mut queues = state.running.iter().flat_map(|running| running.queues());
        queues.next().into_iter().for_each(kicks::again);
    }

    fn save(&self) -> Result<DeviceState, String> {
        let state = self.lock();
        let running = state.running.as_ref();
        let ports = self.ports.iter().enumerate().map(|(index, port)| {
            let there = running.and_then(|running| running.ports.get(index));
            let saved = there.map_or_else(SavedPort::default, |state| SavedPort {
                ready: state.ready,
                open: state.open,
                told_open: state.told_open,
                told_size: state.told_size,
                taken: state.taken,
                input: Vec::new(),
            });
            SavedPort {
                input: port.wire.pending_input(),
                ..saved
            }
        });
        let saved = Saved {
            generation: self.generation.load(Relaxed),
            ports: ports.collect(),
            pending: running.map(|r| r.pending.clone()).unwrap_or_default(),
        };
        lifecycle::save(self.name(), 1, &saved)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let mut saved: Saved = lifecycle::load(self.name(), 1, state)?;
        let (then, now) = (saved.ports.len(), self.ports.len());
        if then != now {
            let text = format!("{then} console ports, here {now}");
            return Err(StateError::Value(text));
        }
        self.generation.store(saved.generation, Relaxed);
        for (port, saved) in self.ports.iter().zip(&mut saved.ports) {
            port.wire.put_back(&std::mem::take(&mut saved.input));
        }
        self.lock().resumed = Some(saved);
        Ok(())
    }
}
