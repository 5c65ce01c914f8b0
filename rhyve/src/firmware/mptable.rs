//! The Intel MultiProcessor Specification 1.4's table: CPUs, buses, the I/O APIC and who interrupts
//! where. Field offsets are those of its chapter 4.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use super::{
    FirmwareError, FirmwareSpec, IOAPIC_BASE, IOAPIC_ID, LAPIC_BASE, ProcessorId, SCI, TIMER_PIN,
    checksum,
};
use crate::config::Era;

/// The APIC id that addresses all APICs, and so names none.
const ALL_APICS: u8 = 0xff;

/// MP specification 1.4.
const SPEC_REV: u8 = 4;

/// Entry types and the lengths that go with them (4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Interrupt types (table 4-10).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// Flags of an interrupt that is as its bus has them.
const CONFORMING: u16 = 0;
/// Flags of an active low, level triggered interrupt.
const LEVEL_LOW: u16 = 0b1111;

/// All local APICs, as a destination.
const ALL_LAPICS: u8 = 0xff;

/// The floating pointer structure (4.1).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct FloatingPointer {
    signature: [u8; 4],
    table: U32,
    /// In units of 16 bytes.
    length: u8,
    spec_rev: u8,
    checksum: u8,
    /// 0: there is a configuration table. The others: no IMCR.
    features: [u8; 5],
}

