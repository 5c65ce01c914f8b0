//! From a linear address to a guest-physical one, by the guest's own page tables: libvmmapi's
//! vm_gla2gpa, vm_copyin and vm_copyout.
//!
//! A walk is a function of memory and registers, so that it works on a running machine, on a stored
//! one and on a core file alike. It reads the tables as a processor would (Intel SDM volume 3,
//! chapter 5), but sets no accessed or dirty bit and knows no protection keys. However broken the
//! tables are, it ends after five reads.

mod mappings;

use std::fmt;
use std::ops::Range;

use crate::memory::{GuestRam, MemFile, MemoryError};
use crate::regs::Registers;

pub use mappings::{Mapping, Mappings, mappings};

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits of an entry that are an address, at the largest physical address width there is.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Bytes of the smallest page.
const SMALL: u64 = 4096;
/// Bits of a PAE page directory pointer that must be 0.
const PDPTE_RESERVED: u64 = 0x1e6 | NO_EXECUTE;

/// Guest-physical memory that a walk reads.
pub trait PhysicalMemory {
    /// Reads bytes.
    ///
    /// # Errors
    ///
    /// They are not all RAM, or the host cannot read them.
    fn read_physical(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError>;

    /// The next range of RAM, at `gpa` or behind it, that was ever written, for who has to look
    /// everywhere; none behind the last. Memory that does not tell has none.
    fn next_written(&self, _gpa: u64) -> Option<Range<u64>> {
        None
    }
}

impl PhysicalMemory for MemFile {
    fn read_physical(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        self.read(gpa, bytes)
    }

    fn next_written(&self, gpa: u64) -> Option<Range<u64>> {
        self.next_written(gpa)
    }
}

impl PhysicalMemory for GuestRam {
    fn read_physical(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        self.read(gpa, bytes)
    }

    fn next_written(&self, gpa: u64) -> Option<Range<u64>> {
        self.next_written(gpa)
    }
}

/// How a vCPU translates addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagingMode {
    /// Not at all.
    Flat,
    /// 32-bit paging: two levels of 4-byte entries.
    Bits32,
    /// PAE paging: three levels.
    Pae,
    /// 4-level paging.
    Long4,
    /// 5-level paging.
    Long5,
}

impl PagingMode {
    /// What the control registers say (libvmmapi's enum vm_paging_mode).
    pub fn of(registers: &Registers) -> Self {
        let Registers { cr0, cr4, efer, .. } = *registers;
        if cr0 & CR0_PG == 0 {
            Self::Flat
        } else if efer & EFER_LMA != 0 {
            if cr4 & CR4_LA57 == 0 {
                Self::Long4
            } else {
                Self::Long5
            }
        } else if cr4 & CR4_PAE != 0 {
            Self::Pae
        } else {
            Self::Bits32
        }
    }

    /// Levels of tables.
    fn levels(self) -> u8 {
        match self {
            Self::Flat => 0,
            Self::Bits32 => 2,
            Self::Pae => 3,
            Self::Long4 => 4,
            Self::Long5 => 5,
        }
    }

    /// Bits of a linear address that number an entry in its table.
    fn index_bits(self) -> u32 {
        if self == Self::Bits32 { 10 } else { 9 }
    }

    /// Bits of a linear address below those that number an entry of the table at `level`.
    fn shift(self, level: u8) -> u32 {
        12 + self.index_bits() * u32::from(level.saturating_sub(1))
    }

    /// The page or table that an entry leads to; a large page's lowest bits are no address.
    fn frame(self, value: u64, large: bool) -> u64 {
        if large && self == Self::Bits32 {
            // PSE-36: bits 13-20 are bits 32-39 of the address.
            value & 0xffc0_0000 | (value >> 13 & 0xff) << 32
        } else {
            value & ADDRESS
        }
    }

    /// Whether these are linear addresses of 64 bits.
    fn is_long(self) -> bool {
        matches!(self, Self::Long4 | Self::Long5)
    }

