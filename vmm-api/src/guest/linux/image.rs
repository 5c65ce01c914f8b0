//! Linux's image in memory, and the symbols in it.
//!
//! The kernel is mapped somewhere in the 1 GiB from [`WINDOW`] on (Documentation/arch/x86/x86_64/mm.rst),
//! wherever KASLR put it; what follows one another there is looked through as a whole.

use memchr::memmem;

use super::kallsyms;
use crate::guest::{Symbols, View};
use crate::pagewalk::{self, WalkError};

const WINDOW: std::ops::Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;
const PAGE: u64 = 4096;
/// The most that is read of what is said to be a kernel; Debian's has 60 MiB.
const IMAGE_MAX: u64 = 256 << 20;
/// Bytes that are read at once.
const PIECE: usize = 1 << 20;
/// The most runs that are looked at; a kernel is the first or the second.
const RUNS_MAX: usize = 64;

/// The kernel's own symbols, if a Linux is mapped that has them.
pub fn symbols(view: View<'_>) -> Option<Symbols> {
    let mut left = IMAGE_MAX;
    let mut at = WINDOW.start;
    for _ in 0..RUNS_MAX {
        if at >= WINDOW.end || left == 0 {
            break;
        }
        let (start, end) = run(view, at, left)?;
        left -= end - start;
        if has_sign(view, start, end) {
            let mut image = vec![0; usize::try_from(end - start).ok()?];
            if view.read(start, &mut image).is_ok()
                && let Some(symbols) = kallsyms::find(&image)
            {
                return Some(symbols);
            }
        }
        at = end;
    }
    None
}

/// Whether there may be a table of symbols between the addresses, all of which can be read: most of
/// what is looked at is no Linux, and not worth as much memory.
fn has_sign(view: View<'_>, start: u64, end: u64) -> bool {
    let sign = memmem::Finder::new(kallsyms::SIGN);
    let mut buffer = vec![0; PIECE];
    let mut at = start;
    loop {
        let len = usize::try_from(end - at).map_or(PIECE, |left| left.min(PIECE));
        let piece = buffer.get_mut(..len).unwrap_or_default();
        if view.read(at, piece).is_err() {
            return false;
        }
        if sign.find(piece).is_some() {
            return true;
        }
        if len < PIECE {
            return false;
        }
        // It may lie across.
        at += (PIECE - kallsyms::SIGN.len()) as u64;
    }
}

/// The next addresses from `at` on that are mapped without a hole, at most `most` bytes. An image is
/// in one piece in physical memory, too: tables that lead back to themselves make no large ones.
fn run(view: View<'_>, mut at: u64, most: u64) -> Option<(u64, u64)> {
    let mut start = None;
    while at < WINDOW.end {
        match pagewalk::gla2gpa_nofault(view.memory, view.registers, at) {
            Ok(found) => {
                let offset = found.gpa.wrapping_sub(at);
                let (first, moved) = *start.get_or_insert((at, offset));
                if moved != offset {
                    break;
                }
                at = (at & !(found.page_size - 1)).saturating_add(found.page_size);
                if at - first >= most {
                    return Some((first, first + most));
                }
            }
            Err(_) if start.is_some() => break,
            Err(error) => {
                // All that the entry, or the table that is missing, would map.
                let above = match error {
                    WalkError::NotPresent { entry, .. } | WalkError::Reserved { entry, .. } => {
                        entry.level.saturating_sub(1)
                    }
                    WalkError::Table { level, .. } => level,
                    _ => 0,
                };
                let hole = PAGE << (9 * u32::from(above));
                at = (at & !(hole - 1)).saturating_add(hole);
            }
        }
    }
    Some((start?.0, at.min(WINDOW.end)))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::memory::MemoryError;
    use crate::pagewalk::PhysicalMemory;
    use crate::regs::Registers;

    /// Tables that have the same entry everywhere, one a level, in RAM that is all zeros.
    struct Tables {
        pml4e: u64,
        pdpte: u64,
        /// The first large page.
        pde: u64,
        ram: u64,
        reads: Cell<usize>,
    }

    impl PhysicalMemory for Tables {
        fn read_physical(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
            self.reads.set(self.reads.get() + 1);
            let len = bytes.len() as u64;
            if gpa + len > self.ram {
                return Err(MemoryError::NotRam { gpa, len });
            }
            bytes.fill(0);
            let entry = match gpa >> 12 {
                2 => self.pml4e,
                3 => self.pdpte,
                4 => self.pde + (((gpa & 0xfff) / 8) << 21),
                _ => return Ok(()),
            };
            bytes.copy_from_slice(&entry.to_le_bytes()[..bytes.len()]);
            Ok(())
        }
    }

    fn reads_of(pml4e: u64, pdpte: u64, ram: u64) -> usize {
        let memory = Tables {
            pml4e,
            pdpte,
            pde: 0x87,
            ram,
            reads: Cell::new(0),
        };
        // CR0.PG and PE, CR4.PAE, EFER.LME and LMA.
        let registers = Registers {
            cr0: 0x8000_0001,
            cr4: 0x20,
            efer: 0x500,
            cr3: 0x2000,
            ..Registers::default()
        };
        let view = View {
            memory: &memory,
            registers: &registers,
        };
        assert_eq!(symbols(view), None);
        memory.reads.get()
    }

    #[test]
    fn a_sign_is_found_wherever_it_is() {
        /// RAM with the sign in it.
        struct Ram(u64);
        impl PhysicalMemory for Ram {
            fn read_physical(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
                for (at, byte) in (gpa..).zip(bytes) {
                    let sign = usize::try_from(at.wrapping_sub(self.0)).unwrap();
                    *byte = kallsyms::SIGN.get(sign).copied().unwrap_or(0xff);
                }
                Ok(())
            }
        }
        let (end, len) = (2 * PIECE as u64 + 77, kallsyms::SIGN.len() as u64);
        let around = |middle: u64| middle - 2 * len..middle + 2;
        let places = [0, 4096, end - len].into_iter();
        for at in places.chain(around(PIECE as u64)) {
            let (memory, registers) = (&Ram(at), &Registers::default());
            let view = View { memory, registers };
            assert!(has_sign(view, 0, end), "{at:#x}");
            assert!(!has_sign(view, at + 1, end), "{at:#x}");
            assert!(!has_sign(view, 0, at + len - 1), "{at:#x}");
        }
    }

    #[test]
    fn a_search_in_vain_takes_few_reads() {
        // What FreeBSD's loader leaves: the first gibibyte, over and over.
        assert!(reads_of(0x3007, 0x4007, 32 << 20) < 5000);
        assert!(reads_of(0x3007, 0x4007, 1 << 30) < 2000);
        // A page of a gibibyte at an address that none can have, a table that is not RAM.
        assert!(reads_of(0x3007, 0x7fc0_0083, 1 << 30) < 10);
        assert!(reads_of(0x3007, 1 << 40 | 7, 1 << 30) < 10);
        assert!(reads_of(1 << 40 | 7, 0, 1 << 30) < 10);
    }
}
