//! Preloaded modules: linked where they lie and started (FreeBSD, sys/kern/link_elf_obj.c).

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::access::{peek16, poke32, poke64};
use crate::console::{Stored, say};
use crate::entry::KERNBASE;
use crate::kernel;
use crate::memory::{self, peek8, peek32, peek64};
use crate::metadata::{self as md, File};
use crate::symbols::{self, Symbol, symbol_at};

const SHT_PROGBITS: u32 = 1;
const SHT_SYMTAB: u32 = 2;
const SHT_RELA: u32 = 4;
const SHT_NOBITS: u32 = 8;
const SHN_ABS: u16 = 0xfff1;

/// Relocations (System V ABI, AMD64 supplement, table 4.9).
const R_64: u32 = 1;
const R_PC32: u32 = 2;
const R_PLT32: u32 = 4;
const R_32: u32 = 10;
const R_32S: u32 = 11;

/// More sections than a module of ours has.
const MAX_SECTIONS: u64 = 64;
const MAX_MODULES: usize = 8;

/// The symbol tables of the modules that are linked: table, end, strings, end, and where the section
/// headers are and what is to be added to their addresses.
static LINKED: [[AtomicU64; 6]; MAX_MODULES] =
    [const { [const { AtomicU64::new(0) }; 6] }; MAX_MODULES];
static LINKED_COUNT: AtomicUsize = AtomicUsize::new(0);

/// A module's sections.
struct Sections {
    headers: u64,
    count: u64,
    /// What makes an address of sh_addr.
    rebase: u64,
    start: u64,
    end: u64,
}

impl Sections {
    fn header(&self, index: u64) -> u64 {
        self.headers + index * 64
    }

    fn kind(&self, index: u64) -> u32 {
        peek32(self.header(index) + 4).unwrap_or(0)
    }

    /// Its physical address, if it was loaded.
    fn address(&self, index: u64) -> Option<u64> {
        let address = peek64(self.header(index) + 16).filter(|&address| address != 0)?;
        (index < self.count).then_some(address.wrapping_add(self.rebase))
    }

    fn size(&self, index: u64) -> u64 {
        peek64(self.header(index) + 32).unwrap_or(0)
    }

    fn link(&self, index: u64) -> u64 {
        peek32(self.header(index) + 40).unwrap_or(0).into()
    }

    fn info(&self, index: u64) -> u64 {
        peek32(self.header(index) + 44).unwrap_or(0).into()
    }

    fn read(file: &File) -> Result<Self, &'static str> {
        let headers = file.info(md::SHDR).ok_or("no section headers")?;
        let elf = file.info(md::ELFHDR).ok_or("no ELF header")?;
        let [start, end] = file.place().ok_or("no address or size")?;
        let count = u64::from(peek16(elf.payload + 60).unwrap_or(0));
        if peek16(elf.payload + 16) != Some(1) {
            return Err("it is not relocatable");
        }
        if headers.length != count * 64 || count > MAX_SECTIONS {
            return Err("not as many section headers as the ELF header says");
        }
        if start % 4096 != 0 {
            return Err("it does not begin with a page");
        }
        let mut lowest = u64::MAX;
        for index in 0..count {
            let address = peek64(headers.payload + index * 64 + 16).unwrap_or(0);
            if address != 0 {
                lowest = lowest.min(address);
            }
        }
        let sections = Self {
            headers: headers.payload,
            count,
            rebase: start.wrapping_sub(lowest),
            start,
            end,
        };
        sections.check().map(|()| sections)
    }

    /// Every section that was loaded lies in the module, aligned, by itself, and clear if it has no
    /// bytes in the file; what a module needs was loaded.
    fn check(&self) -> Result<(), &'static str> {
        for index in 0..self.count {
            let (kind, size) = (self.kind(index), self.size(index));
            let needed = matches!(kind, SHT_PROGBITS | SHT_NOBITS | SHT_SYMTAB | SHT_RELA);
            let Some(address) = self.address(index) else {
                if needed && size != 0 && self.allocated(index) {
                    return Err("a section was left out");
                }
                continue;
            };
            let end = address.saturating_add(size);
            if address < self.start || end > self.end {
                return Err("a section lies outside of it");
            }
            let align = peek64(self.header(index) + 48).unwrap_or(1).max(1);
            if address & (align - 1) != 0 {
                return Err("a section is not aligned");
            }
            let apart = (index + 1..self.count).all(|other| match self.address(other) {
                Some(start) => start >= end || start + self.size(other) <= address,
                None => true,
            });
            if !apart {
                return Err("two sections overlap");
            }
            if kind == SHT_NOBITS && !(address..end).all(|at| peek8(at) == Some(0)) {
                return Err("memory of no file that is not clear");
            }
        }
        Ok(())
    }

    fn allocated(&self, index: u64) -> bool {
        peek64(self.header(index) + 8).unwrap_or(0) & 2 != 0
    }

    /// The symbol table's section.
    fn symbols(&self) -> Option<u64> {
        (0..self.count).find(|&index| self.kind(index) == SHT_SYMTAB)
    }

    /// The kernel's address of a symbol.
    fn value(&self, symbol: &Symbol) -> Result<u64, &'static str> {
        match symbol.section {
            0 => resolve(symbol).ok_or("a symbol that nobody has"),
            SHN_ABS => Ok(symbol.value),
            section => {
                let base = self.address(section.into());
                let base = base.ok_or("a symbol in a section that was left out")?;
                Ok(KERNBASE + base + symbol.value)
            }
        }
    }
}

