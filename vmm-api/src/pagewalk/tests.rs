//! Tables of every mode, made by hand and at random.

use std::cell::RefCell;
use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::memory::MemoryLayout;
use crate::regs::Access as SegAccess;

/// Sparse memory of 8-byte words; `len` bytes of it are RAM.
struct Words {
    words: RefCell<BTreeMap<u64, u64>>,
    len: u64,
}

impl Words {
    fn new(words: &[(u64, u64)]) -> Self {
        Self {
            words: RefCell::new(words.iter().copied().collect()),
            len: 1 << 40,
        }
    }
}

impl PhysicalMemory for Words {
    fn read_physical(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let len = bytes.len() as u64;
        if gpa.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(MemoryError::NotRam { gpa, len });
        }
        for (at, byte) in (gpa..).zip(bytes) {
            let words = self.words.borrow();
            let word = words.get(&(at & !7)).copied().unwrap_or(0);
            *byte = word.to_le_bytes()[at as usize & 7];
        }
        Ok(())
    }
}

fn registers(cr0: u64, cr4: u64, efer: u64, cr3: u64) -> Registers {
    Registers {
        cr0: cr0 | 1,
        cr4,
        efer,
        cr3,
        ..Registers::reset()
    }
}

fn long() -> Registers {
    registers(CR0_PG | CR0_WP, CR4_PAE, EFER_LMA | EFER_NXE, 0x1000)
}

const RWU: u64 = PRESENT | WRITABLE | USER;

#[test]
fn without_paging_an_address_is_itself() {
    let memory = Words::new(&[]);
    let flat = registers(0, 0, 0, 0);
    assert_eq!(gla2gpa_nofault(&memory, &flat, 0x1234).unwrap().gpa, 0x1234);
    assert!(matches!(
        gla2gpa_nofault(&memory, &flat, 1 << 32),
        Err(WalkError::NotCanonical(_))
    ));
}

#[test]
fn four_levels_and_all_page_sizes() {
    let memory = Words::new(&[
        // 0xffff_8000_0000_0000: the upper half's first entry.
        (0x1000 + 256 * 8, 0x2000 | RWU),
        (0x2000, 0x3000 | RWU),
        (0x2008, 0x40_0000_0000 | RWU | LARGE),
        (0x3000, 0x4000 | RWU),
        (0x3008, 0x60_0000 | PRESENT | LARGE | NO_EXECUTE),
        (0x4008, 0x7000 | PRESENT | WRITABLE),
    ]);
    let base = 0xffff_8000_0000_0000;
    let go = |offset: u64| gla2gpa_nofault(&memory, &long(), base + offset).unwrap();
    let small = go(0x1abc);
    assert_eq!((small.gpa, small.page_size), (0x7abc, 4096));
    assert!(small.writable && !small.user && small.executable);
    let values: Vec<_> = small.entries.iter().map(|e| (e.level, e.value)).collect();
    assert_eq!(values, [(4, 0x2007), (3, 0x3007), (2, 0x4007), (1, 0x7003)]);
    let large = go(0x20_1234);
    assert_eq!((large.gpa, large.page_size), (0x60_1234, 2 << 20));
    assert!(!large.writable && !large.executable);
    let huge = go(0x4123_4567);
    assert_eq!((huge.gpa, huge.page_size), (0x40_0123_4567, 1 << 30));
    let error = gla2gpa_nofault(&memory, &long(), base + 0x2000).unwrap_err();
    assert_eq!(
        error.to_string(),
        "linear 0xffff800000002000 is not mapped: level 1 entry 0x0 at 0x4010 is not present"
    );
    let error = gla2gpa_nofault(&memory, &long(), 0x8000_0000_0000).unwrap_err();
    assert!(matches!(error, WalkError::NotCanonical(_)) && error.error_code().is_none());
}

