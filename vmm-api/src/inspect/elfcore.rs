//! A guest as an ELF core file: memory at its linear addresses, and each vCPU as a thread.
//!
//! The file is an ELF header, program headers, notes, and from the next page on all RAM as it is in
//! the memory file, holes included. Each range that vCPU 0's page tables map is a PT_LOAD of its own
//! into that image; without paging linear addresses are physical ones. Notes are NT_PRSTATUS
//! (include/uapi/linux/elfcore.h, `struct elf_prstatus`, with `struct user_regs_struct` of x86-64 at
//! offset 112), one a vCPU, whose thread id is its index plus 1.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::memory::{MemFile, MemoryError};
use crate::pagewalk::{self, Mapping, PagingMode};
use crate::regs::Registers;

const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
const PAGE: u64 = 4096;
/// PN_XNUM and beyond would need a section header to hold the count.
const SEGMENTS_MAX: usize = 0xfff0;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const PRSTATUS: usize = 336;
const PR_PID: usize = 32;
const PR_REG: usize = 112;
const NT_PRSTATUS: u32 = 1;

/// Why there is no core file.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// It cannot be written.
    #[error("the core file cannot be written")]
    Write(#[from] io::Error),
    /// Guest memory cannot be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoreReport {
    /// Ranges of linear addresses in it.
    pub segments: usize,
    /// Page tables map more than those.
    pub truncated: bool,
    /// Bytes of guest memory that were really there, and written.
    pub written: u64,
}

/// Writes a core of a guest into an empty file. `vcpus` are all of its vCPUs.
///
/// # Errors
///
/// The file cannot be written, or memory cannot be read.
pub fn write_core(
    file: &File,
    memory: &MemFile,
    vcpus: &[Registers],
) -> Result<CoreReport, CoreError> {
    let (segments, truncated) = match vcpus.first() {
        Some(first) if PagingMode::of(first) != PagingMode::Flat => {
            let all = pagewalk::mappings(memory, first, SEGMENTS_MAX);
            let ram = all.ranges.iter().flat_map(|range| in_ram(memory, range));
            let ram: Vec<_> = ram.take(SEGMENTS_MAX).collect();
            (ram, all.truncated)
        }
        _ => (flat(memory), false),
    };
    let notes: Vec<u8> = (1..).zip(vcpus).flat_map(|(id, r)| note(id, r)).collect();
    let headers = 1 + segments.len() as u64;
    let notes_at = ELF_HEADER + PROGRAM_HEADER * headers;
    let image = (notes_at + notes.len() as u64).next_multiple_of(PAGE);

    let mut head = elf_header(headers as u16);
    head.extend(program_header(
        PT_NOTE,
        0,
        notes_at,
        0,
        0,
        notes.len() as u64,
    ));
    for segment in &segments {
        // PF_X 1, PF_W 2, PF_R 4.
        let flags = 4 | u32::from(segment.writable) << 1 | u32::from(segment.executable);
        let offset = memory.layout().offset_of(segment.gpa, segment.len);
        head.extend(program_header(
            PT_LOAD,
            flags,
            image + offset.unwrap_or(0),
            segment.gla,
            segment.gpa,
            segment.len,
        ));
    }
    head.extend(&notes);
    file.set_len(image + memory.layout().total())?;
    file.write_all_at(&head, 0)?;
    // Holes where there is nothing.
    let written = memory.pieces(|piece, at| {
        file.write_all_at(piece, image + at)?;
        Ok::<_, CoreError>(())
    })?;
    Ok(CoreReport {
        segments: segments.len(),
        truncated,
        written,
    })
}

/// All RAM at its own address.
fn flat(memory: &MemFile) -> Vec<Mapping> {
    let ram = memory.layout().segments().map(|(gpa, len, _)| Mapping {
        gla: gpa,
        gpa,
        len,
        writable: true,
        executable: true,
    });
    ram.collect()
}

/// The parts of a mapping that lead to RAM.
fn in_ram(memory: &MemFile, range: &Mapping) -> Vec<Mapping> {
    let end = range.gpa.saturating_add(range.len);
    let parts = memory.layout().segments().filter_map(|(base, len, _)| {
        let (from, to) = (range.gpa.max(base), end.min(base + len));
        (from < to).then(|| Mapping {
            gla: range.gla.wrapping_add(from - range.gpa),
            gpa: from,
            len: to - from,
            ..*range
        })
    });
    parts.collect()
}

