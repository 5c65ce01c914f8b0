//! Relocatable kernel modules (.ko, ET_REL): where their sections go (sys/boot/common/
//! load_elf_obj.c). The kernel relocates them itself; the loader only lays them out.

use object::LittleEndian;
use object::elf::{
    EM_X86_64, ET_DYN, ET_REL, SHT_FINI_ARRAY, SHT_INIT_ARRAY, SHT_NOBITS, SHT_PROGBITS, SHT_REL,
    SHT_RELA, SHT_STRTAB, SHT_SYMTAB, SHT_X86_64_UNWIND, SectionType,
};

use super::metadata::{FileRecords, MODINFOMD_ELFHDR, MODINFOMD_SHDR};
use super::modmeta::{self, Modules};
use super::sections::{SectionError, Sections, addr, kind, link, offset, size};
use crate::elf::{self, ElfError};
use crate::plan::{PlanError, Segment};
use crate::source::Source;
use crate::space::SpaceError;

/// Sections that a module runs with. Kernels of today call the functions that the arrays point to, if
/// they find them in memory (sys/sys/linker.h, `ctors_addr`); for older ones compilers made `.ctors`,
/// which is a section like others.
const CONTENTS: [SectionType; 5] = [
    SHT_PROGBITS,
    SHT_NOBITS,
    SHT_X86_64_UNWIND,
    SHT_INIT_ARRAY,
    SHT_FINI_ARRAY,
];

/// Why a file is no module.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// No ELF file.
    #[error("don't know how to load it: not an ELF file")]
    NotElf,
    /// Class, byte order, version.
    #[error("not a 64-bit little-endian ELF file of version 1")]
    Ident,
    /// Machine.
    #[error("a module for another machine (e_machine {0}), not x86-64")]
    Machine(u16),
    /// Type.
    #[error("neither a relocatable nor a shared ELF file (e_type {0}), as modules are")]
    Type(u16),
    /// Section headers.
    #[error(transparent)]
    Sections(#[from] SectionError),
    /// There is none.
    #[error("it has no sections")]
    NoSections,
    /// None, or several.
    #[error("it has {0} symbol tables, not one")]
    SymbolTables(usize),
    /// A string table is something else.
    #[error("the section that should hold its {0} names is no string table")]
    Strings(&'static str),
    /// Reading failed.
    #[error("cannot read it")]
    Read(#[source] std::io::Error),
    /// A shared object's headers.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// A shared object has no place.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// A shared object cannot be described.
    #[error(transparent)]
    Shared(Box<PlanError>),
}

/// Whether a file begins as a shared object does.
pub fn is_shared(head: &[u8]) -> bool {
    let kind = head.get(16..18);
    head.starts_with(elf::MAGIC) && kind == Some(&ET_DYN.0.to_le_bytes())
}

/// A module with its place in memory.
#[derive(Debug)]
pub struct Module {
    /// What is copied.
    pub segments: Vec<Segment>,
    /// Address, size, and metadata for the kernel.
    pub records: FileRecords,
    /// What it provides and needs.
    pub modules: Modules,
}

impl Module {
    /// Lays a module out from `dest` on.
    ///
    /// # Errors
    ///
    /// It is no module for this machine, or it contradicts itself.
    pub fn place(image: &dyn Source, dest: u64) -> Result<Self, ModuleError> {
        let header = header(image)?;
        let mut sections = Sections::read(&header, image)?;
        if sections.headers.is_empty() {
            return Err(ModuleError::NoSections);
        }
        let end = lay_out(&mut sections, dest)?;
        let placed = sections.headers.iter().filter(|header| addr(header) != 0);
        let segments = placed.map(|header| {
            let filesz = match kind(header) {
                SHT_NOBITS => 0,
                _ => size(header),
            };
            Segment {
                offset: offset(header),
                filesz,
                memsz: size(header),
                gpa: addr(header),
            }
        });
        let segments = segments.filter(|segment| segment.filesz != 0).collect();
        let mut records = FileRecords::new("elf obj module", dest, end - dest);
        records.add(MODINFOMD_SHDR, sections.encode());
        records.add(MODINFOMD_ELFHDR, header);
        Ok(Self {
            segments,
            records,
            modules: modmeta::read(true, &sections, image),
        })
    }
}

fn header(image: &dyn Source) -> Result<[u8; 64], ModuleError> {
    let head = image.head(64).map_err(ModuleError::Read)?;
    if !head.starts_with(elf::MAGIC) {
        return Err(ModuleError::NotElf);
    }
    let header: [u8; 64] = head.try_into().map_err(|_| ModuleError::Ident)?;
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    // ELFCLASS64, ELFDATA2LSB, EV_CURRENT.
    if header[4..7] != [2, 1, 1] {
        return Err(ModuleError::Ident);
    }
    if half(18) != EM_X86_64.0 {
        return Err(ModuleError::Machine(half(18)));
    }
    if half(16) != ET_REL.0 {
        return Err(ModuleError::Type(half(16)));
    }
    Ok(header)
}

/// Gives sections their addresses, in the loader's order, and says where they end. Saturated sums
/// end outside of memory, where nobody gets a place.
fn lay_out(sections: &mut Sections, dest: u64) -> Result<u64, ModuleError> {
    let names = sections.names;
    let headers = &mut sections.headers;
    let mut at = dest;
    let put = |header: &mut super::sections::Header, at: &mut u64| {
        let align = header.sh_addralign.get(LittleEndian).max(1);
        *at = at.checked_next_multiple_of(align).unwrap_or(u64::MAX);
        header.sh_addr.set(LittleEndian, *at);
        *at = at.saturating_add(size(header));
    };
    for header in headers.iter_mut() {
        header.sh_addr.set(LittleEndian, 0);
    }
    for header in headers.iter_mut().filter(|header| size(header) != 0) {
        if CONTENTS.contains(&kind(header)) {
            put(header, &mut at);
        }
    }
    let tables = headers.iter().enumerate();
    let tables: Vec<_> = tables.filter(|(_, h)| kind(h) == SHT_SYMTAB).collect();
    let &[(symtab, table)] = tables.as_slice() else {
        return Err(ModuleError::SymbolTables(tables.len()));
    };
    // FreeBSD's loader leaves room for the symbols twice; sizes and addresses are to be the same.
    at = at.saturating_add(size(table));
    let strtab = link(table);
    for (index, what) in [(symtab, ""), (strtab, "symbols'"), (names, "sections'")] {
        let wanted = if index == symtab {
            SHT_SYMTAB
        } else {
            SHT_STRTAB
        };
        match headers.get_mut(index) {
            Some(header) if kind(header) == wanted => put(header, &mut at),
            _ => return Err(ModuleError::Strings(what)),
        }
    }
    for header in headers.iter_mut() {
        if [SHT_REL, SHT_RELA].contains(&kind(header)) {
            put(header, &mut at);
        }
    }
    Ok(at)
}
