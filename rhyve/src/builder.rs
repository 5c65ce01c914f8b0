//! Makes a machine of its specification: KVM's part, devices on their buses, firmware tables, vCPUs.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use kvm_ioctls::Kvm;
use vmm_api::inspect::CmosState;
use vmm_api::kvm::{Away, CpuidPolicy, KvmError, KvmVm, VmPolicy};
use vmm_api::memory::{GuestRam, MemoryError, MemoryLayout};
use vmm_api::say;
use vmm_api::state::{Phase, RunInfo, StateError, VmState};
use vmm_api::topology::Topology;

use crate::block::BlockError;
use crate::bus::{Overlap, PortBus};
use crate::bvm::{self, DbgPort, DebugPort};
use crate::config::{MachineSpec, PciAddress};
use crate::console::{Attached, Console, ConsoleConf, ConsoleError, attach};
use crate::firmware::{self, FirmwareError, FirmwareSpec, SCI};
use crate::gdb::Debugger;
use crate::irq::{IrqLine, WiredOr};
use crate::isa::clock::HostClock;
use crate::isa::debugexit::DebugExit;
use crate::isa::i8042::I8042;
use crate::isa::pm::Pm;
use crate::isa::post::Post;
use crate::isa::rtc::{IRQ as RTC_IRQ, Rtc, base_offset};
use crate::isa::uart::{COM_PORTS, PORTS, Uart};
use crate::lifecycle::Lifecycle;
use crate::machine::{KvmIrq, Machine, Seat};
use crate::mevent::Mevent;
use crate::mmio::MmioBus;
use crate::net::NetError;
use crate::pci::{NoRoom, SlotTaken};
use crate::saving::{RestoreError, Savers};
use crate::sequencer::{Ending, ExitPolicy, Mailbox, Vcpu, pinning};
use crate::suspend::SuspendSink;
use crate::unix_socket::SocketFile;
use crate::virtio::DeviceError;
use crate::virtio::transport::TransportError;

mod pci;