#[test]
fn a_fifth_level_is_one_more() {
    let memory = Words::new(&[
        (0x1008, 0x2000 | RWU),
        (0x2000, 0x3000 | RWU),
        (0x3000, 0x4000 | RWU),
        (0x4000, 0x5000 | RWU),
        (0x5000, 0x9000 | RWU),
    ]);
    let five = Registers {
        cr4: CR4_PAE | CR4_LA57,
        ..long()
    };
    let found = gla2gpa_nofault(&memory, &five, 1 << 48 | 5).unwrap();
    assert_eq!((found.gpa, found.entries.len()), (0x9005, 5));
}

#[test]
fn thirty_two_bits_with_large_pages_and_their_extension() {
    let entry = |low: u64, high: u64| high << 32 | low;
    let memory = Words::new(&[
        (
            0x1000,
            entry(0x2000 | RWU, 0x80_0000 | 3 << 13 | LARGE | PRESENT),
        ),
        (0x2000, entry(0, 0x5000 | PRESENT)),
    ]);
    let regs = registers(CR0_PG, CR4_PSE, 0, 0x1000);
    let small = gla2gpa_nofault(&memory, &regs, 0x1004).unwrap();
    assert_eq!((small.gpa, small.entries.len()), (0x5004, 2));
    let large = gla2gpa_nofault(&memory, &regs, 0x40_0010).unwrap();
    assert_eq!((large.gpa, large.page_size), (0x3_0080_0010, 4 << 20));
    // Without PSE the same entry is a table's.
    let plain = registers(CR0_PG, 0, 0, 0x1000);
    let error = gla2gpa_nofault(&memory, &plain, 0x40_0010).unwrap_err();
    assert!(matches!(error, WalkError::NotPresent { .. }));
}

#[test]
fn pae_uses_the_pointers_that_the_processor_loaded() {
    let memory = Words::new(&[
        (0x1020 + 8, 0x2000 | PRESENT),
        (0x2000, 0x3000 | RWU),
        (0x3000, 0x8000 | RWU | NO_EXECUTE),
        (0x6000, 0x20_0000 | RWU | LARGE),
    ]);
    let mut regs = registers(CR0_PG, CR4_PAE, EFER_NXE, 0x1020);
    let found = gla2gpa_nofault(&memory, &regs, 0x4000_0001).unwrap();
    assert_eq!((found.gpa, found.executable), (0x8001, false));
    regs.pdpte = Some([0, 0x6000 | PRESENT, 0, 0]);
    let found = gla2gpa_nofault(&memory, &regs, 0x4000_0001).unwrap();
    assert_eq!((found.gpa, found.page_size), (0x20_0001, 2 << 20));
    regs.pdpte = Some([0, 0x6000 | PRESENT | WRITABLE, 0, 0]);
    let error = gla2gpa_nofault(&memory, &regs, 0x4000_0001).unwrap_err();
    assert!(matches!(error, WalkError::Reserved { .. }));
}

#[test]
fn faults_have_the_codes_of_a_processor() {
    let memory = Words::new(&[
        (0x1000, 0x2000 | RWU),
        (0x2000, 0x3000 | RWU),
        (0x3000, 0x4000 | RWU),
        (0x4000, 0x5000 | PRESENT | USER | NO_EXECUTE),
        (0x4008, 0x6000 | PRESENT | WRITABLE),
        (0x1008, 0x2000 | RWU | LARGE),
    ]);
    let code = |regs: &Registers, gla: u64, write: bool, execute: bool, user: bool| {
        let access = Access {
            write,
            execute,
            user,
        };
        gla2gpa(&memory, regs, gla, access).map_or_else(|e| e.error_code(), |_| None)
    };
    let regs = long();
    assert_eq!(code(&regs, 0, false, false, true), None);
    assert_eq!(code(&regs, 0, true, false, true), Some(7));
    assert_eq!(code(&regs, 0, true, false, false), Some(3), "CR0.WP");
    let free = Registers {
        cr0: regs.cr0 & !CR0_WP,
        ..regs.clone()
    };
    assert_eq!(code(&free, 0, true, false, false), None);
    assert_eq!(code(&regs, 0, false, true, true), Some(0x15));
    assert_eq!(code(&regs, 0x1000, false, false, true), Some(5));
    assert_eq!(code(&regs, 0x2000, true, false, false), Some(2));
    assert_eq!(
        code(&regs, 1 << 39, false, false, false),
        Some(9),
        "PS in level 4"
    );
    let careful = Registers {
        cr4: regs.cr4 | CR4_SMEP | CR4_SMAP,
        ..regs.clone()
    };
    assert_eq!(code(&careful, 0, false, false, false), Some(1), "SMAP");
    let open = Registers {
        rflags: 2 | RFLAGS_AC,
        ..careful
    };
    assert_eq!(code(&open, 0, false, false, false), None);
    let old = Registers {
        efer: EFER_LMA,
        ..regs
    };
    assert_eq!(
        code(&old, 0, false, false, false),
        Some(9),
        "NX without NXE"
    );
}

