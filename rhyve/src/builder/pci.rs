//! PCI's buses: their functions, the ways to their configuration, what they decode, and interrupts.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use vmm_api::name::VmName;
use vmm_api::say;

use super::{Board, BuildError};
use crate::block;
use crate::config::{
    BlkSpec, Era, MacAddress, MachineSpec, PciAddress, PortSpec, RndSpec, SlotDevice, SlotSpec,
};
use crate::console::{Attached, Console, attach};
use crate::firmware::{Ecam, IOAPIC_BASE, IntxRoute, PCI_HOLE, PciRoot};
use crate::irq::{Fork, WiredOr};
use crate::isa::reset::ResetControl;
use crate::machine::{Function, KvmEvents};
use crate::net;
use crate::pci::{
    Bridge, Buses, ConfigPorts, EcamWindow, Intx, IntxPin, PciBus, PciFunction, Placement,
};
use crate::saving::Savers;
use crate::unix_socket::SocketFile;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::console::{Port, VirtioConsole};
use crate::virtio::net::Net;
use crate::virtio::p9::P9;
use crate::virtio::transport::{self, Transport, VirtioPci};
use crate::virtio::vsock::Vsock;
use crate::virtio::{DeviceError, Rnd, Vintage, VirtioDevice};

/// Where bhyve had its configuration space in memory (sys/amd64/vmm, usr.sbin/bhyve/pci_emul.c).
const ECAM_BASE: u32 = 0xe000_0000;
/// The first port of BARs, as in bhyve.
const FIRST_PORT: u32 = 0x2000;
/// What each bus has of ports and of memory begins at a multiple of these.
const PORT_STEP: u32 = 32;
const MEMORY_STEP: u32 = 1 << 20;
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
        last_bus: buses(&spec.slots).last().copied().unwrap_or(0),
    })
}

/// The buses that have a function.
fn buses(slots: &[SlotSpec]) -> BTreeSet<u8> {
    slots.iter().map(|slot| slot.address.bus).collect()
}

/// Those, each with an equal part of the ports and of the memory that BARs can have.
pub(super) fn roots(spec: &MachineSpec) -> Vec<PciRoot> {
    let buses = buses(&spec.slots);
    let end = ecam(spec).map_or(IOAPIC_BASE, |ecam| ecam.base);
    let part = |all: Range<u32>, number: u32, step: u32| {
        let count = buses.len() as u32;
        let size = (all.end - all.start) / count / step * step;
        let start = all.start + number * size;
        // The last one has what is left.
        let end = if number + 1 == count {
            all.end
        } else {
            start + size
        };
        start..end
    };
    let roots = (0..).zip(&buses).map(|(number, bus)| PciRoot {
        bus: *bus,
        ports: part(FIRST_PORT..0x1_0000, number, PORT_STEP),
        memory: part(PCI_HOLE..end, number, MEMORY_STEP),
    });
    roots.collect()
}

/// The 8259s' input for what goes to `gsi`.
fn pic_irq(gsi: u8) -> u8 {
    let [first, ..] = PIC_IRQS;
    let at = usize::from(gsi) % PIC_IRQS.len();
    PIC_IRQS.get(at).copied().unwrap_or(first)
}

/// The pin by which a function interrupts, and where it goes: neighbours go to different lines.
fn route(address: PciAddress) -> IntxRoute {
    let PciAddress {
        bus,
        slot,
        function,
    } = address;
    let line = bus.wrapping_add(slot + function % 4) % GSIS;
    IntxRoute {
        bus,
        slot,
        pin: function % 4 + 1,
        gsi: FIRST_GSI + line,
    }
}

/// Whether what stands in a slot interrupts.
fn interrupts(device: &SlotDevice) -> bool {
    use SlotDevice::{AmdHostBridge, HostBridge, Lpc};
    !matches!(device, HostBridge | AmdHostBridge | Lpc)
}

/// What the firmware's tables tell of INTx.
pub(super) fn intx_routes(slots: &[SlotSpec]) -> Vec<IntxRoute> {
    let mut routes: Vec<IntxRoute> = slots
        .iter()
        .filter(|slot| interrupts(&slot.device))
        .map(|slot| route(slot.address))
        .collect();
    routes.sort_by_key(|route| (route.bus, route.slot, route.pin));
    routes.dedup();
    routes
}

/// Looks whether the balloons that are asked for can be.
pub(super) fn check_balloons(slots: &[SlotSpec], wired: bool) -> Result<(), BuildError> {
    let balloons = slots
        .iter()
        .filter(|slot| matches!(slot.device, SlotDevice::VirtioBalloon(_)));
    for (number, slot) in balloons.enumerate() {
        let problem = match (wired, number) {
            (true, _) => "memory that is wired (-S) is not given back: leave one of them out",
            (false, 0) => continue,
            (false, _) => "there is another: leave one of them out",
        };
        return Err(BuildError::Balloon {
            address: slot.address,
            problem,
        });
    }
    Ok(())
}

