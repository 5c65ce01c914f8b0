//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4).

use crate::memory::{checksum_is_zero, find32, peek8, peek32};
use crate::startup::CpuList;

const FLOATING: u32 = u32::from_le_bytes(*b"_MP_");
const TABLE: u32 = u32::from_le_bytes(*b"PCMP");

/// What the table says.
pub struct MpTable {
    pub floating: u64,
    pub table: u64,
    pub revision: u8,
    pub cpus: CpuList,
    /// The first I/O APIC's address.
    pub ioapic: Option<u64>,
    pub entries: u32,
    /// The PCI buses below 64, a bit each.
    pub pci_buses: u64,
}

/// Looks in the last KiB of base memory and in the BIOS area (MP 1.4, section 4); an error says
/// what is wrong with what was found.
pub fn find() -> Result<Option<MpTable>, &'static str> {
    let Some(floating) = search(0x9fc00, 64).or_else(|| search(0xf0000, 4096)) else {
        return Ok(None);
    };
    parse(floating).map(Some)
}

fn search(area: u64, count: u64) -> Option<u64> {
    let end = area + count * 16;
    let mut at = area;
    while at < end {
        at = find32(at, 16, (end - at) / 16, FLOATING)?;
        if peek8(at + 8) == Some(1) && checksum_is_zero(at, 16) {
            return Some(at);
        }
        at += 16;
    }
    None
}

fn parse(floating: u64) -> Result<MpTable, &'static str> {
    const ENDS: &str = "it ends in unmapped memory";
    let table = u64::from(peek32(floating + 4).ok_or(ENDS)?);
    if table == 0 {
        return Err("a default configuration, without a table");
    }
    if peek32(table) != Some(TABLE) {
        return Err("no PCMP where the floating pointer points");
    }
    let word = peek32(table + 4).ok_or(ENDS)?;
    let end = table + u64::from(word & 0xffff);
    if !checksum_is_zero(table, u64::from(word & 0xffff)) {
        return Err("bad checksum");
    }
    let mut found = MpTable {
        floating,
        table,
        revision: (word >> 16) as u8,
        cpus: CpuList::new(),
        ioapic: None,
        entries: peek32(table + 34).ok_or(ENDS)? & 0xffff,
        pci_buses: 0,
    };
    let mut at = table + 44;
    for _ in 0..found.entries {
        if at >= end {
            return Err("fewer entries than it counts");
        }
        let head = peek32(at).ok_or(ENDS)?;
        let [kind, id, _, flags] = head.to_le_bytes();
        let size = match kind {
            0 => {
                if flags & 1 != 0 {
                    found.cpus.add(u32::from(id));
                }
                20
            }
            2 => {
                if flags & 1 != 0 && found.ioapic.is_none() {
                    found.ioapic = peek32(at + 4).map(u64::from);
                }
                8
            }
            1 => {
                // The name's first bytes are behind the id.
                if head >> 16 == u32::from(u16::from_le_bytes(*b"PC")) && id < 64 {
                    found.pci_buses |= 1 << id;
                }
                8
            }
            3 | 4 => 8,
            _ => return Err("an entry of unknown type"),
        };
        at += size;
    }
    Ok(found)
}