    fn is_canonical(self, gla: u64) -> bool {
        let unused = match self {
            Self::Long4 => 16,
            Self::Long5 => 7,
            _ => return gla >> 32 == 0,
        };
        // The highest bit in use is repeated in all above it.
        ((gla << unused) as i64 >> unused) as u64 == gla
    }
}

/// What is to be done at an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Written, not read.
    pub write: bool,
    /// Executed.
    pub execute: bool,
    /// By code of privilege level 3.
    pub user: bool,
}

/// One entry that a walk went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Level of its table: 1 has the entries of 4 KiB pages.
    pub level: u8,
    /// Where the entry is; none for a PAE pointer that the processor holds itself.
    pub gpa: Option<u64>,
    /// The entry.
    pub value: u64,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "level {} entry {:#x}", self.level, self.value)?;
        match self.gpa {
            Some(gpa) => write!(f, " at {gpa:#x}"),
            None => Ok(()),
        }
    }
}

/// Where a linear address leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address.
    pub gpa: u64,
    /// Bytes of the page: 4 KiB, 2 or 4 MiB, 1 GiB; 4 KiB without paging.
    pub page_size: u64,
    /// It may be written (by user code, or by all if CR0.WP is set).
    pub writable: bool,
    /// User code may use it.
    pub user: bool,
    /// Code may be executed there.
    pub executable: bool,
    /// The entries on the way, the highest level first.
    pub entries: Vec<Entry>,
}

/// Why a linear address leads nowhere.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// The address has bits that this mode cannot have.
    #[error("linear {0:#x} is not canonical")]
    NotCanonical(u64),
    /// An entry is not present.
    #[error("linear {gla:#x} is not mapped: {entry} is not present")]
    NotPresent {
        /// The linear address.
        gla: u64,
        /// The entry.
        entry: Entry,
        /// The access, for the error code.
        access: Access,
    },
    /// An entry has bits that must be 0.
    #[error("linear {gla:#x} is not mapped: {entry} has reserved bits")]
    Reserved {
        /// The linear address.
        gla: u64,
        /// The entry.
        entry: Entry,
        /// The access, for the error code.
        access: Access,
    },
    /// It is mapped, but not for this.
    #[error("linear {gla:#x} is mapped, but not for this access")]
    Protection {
        /// The linear address.
        gla: u64,
        /// The access, for the error code.
        access: Access,
    },
    /// A table is not in RAM.
    #[error("linear {gla:#x}: its table of level {level} is not in memory")]
    Table {
        /// The linear address.
        gla: u64,
        /// The table's level.
        level: u8,
        /// Why it cannot be read.
        source: MemoryError,
    },
    /// The address is mapped, but to what is no RAM.
    #[error("linear {gla:#x}")]
    Memory {
        /// The linear address.
        gla: u64,
        /// Why it cannot be read or written.
        source: MemoryError,
    },
}

impl WalkError {
    /// The error code of the page fault that a processor would raise (Intel SDM volume 3, 5.7);
    /// none where it would raise another exception, or none.
    pub fn error_code(&self) -> Option<u32> {
        let (access, bits) = match self {
            Self::NotPresent { access, .. } => (access, 0),
            Self::Protection { access, .. } => (access, 1),
            Self::Reserved { access, .. } => (access, 1 | 1 << 3),
            _ => return None,
        };
        let Access {
            write,
            execute,
            user,
        } = *access;
        Some(bits | u32::from(write) << 1 | u32::from(user) << 2 | u32::from(execute) << 4)
    }
}

/// libvmmapi's vm_gla2gpa: translates for an access, and says which fault it would raise.
///
/// # Errors
///
/// The address leads nowhere, or may not be used so.
pub fn gla2gpa(
    memory: &dyn PhysicalMemory,
    registers: &Registers,
    gla: u64,
    access: Access,
) -> Result<Translation, WalkError> {
    let found = walk(memory, registers, gla, access)?;
    if permits(&found, registers, access) {
        Ok(found)
    } else {
        Err(WalkError::Protection { gla, access })
    }
}