/// What was put on the buses.
pub(super) struct Plugged {
    /// All functions, by address.
    pub functions: Vec<Function>,
    /// The balloon among them.
    pub balloon: Option<Arc<Balloon>>,
    /// The disks, by address.
    pub disks: Vec<(PciAddress, Arc<Blk>)>,
    /// The network cards, by address.
    pub cards: Vec<(PciAddress, Arc<Net>)>,
    /// Where the ports of their consoles lead.
    pub consoles: Vec<Attached>,
    /// Where programs of the host connect to.
    pub sockets: Vec<SocketFile>,
}

/// Puts functions on the buses.
struct Backplane<'a> {
    board: &'a Board<'a>,
    vm: &'a VmName,
    era: Era,
    virtio: transport::Board,
    /// What is left of what each bus decodes.
    placements: BTreeMap<u8, Placement>,
    lines: BTreeMap<u8, Arc<WiredOr>>,
    plugged: Plugged,
}

impl Backplane<'_> {
    fn function(&mut self, slot: &SlotSpec) -> Result<Arc<dyn PciFunction>, BuildError> {
        Ok(match &slot.device {
            SlotDevice::HostBridge => self.plain(slot, Bridge::host()),
            SlotDevice::AmdHostBridge => self.plain(slot, Bridge::amd_host()),
            SlotDevice::Lpc => {
                let inputs = std::array::from_fn(|line| pic_irq(FIRST_GSI + line as u8));
                self.plain(slot, Bridge::isa(inputs))
            }
            SlotDevice::VirtioBlk(BlkSpec {
                disk,
                transport,
                queues,
            }) => {
                let blk = Blk::new(disk, block::open(disk)?, queues.get())?;
                let (path, info, engine) = (disk.path.display(), blk.info(), blk.engine().name());
                say!(
                    "rhyve: virtio-blk at {}: {path}: {info}, {engine}",
                    slot.address
                );
                self.plugged.disks.push((slot.address, blk.clone()));
                self.virtio(slot.address, blk, *transport)?
            }
            SlotDevice::VirtioNet(spec) => {
                let (backend, file) = net::open(spec)?;
                self.plugged.sockets.extend(file);
                let (address, label) = (slot.address, &backend.info().label);
                let custom = || MacAddress::customary(self.vm, address);
                let mac = spec.mac.unwrap_or_else(custom);
                say!("rhyve: virtio-net at {address}: {label}, {mac}");
                let (mevent, pairs) = (self.board.mevent.clone(), spec.queues.get());
                let card = Net::new(mevent, backend, mac, spec.mtu, pairs);
                self.plugged.cards.push((address, card.clone()));
                self.virtio(address, card, spec.transport)?
            }
            SlotDevice::VirtioConsole(spec) => {
                let mut ports = Vec::new();
                for port in &spec.ports {
                    let wire = Console::new();
                    let attached = self.attach(slot.address, port, &wire)?;
                    ports.push(Port {
                        name: port.name.clone(),
                        console: port.is_console(),
                        place: attached
                            .location()
                            .map_or_else(|| port.conf.to_string(), str::to_owned),
                        wire,
                    });
                    self.plugged.consoles.push(attached);
                }
                let device = VirtioConsole::new(self.board.mevent.clone(), ports);
                self.virtio(slot.address, device, spec.transport)?
            }
            SlotDevice::VirtioBalloon(spec) => {
                let board = self.board;
                let ram = Arc::new(board.ram.clone());
                let total = ram.layout().total();
                let balloon = Balloon::new(board.mevent.clone(), ram, total, spec.reporting);
                self.plugged.balloon = Some(balloon.clone());
                self.virtio(slot.address, balloon, spec.transport)?
            }
            SlotDevice::Virtio9p(spec) => {
                let p9 = P9::new(spec).map_err(lacks(slot, &spec.path))?;
                self.virtio(slot.address, p9, spec.transport)?
            }
            SlotDevice::VirtioVsock(spec) => {
                let (vsock, file) = Vsock::new(spec).map_err(lacks(slot, &spec.path))?;
                self.plugged.sockets.push(file);
                self.virtio(slot.address, vsock, Transport::Modern)?
            }
            SlotDevice::VirtioRnd(RndSpec { transport, rate }) => {
                let rnd = Rnd::new(self.board.mevent.clone(), *rate);
                let rnd = rnd.map_err(lacks(slot, Path::new("/dev/urandom")))?;
                self.virtio(slot.address, rnd, *transport)?
            }
        })
    }

    /// Connects a port of a virtio-console.
    fn attach(
        &self,
        address: PciAddress,
        port: &PortSpec,
        wire: &Arc<Console>,
    ) -> Result<Attached, BuildError> {
        let name = format!("virtio-console at {address}, {}", port.name);
        let board = self.board;
        let attached = attach(&board.mevent, &name, &port.conf, wire, board.sink())?;
        if let Some(place) = attached.location() {
            say!("rhyve: {name} is at {place}");
        }
        Ok(attached)
    }

    fn plain(&mut self, slot: &SlotSpec, function: Arc<dyn PciFunction>) -> Arc<dyn PciFunction> {
        self.plugged.functions.push(Function {
            address: slot.address,
            kind: slot.device.name(),
            virtio: None,
        });
        function
    }

    fn virtio(
        &mut self,
        address: PciAddress,
        device: Arc<dyn VirtioDevice>,
        transport: Transport,
    ) -> Result<Arc<dyn PciFunction>, BuildError> {
        let era = self.era;
        let device = if era == Era::Y2012 {
            Vintage::of(device)
        } else {
            device
        };
        let transport = match transport {
            Transport::Customary if era != Era::Today => Transport::Legacy,
            _ => transport,
        };
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
        let kind = device.name();
        let nothing = || Placement::new(0..0, 0..0);
        let place = self.placements.entry(address.bus).or_insert_with(nothing);
        let (virtio, function) = VirtioPci::new(device, transport, &self.virtio, pin, place)?;
        self.plugged.functions.push(Function {
            address,
            kind,
            virtio: Some(virtio),
        });
        Ok(function)
    }
}