#[test]
fn tables_outside_of_ram_and_tables_of_themselves_end_the_walk() {
    let mut memory = Words::new(&[(0x1000, 0x1000 | RWU)]);
    // The table is its own entry, at all levels.
    assert_eq!(gla2gpa_nofault(&memory, &long(), 5).unwrap().gpa, 0x1005);
    memory.len = 0x1000;
    let error = gla2gpa_nofault(&memory, &long(), 0).unwrap_err();
    assert!(matches!(error, WalkError::Table { level: 4, .. }));
}

#[test]
fn the_instruction_pointer_counts_from_its_segment_but_in_64_bit_code() {
    let mut regs = Registers::reset();
    assert_eq!(linear_rip(&regs), 0xffff_fff0);
    regs.efer = EFER_LMA;
    regs.cs.access = SegAccess(0xa09b);
    regs.rip = 0xffff_ffff_8100_0000;
    assert_eq!(linear_rip(&regs), regs.rip);
}

fn ram() -> GuestRam {
    let layout = MemoryLayout {
        lowmem: 1 << 20,
        highmem: 0,
    };
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(layout.total()).unwrap();
    GuestRam::map(file, layout).unwrap()
}

#[test]
fn copies_go_over_pages_that_lie_apart_and_write_all_or_nothing() {
    let ram = ram();
    for (gpa, value) in [
        (0x1000, 0x2000 | RWU),
        (0x2000, 0x3000 | RWU),
        (0x3000, 0x4000 | RWU),
        (0x4000, 0x9000 | RWU),
        (0x4008, 0x7000 | RWU),
        // Mapped, but to what is no RAM.
        (0x4018, 0xfee0_0000 | RWU),
    ] {
        ram.write(gpa, &u64::to_le_bytes(value)).unwrap();
    }
    copyout(&ram, &long(), 0xffe, b"abcd").unwrap();
    let mut bytes = [0; 2];
    ram.read(0x7000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"cd");
    let mut back = [0; 4];
    copyin(&ram, &long(), 0xffe, &mut back).unwrap();
    assert_eq!(&back, b"abcd");
    let error = copyout(&ram, &long(), 0x1ffe, b"wxyz").unwrap_err();
    assert_eq!(error.error_code(), Some(0));
    ram.read(0x7ffe, &mut bytes).unwrap();
    assert_eq!(bytes, [0, 0]);
    let error = copyin(&ram, &long(), 0x3000, &mut back).unwrap_err();
    assert!(matches!(error, WalkError::Memory { .. }), "{error}");
    // Of a large page, what is RAM.
    ram.write(0x3008, &(0x83u64).to_le_bytes()).unwrap();
    ram.write(0xf_f000, &[7; 4096]).unwrap();
    let mut back = [0; 0x2000];
    let error = copyin(&ram, &long(), 0x2f_f000, &mut back).unwrap_err();
    assert!(
        matches!(error, WalkError::Memory { gla: 0x30_0000, .. }),
        "{error}"
    );
    assert_eq!(back[..0x1000], [7; 0x1000]);
    assert_eq!(back[0x1000..], [0; 0x1000]);
}