/// libvmmapi's vm_gla2gpa_nofault: translates, whoever may use it.
///
/// # Errors
///
/// The address leads nowhere.
pub fn gla2gpa_nofault(
    memory: &dyn PhysicalMemory,
    registers: &Registers,
    gla: u64,
) -> Result<Translation, WalkError> {
    walk(memory, registers, gla, Access::default())
}

fn permits(found: &Translation, registers: &Registers, access: Access) -> bool {
    let Registers {
        cr0, cr4, rflags, ..
    } = *registers;
    if cr0 & CR0_PG == 0 {
        return true;
    }
    let privilege = if access.user {
        found.user
    } else if !found.user {
        true
    } else if access.execute {
        cr4 & CR4_SMEP == 0
    } else {
        cr4 & CR4_SMAP == 0 || rflags & RFLAGS_AC != 0
    };
    let write = !access.write || found.writable || (!access.user && cr0 & CR0_WP == 0);
    privilege && write && (!access.execute || found.executable)
}

fn walk(
    memory: &dyn PhysicalMemory,
    registers: &Registers,
    gla: u64,
    access: Access,
) -> Result<Translation, WalkError> {
    let mode = PagingMode::of(registers);
    if !mode.is_canonical(gla) {
        return Err(WalkError::NotCanonical(gla));
    }
    let mut found = Translation {
        gpa: gla,
        page_size: SMALL,
        writable: true,
        user: true,
        executable: true,
        entries: Vec::with_capacity(mode.levels().into()),
    };
    let mut table = match mode {
        PagingMode::Flat => return Ok(found),
        PagingMode::Bits32 => registers.cr3 & 0xffff_f000,
        PagingMode::Pae => registers.cr3 & 0xffff_ffe0,
        PagingMode::Long4 | PagingMode::Long5 => registers.cr3 & ADDRESS,
    };
    for level in (1..=mode.levels()).rev() {
        let shift = mode.shift(level);
        let pointer = mode == PagingMode::Pae && level == 3;
        let index = gla >> shift & ((1 << mode.index_bits()) - 1);
        let entry = match registers.pdpte.filter(|_| pointer) {
            // The processor reads them once, when CR3 is loaded; there are four.
            Some(loaded) => Entry {
                level,
                gpa: None,
                value: loaded[index as usize & 3],
            },
            None => read_entry(memory, mode, level, table, index)
                .map_err(|source| WalkError::Table { gla, level, source })?,
        };
        found.entries.push(entry);
        let value = entry.value;
        if value & PRESENT == 0 {
            return Err(WalkError::NotPresent { gla, entry, access });
        }
        let large = is_large(mode, registers, level, value);
        if has_reserved(mode, registers, level, value, large) {
            return Err(WalkError::Reserved { gla, entry, access });
        }
        if !pointer {
            found.writable &= value & WRITABLE != 0;
            found.user &= value & USER != 0;
            found.executable &= mode == PagingMode::Bits32 || value & NO_EXECUTE == 0;
        }
        let frame = mode.frame(value, large);
        if large || level == 1 {
            let offset = (1 << shift) - 1;
            found.page_size = 1 << shift;
            found.gpa = frame & !offset | gla & offset;
            return Ok(found);
        }
        table = frame;
    }
    Ok(found)
}

fn read_entry(
    memory: &dyn PhysicalMemory,
    mode: PagingMode,
    level: u8,
    table: u64,
    index: u64,
) -> Result<Entry, MemoryError> {
    let (width, mut bytes) = (if mode == PagingMode::Bits32 { 4 } else { 8 }, [0; 8]);
    let gpa = table + index * width as u64;
    memory.read_physical(gpa, &mut bytes[..width])?;
    Ok(Entry {
        level,
        gpa: Some(gpa),
        value: u64::from_le_bytes(bytes),
    })
}

/// Whether an entry maps a page itself, above the lowest level.
fn is_large(mode: PagingMode, registers: &Registers, level: u8, value: u64) -> bool {
    let possible = match (mode, level) {
        (PagingMode::Bits32, 2) => registers.cr4 & CR4_PSE != 0,
        (PagingMode::Pae, 2) => true,
        (mode, 2 | 3) => mode.is_long(),
        _ => false,
    };
    possible && value & LARGE != 0
}

