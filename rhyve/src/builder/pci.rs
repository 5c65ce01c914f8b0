//! Bus 0: its functions, the ways to their configuration, and their interrupts.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Board, BuildError};
use crate::block;
use crate::config::{BlkSpec, Era, MachineSpec, PciAddress, RndSpec, SlotDevice, SlotSpec};
use crate::firmware::{Ecam, IOAPIC_BASE, IntxRoute, PCI_HOLE};
use crate::irq::{Fork, WiredOr};
use crate::isa::reset::ResetControl;
use crate::machine::KvmEvents;
use crate::pci::{
    Buses, ConfigPorts, EcamWindow, HostBridge, Intx, IntxPin, PciBus, PciFunction, Placement,
};
use crate::virtio::blk::Blk;
use crate::virtio::transport::{self, Transport, VirtioPci};
use crate::virtio::{Rnd, VirtioDevice};

/// Where bhyve had its configuration space in memory (sys/amd64/vmm, usr.sbin/bhyve/pci_emul.c).
const ECAM_BASE: u32 = 0xe000_0000;
/// The I/O APIC's pins from here on are PCI's alone; below are those of ISA.
const FIRST_GSI: u8 = 16;
const GSIS: u8 = 8;
/// Inputs of the 8259s that no ISA device has. As a chipset does, every line goes to one of these
/// as well, for guests without an I/O APIC; they find it in the interrupt line register.
const PIC_IRQS: [u8; 3] = [10, 11, 5];

/// Configuration space in memory, which guests learn of by ACPI.
pub(super) fn ecam(spec: &MachineSpec) -> Option<Ecam> {
    (spec.acpi && spec.era == Era::Today).then_some(Ecam {
        base: ECAM_BASE,
        last_bus: 0,
    })
}

/// The 8259s' input for what goes to `gsi`.
fn pic_irq(gsi: u8) -> u8 {
    let [first, ..] = PIC_IRQS;
    let at = usize::from(gsi) % PIC_IRQS.len();
    PIC_IRQS.get(at).copied().unwrap_or(first)
}

/// The pin by which a function interrupts, and where it goes: neighbours go to different lines.
fn route(address: PciAddress) -> IntxRoute {
    let PciAddress { slot, function, .. } = address;
    IntxRoute {
        slot,
        pin: function % 4 + 1,
        gsi: FIRST_GSI + (slot + function % 4) % GSIS,
    }
}

/// Whether what stands in a slot interrupts.
fn interrupts(device: &SlotDevice) -> bool {
    !matches!(device, SlotDevice::HostBridge | SlotDevice::AmdHostBridge)
}

/// What the firmware's tables tell of INTx.
pub(super) fn intx_routes(slots: &[SlotSpec]) -> Vec<IntxRoute> {
    let mut routes: Vec<IntxRoute> = slots
        .iter()
        .filter(|slot| interrupts(&slot.device))
        .map(|slot| route(slot.address))
        .collect();
    routes.sort_by_key(|route| (route.slot, route.pin));
    routes.dedup();
    routes
}

/// Puts functions on the bus.
struct Backplane<'a> {
    board: &'a Board<'a>,
    virtio: transport::Board,
    placement: Placement,
    lines: BTreeMap<u8, Arc<WiredOr>>,
    devices: Vec<Arc<VirtioPci>>,
}

impl Backplane<'_> {
    fn function(&mut self, slot: &SlotSpec) -> Result<Arc<dyn PciFunction>, BuildError> {
        Ok(match &slot.device {
            SlotDevice::HostBridge => HostBridge::new(),
            SlotDevice::AmdHostBridge => HostBridge::amd(),
            SlotDevice::VirtioBlk(BlkSpec {
                disk,
                transport,
                queues,
            }) => {
                let blk = Blk::new(disk, block::open(disk)?, queues.get())?;
                let (path, info, engine) = (disk.path.display(), blk.info(), blk.engine().name());
                eprintln!(
                    "rhyve: virtio-blk at {}: {path}: {info}, {engine}",
                    slot.address
                );
                self.virtio(slot.address, blk, *transport)?
            }
            SlotDevice::VirtioRnd(RndSpec { transport, rate }) => {
                let rnd = Rnd::new(self.board.mevent.clone(), *rate);
                let rnd = rnd.map_err(|source| BuildError::Device {
                    device: slot.device.name(),
                    source,
                })?;
                self.virtio(slot.address, rnd, *transport)?
            }
        })
    }

    fn virtio(
        &mut self,
        address: PciAddress,
        device: Arc<dyn VirtioDevice>,
        transport: Transport,
    ) -> Result<Arc<dyn PciFunction>, BuildError> {
        let IntxRoute { pin, gsi, .. } = route(address);
        let pic = pic_irq(gsi);
        let board = self.board;
        let shared = |irq| WiredOr::new(board.irq(irq));
        let pic_line = self
            .lines
            .entry(pic)
            .or_insert_with(|| shared(pic))
            .source();
        let line = self
            .lines
            .entry(gsi)
            .or_insert_with(|| WiredOr::new(Arc::new(Fork([board.irq(gsi), pic_line]))));
        let pin = IntxPin {
            pin,
            line: pic,
            intx: Intx::new(line.source()),
        };
        let place = &mut self.placement;
        let (virtio, function) = VirtioPci::new(device, transport, &self.virtio, pin, place)?;
        self.devices.push(virtio);
        Ok(function)
    }
}

impl Board<'_> {
    /// Bus 0, and the ports and memory through which guests see it. Returns the devices that work
    /// by themselves.
    pub(super) fn pci(&self, spec: &MachineSpec) -> Result<Vec<Arc<VirtioPci>>, BuildError> {
        let bus = PciBus::new();
        let ecam = ecam(spec);
        let end = ecam.map_or(IOAPIC_BASE, |ecam| ecam.base);
        let events = KvmEvents::new(self.vm.clone());
        let mut backplane = Backplane {
            board: self,
            virtio: transport::Board {
                memory: self.ram.for_devices(),
                buses: Buses {
                    ports: self.ports.clone(),
                    mmio: self.mmio.clone(),
                },
                msi: events.clone(),
                doorbells: events,
            },
            placement: Placement::new(PCI_HOLE.into()..end.into()),
            lines: BTreeMap::new(),
            devices: Vec::new(),
        };
        for slot in &spec.slots {
            bus.plug(slot.address, backplane.function(slot)?)?;
        }
        self.vm.set_level_triggered(&PIC_IRQS)?;
        if let Some(ecam) = ecam {
            EcamWindow::register(bus.clone(), ecam.base.into(), &self.mmio)?;
        }
        ConfigPorts::new(bus, ResetControl::new(self.sink())).register(&self.ports)?;
        Ok(backplane.devices)
    }
}
