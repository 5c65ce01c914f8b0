//! Makes a machine of its specification: KVM's part, devices on their buses, firmware tables, vCPUs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvm_ioctls::Kvm;
use vmm_api::inspect::CmosState;
use vmm_api::kvm::{CpuidPolicy, KvmError, KvmVm, VmPolicy};
use vmm_api::memory::{GuestRam, MemoryError, MemoryLayout};
use vmm_api::state::{StateError, VmState};
use vmm_api::topology::Topology;

use crate::block::BlockError;
use crate::bus::{Overlap, PortBus};
use crate::config::MachineSpec;
use crate::console::{Attached, Console, ConsoleError, attach};
use crate::firmware::{self, FirmwareError, FirmwareSpec, SCI};
use crate::irq::{IrqLine, WiredOr};
use crate::isa::clock::HostClock;
use crate::isa::debugexit::DebugExit;
use crate::isa::i8042::I8042;
use crate::isa::pm::Pm;
use crate::isa::post::Post;
use crate::isa::rtc::{IRQ as RTC_IRQ, Rtc, base_offset};
use crate::isa::uart::{COM_PORTS, PORTS, Uart};
use crate::machine::{KvmIrq, Machine, Seat};
use crate::mevent::Mevent;
use crate::mmio::MmioBus;
use crate::pci::{NoRoom, SlotTaken};
use crate::sequencer::{Ending, ExitPolicy, Mailbox, Vcpu};
use crate::suspend::SuspendSink;
use crate::virtio::DeviceError;
use crate::virtio::transport::TransportError;

mod pci;

