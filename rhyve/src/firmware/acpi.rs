//! ACPI 6.5's static tables: RSDP, RSDT, XSDT, FADT, FACS, MADT, MCFG. The DSDT is [`dsdt`]'s.
//!
//! The tables are few and small on purpose. A guest pays for each feature it finds here with
//! accesses that leave the guest.

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;

use crate::config::CpuTopology;

use super::{FirmwareSpec, IOAPIC_BASE, IOAPIC_ID, LAPIC_BASE, SCI, TIMER_PIN, checksum, dsdt, pm};

/// Who made the tables.
pub(super) const OEM_ID: [u8; 6] = *b"RHYVE ";
/// Which tables of theirs; FADT and RSDT must agree in it.
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"RHYVE   ";
/// Which version of them.
pub(super) const OEM_REVISION: u32 = 1;

/// A table with the common header (5.2.6) and `body`.
pub(super) fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    const HEADER: u32 = 36;
    let mut sdt = Sdt::new(
        *signature,
        HEADER,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    sdt.append_slice(body);
    sdt.as_slice().to_vec()
}

/// The bytes of what acpi_tables describes.
pub(super) fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// Tables one behind the other from a guest-physical address.
struct Area {
    base: u64,
    bytes: Vec<u8>,
}

impl Area {
    /// Adds a table on a 64-byte boundary, which FACS wants (5.2.10), and says where it is.
    fn push(&mut self, table: &[u8]) -> u64 {
        let at = (self.base + self.bytes.len() as u64).next_multiple_of(64);
        self.bytes.resize((at - self.base) as usize, 0);
        self.bytes.extend_from_slice(table);
        at
    }
}

/// All tables, RSDP first, for guest-physical `base`, which is a multiple of 64.
pub(super) fn build(spec: &FirmwareSpec, base: u64) -> Vec<u8> {
    let mut area = Area {
        base,
        bytes: vec![0; Rsdp::len()],
    };
    let facs = area.push(&bytes(&FACS::new()));
    let dsdt = area.push(&table(b"DSDT", 2, &dsdt::build(spec)));
    let fadt = area.push(&bytes(&fadt(spec, facs as u32, dsdt)));
    let madt = area.push(&table(b"APIC", 5, &madt(spec.topology)));
    let mut tables = vec![fadt, madt];
    if let Some(ecam) = spec.ecam {
        let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        mcfg.add_ecam(ecam.base.into(), 0, 0, ecam.last_bus);
        tables.push(area.push(&bytes(&mcfg)));
    }
    let body: Vec<u8> = tables.iter().flat_map(|gpa| gpa.to_le_bytes()).collect();
    let xsdt = area.push(&table(b"XSDT", 1, &body));
    let body: Vec<u8> = tables
        .iter()
        .flat_map(|gpa| (*gpa as u32).to_le_bytes())
        .collect();
    let rsdt = area.push(&table(b"RSDT", 1, &body));

    let rsdp = rsdp(rsdt as u32, xsdt);
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    area.bytes
}

/// The root pointer of ACPI 2.0 and later, with an RSDT for guests that are older (5.2.5.3).
fn rsdp(rsdt: u32, xsdt: u64) -> Vec<u8> {
    let mut rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    rsdp[16..20].copy_from_slice(&rsdt.to_le_bytes());
    // One checksum of what ACPI 1.0 knew, one of all.
    for (at, end) in [(8, 20), (32, 36)] {
        rsdp[at] = 0;
        rsdp[at] = checksum(&rsdp[..end]);
    }
    rsdp
}

/// IA-PC boot architecture flags (table 5.10).
const LEGACY_DEVICES: u16 = 1 << 0;
/// No VGA: the guest need not look for one. (8042 is bit 1 and not set, as there is no keyboard;
/// "no CMOS clock" is bit 5 and not set, as there is one.)
const NO_VGA: u16 = 1 << 2;

/// The fixed hardware (5.2.9).
fn fadt(spec: &FirmwareSpec, facs: u32, dsdt: u64) -> FADT {
    let port = |port: u16, bits: u8, access| {
        GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // PWR_BUTTON is not set: the power button is fixed hardware. There is no sleep button, and
        // the clock's alarm wakes nobody.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = u16::from(SCI).into();
    fadt.smi_cmd = u32::from(pm::SMI_CMD).into();
    fadt.acpi_enable = pm::ACPI_ENABLE;
    fadt.acpi_disable = pm::ACPI_DISABLE;
    fadt.pm1a_evt_blk = u32::from(pm::PM1A_EVT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(pm::PM1A_EVT, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(pm::PM1A_CNT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(pm::PM1A_CNT, 16, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(pm::TIMER).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = port(pm::TIMER, 32, AccessSize::DwordAccess);
    fadt.reset_reg = port(pm::RESET, 8, AccessSize::ByteAccess);
    fadt.reset_value = pm::RESET_VALUE;
    // More than 100 us and 1000 us: there is no C2 and no C3.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = pm::CMOS_CENTURY;
    let legacy = if spec.com.is_empty() {
        0
    } else {
        LEGACY_DEVICES
    };
    fadt.iapc_boot_arch = (legacy | NO_VGA).into();
    fadt.finalize()
}

/// Interrupt controllers (5.2.12).
fn madt(topology: CpuTopology) -> Vec<u8> {
    /// There are two 8259s as well.
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    /// Active low, level triggered (table 5.26).
    const LEVEL_LOW: u16 = 0b1111;

    let mut body = Vec::new();
    body.extend(LAPIC_BASE.to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    let mut entry = |kind: u8, fields: &[&[u8]]| {
        let fields = fields.concat();
        body.extend([kind, fields.len() as u8 + 2]);
        body.extend(fields);
    };
    for (uid, id) in topology.apic_ids() {
        match (u8::try_from(uid), u8::try_from(id)) {
            // Id 255 addresses all APICs in 8 bits, and 255 as UID all processors.
            (Ok(uid), Ok(id)) if id < 0xff => entry(0, &[&[uid, id], &ENABLED.to_le_bytes()]),
            _ => entry(
                9,
                &[
                    &[0; 2],
                    &id.to_le_bytes(),
                    &ENABLED.to_le_bytes(),
                    &uid.to_le_bytes(),
                ],
            ),
        }
    }
    entry(
        1,
        &[
            &[IOAPIC_ID, 0],
            &IOAPIC_BASE.to_le_bytes(),
            &0u32.to_le_bytes(),
        ],
    );
    for (irq, gsi, flags) in [(0, TIMER_PIN, 0), (SCI, SCI, LEVEL_LOW)] {
        entry(
            2,
            &[
                &[0, irq],
                &u32::from(gsi).to_le_bytes(),
                &flags.to_le_bytes(),
            ],
        );
    }
    // LINT1 of every local APIC is NMI.
    entry(4, &[&[0xff], &[0; 2], &[1]]);
    if topology.cpus > 0xff {
        entry(10, &[&[0; 2], &u32::MAX.to_le_bytes(), &[1, 0, 0, 0]]);
    }
    body
}