fn has_reserved(
    mode: PagingMode,
    registers: &Registers,
    level: u8,
    value: u64,
    large: bool,
) -> bool {
    let mut reserved = 0;
    if mode == PagingMode::Bits32 {
        if large {
            reserved |= 1 << 21;
        }
        return value & reserved != 0;
    }
    if mode == PagingMode::Pae && level == 3 {
        return value & PDPTE_RESERVED != 0;
    }
    if registers.efer & EFER_NXE == 0 {
        reserved |= NO_EXECUTE;
    }
    if level >= 4 {
        reserved |= LARGE;
    }
    if large {
        // Bit 12 is PAT, the page's own offset begins above it.
        reserved |= ((1 << mode.shift(level)) - 1) & !0x1fff;
    }
    value & reserved != 0
}

/// The linear address of the instruction that a vCPU executes next.
pub fn linear_rip(registers: &Registers) -> u64 {
    const CODE_64: u32 = 13;
    if registers.efer & EFER_LMA != 0 && registers.cs.access.bit(CODE_64) {
        registers.rip
    } else {
        registers.cs.base.wrapping_add(registers.rip) & 0xffff_ffff
    }
}

/// libvmmapi's vm_copyin: reads from a linear address on, over as many pages as it takes, whoever
/// may read there.
///
/// # Errors
///
/// A page leads nowhere or to what is no RAM; what is before it was read.
pub fn copyin(
    memory: &dyn PhysicalMemory,
    registers: &Registers,
    gla: u64,
    bytes: &mut [u8],
) -> Result<(), WalkError> {
    let (mut done, mut small) = (0, false);
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let gla = gla.wrapping_add(done as u64);
        let found = gla2gpa_nofault(memory, registers, gla)?;
        // A large page at once: a walk for each of its small ones would be most of the work.
        let size = if small { SMALL } else { found.page_size };
        let room = |size: u64| (size - gla % size).min(rest.len() as u64);
        let len = room(size);
        let is_large = len > room(SMALL);
        let piece = rest.get_mut(..len as usize).unwrap_or(&mut []);
        match memory.read_physical(found.gpa, piece) {
            Ok(()) => done += piece.len(),
            // The first of its small ones may be RAM.
            Err(_) if is_large => small = true,
            Err(source) => return Err(WalkError::Memory { gla, source }),
        }
    }
    Ok(())
}

/// libvmmapi's vm_copyout: writes from a linear address on, whoever may write there. All pages are
/// found first (vm_copy_setup): nothing is written if one is missing.
///
/// # Errors
///
/// A page leads nowhere or to what is no RAM, or the host has no room for it.
pub fn copyout(
    ram: &GuestRam,
    registers: &Registers,
    gla: u64,
    bytes: &[u8],
) -> Result<(), WalkError> {
    let mut places = Vec::new();
    for (gla, range) in pages(gla, bytes.len()) {
        let gpa = gla2gpa_nofault(ram, registers, gla)?.gpa;
        let len = range.len() as u64;
        if ram.layout().offset_of(gpa, len).is_none() {
            let source = MemoryError::NotRam { gpa, len };
            return Err(WalkError::Memory { gla, source });
        }
        places.push((gla, gpa, range));
    }
    for (gla, gpa, range) in places {
        let piece = bytes.get(range).unwrap_or(&[]);
        ram.write(gpa, piece)
            .map_err(|source| WalkError::Memory { gla, source })?;
    }
    Ok(())
}

/// The pieces of a range that lie in one 4 KiB page each: linear address, and place in the buffer.
fn pages(gla: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = gla.wrapping_add(done as u64);
        let room = (4096 - at % 4096) as usize;
        let end = len.min(done + room);
        let range = done..end;
        done = end;
        (!range.is_empty()).then_some((at, range))
    })
}

#[cfg(test)]
mod tests;
