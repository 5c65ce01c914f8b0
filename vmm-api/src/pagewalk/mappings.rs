//! All that page tables map, in the order of linear addresses.

use super::{
    ADDRESS, NO_EXECUTE, PRESENT, PagingMode, PhysicalMemory, WRITABLE, has_reserved, is_large,
};
use crate::regs::Registers;

/// Tables that are read at most: those of a guest map some 2 MiB each at least, those of a liar
/// may be all of its memory, over and over.
const TABLES_MAX: usize = 1 << 15;

/// A range of linear addresses that leads to a range of guest-physical ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its first linear address.
    pub gla: u64,
    /// The guest-physical address that this leads to.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// It may be written.
    pub writable: bool,
    /// It may be executed.
    pub executable: bool,
}

/// What page tables map, as far as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mappings {
    /// Neighbours that lead to neighbours, with the same rights, are one.
    pub ranges: Vec<Mapping>,
    /// There is more than was asked for, or than any honest guest has.
    pub truncated: bool,
}

/// Everything that a vCPU's page tables map, in at most `limit` ranges; nothing without paging.
/// Tables that are not in memory map nothing.
pub fn mappings(memory: &dyn PhysicalMemory, registers: &Registers, limit: usize) -> Mappings {
    let mode = PagingMode::of(registers);
    let root = match mode {
        PagingMode::Flat => return Mappings::default(),
        PagingMode::Bits32 => registers.cr3 & 0xffff_f000,
        PagingMode::Pae => registers.cr3 & 0xffff_ffe0,
        PagingMode::Long4 | PagingMode::Long5 => registers.cr3 & ADDRESS,
    };
    let mut scan = Scan {
        memory,
        registers,
        mode,
        limit,
        tables: 0,
        found: Mappings::default(),
    };
    scan.table(mode.levels(), root, 0, true, true);
    scan.found
}

struct Scan<'a> {
    memory: &'a dyn PhysicalMemory,
    registers: &'a Registers,
    mode: PagingMode,
    limit: usize,
    tables: usize,
    found: Mappings,
}

impl Scan<'_> {
    /// One table, which maps from `gla` on; recursion ends with the levels.
    fn table(&mut self, level: u8, table: u64, gla: u64, writable: bool, executable: bool) {
        if self.tables >= TABLES_MAX {
            self.found.truncated = true;
            return;
        }
        self.tables += 1;
        let pointers = self.mode == PagingMode::Pae && level == 3;
        let Some(entries) = self.entries(table, pointers) else {
            return;
        };
        let shift = self.mode.shift(level);
        for (index, value) in (0u64..).zip(entries) {
            if self.found.truncated {
                return;
            }
            let large = is_large(self.mode, self.registers, level, value);
            if value & PRESENT == 0 || has_reserved(self.mode, self.registers, level, value, large)
            {
                continue;
            }
            let gla = self.canonical(gla | index << shift);
            let (writable, executable) = if pointers {
                (true, true)
            } else {
                let narrow = self.mode == PagingMode::Bits32;
                (
                    writable && value & WRITABLE != 0,
                    executable && (narrow || value & NO_EXECUTE == 0),
                )
            };
            let frame = self.mode.frame(value, large);
            if large || level == 1 {
                self.push(Mapping {
                    gla,
                    gpa: frame & !((1 << shift) - 1),
                    len: 1 << shift,
                    writable,
                    executable,
                });
            } else {
                self.table(level - 1, frame, gla, writable, executable);
            }
        }
    }

    fn entries(&self, table: u64, pointers: bool) -> Option<Vec<u64>> {
        if let Some(loaded) = self.registers.pdpte.filter(|_| pointers) {
            return Some(loaded.to_vec());
        }
        let mut bytes = vec![0; if pointers { 32 } else { 4096 }];
        self.memory.read_physical(table, &mut bytes).ok()?;
        let width = if self.mode == PagingMode::Bits32 {
            4
        } else {
            8
        };
        let word = |bytes: &[u8]| {
            bytes
                .iter()
                .rev()
                .fold(0, |word, &b| word << 8 | u64::from(b))
        };
        Some(bytes.chunks_exact(width).map(word).collect())
    }

    /// The highest bit in use is repeated in all above it.
    fn canonical(&self, gla: u64) -> u64 {
        match self.mode {
            PagingMode::Long4 => ((gla << 16) as i64 >> 16) as u64,
            PagingMode::Long5 => ((gla << 7) as i64 >> 7) as u64,
            _ => gla,
        }
    }

    fn push(&mut self, next: Mapping) {
        if let Some(last) = self.found.ranges.last_mut() {
            let joins = last.gla.wrapping_add(last.len) == next.gla
                && last.gpa.wrapping_add(last.len) == next.gpa
                && (last.writable, last.executable) == (next.writable, next.executable);
            if joins {
                last.len += next.len;
                return;
            }
        }
        if self.found.ranges.len() >= self.limit {
            self.found.truncated = true;
        } else {
            self.found.ranges.push(next);
        }
    }
}