fn elf_header(program_headers: u16) -> Vec<u8> {
    // ELFCLASS64, ELFDATA2LSB, EV_CURRENT.
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend(ET_CORE.to_le_bytes());
    bytes.extend(EM_X86_64.to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    for word in [0, ELF_HEADER, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(0u32.to_le_bytes());
    let sizes = [
        ELF_HEADER as u16,
        PROGRAM_HEADER as u16,
        program_headers,
        0,
        0,
        0,
    ];
    bytes.extend(sizes.iter().flat_map(|n| n.to_le_bytes()));
    bytes
}

fn program_header(kind: u32, flags: u32, offset: u64, gla: u64, gpa: u64, len: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend(flags.to_le_bytes());
    for word in [
        offset,
        gla,
        gpa,
        len,
        if kind == PT_NOTE { 0 } else { len },
        0,
    ] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

fn note(id: u32, r: &Registers) -> Vec<u8> {
    let mut status = [0; PRSTATUS];
    status[PR_PID..PR_PID + 4].copy_from_slice(&id.to_le_bytes());
    let selector = |s: crate::regs::Segment| u64::from(s.selector);
    let words = [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        // orig_rax: not in a system call.
        u64::MAX,
        r.rip,
        selector(r.cs),
        r.rflags,
        r.rsp,
        selector(r.ss),
        r.fs.base,
        r.gs.base,
        selector(r.ds),
        selector(r.es),
        selector(r.fs),
        selector(r.gs),
    ];
    for (to, word) in status[PR_REG..].chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    let name = b"CORE\0\0\0\0";
    let mut bytes = Vec::new();
    for word in [5, PRSTATUS as u32, NT_PRSTATUS] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(name);
    bytes.extend(status);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, MemoryLayout};

    #[test]
    fn a_core_has_memory_where_page_tables_put_it_and_vcpus_as_threads() {
        let layout = MemoryLayout {
            lowmem: 4 << 20,
            highmem: 2 << 20,
        };
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(layout.total()).unwrap();
        let ram = GuestRam::map(file.try_clone().unwrap(), layout).unwrap();
        for (gpa, entry) in [
            (0x1000u64, 0x2003u64),
            (0x1ff8, 0x2003),
            (0x2000, 0x3003),
            (0x3000, 0x83),
            // Beyond RAM, in part.
            (0x3008, 0x20_0083),
            (0x3010, 0x40_0083),
        ] {
            ram.write(gpa, &entry.to_le_bytes()).unwrap();
        }
        ram.write(0x20_0123, b"needle").unwrap();
        let memory = MemFile::new(file, layout).unwrap();
        let long = Registers {
            cr0: 0x8000_0001,
            cr4: 0x20,
            efer: 0x500,
            cr3: 0x1000,
            rip: 0x1234,
            ..Registers::reset()
        };
        let core = tempfile::tempfile_in("/dev/shm").unwrap();
        let report = write_core(&core, &memory, &[long.clone(), long.clone()]).unwrap();
        assert_eq!((report.segments, report.truncated), (2, false));
        assert!(report.written < 1 << 20, "sparse");
        let mut head = vec![0; 0x2000];
        core.read_exact_at(&mut head, 0).unwrap();
        let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap());
        // The second PT_LOAD is the upper half's.
        let second = 64 + 56 * 2;
        assert_eq!(word(second + 16), 0xffff_ff80_0000_0000);
        assert_eq!((word(second + 24), word(second + 32)), (0, 4 << 20));
        let mut found = [0; 6];
        core.read_exact_at(&mut found, word(second + 8) + 0x20_0123)
            .unwrap();
        assert_eq!(&found, b"needle");
        let notes = word(64 + 8) as usize;
        let status = notes + 12 + 8;
        assert_eq!(word(status + PR_REG + 16 * 8), 0x1234);
        let next = status + PRSTATUS + 12 + 8;
        assert_eq!(word(next + PR_PID) as u32, 2);

        let report = write_core(&core, &memory, &[Registers::reset()]).unwrap();
        assert_eq!(report.segments, 2, "lowmem and highmem");
    }
}
