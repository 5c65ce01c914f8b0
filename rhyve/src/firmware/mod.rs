//! The tables a PC's firmware leaves in memory: Intel MP, ACPI and SMBIOS.
//!
//! Pure builders: a [`FirmwareSpec`] goes in, [`Blob`]s to be copied into guest memory come out.
//! rhyve makes them, not rhyveload, because only rhyve knows how many CPUs there are; a loader that
//! must name the RSDP (PVH, Linux boot_params) uses [`RSDP_BASE`], which never moves.
//!
//! | guest-physical        | what                                                                |
//! |-----------------------|---------------------------------------------------------------------|
//! | 0xe0000 - 0xeffff     | SMBIOS structures                                                   |
//! | 0xf0000 - 0xf1fff     | MP floating pointer and configuration table                         |
//! | 0xf2000 - 0xf23ff     | SMBIOS entry point                                                  |
//! | 0xf2400 - 0xfffff     | RSDP and all ACPI tables                                            |
//!
//! # What the interrupt tables promise
//!
//! They describe KVM's in-kernel chips, and whoever makes the machine keeps the promise by
//! KVM_SET_GSI_ROUTING:
//!
//! - GSI n is pin n of the I/O APIC, except that GSI 0 (the PIT) is pin [`TIMER_PIN`] and GSI 2,
//!   the cascade, is no pin at all. KVM's default routing has GSI 0 on pin 0 (arch/x86/kvm/
//!   irq_comm.c, `default_routing`), so it must be replaced.
//! - GSIs 0 to 15 are also inputs of the two 8259s, GSI 2 again excepted.
//! - COM ports and the clock raise edges, active high. The SCI ([`SCI`]) and PCI's INTx are level
//!   triggered. They are declared active low, as on a PC; KVM's I/O APIC ignores polarity, so
//!   level 1 of KVM_IRQ_LINE asserts them nevertheless.
//! - A guest that stays with the 8259s learns what is level triggered from the ELCR (ports 0x4d0
//!   and 0x4d1), which firmware sets for every INTx line below 16.

use std::ops::Range;

use uuid::Uuid;
use vmm_api::memory::MemoryLayout;
use vmm_api::name::VmName;

use crate::config::{ComPort, CpuTopology, Era, MachineSpec};

mod acpi;
mod dsdt;
mod mptable;
#[cfg(test)]
mod reader;
mod smbios;
#[cfg(test)]
mod tests;

pub use dsdt::PCI_HOLE;
pub use smbios::default_uuid;

/// Where the MP floating pointer is: Linux and FreeBSD scan 0xf0000 to 0xfffff.
pub const MPTABLE_BASE: u64 = 0xf_0000;
/// Where the SMBIOS entry point is: guests scan 0xf0000 to 0xfffff on 16-byte boundaries.
pub const SMBIOS_BASE: u64 = 0xf_2000;
/// Where the ACPI RSDP is; guests also find it by scanning 0xe0000 to 0xfffff.
pub use vmm_api::boot::RSDP_BASE;
/// Where the SMBIOS structures are.
const SMBIOS_TABLE_BASE: u64 = 0xe_0000;
/// End of the BIOS area.
const BIOS_END: u64 = 0x10_0000;

/// The local APICs' address.
pub const LAPIC_BASE: u32 = 0xfee0_0000;
/// The I/O APIC's address in KVM.
pub const IOAPIC_BASE: u32 = 0xfec0_0000;
/// What KVM's I/O APIC answers as its id after reset.
pub const IOAPIC_ID: u8 = 0;
/// Pins of KVM's I/O APIC.
pub const IOAPIC_PINS: u8 = 24;
/// The I/O APIC pin of the PIT's interrupt.
pub const TIMER_PIN: u8 = 2;
/// The interrupt of ACPI's fixed hardware.
pub const SCI: u8 = 9;

