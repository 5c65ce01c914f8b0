//! Where an ELF kernel's segments and symbols go (sys/boot/common/load_elf.c).

use std::fmt::Write;

use object::elf::{SHT_NOBITS, SHT_SYMTAB};

use super::metadata::{
    FileRecords, MODINFOMD_CTORS_ADDR, MODINFOMD_CTORS_SIZE, MODINFOMD_DYNAMIC, MODINFOMD_ELFHDR,
    MODINFOMD_ESYM, MODINFOMD_SHDR, MODINFOMD_SSYM,
};
use super::modmeta::{self, Modules};
use super::sections::{Sections, addr, kind, link, offset, size};
use super::{FreebsdError, REACH};
use crate::elf::Elf;
use crate::plan::{Blob, PlanError, Protocol, Segment};
use crate::source::Source;
use crate::space::{Space, SpaceError};

/// Where a FreeBSD/amd64 kernel's first gibibyte is mapped (KERNBASE, sys/amd64/include/vmparam.h).
const KERNBASE: u64 = 0xffff_ffff_8000_0000;

/// A kernel with its place in guest-physical memory.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The PT_LOAD segments in the file's order.
    pub segments: Vec<Segment>,
    /// First byte of the lowest segment.
    pub base: u64,
    /// End of the highest segment, rounded up to 8 bytes as symbols follow there.
    pub end: u64,
    writable: Vec<bool>,
}

impl Kernel {
    /// Takes room for every segment.
    ///
    /// # Errors
    ///
    /// A segment is outside of memory, or over something else.
    pub fn place(elf: &Elf, protocol: Protocol, space: &mut Space) -> Result<Self, PlanError> {
        let mut segments = Vec::with_capacity(elf.loads.len());
        for (index, load) in elf.loads.iter().enumerate() {
            let gpa = match protocol {
                // FreeBSD kernels carry p_paddr == p_vaddr. Where the page tables map them is where
                // userboot puts them, too: its offset is the entry point's, in steps of 16 MiB. A
                // kernel that could run elsewhere (since 14.0) finds itself there as well.
                Protocol::Freebsd => load.vaddr % REACH,
                Protocol::Pvh if load.paddr >= KERNBASE => load.paddr - KERNBASE,
                _ => load.paddr,
            };
            space.claim(format!("ELF segment {index}"), gpa, load.memsz)?;
            segments.push(Segment {
                offset: load.offset,
                filesz: load.filesz,
                memsz: load.memsz,
                gpa,
            });
        }
        // Claimed segments end below 4 GiB.
        let ends = segments.iter().map(|s| s.gpa + s.memsz);
        Ok(Self {
            base: segments.iter().map(|s| s.gpa).min().unwrap_or(0),
            end: ends.max().unwrap_or(0).next_multiple_of(8),
            writable: elf.loads.iter().map(|load| load.writable).collect(),
            segments,
        })
    }

    /// Takes room for a shared object, whose addresses count from `dest`.
    ///
    /// # Errors
    ///
    /// A segment is outside of memory, or over something else.
    pub fn place_shared(elf: &Elf, dest: u64, space: &mut Space) -> Result<Self, SpaceError> {
        let mut segments = Vec::with_capacity(elf.loads.len());
        for (index, load) in elf.loads.iter().enumerate() {
            let gpa = dest.saturating_add(load.vaddr);
            space.claim(format!("ELF segment {index}"), gpa, load.memsz)?;
            segments.push(Segment {
                offset: load.offset,
                filesz: load.filesz,
                memsz: load.memsz,
                gpa,
            });
        }
        let ends = segments.iter().map(|s| s.gpa + s.memsz);
        Ok(Self {
            base: dest,
            end: ends.max().unwrap_or(0).next_multiple_of(8),
            writable: elf.loads.iter().map(|load| load.writable).collect(),
            segments,
        })
    }

