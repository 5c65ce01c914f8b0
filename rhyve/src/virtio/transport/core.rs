//! What the legacy and the modern registers have in common: negotiation, queues, and the device's
//! two states.

use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::GuestMemoryMmap;
use vmm_api::kvm::Doorbell;

use super::link::{Link, NO_VECTOR};
use super::{BoundDoorbell, Doorbells};
use crate::virtio::{
    Activation, Interrupts, Position, QueueCounters, Rings, VirtioDevice, Virtqueue, feature,
};

/// Device status bits (2.1).
pub mod status {
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are settled.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on.
    pub const DEVICE_NEEDS_RESET: u8 = 0x40;
    /// The driver has given up.
    pub const FAILED: u8 = 0x80;
}

/// Which registers a driver uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Interface {
    /// 0.9.5's.
    Legacy,
    /// 1.0's and later.
    Modern,
}

/// A queue as its driver sets it up.
pub(super) struct QueueSetup {
    /// What the device offers.
    pub max_size: u16,
    /// What the driver wants.
    pub rings: Rings,
    /// The driver has enabled it.
    pub enabled: bool,
    /// Written when the driver kicks.
    pub kick: Arc<EventFd>,
    /// The device has it; its counters.
    pub running: Option<Arc<QueueCounters>>,
    /// How far it got in another process, from where it is to go on when it starts.
    pub resume: Option<Position>,
}

/// The addresses at which a driver kicks, as far as they are decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct NotifyBases {
    /// The legacy interface's port, which takes a queue's number.
    pub legacy: Option<u16>,
    /// The modern interface's, likewise.
    pub port: Option<u16>,
    /// The modern interface's memory: [`super::modern::NOTIFY_STEP`] bytes a queue.
    pub memory: Option<u64>,
}

/// The state of a transport, behind its lock.
pub(super) struct Core {
    pub device: Arc<dyn VirtioDevice>,
    pub link: Arc<Link>,
    pub memory: GuestMemoryMmap,
    pub queues: Vec<QueueSetup>,
    /// The queue that queue registers are of.
    pub queue_select: u16,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    /// What the driver has set, without DEVICE_NEEDS_RESET.
    pub status: u8,
    /// The device is activated, by a driver that uses this interface.
    pub active: Option<Interface>,
    pub notify: NotifyBases,
    doorbells: Arc<dyn Doorbells>,
    bound: Vec<BoundDoorbell>,
}