/// ACPI's fixed hardware: I/O ports and values the tables tell the guest, and the device answers.
pub mod pm {
    /// PM1a event block: status at this port, enable at the next word.
    pub const PM1A_EVT: u16 = 0x400;
    /// PM1a control block, one word.
    pub const PM1A_CNT: u16 = 0x404;
    /// Power management timer, 32 bits wide.
    pub const TIMER: u16 = 0x408;
    /// Where [`ACPI_ENABLE`] and [`ACPI_DISABLE`] are written.
    pub const SMI_CMD: u16 = 0xb2;
    /// Sets SCI_EN.
    pub const ACPI_ENABLE: u8 = 0xa0;
    /// Clears SCI_EN.
    pub const ACPI_DISABLE: u8 = 0xa1;
    /// Reset register.
    pub const RESET: u16 = 0xcf9;
    /// What is written there to reset the machine.
    pub const RESET_VALUE: u8 = 0x06;
    /// SLP_TYP of S5, soft off.
    pub const S5_SLP_TYP: u8 = 5;
    /// CMOS register of the century.
    pub const CMOS_CENTURY: u8 = 0x32;
}

/// What the tables are to describe.
#[derive(Clone, Debug)]
pub struct FirmwareSpec {
    /// Settles the MP table's form and ids.
    pub era: Era,
    /// The VM's name, from which the UUID comes if there is none.
    pub name: VmName,
    /// The machine's UUID.
    pub uuid: Option<Uuid>,
    /// Virtual CPUs; their APIC ids come from their places in it.
    pub topology: CpuTopology,
    /// What the MP table and SMBIOS say of the processor.
    pub processor: ProcessorId,
    /// Guest memory.
    pub memory: MemoryLayout,
    /// Make an Intel MP table.
    pub mptable: bool,
    /// Make ACPI tables.
    pub acpi: bool,
    /// Make an SMBIOS table.
    pub smbios: bool,
    /// The serial ports there are.
    pub com: Vec<ComPort>,
    /// The PCI buses, by ascending number; bus 0 has the legacy ports as well.
    pub roots: Vec<PciRoot>,
    /// Where INTx of PCI devices go; at most one entry a device and pin.
    pub intx: Vec<IntxRoute>,
    /// PCI configuration space in memory, if there is any.
    pub ecam: Option<Ecam>,
}

/// CPUID leaf 1 of the virtual CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessorId {
    /// EAX: family, model, stepping.
    pub signature: u32,
    /// EDX: features.
    pub features: u32,
}

impl ProcessorId {
    /// What bhyve has always told in its MP table, whatever the CPU: a Nehalem.
    pub const BHYVE: Self = Self {
        signature: 0x6a5,
        features: 0xbfeb_fbff,
    };
}

/// A PCI bus, which is a root of its own, and what it decodes for its BARs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciRoot {
    /// Its number.
    pub bus: u8,
    /// Ports.
    pub ports: Range<u32>,
    /// Guest-physical addresses.
    pub memory: Range<u32>,
}

/// One interrupt pin of a PCI device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntxRoute {
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub slot: u8,
    /// 1 for INTA to 4 for INTD, as the device's interrupt pin register counts.
    pub pin: u8,
    /// Interrupt, below [`IOAPIC_PINS`].
    pub gsi: u8,
}

/// PCI Express configuration space in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ecam {
    /// Guest-physical address of bus 0, 1 MiB a bus, between 3 GiB and the I/O APIC.
    pub base: u32,
    /// The last bus.
    pub last_bus: u8,
}

/// Bytes for guest memory.
#[derive(Clone, PartialEq, Eq)]
pub struct Blob {
    /// Guest-physical address.
    pub gpa: u64,
    /// What belongs there.
    pub bytes: Vec<u8>,
}

/// Why there are no tables.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FirmwareError {
    /// More CPUs than 8-bit APIC ids can name.
    #[error("an MP table has 8-bit APIC ids, too few for {0} CPUs: leave it out with -Y")]
    TooManyCpus(u16),
    /// No bus id is left for ISA.
    #[error(
        "an MP table has 8-bit bus ids, too few for {0} PCI buses and ISA: leave it out with -Y"
    )]
    TooManyBuses(usize),
    /// The guest has no RAM where the tables belong.
    #[error(
        "the guest's {0} bytes do not reach to 1 MiB, where its tables are: load it with -m 1M or more"
    )]
    Memory(u64),
    /// A table is larger than the place it has.
    #[error("the {table} of {size} bytes does not fit into its {room}: use fewer CPUs or sockets")]
    TooLarge {
        /// Which.
        table: &'static str,
        /// Its bytes.
        size: usize,
        /// Bytes there are.
        room: u64,
    },
    /// A PCI interrupt that cannot be.
    #[error("bus {} slot {} pin {} cannot be routed to GSI {}", .0.bus, .0.slot, .0.pin, .0.gsi)]
    Intx(IntxRoute),
    /// Configuration space where something else is.
    #[error(
        "configuration space of {buses} buses at {base:#x} is not between 3 GiB and the I/O APIC"
    )]
    Ecam {
        /// Where it should begin.
        base: u32,
        /// How many buses it should have.
        buses: u32,
    },
}