    /// What the kernel is told of itself: for a FreeBSD kernel with symbols behind its segments,
    /// whose bytes are added to the segments and to `blobs`.
    ///
    /// # Errors
    ///
    /// The section headers are damaged, or there is no room for the symbols.
    pub fn describe(
        &mut self,
        elf: &Elf,
        image: &(impl Source + ?Sized),
        space: &mut Space,
        blobs: &mut Vec<Blob>,
    ) -> Result<Description, PlanError> {
        let image: &dyn Source = &Whole(image);
        let mut records = FileRecords::new("elf kernel", self.base, 0);
        let mut summary = self.summary();
        let sections = Sections::read(&elf.header, image).map_err(FreebsdError::from)?;
        if !sections.headers.is_empty() {
            records.add(MODINFOMD_SHDR, sections.encode());
        }
        // stand/common/load_elf.c; the kernel adds where a shared object lies.
        if let Some(ctors) = sections.find(".ctors", image) {
            records.add(MODINFOMD_CTORS_ADDR, addr(ctors).to_le_bytes());
            records.add(MODINFOMD_CTORS_SIZE, size(ctors).to_le_bytes());
        }
        if let Some(tables) = symbols(&sections, elf) {
            let ssym = self.end;
            let mut at = ssym;
            for table in tables {
                blobs.push(Blob {
                    gpa: at,
                    bytes: table.size.to_le_bytes().to_vec(),
                });
                at += 8;
                let Range { offset, size } = table;
                space.claim("the kernel's symbols", at - 8, size.saturating_add(8))?;
                let whole = Segment {
                    offset,
                    filesz: size,
                    memsz: size,
                    gpa: at,
                };
                self.segments.extend((size != 0).then_some(whole));
                at = (at + size).next_multiple_of(8);
            }
            self.end = at;
            records.add(MODINFOMD_SSYM, ssym.to_le_bytes());
            records.add(MODINFOMD_ESYM, at.to_le_bytes());
            let [symtab, strtab] = tables.map(|table| table.size);
            // Writing to a String cannot fail.
            let _ = write!(summary, " syms=[0x8+{symtab:#x}+0x8+{strtab:#x}]");
        }
        if let Some(dynamic) = elf.dynamic {
            records.add(MODINFOMD_DYNAMIC, dynamic.to_le_bytes());
        }
        records.add(MODINFOMD_ELFHDR, elf.header);
        records.size = self.end - self.base;
        Ok(Description {
            records,
            summary,
            modules: modmeta::read(false, &sections, image),
        })
    }

    /// `text=0x... data=0x...+0x...`, as FreeBSD's loader says it.
    pub fn summary(&self) -> String {
        summary(&self.segments, &self.writable)
    }
}

/// What is known of a FreeBSD kernel.
#[derive(Debug)]
pub struct Description {
    /// For the module list.
    pub records: FileRecords,
    /// What is said of it: `text=0x... data=0x...+0x... syms=[...]`.
    pub summary: String,
    /// The modules that are part of it.
    pub modules: Modules,
}

/// A reference that is not `dyn`, as one that is.
#[derive(Debug)]
struct Whole<'a, S: ?Sized>(&'a S);

impl<S: Source + ?Sized> Source for Whole<'_, S> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        self.0.read(offset, bytes)
    }
}

/// Bytes of a file.
#[derive(Clone, Copy)]
struct Range {
    offset: u64,
    size: u64,
}

/// The symbol table and its strings, unless a segment has them already.
fn symbols(sections: &Sections, elf: &Elf) -> Option<[Range; 2]> {
    let headers = sections.headers.iter().enumerate();
    let mut tables = headers.filter(|(_, header)| {
        let in_segment = |load: &crate::elf::Load| {
            // Ends of what is in the file are checked against it, so sums do not overflow.
            let end = offset(header) + size(header);
            offset(header) >= load.offset && end <= load.offset + load.filesz
        };
        kind(header) == SHT_SYMTAB && size(header) != 0 && !elf.loads.iter().any(in_segment)
    });
    let (index, table) = tables.next_back()?;
    let strings = sections
        .headers
        .get(link(table))
        .filter(|strings| link(table) != index && kind(strings) != SHT_NOBITS)?;
    Some([table, strings].map(|header| Range {
        offset: offset(header),
        size: size(header),
    }))
}

/// `text=0x...` for each segment that is not writable, `data=0x...+0x...` for the others.
pub fn summary(segments: &[Segment], writable: &[bool]) -> String {
    let mut text = String::new();
    for (segment, &writable) in segments.iter().zip(writable) {
        let space = if text.is_empty() { "" } else { " " };
        let name = if writable { "data" } else { "text" };
        // Writing to a String cannot fail.
        let _ = write!(text, "{space}{name}={:#x}", segment.filesz);
        if writable && segment.memsz > segment.filesz {
            let _ = write!(text, "+{:#x}", segment.memsz - segment.filesz);
        }
    }
    text
}