/// Looks a name up in the kernel, and in the modules that are linked.
fn resolve(symbol: &Symbol) -> Option<u64> {
    let length = memory::string_length(symbol.name);
    // SAFETY: the name lies in a string table, which is mapped, and is not written to.
    let name = unsafe { core::slice::from_raw_parts(symbol.name as *const u8, length as usize) };
    kernel::lookup(name).or_else(|| {
        let linked = LINKED.iter().take(LINKED_COUNT.load(Ordering::Relaxed));
        linked.into_iter().find_map(|module| {
            let [table, end, strings, strings_end, headers, rebase] =
                module.each_ref().map(|word| word.load(Ordering::Relaxed));
            let found = symbols::find(table..end, strings..strings_end, name)?;
            let section = headers + u64::from(found.section) * 64;
            Some(KERNBASE + peek64(section + 16)?.wrapping_add(rebase) + found.value)
        })
    })
}

/// Links a module and starts it; returns how many relocations that took.
pub fn link(file: &File) -> Result<u64, &'static str> {
    let sections = Sections::read(file)?;
    let symbols = sections.symbols().ok_or("no symbol table")?;
    let table = sections
        .address(symbols)
        .ok_or("its symbols were left out")?;
    let strings = sections.link(symbols);
    let strings = [
        sections
            .address(strings)
            .ok_or("its strings were left out")?,
        sections.size(strings),
    ];
    let mut done = 0;
    for index in (0..sections.count).filter(|&index| sections.kind(index) == SHT_RELA) {
        let target = sections.address(sections.info(index));
        let (Some(target), Some(entries)) = (target, sections.address(index)) else {
            continue;
        };
        for at in (entries..entries + sections.size(index)).step_by(24) {
            let [offset, info, addend] = [at, at + 8, at + 16].map(|at| peek64(at).unwrap_or(0));
            let symbol = symbol_at(table + (info >> 32) * 24, strings[0]);
            let value = sections.value(&symbol.ok_or("a relocation without a symbol")?)?;
            apply(info as u32, target + offset, value.wrapping_add(addend))?;
            done += 1;
        }
    }
    let words = [
        table,
        table + sections.size(symbols),
        strings[0],
        strings[0] + strings[1],
        sections.headers,
        sections.rebase,
    ];
    let slot = LINKED_COUNT.fetch_add(1, Ordering::Relaxed);
    let slot = LINKED
        .get(slot)
        .ok_or("more modules than there is room for")?;
    for (to, word) in slot.iter().zip(words) {
        to.store(word, Ordering::Relaxed);
    }
    start(&sections, strings_of_names(file, &sections)).map(|()| done)
}

/// Changes the word at `at`, a physical address, for a symbol and addend of this sum.
fn apply(kind: u32, at: u64, sum: u64) -> Result<(), &'static str> {
    let relative = sum.wrapping_sub(KERNBASE + at);
    let written = match kind {
        R_64 => poke64(at, sum),
        R_PC32 | R_PLT32 if relative as i32 as u64 == relative => poke32(at, relative as u32),
        R_32S if sum as i32 as u64 == sum => poke32(at, sum as u32),
        R_32 if sum >> 32 == 0 => poke32(at, sum as u32),
        R_PC32 | R_PLT32 | R_32 | R_32S => return Err("a relocation out of reach"),
        _ => return Err("a relocation of unknown type"),
    };
    written
        .then_some(())
        .ok_or("a relocation outside of memory")
}

/// The section names.
fn strings_of_names(file: &File, sections: &Sections) -> Option<u64> {
    let elf = file.info(md::ELFHDR)?;
    sections.address(peek16(elf.payload + 62)?.into())
}

/// Reads the module's own metadata, and calls its event handler.
fn start(sections: &Sections, names: Option<u64>) -> Result<(), &'static str> {
    let names = names.ok_or("the section names were left out")?;
    let named = |index: &u64| {
        let name = names + u64::from(peek32(sections.header(*index)).unwrap_or(0));
        let wanted = b"set_modmetadata_set\0";
        (name..)
            .zip(wanted)
            .all(|(at, &byte)| peek8(at) == Some(byte))
    };
    let set = (0..sections.count)
        .filter(|&index| sections.kind(index) == SHT_PROGBITS)
        .find(named)
        .ok_or("no set_modmetadata_set")?;
    let start = sections.address(set).ok_or("its metadata was left out")?;
    let mut started = false;
    for at in (start..start + sections.size(set)).step_by(8) {
        const OUTSIDE: &str = "metadata outside of memory";
        let entry = peek64(at).ok_or(OUTSIDE)?;
        let kind = (peek64(entry).ok_or(OUTSIDE)? >> 32) as u32;
        let data = peek64(entry + 8).ok_or(OUTSIDE)?;
        let name = peek64(entry + 16).ok_or(OUTSIDE)?;
        let name = Stored(name, memory::string_length(name));
        match kind {
            1 => {
                let [min, _, max] = [0, 4, 8].map(|offset| peek32(data + offset).unwrap_or(0));
                say!("module: depends on ", name, " ", min, " to ", max);
            }
            2 => {
                let handler = peek64(data + 8).ok_or(OUTSIDE)?;
                // SAFETY: a function of the module, which is linked, of this type.
                let result = unsafe {
                    let handler: extern "C" fn(u64, i32, u64) -> i32 =
                        core::mem::transmute(handler as *const ());
                    handler(0, 0, peek64(data + 16).unwrap_or(0))
                };
                if result != 0 {
                    return Err("its event handler finds something wrong");
                }
                started = true;
                say!("module: ", name, " started");
            }
            3 => say!("module: ", name, " version ", peek32(data).unwrap_or(0)),
            _ => return Err("metadata of unknown type"),
        }
    }
    started.then_some(()).ok_or("it has no event handler")
}
