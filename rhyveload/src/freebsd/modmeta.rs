//! What a kernel or module says of itself: the modules it provides and those it needs.
//!
//! The linker set `set_modmetadata_set` is an array of pointers to `struct mod_metadata`
//! (sys/sys/module.h). In a relocatable file the pointers are zeros until relocations are applied;
//! here each is looked up where it is read, and nothing is changed.

use std::collections::HashMap;

use object::LittleEndian;
use object::elf::{R_X86_64_64, R_X86_64_RELATIVE, Rela64, SHT_NOBITS, SHT_RELA};
use object::pod::slice_from_all_bytes;

use super::search::Versions;
use super::sections::{Sections, addr, kind, link, offset, size};
use crate::source::Source;

/// The linker set's section.
const SET: &str = "set_modmetadata_set";

/// More entries than any kernel's are not looked at.
const ENTRIES_MAX: u64 = 16384;

/// More relocations than any module's are not looked at.
const RELOCATIONS_MAX: usize = 1 << 20;

/// Longer names than the kernel knows (MAXMODNAME, sys/sys/module.h) are cut.
const NAME_MAX: u64 = 32;

// MDT_* (sys/sys/module.h).
const MDT_DEPEND: u32 = 1;
const MDT_VERSION: u32 = 3;

/// A module that a file needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dependency {
    /// Its name.
    pub name: String,
    /// The versions that will do.
    pub versions: Versions,
}

/// What a file provides and needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Modules {
    /// Modules with their versions.
    pub provides: Vec<(String, i32)>,
    /// Modules that must be loaded as well.
    pub needs: Vec<Dependency>,
}

/// Reads the metadata of a file, relocatable or not, whose sections have addresses. What is damaged is left out: the
/// kernel reads it again, and says more.
pub fn read(relocatable: bool, sections: &Sections, image: &dyn Source) -> Modules {
    let mut modules = Modules::default();
    let Some(set) = sections.find(SET, image) else {
        return modules;
    };
    let mut memory = Memory {
        sections,
        image,
        relocatable,
        relocations: HashMap::new(),
    };
    memory.relocate();
    for index in 0..(size(set) / 8).min(ENTRIES_MAX) {
        let at = addr(set).checked_add(8 * index);
        if let Some(entry) = at.and_then(|at| memory.pointer(at)) {
            memory.entry(entry, &mut modules);
        }
    }
    modules
}

/// A file's sections, by address.
struct Memory<'a> {
    sections: &'a Sections,
    image: &'a dyn Source,
    relocatable: bool,
    /// By the address of the word they change.
    relocations: HashMap<u64, Relocation>,
}

/// A relocation to a 64-bit word.
struct Relocation {
    /// The section with the symbols, and which symbol; none for a relative one.
    symbol: Option<(usize, u64)>,
    addend: i64,
}

impl Memory<'_> {
    fn relocate(&mut self) {
        let sections = &self.sections.headers;
        for table in sections.iter().filter(|header| kind(header) == SHT_RELA) {
            let base = match self.relocatable {
                false => 0,
                true => match sections.get(table.sh_info.get(LittleEndian) as usize) {
                    Some(target) if addr(target) != 0 => addr(target),
                    _ => continue,
                },
            };
            let room = RELOCATIONS_MAX - self.relocations.len();
            let count = (size(table) / size_of::<Rela64<LittleEndian>>() as u64).min(room as u64);
            let mut bytes = vec![0; count as usize * size_of::<Rela64<LittleEndian>>()];
            if self.image.read(offset(table), &mut bytes).is_err() {
                continue;
            }
            let entries = slice_from_all_bytes::<Rela64<LittleEndian>>(&bytes).unwrap_or_default();
            for entry in entries {
                let symbol = match entry.r_type(LittleEndian, false) {
                    R_X86_64_64 => {
                        let symbol = entry.r_sym(LittleEndian, false);
                        Some((link(table), symbol.into()))
                    }
                    R_X86_64_RELATIVE => None,
                    _ => continue,
                };
                let at = base.wrapping_add(entry.r_offset.get(LittleEndian));
                let addend = entry.r_addend.get(LittleEndian);
                self.relocations.insert(at, Relocation { symbol, addend });
            }
        }
    }

    /// The bytes at an address, `max` at most, as far as its section has them.
    fn span(&self, at: u64, max: u64) -> Option<Vec<u8>> {
        let inside = |header: &&_| {
            let within = at.checked_sub(addr(header));
            addr(header) != 0
                && kind(header) != SHT_NOBITS
                && within.is_some_and(|within| within < size(header))
        };
        let header = self.sections.headers.iter().find(inside)?;
        let within = at - addr(header);
        let mut bytes = vec![0; max.min(size(header) - within) as usize];
        self.image.read(offset(header) + within, &mut bytes).ok()?;
        Some(bytes)
    }

    fn bytes<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        self.span(at, N as u64)?.try_into().ok()
    }

    /// The pointer at an address, relocated.
    fn pointer(&self, at: u64) -> Option<u64> {
        let Some(relocation) = self.relocations.get(&at) else {
            return self.bytes(at).map(u64::from_le_bytes);
        };
        let base = match relocation.symbol {
            None => 0,
            Some((table, index)) => self.symbol(table, index)?,
        };
        Some(base.wrapping_add_signed(relocation.addend))
    }

    /// A symbol's address (Elf64_Sym: st_shndx at 6, st_value at 8, 24 bytes in all).
    fn symbol(&self, table: usize, index: u64) -> Option<u64> {
        let table = self.sections.headers.get(table)?;
        let at = index.checked_mul(24)?;
        if at.checked_add(24)? > size(table) {
            return None;
        }
        let mut bytes = [0; 24];
        self.image.read(offset(table) + at, &mut bytes).ok()?;
        let [_, _, _, _, _, _, low, high, value @ ..] = bytes;
        let value = u64::from_le_bytes(*value.first_chunk()?);
        if !self.relocatable {
            return Some(value);
        }
        let section = usize::from(u16::from_le_bytes([low, high]));
        let section = self.sections.headers.get(section)?;
        (addr(section) != 0).then(|| addr(section).wrapping_add(value))
    }

    fn name(&self, at: u64) -> Option<String> {
        let bytes = self.span(at, NAME_MAX)?;
        let name = bytes.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(name).into_owned())
    }

    /// struct mod_metadata: i32 version, i32 type, pointers to data and name.
    fn entry(&self, at: u64, modules: &mut Modules) -> Option<()> {
        let kind = u32::from_le_bytes(self.bytes(at.checked_add(4)?)?);
        let data = self.pointer(at.checked_add(8)?)?;
        let name = self.name(self.pointer(at.checked_add(16)?)?)?;
        match kind {
            MDT_DEPEND => {
                let [minimum, preferred, maximum] = self.ints(data)?;
                let versions = Versions {
                    minimum,
                    preferred,
                    maximum,
                };
                modules.needs.push(Dependency { name, versions });
            }
            MDT_VERSION => {
                let [version] = self.ints(data)?;
                modules.provides.push((name, version));
            }
            _ => {}
        }
        Some(())
    }

    fn ints<const N: usize>(&self, at: u64) -> Option<[i32; N]> {
        let mut ints = [0; N];
        for (index, int) in ints.iter_mut().enumerate() {
            *int = i32::from_le_bytes(self.bytes(at.checked_add(4 * index as u64)?)?);
        }
        Some(ints)
    }
}
