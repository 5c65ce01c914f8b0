//! virtio over PCI (4.1): the legacy registers, the modern ones, or both at once.
//!
//! | BAR | what                                                                    |
//! |-----|-------------------------------------------------------------------------|
//! | 0   | ports: legacy registers and device configuration                        |
//! | 1   | memory: MSI-X table and pending bits, unless MSI takes its place        |
//! | 2   | ports: modern notification                                              |
//! | 4   | memory: modern common configuration, ISR, device configuration, notify  |

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::EventFd;
use vm_memory::GuestMemoryMmap;
use vmm_api::kvm::Doorbell;

use self::core::{Core, Interface, NotifyBases};
use self::link::Link;
use super::VirtioDevice;
use crate::bus::IoSize;
use crate::lifecycle::Lifecycle;
use crate::pci::{
    Bar, BarKind, Buses, ConfigSpace, Endpoint, Ident, IntxPin, Messages, Msi, MsiSink, Msix,
    NoRoom, Parts, PciDevice, Placement,
};

mod core;
mod inspect;
mod legacy;
mod link;
mod modern;
mod saved;
#[cfg(test)]
mod tests;

/// Which of its interfaces a device has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Those of virtio 0.9.5 only.
    Legacy,
    /// Those of virtio 1.0 and later only.
    Modern,
    /// Both.
    Transitional,
    /// Those that devices had at the time the machine is of: both, today.
    #[default]
    Customary,
}

/// Has KVM take a driver's kicks without an exit to user space.
pub trait Doorbells: Send + Sync {
    /// Lets `doorbell` count up `event` until what is returned is dropped; none if that cannot be
    /// had, and then the doorbell's access comes to user space.
    fn bind(&self, doorbell: Doorbell, event: &EventFd) -> Option<BoundDoorbell>;
}

/// A doorbell that is bound, until this is dropped.
pub type BoundDoorbell = Box<dyn Send>;

/// What a device on PCI needs of its machine.
#[derive(Clone)]
pub struct Board {
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// Where its BARs are.
    pub buses: Buses,
    /// Where its message signalled interrupts go.
    pub msi: Arc<dyn MsiSink>,
    /// They are MSI-X; or else MSI, of which a function has one.
    pub msix: bool,
    /// Where its driver's kicks come from.
    pub doorbells: Arc<dyn Doorbells>,
}

/// Why a device cannot be put on PCI.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// There is no place for its BARs.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// A queue's event descriptor cannot be had.
    #[error("cannot make an event descriptor for a virtqueue")]
    Event(#[from] std::io::Error),
}

/// A virtio device as PCI shows it: vendor 0x1af4, and who it is.
struct Identity {
    /// Transitional device id, if there is one (4.1.2.1).
    transitional: Option<u16>,
    class: u32,
}

impl Identity {
    fn of(id: u16) -> Self {
        use super::device_id::*;
        let (transitional, class) = match id {
            NET => (Some(0x1000), 0x02_00_00),
            BLOCK => (Some(0x1001), 0x01_00_00),
            BALLOON => (Some(0x1002), 0x05_00_00),
            CONSOLE => (Some(0x1003), 0x07_80_00),
            ENTROPY => (Some(0x1005), 0x10_00_00),
            NINE_P => (Some(0x1009), 0x00_02_00),
            _ => (None, 0x00_02_00),
        };
        Self {
            transitional,
            class,
        }
    }
}

/// A virtio device behind PCI's registers.
pub struct VirtioPci {
    device: Arc<dyn VirtioDevice>,
    link: Arc<Link>,
    core: Mutex<Core>,
    /// The interfaces it has, in `virtio=`'s words.
    offered: &'static str,
    /// Its own, without the one of MSI-X.
    bars: Vec<Bar>,
    /// Where the capability of PCI configuration access is.
    window: Option<u8>,
}

impl VirtioPci {
    /// Puts `device` behind a function, with INTx at `pin`. Plug that in, and keep this to [`VirtioPci::stop`] the device at the end.
    ///
    /// # Errors
    /// There is no room for its BARs, or no descriptor to be had.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        transport: Transport,
        board: &Board,
        pin: IntxPin,
        placement: &mut Placement,
    ) -> Result<(Arc<Self>, Arc<Endpoint>), TransportError> {
        let queues = device.queue_sizes().len();
        let Identity {
            transitional,
            class,
        } = Identity::of(device.id());
        // A device that came with 1.0 has no other registers.
        let old = transitional.filter(|_| transport != Transport::Modern);
        let ident = Ident {
            vendor: 0x1af4,
            device: old.unwrap_or(0x1040 + device.id()),
            class,
            // 0 tells a legacy driver that it may go on, 1 that there is nothing for it.
            revision: old.is_none().into(),
            subsystem_vendor: 0x1af4,
            subsystem: device.id(),
        };
        let mut parts = Parts::new(device.name(), ident);
        let mut bar = |index, kind, size| parts.bars.push(Bar { index, kind, size });
        if old.is_some() {
            bar(
                legacy::BAR,
                BarKind::Io,
                legacy::bar_size(device.config_size()),
            );
        }
        let modern = old.is_none() || transport != Transport::Legacy;
        if modern {
            let memory = BarKind::Memory64 { prefetchable: true };
            bar(modern::PORT_BAR, BarKind::Io, modern::PORT_BAR_SIZE);
            bar(modern::BAR, memory, modern::bar_size(queues));
        }
        let messages = if board.msix {
            // One for each queue, one for the configuration.
            let vectors = u16::try_from(queues + 1).unwrap_or(u16::MAX);
            Messages::Msix(Msix::new(1, vectors, &*board.msi))
        } else {
            Messages::Msi(Msi::new(&*board.msi))
        };
        let window = modern.then(|| modern::install(&mut parts.space, queues));
        parts.messages = Some(messages.clone());
        let link = Link::new(messages, pin.intx.clone(), queues);
        parts.intx = Some(pin);

        let core = Core::new(
            device.clone(),
            link.clone(),
            board.memory.clone(),
            board.doorbells.clone(),
        )?;
        let transport = Arc::new(Self {
            device,
            link,
            core: Mutex::new(core),
            offered: match (old, modern) {
                (None, _) => "modern",
                (Some(_), false) => "legacy",
                (Some(_), true) => "transitional",
            },
            bars: parts.bars.clone(),
            window,
        });
        let endpoint = Endpoint::new(parts, transport.clone(), board.buses.clone(), placement)?;
        Ok((transport, endpoint))
    }

    /// Stops the device for good: nothing touches guest memory any more when this returns.
    pub fn stop(&self) {
        self.lock().reset();
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What PCI configuration access leads to: BAR, offset and length (4.1.4.9).
    fn window(&self, space: &ConfigSpace) -> Option<(u8, u64, usize)> {
        let at = self.window?;
        let bar = space.read(at + 4, IoSize::Byte) as u8;
        let offset = u64::from(space.read(at + 8, IoSize::Dword));
        let len = space.read(at + 12, IoSize::Dword);
        let size = self.bars.iter().find(|known| known.index == bar)?.size;
        let fits = matches!(len, 1 | 2 | 4) && offset + u64::from(len) <= size;
        fits.then_some((bar, offset, len as usize))
    }
}