use pci::Plugged;

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
    /// A network card's other end cannot be had.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A device lacks something of the host.
    #[error("{device}")]
    Device {
        /// What `-s` calls it and where it is, and its end on the host.
        device: String,
        /// What it lacks.
        source: DeviceError,
    },
    /// A serial port cannot be connected.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// There is one balloon at most, and none in memory that is the guest's for good.
    #[error("virtio-balloon at {address}: {problem}")]
    Balloon {
        /// Where it was to be.
        address: PciAddress,
        /// Why it cannot be there.
        problem: &'static str,
    },
    /// A table cannot be made.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// Memory cannot be wired, or has no room for a table.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device's stored state does not fit.
    #[error(transparent)]
    State(#[from] StateError),
    /// A suspended machine cannot go on.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A vCPU is to be where this machine has no processor.
    #[error(transparent)]
    Pin(#[from] pinning::PinError),
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
    /// The consoles' other ends; their drop restores the terminal.
    pub consoles: Vec<Attached>,
    /// The sockets' places in the file system, which last as long.
    pub sockets: Vec<SocketFile>,
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
    run: RunInfo,
) -> Result<Built, BuildError> {
    let topology = Topology::from(spec.topology);
    let (wanted, max) = (topology.cpus(), kvm.get_max_vcpus());
    if usize::try_from(wanted).is_ok_and(|wanted| wanted > max) {
        return Err(BuildError::TooManyVcpus { wanted, max });
    }
    let layout = ram.layout();
    let wired = spec.wire_memory || state.machine.wired;
    pci::check_balloons(&spec.slots, wired)?;
    if spec.wire_memory {
        ram.wire()?;
    }
    ram.set_dumped(spec.guest_in_core)?;
    let mut firmware = FirmwareSpec::new(spec, layout);
    firmware.roots = pci::roots(spec);
    firmware.intx = pci::intx_routes(&spec.slots);
    firmware.ecam = pci::ecam(spec);
    let suspended = state.phase == Phase::Suspended;
    if suspended && usize::try_from(wanted).is_ok_and(|wanted| wanted != state.vcpus.len()) {
        let (then, now) = (state.vcpus.len(), wanted);
        return Err(RestoreError::Vcpus { then, now }.into());
    }
    // A suspended machine has them, and may have other things there by now.
    for blob in firmware::build(&firmware)?
        .into_iter()
        .filter(|_| !suspended)
    {
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
    let debugger = Debugger::new(mailboxes.clone())?;
    let board = Board {
        vm: &vm,
        ram: &ram,
        ports: Arc::default(),
        mmio: Arc::default(),
        mevent: Mevent::start()?,
        ending: &ending,
    };
    let mut savers = Savers::default();
    let mut consoles = board.serial_ports(spec, &mut savers)?;
    consoles.extend(board.bvm(spec)?);
    let (pm, rtc) = board.legacy_devices(spec, &layout, &mut savers)?;
    if let Some(cmos) = CmosState::stored(state)? {
        rtc.restore(&cmos);
    }
    let Plugged {
        functions,
        balloon,
        disks,
        cards,
        consoles: ports,
        sockets,
    } = board.pci(spec, &mut savers)?;
    consoles.extend(ports);

    let stopped = suspended.then_some(state.machine.run.as_ref()).flatten();
    let away = stopped.map(|run| Away::since(run.at_ns));
    pm.set_away(away.unwrap_or_default());
    let (mut seats, mut vcpus) = (Vec::new(), Vec::new());
    for (index, mailbox) in (0..).zip(mailboxes) {
        let mut kvm = vm.create_vcpu(index)?;
        // The others wait for INIT and SIPI, as KVM makes them, unless they were running before.
        let stored = usize::try_from(index).ok().and_then(|n| state.vcpus.get(n));
        if let Some(state) = stored {
            kvm.restore_after(state, away)?;
        }
        let stats = kvm.stats_file().ok();
        seats.push(Seat {
            mailbox: mailbox.clone(),
            counters: kvm.counters(),
            stats,
        });
        let pin = u16::try_from(index).ok().and_then(|n| spec.pins.get(&n));
        let pin = pin.or(stored.map(|vcpu| &vcpu.pinning));
        let pin = pin.cloned().unwrap_or_default();
        pinning::check(index, &pin)?;
        vcpus.push(Vcpu {
            kvm,
            mailbox,
            ports: board.ports.clone(),
            mmio: board.mmio.clone(),
            ending: ending.clone(),
            debugger: debugger.clone(),
            ram: ram.clone(),
            policy: ExitPolicy {
                strict_io: spec.strict_io,
            },
            pin,
        });
    }
    if suspended {
        savers.restore(&vm, state, away.unwrap_or_default())?;
    }
    let Board {
        ports,
        mmio,
        mevent,
        ..
    } = board;
    let machine = Machine {
        seats,
        ports,
        mmio,
        ending,
        pm,
        rtc,
        topology,
        max_vcpus: max,
        functions,
        balloon,
        disks,
        cards,
        layout,
        wired,
        stats: vm.stats_file().ok(),
        started: Instant::now(),
        counting: Mutex::default(),
        paused: Mutex::default(),
        vm,
        debugger,
        savers,
        run,
        ram,
        object: OnceLock::new(),
        suspended: Mutex::default(),
    };
    Ok(Built {
        machine: Arc::new(machine),
        vcpus,
        consoles,
        sockets,
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
        savers: &mut Savers,
    ) -> Result<(Arc<Pm>, Arc<Rtc>), BuildError> {
        let pm = Pm::new(Arc::new(HostClock), self.irq(SCI), self.sink());
        pm.attach_timer(&self.mevent)?;
        pm.register(&self.ports)?;
        let offset = base_offset(spec.rtc);
        let rtc = Rtc::new(Arc::new(HostClock), self.irq(RTC_IRQ), offset, layout);
        rtc.attach_timer(&self.mevent)?;
        rtc.register(&self.ports)?;
        let (i8042, post) = (I8042::new(self.sink()), Post::new());
        i8042.register(&self.ports)?;
        post.register(&self.ports)?;
        if let Some(port) = spec.debug_exit {
            DebugExit::new(self.sink()).register(&self.ports, port)?;
        }
        savers.isa.extend::<[(String, Arc<dyn Lifecycle>); 4]>([
            ("pm".into(), pm.clone()),
            ("rtc-chip".into(), rtc.clone()),
            ("i8042".into(), i8042),
            ("post".into(), post),
        ]);
        Ok((pm, rtc))
    }

    /// The serial ports that are connected to something. COM1 and COM3 share an interrupt, and so
    /// do COM2 and COM4.
    fn serial_ports(
        &self,
        spec: &MachineSpec,
        savers: &mut Savers,
    ) -> Result<Vec<Attached>, BuildError> {
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
                .register(com.base..=com.base + (PORTS - 1), com.name, uart.clone())?;
            savers.isa.push((com.name.into(), uart));
            consoles.push(self.connect(com.name, backend, &console)?);
        }
        Ok(consoles)
    }

    /// The BVM console, and the BVM debug port.
    fn bvm(&self, spec: &MachineSpec) -> Result<Option<Attached>, BuildError> {
        let name = "bvmdbg";
        let (mevent, sink, wire) = (self.mevent.clone(), self.sink(), Console::new());
        let far = wire.clone();
        let listen = move |port: u16| {
            let conf = ConsoleConf::Tcp((Ipv4Addr::LOCALHOST, port).into());
            attach(&mevent, name, &conf, &far, sink)
        };
        let dbgport = match spec.bvmdbg {
            DebugPort::Absent => None,
            DebugPort::OnDemand => Some(DbgPort::on_demand(wire, Box::new(move || listen(0)))),
            DebugPort::At(port) => Some(DbgPort::listening(wire, listen(port)?)),
        };
        if let Some(dbgport) = dbgport {
            dbgport.register(&self.ports)?;
        }
        let Some(backend) = &spec.bvmcons else {
            return Ok(None);
        };
        let console = Console::new();
        bvm::consport(console.clone(), &self.ports)?;
        self.connect("bvmcons", backend, &console).map(Some)
    }

    /// Connects a console, and says where it is if that is not known.
    fn connect(
        &self,
        name: &str,
        backend: &ConsoleConf,
        console: &Arc<Console>,
    ) -> Result<Attached, BuildError> {
        let attached = attach(&self.mevent, name, backend, console, self.sink())?;
        if let Some(place) = attached.location() {
            say!("rhyve: {name} is at {place}");
        }
        Ok(attached)
    }
}