/// The configuration table's header (4.2).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    signature: [u8; 4],
    base_length: U16,
    spec_rev: u8,
    checksum: u8,
    oem: [u8; 8],
    product: [u8; 12],
    oem_table: U32,
    oem_table_size: U16,
    entries: U16,
    lapic: U32,
    extended_length: U16,
    extended_checksum: u8,
    reserved: u8,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Processor {
    kind: u8,
    apic_id: u8,
    apic_version: u8,
    /// Bit 0 enabled, bit 1 the bootstrap processor.
    flags: u8,
    signature: U32,
    features: U32,
    reserved: [u8; 8],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Bus {
    kind: u8,
    id: u8,
    name: [u8; 6],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct IoApic {
    kind: u8,
    id: u8,
    version: u8,
    enabled: u8,
    address: U32,
}

/// An I/O or a local interrupt assignment.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Interrupt {
    kind: u8,
    interrupt: u8,
    flags: U16,
    source_bus: u8,
    source_irq: u8,
    apic_id: u8,
    pin: u8,
}

/// What the eras differ in.
struct Form {
    oem: [u8; 8],
    product: [u8; 12],
    processor: ProcessorId,
    lapic_version: u8,
    /// Bus ids: ISA's, and PCI bus 0's, which the others follow by their numbers.
    isa: u8,
    pci: u8,
    /// The table of 2012 has no I/O APIC and no interrupt entries: all interrupts are MSIs.
    interrupts: bool,
}

impl Form {
    /// # Errors
    /// [`FirmwareError::TooManyBuses`].
    fn of(spec: &FirmwareSpec) -> Result<Self, FirmwareError> {
        let buses = || spec.roots.iter().map(|root| root.bus);
        let too_many = || FirmwareError::TooManyBuses(spec.roots.len());
        Ok(match spec.era {
            Era::Y2012 if buses().any(|bus| bus == u8::MAX) => return Err(too_many()),
            Era::Y2012 => Self {
                oem: *b"NETAPP  ",
                product: *b"vFiler      ",
                processor: ProcessorId::BHYVE,
                lapic_version: 0x10,
                isa: 0,
                pci: 1,
                interrupts: false,
            },
            Era::Y2014 | Era::Today => Self {
                oem: *b"RHYVE   ",
                product: *b"Hypervisor  ",
                processor: spec.processor,
                // What KVM's local APICs have in their version register.
                lapic_version: 0x14,
                // Guests take the id of a PCI bus for its number, so ISA has one of the others.
                isa: (1..=u8::MAX)
                    .find(|id| buses().all(|bus| bus != *id))
                    .ok_or_else(too_many)?,
                pci: 0,
                interrupts: true,
            },
        })
    }
}

/// Entries of the table, in the order of their types.
#[derive(Default)]
struct Entries {
    bytes: Vec<u8>,
    count: u16,
}

impl Entries {
    fn push(&mut self, entry: &(impl IntoBytes + Immutable)) {
        self.bytes.extend_from_slice(entry.as_bytes());
        self.count += 1;
    }
}

/// The floating pointer for `base` with the table right behind it.
///
/// # Errors
/// [`FirmwareError::TooManyCpus`] and [`FirmwareError::TooManyBuses`].
pub(super) fn build(spec: &FirmwareSpec, base: u64) -> Result<Vec<u8>, FirmwareError> {
    let form = Form::of(spec)?;
    let mut entries = Entries::default();
    for (_, id) in spec.topology.apic_ids() {
        let apic_id = u8::try_from(id).ok().filter(|id| *id != ALL_APICS);
        let apic_id = apic_id.ok_or(FirmwareError::TooManyCpus(spec.topology.cpus))?;
        entries.push(&Processor {
            kind: PROCESSOR,
            apic_id,
            apic_version: form.lapic_version,
            flags: if apic_id == 0 { 0b11 } else { 0b01 },
            signature: form.processor.signature.into(),
            features: form.processor.features.into(),
            reserved: [0; 8],
        });
    }
    let pci = spec.roots.iter();
    let pci = pci.map(|root| (form.pci + root.bus, b"PCI   "));
    let mut buses: Vec<_> = pci.chain([(form.isa, b"ISA   ")]).collect();
    buses.sort();
    for (id, name) in buses {
        entries.push(&Bus {
            kind: BUS,
            id,
            name: *name,
        });
    }
    if form.interrupts {
        let id = IOAPIC_ID;
        let address = IOAPIC_BASE.into();
        entries.push(&IoApic {
            kind: IO_APIC,
            id,
            version: 0x11,
            enabled: 1,
            address,
        });
        interrupts(spec, &form, &mut entries);
    }

    let mut table = Header {
        signature: *b"PCMP",
        base_length: ((size_of::<Header>() + entries.bytes.len()) as u16).into(),
        spec_rev: SPEC_REV,
        checksum: 0,
        oem: form.oem,
        product: form.product,
        oem_table: 0.into(),
        oem_table_size: 0.into(),
        entries: entries.count.into(),
        lapic: LAPIC_BASE.into(),
        extended_length: 0.into(),
        extended_checksum: 0,
        reserved: 0,
    };
    table.checksum = checksum(table.as_bytes()).wrapping_add(checksum(&entries.bytes));

    let mut pointer = FloatingPointer {
        signature: *b"_MP_",
        table: (base as u32 + size_of::<FloatingPointer>() as u32).into(),
        length: 1,
        spec_rev: SPEC_REV,
        checksum: 0,
        features: [0; 5],
    };
    pointer.checksum = checksum(pointer.as_bytes());
    Ok([pointer.as_bytes(), table.as_bytes(), &entries.bytes].concat())
}

/// Who interrupts where: ISA, PCI, then what is wired to every local APIC.
fn interrupts(spec: &FirmwareSpec, form: &Form, entries: &mut Entries) {
    // IRQ 2 is the cascade of the 8259s, and its pin is the timer's.
    for irq in (0..16).filter(|irq| *irq != 2) {
        entries.push(&Interrupt {
            kind: IO_INTERRUPT,
            interrupt: INT,
            flags: if irq == SCI { LEVEL_LOW } else { CONFORMING }.into(),
            source_bus: form.isa,
            source_irq: irq,
            apic_id: IOAPIC_ID,
            pin: if irq == 0 { TIMER_PIN } else { irq },
        });
    }
    for route in &spec.intx {
        entries.push(&Interrupt {
            kind: IO_INTERRUPT,
            interrupt: INT,
            flags: CONFORMING.into(),
            source_bus: form.pci + route.bus,
            // Device in bits 2 to 6, INTA as 0 in bits 0 and 1 (D.3).
            source_irq: route.slot << 2 | (route.pin - 1),
            apic_id: IOAPIC_ID,
            pin: route.gsi,
        });
    }
    for (pin, interrupt) in [(0, EXT_INT), (1, NMI)] {
        entries.push(&Interrupt {
            kind: LOCAL_INTERRUPT,
            interrupt,
            flags: CONFORMING.into(),
            source_bus: form.isa,
            source_irq: 0,
            apic_id: ALL_LAPICS,
            pin,
        });
    }
}
