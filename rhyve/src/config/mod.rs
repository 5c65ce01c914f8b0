//! What a machine is to be: the command line's meaning, as plain data.
//!
//! Words become a [`MachineSpec`] through a [`SpecBuilder`]: each flag and each `-o name=value` is
//! read by itself, and [`SpecBuilder::settle`] checks them against each other. What the host can
//! do (CPUs there are, KVM's limits, the VM object's memory) is not known here and is checked by
//! the machine.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;
use vmm_api::memory::{MemSizeError, MemoryLayout};
use vmm_api::name::{NameError, VmName};

use crate::bvm::DebugPort;
use crate::console::ConsoleConf;

mod block;
mod builder;
mod com;
mod devices;
mod gdb;
mod net;
mod slot;
mod topology;
mod variable;
mod virtio;

pub use block::{AioEngine, BlkSpec, BlockConfError, BlockSpec, ImageFormat};
pub use builder::SpecBuilder;
pub use com::{ComPort, ComSpec, LpcError, LpcSpec, help as lpc_help, io_port};
pub use devices::{BalloonSpec, ConsoleSpec, PortSpec, ShareSpec, VsockSpec};
pub use gdb::{GdbConfError, GdbPlace, GdbSpec};
pub use net::{Forward, GATEWAY, GUEST, MacAddress, NetBackend, NetConfError, NetSpec, UserSpec};
pub use slot::{PciAddress, SlotDevice, SlotError, SlotSpec, help as slot_help};
pub use topology::{CpuTopology, TopologyError, TopologyRequest};
pub use virtio::RndSpec;

/// Which bhyve the machine is to look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Era {
    /// The bhyve of 2012: MPtable only, no ACPI unless -A, x2APIC, virtio 0.9.5 with that year's
    /// features, BVM console on standard input and output, BVM debug port.
    #[value(name = "2012")]
    Y2012,
    /// The bhyve of FreeBSD 10: MPtable, ACPI with -A, x2APIC with -x, virtio 0.9.5.
    #[value(name = "2014")]
    Y2014,
    /// ACPI, MPtable, SMBIOS, x2APIC.
    #[default]
    Today,
}

/// What the CMOS clock shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RtcBase {
    /// The host's local time, bhyve's default.
    #[default]
    LocalTime,
    /// Coordinated universal time.
    Utc,
}

/// A whole machine, checked as far as the words alone allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineSpec {
    /// The VM's name.
    pub name: VmName,
    /// Which bhyve to look like.
    pub era: Era,
    /// Virtual CPUs; the APIC id of each comes from its place.
    pub topology: CpuTopology,
    /// Host CPUs a virtual CPU may run on; those which are not in the map run anywhere.
    pub pins: BTreeMap<u16, BTreeSet<usize>>,
    /// Memory the loaded VM is expected to have, if it was said.
    pub memory: Option<MemoryLayout>,
    /// Lock guest memory in RAM.
    pub wire_memory: bool,
    /// Let guest memory into rhyve's own core dumps.
    pub guest_in_core: bool,
    /// Destroy the VM object once the guest has switched itself off.
    pub destroy_on_poweroff: bool,
    /// Make ACPI tables.
    pub acpi: bool,
    /// Make an Intel MP table.
    pub mptable: bool,
    /// Make an SMBIOS table.
    pub smbios: bool,
    /// Offer x2APIC mode by CPUID.
    pub x2apic: bool,
    /// Stop the machine on an access to an I/O port nobody answers.
    pub strict_io: bool,
    /// Fault accesses to unknown MSRs; otherwise they read 0 and ignore writes.
    pub strict_msr: bool,
    /// What the CMOS clock shows.
    pub rtc: RtcBase,
    /// The machine's UUID, if one was given.
    pub uuid: Option<Uuid>,
    /// Let virtio devices interrupt by MSI-X; otherwise by MSI, one message a device.
    pub virtio_msix: bool,
    /// PCI functions by address; there is always one in slot 0.
    pub slots: Vec<SlotSpec>,
    /// The serial ports, com1 first.
    pub com: [Option<ConsoleConf>; 4],
    /// What the BVM console is connected to, if there is one.
    pub bvmcons: Option<ConsoleConf>,
    /// Where a debugger finds the BVM debug port.
    pub bvmdbg: DebugPort,
    /// I/O port of an isa-debug-exit device, if there is to be one.
    pub debug_exit: Option<u16>,
    /// A debug server, if there is to be one.
    pub gdb: Option<GdbSpec>,
}