impl FirmwareSpec {
    /// What `machine` with `memory` wants, but for PCI.
    pub fn new(machine: &MachineSpec, memory: MemoryLayout) -> Self {
        let com = ComPort::ALL
            .into_iter()
            .filter(|port| machine.com[port.index()].is_some());
        Self {
            era: machine.era,
            name: machine.name.clone(),
            uuid: machine.uuid,
            topology: machine.topology,
            processor: ProcessorId::BHYVE,
            memory,
            mptable: machine.mptable,
            acpi: machine.acpi,
            smbios: machine.smbios,
            com: com.collect(),
            roots: Vec::new(),
            intx: Vec::new(),
            ecam: None,
        }
    }

    /// Refuses what no table could say.
    fn check(&self) -> Result<(), FirmwareError> {
        let any = self.mptable || self.acpi || self.smbios;
        if any && self.memory.lowmem < BIOS_END {
            return Err(FirmwareError::Memory(self.memory.lowmem));
        }
        for route in &self.intx {
            // GSI 0 and 2 are the timer and the cascade, 9 is the SCI, which INTx may share.
            let possible = (1..=4).contains(&route.pin)
                && route.slot < 32
                && route.gsi < IOAPIC_PINS
                && !matches!(route.gsi, 0 | TIMER_PIN);
            if !possible {
                return Err(FirmwareError::Intx(*route));
            }
        }
        if let Some(Ecam { base, last_bus }) = self.ecam {
            let buses = u32::from(last_bus) + 1;
            let end = u64::from(base) + (u64::from(buses) << 20);
            if base < dsdt::PCI_HOLE || base & 0xf_ffff != 0 || end > IOAPIC_BASE.into() {
                return Err(FirmwareError::Ecam { base, buses });
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Blob({:#x}..{:#x})",
            self.gpa,
            self.gpa + self.bytes.len() as u64
        )
    }
}

/// Makes the tables `spec` asks for. They lie in 0xe0000 to 0xfffff and do not overlap.
///
/// # Errors
/// What cannot be described.
pub fn build(spec: &FirmwareSpec) -> Result<Vec<Blob>, FirmwareError> {
    spec.check()?;
    let mut blobs = Vec::new();
    if spec.mptable {
        let bytes = mptable::build(spec, MPTABLE_BASE)?;
        place(&mut blobs, "MP table", MPTABLE_BASE, SMBIOS_BASE, bytes)?;
    }
    if spec.smbios {
        let table = smbios::build(spec, SMBIOS_TABLE_BASE);
        let (entry, structures) = (table.entry_point, table.structures);
        // Less one byte: the entry point has the length in 16 bits.
        let end = MPTABLE_BASE - 1;
        place(
            &mut blobs,
            "SMBIOS table",
            SMBIOS_TABLE_BASE,
            end,
            structures,
        )?;
        place(
            &mut blobs,
            "SMBIOS entry point",
            SMBIOS_BASE,
            RSDP_BASE,
            entry,
        )?;
    }
    if spec.acpi {
        let bytes = acpi::build(spec, RSDP_BASE);
        place(&mut blobs, "ACPI tables", RSDP_BASE, BIOS_END, bytes)?;
    }
    Ok(blobs)
}

/// Adds a blob from `gpa`, if it ends by `end`.
fn place(
    blobs: &mut Vec<Blob>,
    table: &'static str,
    gpa: u64,
    end: u64,
    bytes: Vec<u8>,
) -> Result<(), FirmwareError> {
    let (size, room) = (bytes.len(), end - gpa);
    if size as u64 > room {
        return Err(FirmwareError::TooLarge { table, size, room });
    }
    blobs.push(Blob { gpa, bytes });
    Ok(())
}

/// The byte that makes the sum of `bytes` 0, which is how all these tables are checked.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}
