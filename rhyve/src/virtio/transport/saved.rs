//! A transport as it is stored: what the driver has set up, and how far each queue got.

use serde::{Deserialize, Serialize};
use vmm_api::state::{DeviceState, StateError};

use super::VirtioPci;
use super::core::{Core, Interface, QueueSetup};
use super::link::SavedLink;
use crate::lifecycle::{self, Lifecycle};
use crate::virtio::{Interrupts, Position};

const KIND: &str = "virtio-pci";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    queue_select: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    active: Option<Interface>,
    link: SavedLink,
    queues: Vec<SavedQueue>,
    device: DeviceState,
}

#[derive(Serialize, Deserialize)]
struct SavedQueue {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    enabled: bool,
    running: Option<Position>,
}

impl SavedQueue {
    fn new(index: usize, queue: &QueueSetup) -> Result<Self, String> {
        let running = queue.running.as_ref().map(|counters| counters.position());
        match running {
            Some(at) if at.next_avail != at.next_used => {
                return Err(format!("queue {index} has requests under way"));
            }
            _ => {}
        }
        Ok(Self {
            size: queue.rings.size,
            descriptors: queue.rings.descriptors,
            available: queue.rings.available,
            used: queue.rings.used,
            enabled: queue.enabled,
            running,
        })
    }

    fn restore(&self, queue: &mut QueueSetup) -> Result<(), StateError> {
        if self.size > queue.max_size {
            let text = format!("a queue of {}, here {}", self.size, queue.max_size);
            return Err(StateError::Value(text));
        }
        queue.rings.size = self.size;
        queue.rings.descriptors = self.descriptors;
        queue.rings.available = self.available;
        queue.rings.used = self.used;
        queue.enabled = self.enabled;
        queue.resume = self.running;
        Ok(())
    }
}

impl Core {
    fn restore(&mut self, saved: &Saved) -> Result<(), StateError> {
        let wrong = |text: String| StateError::Value(text);
        if saved.queues.len() != self.queues.len() {
            let (then, now) = (saved.queues.len(), self.queues.len());
            return Err(wrong(format!("{then} queues, here {now}")));
        }
        if let Some(interface) = saved.active {
            let more = saved.driver_features & !self.offered(interface);
            if more != 0 {
                return Err(wrong(format!("its driver uses features {more:#x}")));
            }
        }
        self.queue_select = saved.queue_select;
        self.device_feature_select = saved.device_feature_select;
        self.driver_feature_select = saved.driver_feature_select;
        self.driver_features = saved.driver_features;
        self.status = saved.status;
        for (queue, saved) in self.queues.iter_mut().zip(&saved.queues) {
            saved.restore(queue)?;
        }
        self.link.restore(&saved.link);
        let Some(interface) = saved.active else {
            return Ok(());
        };
        self.activate(interface);
        for (index, queue) in (0..).zip(&self.queues) {
            if queue.running.is_some() {
                // A kick, or an interrupt, may have been on its way: one too many does no harm.
                let _ = queue.kick.write(1);
                self.link.signal_queue(index);
            }
        }
        Ok(())
    }
}

impl Lifecycle for VirtioPci {
    fn freeze(&self) {
        if let Some(device) = self.device.lifecycle() {
            device.freeze();
        }
    }

    fn thaw(&self) {
        if let Some(device) = self.device.lifecycle() {
            device.thaw();
        }
    }

    fn save(&self) -> Result<DeviceState, String> {
        let device = self.device.lifecycle();
        let device = device.ok_or("it has no state to be saved")?.save()?;
        let core = self.lock();
        let queues = core.queues.iter().enumerate();
        let saved = Saved {
            queue_select: core.queue_select,
            device_feature_select: core.device_feature_select,
            driver_feature_select: core.driver_feature_select,
            driver_features: core.driver_features,
            status: core.status,
            active: core.active,
            link: core.link.save(),
            queues: queues
                .map(|(index, queue)| SavedQueue::new(index, queue))
                .collect::<Result<_, _>>()?,
            device,
        };
        lifecycle::save(KIND, VERSION, &saved)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Saved = lifecycle::load(KIND, VERSION, state)?;
        let none = || StateError::Value("it has no state to be restored".into());
        let device = self.device.lifecycle().ok_or_else(none)?;
        device.restore(&saved.device)?;
        self.lock().restore(&saved)
    }
}