impl PciDevice for VirtioPci {
    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        self.device.lifecycle().map(|_| self as &dyn Lifecycle)
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match (bar, offset / modern::PART * modern::PART) {
            (legacy::BAR, _) => {
                let mut core = self.lock();
                let config = legacy::config_base(&core);
                let (before, behind) = split_mut(data, offset, config);
                legacy::read(&mut core, offset, before);
                // The device is asked without the transport's lock.
                drop(core);
                if !behind.is_empty() {
                    let offset = offset.saturating_sub(config) as usize;
                    self.device.config_read(offset, behind);
                }
            }
            (modern::BAR, modern::COMMON) => modern::read(&mut self.lock(), offset, data),
            (modern::BAR, modern::ISR) => {
                if let (modern::ISR, Some(first)) = (offset, data.first_mut()) {
                    *first = self.link.take_isr();
                }
            }
            (modern::BAR, modern::DEVICE) => {
                let offset = (offset - modern::DEVICE) as usize;
                self.device.config_read(offset, data);
            }
            _ => {}
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        match (bar, offset / modern::PART * modern::PART) {
            (legacy::BAR, _) => {
                let mut core = self.lock();
                let config = legacy::config_base(&core);
                let before = config.saturating_sub(offset).min(data.len() as u64) as usize;
                let (before, behind) = data.split_at(before);
                legacy::write(&mut core, offset, before);
                drop(core);
                if !behind.is_empty() {
                    let offset = offset.saturating_sub(config) as usize;
                    self.device.config_write(offset, behind);
                }
            }
            (modern::PORT_BAR, _) => {
                if let (0, [low, high, ..]) = (offset, data) {
                    let queue = u16::from_le_bytes([*low, *high]);
                    self.lock().kick(Interface::Modern, queue);
                }
            }
            (modern::BAR, modern::COMMON) => modern::write(&mut self.lock(), offset, data),
            (modern::BAR, modern::DEVICE) => {
                let offset = (offset - modern::DEVICE) as usize;
                self.device.config_write(offset, data);
            }
            (modern::BAR, modern::NOTIFY..) => {
                let queue = (offset - modern::NOTIFY) / modern::NOTIFY_STEP;
                let queue = u16::try_from(queue).unwrap_or(u16::MAX);
                self.lock().kick(Interface::Modern, queue);
            }
            _ => {}
        }
    }

    fn bar_moved(&self, bar: u8, base: Option<u64>) {
        let mut core = self.lock();
        let port = base.and_then(|base| u16::try_from(base).ok());
        let before = core.notify;
        let notify = match bar {
            legacy::BAR => NotifyBases {
                legacy: port.map(|port| port + legacy::NOTIFY),
                ..before
            },
            modern::PORT_BAR => NotifyBases { port, ..before },
            modern::BAR => NotifyBases {
                memory: base.map(|base| base + modern::NOTIFY),
                ..before
            },
            _ => before,
        };
        if notify != before {
            core.notify = notify;
            core.bind_doorbells();
        }
    }

    fn config_read(&self, space: &ConfigSpace, register: u8, size: IoSize) -> Option<u32> {
        let at = self.window? + modern::WINDOW;
        if register != at {
            return None;
        }
        let (bar, offset, len) = self.window(space)?;
        let mut data = [0xff; 4];
        self.bar_read(bar, offset, data.get_mut(..len)?);
        Some(u32::from_le_bytes(data) & size.ones())
    }

    fn config_written(&self, space: &ConfigSpace, register: u8) {
        let Some(at) = self.window.map(|at| at + modern::WINDOW) else {
            return;
        };
        if register != at {
            return;
        }
        let data = space.read(at, IoSize::Dword).to_le_bytes();
        if let Some((bar, offset, len)) = self.window(space)
            && let Some(data) = data.get(..len)
        {
            self.bar_write(bar, offset, data);
        }
    }
}

/// What of an access lies before `border`, and what behind it.
fn split_mut(data: &mut [u8], offset: u64, border: u64) -> (&mut [u8], &mut [u8]) {
    let before = border.saturating_sub(offset).min(data.len() as u64);
    data.split_at_mut(before as usize)
}
