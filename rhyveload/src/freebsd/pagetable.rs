//! The low pages that userboot fills just before it enters a kernel: stack, page tables, GDT.

use vmm_api::boot::LONG_MODE_GDT;

/// The stack page; RSP points to its first word.
pub const STACK: u64 = 0x1000;

/// The top-level page table.
pub const PML4: u64 = 0x2000;

/// The global descriptor table.
pub const GDT: u64 = 0x5000;

/// End of these pages. What lies below [`STACK`] must be writable as well: the kernel's first push
/// goes there.
pub const END: u64 = 0x6000;

const PDPT: u64 = 0x3000;
const PD: u64 = 0x4000;
const ENTRIES: u64 = 512;

// Intel SDM volume 3, 4.5.4: present, writable, user; PS makes a 2 MiB page.
const TABLE: u64 = 0x7;
const LARGE: u64 = 0x87;

/// The bytes from [`STACK`] to the end of the GDT. Every gibibyte of the address space maps the
/// first one, so a kernel runs at its virtual and at its physical address.
pub fn encode(modulep: u64, kernend: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(0x4018);
    // locore takes 32-bit words: an unused return address, modulep, kernend. Both lie below 1 GiB.
    for word in [0, modulep, kernend] {
        bytes.extend_from_slice(&(word as u32).to_le_bytes());
    }
    bytes.resize((PML4 - STACK) as usize, 0);
    let tables = (0..ENTRIES)
        .map(|_| PDPT | TABLE)
        .chain((0..ENTRIES).map(|_| PD | TABLE))
        .chain((0..ENTRIES).map(|i| i << 21 | LARGE));
    for word in tables.chain(LONG_MODE_GDT) {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_where_the_hand_off_has_them() {
        let bytes = encode(0x12_3000, 0x12_5000);
        let word = |gpa: u64| {
            let at = (gpa - STACK) as usize;
            u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        assert_eq!(word(STACK), 0x12_3000 << 32);
        assert_eq!(word(STACK + 8), 0x12_5000);
        assert_eq!(word(PML4), 0x3007);
        assert_eq!(word(PML4 + 511 * 8), 0x3007);
        assert_eq!(word(0x3000 + 511 * 8), 0x4007);
        assert_eq!(word(0x4000 + 511 * 8), 511 << 21 | 0x87);
        assert_eq!(word(GDT + 8), 0x0020_9800_0000_0000);
        assert_eq!(STACK + bytes.len() as u64, GDT + 24);
    }
}
