//! The page tables and the GDT of the 64-bit entry.

use vmm_api::regs::Table;

use super::{GDT, PML4};

const PDPT: u64 = PML4 + 0x1000;
const PD: u64 = PML4 + 0x2000;

/// A kernel in lowmem ends below 4 GiB.
const GIBS: u64 = 4;

// Intel SDM volume 3, 4.5.4: present, writable; PS makes a 2 MiB page.
const TABLE: u64 = 0x3;
const LARGE: u64 = 0x83;

/// Two empty entries, so that __BOOT_CS is 0x10 and __BOOT_DS is 0x18: 4 GiB execute/read code, L
/// set, and read/write data (boot.rst, "64-bit Boot Protocol").
const BOOT_GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// The GDT's bytes.
pub fn gdt() -> Vec<u8> {
    BOOT_GDT
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect()
}

/// Where the GDT is.
pub fn gdt_register() -> Table {
    Table {
        base: GDT,
        limit: size_of_val(&BOOT_GDT) as u16 - 1,
    }
}

/// Tables from [`PML4`] on that map each address to itself, by 2 MiB pages (1 GiB pages are not on
/// every processor), for as many gibibytes as the kernel reaches into.
pub fn identity(kernel_end: u64) -> Vec<u8> {
    let gibs = kernel_end.div_ceil(1 << 30).clamp(1, GIBS);
    let mut bytes = vec![0; 0x2000];
    bytes[..8].copy_from_slice(&(PDPT | TABLE).to_le_bytes());
    for gib in 0..gibs {
        let at = 0x1000 + 8 * gib as usize;
        bytes[at..at + 8].copy_from_slice(&((PD + (gib << 12)) | TABLE).to_le_bytes());
    }
    for page in 0..gibs * 512 {
        bytes.extend_from_slice(&(page << 21 | LARGE).to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::CMDLINE;

    fn word(bytes: &[u8], gpa: u64) -> u64 {
        let at = (gpa - PML4) as usize;
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Walks the tables as a processor would.
    fn walk(bytes: &[u8], address: u64) -> Option<u64> {
        let step = |table: u64, shift: u32| {
            let entry = word(bytes, (table & !0xfff) + 8 * (address >> shift & 511));
            (entry & 1 != 0).then_some(entry)
        };
        let page = step(step(step(PML4, 39)?, 30)?, 21)?;
        assert_eq!(page & 0x80, 0x80, "a large page");
        Some((page & !0x1f_ffff) | address & 0x1f_ffff)
    }

    #[test]
    fn addresses_map_to_themselves_up_to_the_kernels_end() {
        let small = identity(0x300_0000);
        assert_eq!(walk(&small, 0x3fff_ffff), Some(0x3fff_ffff));
        assert_eq!(walk(&small, 0x4000_0000), None);
        let large = identity(u64::MAX);
        for address in [0, 0x7000, 0x1234_5678, 0xbfff_ffff, 0xffff_ffff] {
            assert_eq!(walk(&large, address), Some(address));
        }
        assert_eq!(walk(&large, 1 << 32), None);
        assert!(PML4 + large.len() as u64 <= CMDLINE);
    }
}
