//! A balloon that goes on in another process: what was asked of its driver, and what that gave. The
//! pages themselves are holes in guest memory, and stay that.

use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};
use vmm_api::state::{DeviceState, StateError};

use super::Balloon;
use crate::lifecycle::{self, Lifecycle};
use crate::virtio::{VirtioDevice, kicks};

/// In pages.
#[derive(Serialize, Deserialize)]
struct Saved {
    target: u32,
    actual: u32,
}

impl Lifecycle for Balloon {
    fn freeze(&self) {
        let mut state = self.lock();
        state.frozen = true;
        if let Some(running) = &mut state.running {
            let held = running.stats_buffer.take();
            if let (Some(_), Some(queue)) = (held, &mut running.stats) {
                // The driver waits for it, and would for ever. It is the last that was taken.
                queue.give_back(1);
            }
        }
    }

    fn thaw(&self) {
        let mut state = self.lock();
        state.frozen = false;
        if let Some(running) = &mut state.running {
            let mut queues = running.queues().into_iter().flatten();
            queues.by_ref().for_each(|queue| kicks::again(queue));
        }
    }

    fn save(&self) -> Result<DeviceState, String> {
        let saved = Saved {
            target: self.target.load(Relaxed),
            actual: self.actual.load(Relaxed),
        };
        lifecycle::save(self.name(), 1, &saved)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Saved = lifecycle::load(self.name(), 1, state)?;
        self.target.store(saved.target.min(self.most), Relaxed);
        self.actual.store(saved.actual, Relaxed);
        Ok(())
    }
}