/// Why the words make no machine: which of them, what is wrong and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {problem}")]
pub struct ConfigError {
    /// The words at fault, as they were given.
    pub at: String,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong with one flag or variable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// bhyve has it, rhyve has not.
    #[error("not supported yet: {0}")]
    NotYet(&'static str),
    /// It is so, and nothing can make it otherwise.
    #[error("cannot be changed: {0}")]
    Fixed(&'static str),
    /// No such variable; with what to write instead.
    #[error("there is no such variable{0}")]
    Unknown(String),
    /// `-o` without a value.
    #[error("write -o NAME=VALUE, as in -o rtc.use_localtime=false")]
    NoValue,
    /// Not a TCP port.
    #[error("'{0}' is not a TCP port: write a number up to 65535; 0 is no debug port")]
    TcpPort(String),
    /// Not a boolean.
    #[error("'{0}' is neither true nor false")]
    Boolean(String),
    /// Not a UUID.
    #[error("'{0}' is not a UUID: write 8-4-4-4-12 hexadecimal digits, as uuidgen(1) prints")]
    Uuid(String),
    /// Not a set of CPUs.
    #[error("'{0}' is not a set of host CPUs: write numbers and ranges, as in 0-3,8")]
    CpuSet(String),
    /// Not a pinning.
    #[error("write VCPU:HOSTCPU, as in 0:2")]
    Pin,
    /// 2012's form of -p in another era.
    #[error("write VCPU:HOSTCPU, as in 0:2; a first host CPU alone is 2012's -p: add --era=2012")]
    PinBase,
    /// A virtual CPU that is not there.
    #[error("there is no vCPU {vcpu}: {cpus} CPUs are numbered from 0 to {last}", last = cpus - 1)]
    NoSuchVcpu {
        /// The one that was named.
        vcpu: u16,
        /// How many there are.
        cpus: u16,
    },
    /// Two devices in one place.
    #[error("{0} is taken by another -s: give each its own slot or function")]
    SlotTaken(PciAddress),
    /// A function guests never look for.
    #[error("guests look at a slot's other functions only if it has function 0: fill {0} first")]
    NoFunctionZero(PciAddress),
    /// A second bridge to ISA, or one that is not on bus 0, as bhyve has it.
    #[error("a machine has one bridge to ISA, on bus 0: leave lpc at {0} out")]
    IsaBridge(PciAddress),
    /// Two consoles at one other end.
    #[error("two consoles cannot share {0}: connect one of them elsewhere")]
    Shared(&'static str),
    /// One port for two devices.
    #[error("I/O port {0:#x} belongs to {1}: take another, as in 0xf4")]
    PortTaken(u16, &'static str),
    /// There is no name.
    #[error("a VM needs a name: give it last, as in rhyve -c 2 guest0")]
    NoName,
    /// Not a name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Two names.
    #[error("the VM is also called '{0}': give one name")]
    TwoNames(VmName),
    /// A bad place for the debug server.
    #[error(transparent)]
    Gdb(#[from] GdbConfError),
    /// A bad memory size.
    #[error(transparent)]
    Size(#[from] MemSizeError),
    /// Sizes no guest can have.
    #[error("a guest has at most 3G below 4 GiB and 64T above, in pages of 4K")]
    Memory,
    /// No memory at all.
    #[error("a guest needs some memory, as in 512M")]
    NoMemory,
    /// Memory above 4 GiB alone.
    #[error("memory above 4 GiB needs some below it: give -m as well")]
    NoLowmem,
    /// A bad CPU topology.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// A bad PCI slot.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A bad serial port.
    #[error(transparent)]
    Lpc(#[from] LpcError),
}