/// Why a machine cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// More vCPUs than this machine's KVM has.
    #[error("-c: {wanted} vCPUs are more than this machine's KVM runs ({max})")]
    TooManyVcpus {
        /// What was asked for.
        wanted: u32,
        /// KVM_CAP_MAX_VCPUS.
        max: usize,
    },
    /// KVM refused a step.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Two devices at one port.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// Two PCI functions in one place.
    #[error(transparent)]
    Slot(#[from] SlotTaken),
    /// A PCI device has no place.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// A virtio device cannot be put on PCI.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A disk's image cannot be had.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A device lacks something of the host.
    #[error("{device}")]
    Device {
        /// What `-s` calls it.
        device: &'static str,
        /// What it lacks.
        source: DeviceError,
    },
    /// A serial port cannot be connected.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// A table cannot be made.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// Memory cannot be wired, or has no room for a table.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device's stored state does not fit.
    #[error(transparent)]
    State(#[from] StateError),
    /// The event thread cannot be started.
    #[error("cannot start the event thread")]
    Event(#[from] std::io::Error),
}

/// A machine that is ready to run.
pub struct Built {
    /// What the rest of the program sees of it.
    pub machine: Arc<Machine>,
    /// The vCPUs, each to be run by a thread of its own.
    pub vcpus: Vec<Vcpu>,
    /// The serial ports' other ends; their drop restores the terminal.
    pub consoles: Vec<Attached>,
    /// The event thread.
    pub mevent: Arc<Mevent>,
}

/// Makes the machine, with its firmware tables in memory and its vCPUs in their loaded state.
///
/// # Errors
///
/// The first thing that cannot be had; nothing is left behind.
pub fn build(
    spec: &MachineSpec,
    state: &VmState,
    kvm: Kvm,
    ram: GuestRam,
) -> Result<Built, BuildError> {
    let topology = Topology::from(spec.topology);
    let (wanted, max) = (topology.cpus(), kvm.get_max_vcpus());
    if usize::try_from(wanted).is_ok_and(|wanted| wanted > max) {
        return Err(BuildError::TooManyVcpus { wanted, max });
    }
    let layout = ram.layout();
    if spec.wire_memory {
        ram.wire()?;
    }
    ram.set_dumped(spec.guest_in_core)?;
    let mut firmware = FirmwareSpec::new(spec, layout);
    firmware.intx = pci::intx_routes(&spec.slots);
    firmware.ecam = pci::ecam(spec);
    for blob in firmware::build(&firmware)? {
        ram.write(blob.gpa, &blob.bytes)?;
    }
    let policy = VmPolicy {
        cpuid: CpuidPolicy {
            topology,
            x2apic: spec.x2apic,
        },
        unknown_msr_exits: !spec.strict_msr,
    };
    let vm = KvmVm::new(kvm, ram.clone(), policy)?;
    let mailboxes: Vec<Arc<Mailbox>> = (0..wanted).map(|_| Arc::default()).collect();
    let ending = Ending::new(mailboxes.clone())?;
    let board = Board {
        vm: &vm,
        ram: &ram,
        ports: Arc::default(),
        mmio: Arc::default(),
        mevent: Mevent::start()?,
        ending: &ending,
    };
    let consoles = board.serial_ports(spec)?;
    let (pm, rtc) = board.legacy_devices(spec, &layout)?;
    if let Some(cmos) = CmosState::stored(state)? {
        rtc.restore(&cmos);
    }
    let devices = board.pci(spec)?;

    let (mut seats, mut vcpus) = (Vec::new(), Vec::new());
    for (index, mailbox) in (0..).zip(mailboxes) {
        let mut kvm = vm.create_vcpu(index)?;
        // The others wait for INIT and SIPI, as KVM makes them, unless they were running before.
        let stored = usize::try_from(index).ok().and_then(|n| state.vcpus.get(n));
        if let Some(state) = stored {
            kvm.restore(state)?;
        }
        let stats = kvm.stats_file().ok();
        seats.push(Seat {
            mailbox: mailbox.clone(),
            counters: kvm.counters(),
            stats,
        });
        let pin = u16::try_from(index).ok().and_then(|n| spec.pins.get(&n));
        vcpus.push(Vcpu {
            kvm,
            mailbox,
            ports: board.ports.clone(),
            mmio: board.mmio.clone(),
            ending: ending.clone(),
            ram: ram.clone(),
            policy: ExitPolicy {
                strict_io: spec.strict_io,
            },
            pin: pin
                .or(stored.map(|vcpu| &vcpu.pinning))
                .cloned()
                .unwrap_or_default(),
        });
    }
    let Board { ports, mevent, .. } = board;
    let machine = Machine {
        seats,
        ports,
        ending,
        pm,
        rtc,
        topology,
        max_vcpus: max,
        devices,
        layout,
        wired: spec.wire_memory || state.machine.wired,
        stats: vm.stats_file().ok(),
        started: Instant::now(),
        paused: Mutex::default(),
    };
    Ok(Built {
        machine: Arc::new(machine),
        vcpus,
        consoles,
        mevent,
    })
}

/// What devices are put on.
struct Board<'a> {
    vm: &'a Arc<KvmVm>,
    ram: &'a GuestRam,
    ports: Arc<PortBus>,
    mmio: Arc<MmioBus>,
    mevent: Arc<Mevent>,
    ending: &'a Arc<Ending>,
}

impl Board<'_> {
    fn irq(&self, gsi: u8) -> Arc<dyn IrqLine> {
        KvmIrq::new(self.vm.clone(), gsi.into())
    }

    fn sink(&self) -> Arc<dyn SuspendSink> {
        self.ending.clone()
    }

    /// What every PC has, but for its serial ports.
    fn legacy_devices(
        &self,
        spec: &MachineSpec,
        layout: &MemoryLayout,
    ) -> Result<(Arc<Pm>, Arc<Rtc>), BuildError> {
        let pm = Pm::new(Arc::new(HostClock), self.irq(SCI), self.sink());
        pm.attach_timer(&self.mevent)?;
        pm.register(&self.ports)?;
        let offset = base_offset(spec.rtc);
        let rtc = Rtc::new(Arc::new(HostClock), self.irq(RTC_IRQ), offset, layout);
        rtc.attach_timer(&self.mevent)?;
        rtc.register(&self.ports)?;
        I8042::new(self.sink()).register(&self.ports)?;
        Post::new().register(&self.ports)?;
        if let Some(port) = spec.debug_exit {
            DebugExit::new(self.sink()).register(&self.ports, port)?;
        }
        Ok((pm, rtc))
    }

    /// The serial ports that are connected to something. COM1 and COM3 share an interrupt, and so
    /// do COM2 and COM4.
    fn serial_ports(&self, spec: &MachineSpec) -> Result<Vec<Attached>, BuildError> {
        let mut consoles = Vec::new();
        let mut lines: BTreeMap<u8, Arc<WiredOr>> = BTreeMap::new();
        for (com, backend) in COM_PORTS.iter().zip(&spec.com) {
            let Some(backend) = backend else { continue };
            let line = lines
                .entry(com.irq)
                .or_insert_with(|| WiredOr::new(self.irq(com.irq)));
            let console = Console::new();
            let uart = Uart::new(line.source(), console.clone());
            self.ports
                .register(com.base..=com.base + (PORTS - 1), com.name, uart)?;
            let attached = attach(&self.mevent, com.name, backend, &console, self.sink())?;
            if let Some(place) = attached.location() {
                eprintln!("rhyve: {} is at {place}", com.name);
            }
            consoles.push(attached);
        }
        Ok(consoles)
    }
}