/// Any mode, and control registers that say so.
fn any_registers() -> impl Strategy<Value = Registers> {
    let mode = prop::sample::select(vec![
        (0, 0, 0),
        (CR0_PG, 0, 0),
        (CR0_PG, CR4_PSE, 0),
        (CR0_PG, CR4_PAE, EFER_NXE),
        (CR0_PG | CR0_WP, CR4_PAE, EFER_LMA),
        (CR0_PG, CR4_PAE, EFER_LMA | EFER_NXE),
        (CR0_PG, CR4_PAE | CR4_LA57, EFER_LMA),
    ]);
    (mode, any::<u64>(), any::<Option<[u64; 4]>>()).prop_map(|((cr0, cr4, efer), cr3, pdpte)| {
        Registers {
            pdpte,
            ..registers(cr0, cr4, efer, cr3)
        }
    })
}

/// Memory whose every word is a hash of its address: tables full of lies.
struct Noise(u64);

impl PhysicalMemory for Noise {
    fn read_physical(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        for (at, byte) in (0..).map(|n| gpa.wrapping_add(n)).zip(bytes) {
            let mut word = ((at & !7) ^ self.0).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word ^= word >> 29;
            *byte = word.to_le_bytes()[at as usize & 7];
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What is listed is what is found one by one, in order and joined; liars end as well.
    #[test]
    fn mappings_agree_with_walks(regs in any_registers(), seed: u64) {
        let all = mappings(&Noise(seed), &regs, 500);
        prop_assert!(all.ranges.len() <= 500);
        for range in &all.ranges {
            for gla in [range.gla, range.gla + (range.len - 1)] {
                let found = gla2gpa_nofault(&Noise(seed), &regs, gla).unwrap();
                prop_assert_eq!(found.gpa - range.gpa, gla - range.gla);
                prop_assert_eq!((found.writable, found.executable), (range.writable, range.executable));
            }
        }
    }

    #[test]
    fn any_tables_give_an_answer(regs in any_registers(), gla: u64, seed: u64, short: bool) {
        let gla = if short { gla & 0xffff_ffff } else { gla };
        let access = Access { write: seed & 1 != 0, execute: seed & 2 != 0, user: seed & 4 != 0 };
        match gla2gpa(&Noise(seed), &regs, gla, access) {
            Ok(found) => {
                prop_assert_eq!(found.gpa % found.page_size, gla % found.page_size);
                prop_assert!(found.entries.len() <= 5);
                // What is permitted is found without asking as well, and at the same place.
                prop_assert_eq!(gla2gpa_nofault(&Noise(seed), &regs, gla).unwrap(), found);
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
        let mut bytes = [0; 9000];
        let _ = copyin(&Noise(seed), &regs, gla, &mut bytes);
        let _ = linear_rip(&regs);
    }

    /// Tables that are made for a mapping give that mapping back.
    #[test]
    fn what_was_mapped_is_found(page in 0u64..1 << 36, frame in 1u64..1 << 30, large: bool) {
        let gla = ((page << 12) << 16) as i64 >> 16;
        let gla = gla as u64;
        let index = |level: u64| (gla >> (12 + 9 * (level - 1)) & 511) * 8;
        let frame = if large { (frame << 21) & ADDRESS } else { frame << 12 };
        let mut words = vec![
            (0x1000 + index(4), 0x2000 | RWU),
            (0x2000 + index(3), 0x3000 | RWU),
        ];
        if large {
            words.push((0x3000 + index(2), frame | RWU | LARGE));
        } else {
            words.push((0x3000 + index(2), 0x4000 | RWU));
            words.push((0x4000 + index(1), frame | RWU));
        }
        let found = gla2gpa_nofault(&Words::new(&words), &long(), gla | 0xabc).unwrap();
        let size = if large { 2 << 20 } else { 4096 };
        prop_assert_eq!(found.gpa, frame + ((gla | 0xabc) & (size - 1)));
    }
}