/// What a device lacks of the host, of which the error says no more than what was tried.
fn lacks(slot: &SlotSpec, end: &Path) -> impl FnOnce(DeviceError) -> BuildError {
    let (name, address, end) = (slot.device.name(), slot.address, end.display());
    let device = format!("{name} at {address}: {end}");
    move |source| BuildError::Device { device, source }
}

impl Board<'_> {
    /// The buses, and the ports and memory through which guests see them. Returns what is on them.
    pub(super) fn pci(
        &self,
        spec: &MachineSpec,
        savers: &mut Savers,
    ) -> Result<Plugged, BuildError> {
        let bus = PciBus::new();
        savers.pci = bus.clone();
        let places = roots(spec)
            .into_iter()
            .map(|PciRoot { bus, ports, memory }| {
                let wide = |range: Range<u32>| range.start.into()..range.end.into();
                (bus, Placement::new(wide(ports), wide(memory)))
            });
        let events = KvmEvents::new(self.vm.clone());
        let mut backplane = Backplane {
            board: self,
            vm: &spec.name,
            era: spec.era,
            virtio: transport::Board {
                memory: self.ram.for_devices(),
                buses: Buses {
                    ports: self.ports.clone(),
                    mmio: self.mmio.clone(),
                },
                msi: events.clone(),
                msix: spec.virtio_msix,
                doorbells: events,
            },
            placements: places.collect(),
            lines: BTreeMap::new(),
            plugged: Plugged {
                functions: Vec::new(),
                balloon: None,
                disks: Vec::new(),
                cards: Vec::new(),
                consoles: Vec::new(),
                sockets: Vec::new(),
            },
        };
        for slot in &spec.slots {
            bus.plug(slot.address, backplane.function(slot)?)?;
        }
        self.vm.set_level_triggered(&PIC_IRQS)?;
        if let Some(Ecam { base, last_bus }) = ecam(spec) {
            EcamWindow::register(bus.clone(), base.into(), last_bus, &self.mmio)?;
        }
        let ports = ConfigPorts::new(bus, ResetControl::new(self.sink()));
        ports.register(&self.ports)?;
        savers.isa.push(("pciconf".into(), ports));
        let mut plugged = backplane.plugged;
        plugged.functions.sort_by_key(|function| function.address);
        Ok(plugged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SpecBuilder;

    fn spec(slots: impl Iterator<Item = String>) -> MachineSpec {
        let mut builder = SpecBuilder::new(Era::Today);
        builder.set_name("guest0").unwrap();
        slots.for_each(|slot| builder.slot(&slot).unwrap());
        builder.settle().unwrap()
    }

    #[test]
    fn buses_share_what_there_is_of_addresses() {
        for buses in [&[0][..], &[0, 1], &[0, 9, 255]] {
            let spec = spec(buses.iter().map(|bus| format!("{bus}:2:0,virtio-rnd")));
            let last = *buses.last().unwrap();
            assert_eq!(ecam(&spec).map(|ecam| ecam.last_bus), Some(last));
            let roots = roots(&spec);
            assert!(roots.iter().map(|root| root.bus).eq(buses.iter().copied()));
            let (mut port, mut memory) = (0x2000, 0xc000_0000);
            for root in roots {
                assert_eq!((root.ports.start, root.memory.start), (port, memory));
                assert!(port.is_multiple_of(32) && memory.is_multiple_of(1 << 20));
                (port, memory) = (root.ports.end, root.memory.end);
            }
            assert_eq!((port, memory), (0x1_0000, 0xe000_0000));
        }
    }

    #[test]
    fn each_of_all_buses_has_room_for_a_device() {
        let spec = spec((0..=255).map(|bus| format!("{bus}:2:0,virtio-rnd")));
        for PciRoot { ports, memory, .. } in roots(&spec) {
            assert!(ports.len() >= 128 && memory.len() >= 1 << 20);
        }
        let routes = intx_routes(&spec.slots);
        assert_eq!(routes.len(), 256);
        // Neighbours do not share a line.
        assert!(routes.windows(2).all(|pair| pair[0].gsi != pair[1].gsi));
    }
}