impl Core {
    /// # Errors
    /// No event descriptor can be had.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        link: Arc<Link>,
        memory: GuestMemoryMmap,
        doorbells: Arc<dyn Doorbells>,
    ) -> std::io::Result<Self> {
        let queues = device.queue_sizes().iter().map(|&max_size| {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            Ok(QueueSetup {
                max_size,
                rings: Rings {
                    size: max_size,
                    ..Rings::default()
                },
                enabled: false,
                kick: Arc::new(EventFd::from_flags(flags)?),
                running: None,
                resume: None,
            })
        });
        Ok(Self {
            queues: queues.collect::<std::io::Result<_>>()?,
            device,
            link,
            memory,
            queue_select: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            active: None,
            notify: NotifyBases::default(),
            doorbells,
            bound: Vec::new(),
        })
    }

    /// All features that are offered to a driver of this interface.
    pub fn offered(&self, interface: Interface) -> u64 {
        let rings = self.device.ring_features();
        let own = self.device.features();
        match interface {
            Interface::Legacy => (own | rings) & 0xffff_ffff,
            Interface::Modern => {
                let reset = self.device.queue_reset().map_or(0, |_| feature::RING_RESET);
                own | rings & !feature::ANY_LAYOUT | feature::VERSION_1 | reset
            }
        }
    }

    /// The queue that is selected, if it is there.
    pub fn queue(&mut self) -> Option<&mut QueueSetup> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    /// The device status register.
    pub fn device_status(&self) -> u8 {
        let broken = self.link.is_broken();
        self.status
            | if broken {
                status::DEVICE_NEEDS_RESET
            } else {
                0
            }
    }

    /// The driver writes the device status register.
    pub fn set_status(&mut self, interface: Interface, mut value: u8) {
        if value == 0 {
            return self.reset();
        }
        value &= !status::DEVICE_NEEDS_RESET;
        if interface == Interface::Modern && value & status::FEATURES_OK != 0 {
            let fine = self.driver_features & !self.offered(interface) == 0
                && self.driver_features & feature::VERSION_1 != 0;
            if !fine {
                value &= !status::FEATURES_OK;
            }
        }
        // Bits are only ever added (2.1.1); without a reset there is no way back.
        self.status |= value;
        let needed = match interface {
            Interface::Legacy => status::DRIVER_OK,
            Interface::Modern => status::DRIVER_OK | status::FEATURES_OK,
        };
        if self.status & needed == needed {
            self.activate(interface);
        }
    }

    /// Whether features can still be chosen.
    pub fn negotiating(&self) -> bool {
        self.active.is_none() && self.status & status::FEATURES_OK == 0
    }

    /// Hands the device its queues, unless it has them.
    pub fn activate(&mut self, interface: Interface) {
        if self.active.is_some() || self.link.is_broken() {
            return;
        }
        let features = self.driver_features & self.offered(interface);
        let mut queues = Vec::new();
        for index in 0..self.queues.len() {
            queues.extend(self.make_queue(index, features));
        }
        if self.link.is_broken() {
            return;
        }
        self.active = Some(interface);
        let activation = Activation {
            memory: self.memory.clone(),
            features,
            queues,
            interrupts: self.link.clone(),
        };
        let name = self.device.name();
        tracing::debug!(target: "rhyve::virtio", "{name}: {interface:?}, features {features:#x}");
        if let Err(error) = self.device.activate(activation) {
            tracing::error!(target: "rhyve::virtio", "{name}: {}", crate::chain(&error));
            self.link.needs_reset();
        }
        self.bind_doorbells();
    }

    /// The device's side of a queue that the driver has enabled.
    fn make_queue(&mut self, index: usize, features: u64) -> Option<Virtqueue> {
        let number = u16::try_from(index).ok()?;
        let setup = self.queues.get_mut(index).filter(|q| q.enabled)?;
        setup.rings.event_index = features & feature::RING_EVENT_IDX != 0;
        let (memory, kick) = (self.memory.clone(), setup.kick.clone());
        let interrupts = self.link.clone();
        match Virtqueue::new(number, setup.rings, memory, kick, interrupts) {
            Ok(mut queue) => {
                if let Some(position) = setup.resume.take() {
                    queue.resume_at(position);
                }
                setup.running = Some(queue.counters().clone());
                Some(queue)
            }
            Err(error) => {
                let name = self.device.name();
                tracing::warn!(target: "rhyve::virtio", "{name}: {error}");
                self.link.needs_reset();
                None
            }
        }
    }

    /// Makes everything as it was before there was a driver.
    pub fn reset(&mut self) {
        self.bound.clear();
        self.device.reset();
        self.active = None;
        self.status = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        for queue in &mut self.queues {
            queue.clear();
        }
        self.link.reset();
    }

    /// Starts the selected queue of a device that runs already.
    pub fn start_queue(&mut self) {
        let Some(interface) = self.active else { return };
        let features = self.driver_features & self.offered(interface);
        let index = usize::from(self.queue_select);
        if self.queues.get(index).is_none_or(|q| q.running.is_some()) {
            return;
        }
        let device = self.device.clone();
        let Some(reset) = device.queue_reset() else {
            let name = device.name();
            tracing::warn!(target: "rhyve::virtio", "{name}: queue {index} comes too late");
            return;
        };
        if let Some(queue) = self.make_queue(index, features)
            && let Err(error) = reset.start_queue(queue)
        {
            tracing::error!(target: "rhyve::virtio", "{}: {}", device.name(), crate::chain(&error));
            self.link.needs_reset();
        }
    }

    /// Stops the selected queue, if the device can do that, and forgets what the driver set up.
    pub fn stop_queue(&mut self) {
        let device = self.device.clone();
        let Some(setup) = self.queues.get(usize::from(self.queue_select)) else {
            return;
        };
        if setup.running.is_some() {
            let Some(reset) = device.queue_reset() else {
                return;
            };
            reset.stop_queue(self.queue_select);
        }
        self.link.set_queue_vector(self.queue_select, NO_VECTOR);
        if let Some(setup) = self.queue() {
            setup.clear();
        }
    }

    /// The driver kicks, and KVM did not see it.
    pub fn kick(&mut self, interface: Interface, queue: u16) {
        // Legacy drivers use devices before they set DRIVER_OK (3.1.2).
        if interface == Interface::Legacy && self.status & status::FAILED == 0 {
            let set_up = self
                .queues
                .get(usize::from(queue))
                .is_some_and(|q| q.enabled);
            if set_up {
                self.activate(interface);
            }
        }
        if let Some(queue) = self.queues.get(usize::from(queue))
            && queue.running.is_some()
        {
            // The one failure, a counter at its maximum, means that the device has not looked yet.
            let _ = queue.kick.write(1);
        }
    }

    /// Has KVM take the driver's kicks, if there is anybody to hear them.
    pub fn bind_doorbells(&mut self) {
        self.bound.clear();
        let Some(interface) = self.active else { return };
        let NotifyBases {
            legacy,
            port,
            memory,
        } = self.notify;
        for (index, queue) in (0u16..).zip(&self.queues) {
            let doorbells = match interface {
                Interface::Legacy => [legacy.map(|port| Doorbell::Port(port, index)), None],
                Interface::Modern => [
                    port.map(|port| Doorbell::Port(port, index)),
                    memory.map(|base| {
                        Doorbell::Memory(base + super::modern::NOTIFY_STEP * u64::from(index))
                    }),
                ],
            };
            for doorbell in doorbells.into_iter().flatten() {
                // Without it the kick comes by an exit.
                self.bound
                    .extend(self.doorbells.bind(doorbell, &queue.kick));
            }
        }
    }
}

impl QueueSetup {
    fn clear(&mut self) {
        self.rings = Rings {
            size: self.max_size,
            ..Rings::default()
        };
        self.enabled = false;
        self.running = None;
        self.resume = None;
        // A kick for the driver that is gone would be spurious for the next.
        let _ = self.kick.read();
    }
}
