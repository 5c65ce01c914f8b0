//! The ACPI tables that matter here: RSDP, RSDT or XSDT, MADT, FADT, and \_S5 in the DSDT (ACPI
//! 6.5, chapter 5).

use crate::boot::BootInfo;
use crate::memory::{checksum_is_zero, find32, peek8, peek32, peek64};
use crate::startup::CpuList;

const RSDP: u32 = u32::from_le_bytes(*b"RSD ");
const RSDP_REST: u32 = u32::from_le_bytes(*b"PTR ");
const MADT: u32 = u32::from_le_bytes(*b"APIC");
const FADT: u32 = u32::from_le_bytes(*b"FACP");
const S5: u32 = u32::from_le_bytes(*b"_S5_");

/// A length above this is taken for garbage.
const MAX_TABLE: u64 = 1 << 20;

/// Where the tables start.
#[derive(Clone, Copy)]
pub struct Acpi {
    pub rsdp: u64,
    pub revision: u8,
    root: u64,
    /// Whether it is an XSDT, with entries of 8 bytes, or an RSDT, with 4.
    wide: bool,
}

/// Looks where the loader says, then from 0xf0000 up, then in 0xe0000-0xeffff (ACPI 6.5, 5.2.5.1).
pub fn find(info: &BootInfo) -> Option<Acpi> {
    let rsdp = if info.rsdp != 0 {
        Some(info.rsdp)
    } else {
        search(0xf0000).or_else(|| search(0xe0000))
    }?;
    let revision = peek8(rsdp + 15)?;
    let (root, wide) = match peek64(rsdp + 24) {
        Some(xsdt) if revision >= 2 && xsdt != 0 => (xsdt, true),
        _ => (u64::from(peek32(rsdp + 16)?), false),
    };
    Some(Acpi {
        rsdp,
        revision,
        root,
        wide,
    })
}

fn search(area: u64) -> Option<u64> {
    let end = area + 0x10000;
    let mut at = area;
    while at < end {
        at = find32(at, 16, (end - at) / 16, RSDP)?;
        if peek32(at + 4) == Some(RSDP_REST) && checksum_is_zero(at, 20) {
            return Some(at);
        }
        at += 16;
    }
    None
}

/// A table's length, if it is sane.
fn length(table: u64) -> Option<u64> {
    peek32(table + 4)
        .map(u64::from)
        .filter(|length| (36..MAX_TABLE).contains(length))
}

impl Acpi {
    /// The OEM id in the RSDP.
    pub fn oem(&self) -> [u8; 6] {
        let word = peek64(self.rsdp + 9).unwrap_or(0).to_le_bytes();
        [word[0], word[1], word[2], word[3], word[4], word[5]]
    }

    /// The tables named by the root table: their addresses.
    pub fn tables(&self) -> impl Iterator<Item = u64> {
        let (first, wide) = (self.root + 36, self.wide);
        let bytes = length(self.root).map_or(0, |length| length - 36);
        let count = if wide { bytes / 8 } else { bytes / 4 }.min(64);
        (0..count).map_while(move |index| {
            if wide {
                peek64(first + index * 8)
            } else {
                peek32(first + index * 4).map(u64::from)
            }
        })
    }

    fn table(&self, signature: u32) -> Option<u64> {
        self.tables()
            .find(|&table| peek32(table) == Some(signature))
    }

    /// Whether the root table and all that it names have good checksums; an error says what is
    /// wrong.
    pub fn check(&self) -> Result<(), &'static str> {
        let good = |table| length(table).is_some_and(|length| checksum_is_zero(table, length));
        if !good(self.root) {
            return Err("the root table's checksum");
        }
        if !self.tables().all(good) {
            return Err("a table's checksum");
        }
        Ok(())
    }

    /// The MADT, parsed.
    pub fn madt(&self) -> Option<Madt> {
        let table = self.table(MADT)?;
        let end = table + length(table)?;
        let mut madt = Madt {
            cpus: CpuList::new(),
            ioapic: None,
            serial: None,
        };
        let mut at = table + 44;
        while at + 2 <= end {
            let (kind, size) = (peek8(at)?, u64::from(peek8(at + 1)?));
            match kind {
                // Local APIC: processor, id, flags.
                0 if peek32(at + 4)? & 1 != 0 => madt.cpus.add(u32::from(peek8(at + 3)?)),
                // I/O APIC: address, first GSI.
                1 if madt.ioapic.is_none() => {
                    madt.ioapic = Some((u64::from(peek32(at + 4)?), peek32(at + 8)?));
                }
                // Interrupt source override: ISA line, GSI.
                2 if peek8(at + 3)? == crate::uart::IRQ => madt.serial = Some(peek32(at + 4)?),
                // Local x2APIC: id, flags.
                9 if peek32(at + 8)? & 1 != 0 => madt.cpus.add(peek32(at + 4)?),
                _ => {}
            }
            if size < 2 {
                return None;
            }
            at += size;
        }
        Some(madt)
    }

    /// The port of PM1a_CNT and the sleep type for S5, from the FADT and the DSDT's \_S5 package.
    pub fn power_off(&self) -> Option<(u16, u16)> {
        let fadt = self.table(FADT)?;
        let control = u16::try_from(peek32(fadt + 64)?)
            .ok()
            .filter(|&port| port != 0)?;
        let dsdt = match peek64(fadt + 140) {
            Some(wide) if length(fadt)? >= 148 && wide != 0 => wide,
            _ => u64::from(peek32(fadt + 40)?),
        };
        let name = find32(dsdt + 36, 1, length(dsdt)?.saturating_sub(44), S5)?;
        // PackageOp, PkgLength (its top two bits: how many more bytes), NumElements, SLP_TYPa.
        let package = name + 4;
        if peek8(package)? != 0x12 {
            return None;
        }
        let first = package + 3 + u64::from(peek8(package + 1)? >> 6);
        let sleep_type = match peek8(first)? {
            0x0a => peek8(first + 1)?,
            value @ (0 | 1) => value,
            _ => return None,
        };
        Some((control, u16::from(sleep_type)))
    }
}

/// What the MADT says.
pub struct Madt {
    pub cpus: CpuList,
    /// The first I/O APIC's address and first GSI.
    pub ioapic: Option<(u64, u32)>,
    /// The GSI of the serial port's ISA line, where it is not the same number.
    pub serial: Option<u32>,
}
