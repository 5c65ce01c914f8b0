//! Makes FreeBSD kernels and modules.

use crate::kernels::{Ph, elf};

pub const KERNBASE: u64 = 0xffff_ffff_8000_0000;

/// A section of an ELF file.
#[derive(Clone, Debug, Default)]
pub struct Section {
    pub name: &'static str,
    pub kind: u32,
    pub addr: u64,
    pub align: u64,
    pub bytes: Vec<u8>,
    /// Length of a section without bytes.
    pub size: u64,
    pub link: u32,
    pub info: u32,
}

const PROGBITS: u32 = 1;
const SYMTAB: u32 = 2;
const STRTAB: u32 = 3;
const RELA: u32 = 4;
const NOBITS: u32 = 8;

/// Adds sections and their headers to a file that begins with an ELF header. The last is the one
/// with the names; it and section 0 are made here.
pub fn add_sections(file: &mut Vec<u8>, mut sections: Vec<Section>) {
    sections.insert(0, Section::default());
    let mut names = vec![0];
    let mut name_at = Vec::new();
    sections.push(Section {
        name: ".shstrtab",
        kind: STRTAB,
        align: 1,
        ..Section::default()
    });
    for section in &sections {
        // The first name is the empty one.
        if section.name.is_empty() {
            name_at.push(0);
            continue;
        }
        name_at.push(names.len() as u32);
        names.extend_from_slice(section.name.as_bytes());
        names.push(0);
    }
    sections.last_mut().unwrap().bytes = names;
    let mut headers = Vec::new();
    for (section, name) in sections.iter().zip(name_at) {
        file.resize(
            file.len().next_multiple_of(section.align.max(1) as usize),
            0,
        );
        let offset = file.len() as u64;
        file.extend_from_slice(&section.bytes);
        let size = section.size.max(section.bytes.len() as u64);
        headers.extend_from_slice(&name.to_le_bytes());
        headers.extend_from_slice(&section.kind.to_le_bytes());
        for word in [0, section.addr, offset, size] {
            headers.extend_from_slice(&word.to_le_bytes());
        }
        headers.extend_from_slice(&section.link.to_le_bytes());
        headers.extend_from_slice(&section.info.to_le_bytes());
        for word in [section.align, 0] {
            headers.extend_from_slice(&word.to_le_bytes());
        }
    }
    file.resize(file.len().next_multiple_of(8), 0);
    let offset = file.len() as u64;
    file.extend_from_slice(&headers);
    file[40..48].copy_from_slice(&offset.to_le_bytes());
    let count = sections.len() as u16;
    for (at, half) in [(58, 64), (60, count), (62, count - 1)] {
        file[at..at + 2].copy_from_slice(&half.to_le_bytes());
    }
}

/// An entry of set_modmetadata_set.
#[derive(Clone, Copy, Debug)]
pub enum Meta {
    Depend(&'static str, [i32; 3]),
    Version(&'static str, i32),
}

/// The structures behind the entries, which lie at `base`: their bytes, where each begins, and
/// which words point to which offset.
fn metadata(entries: &[Meta], base: u64) -> (Vec<u8>, Vec<u64>, Vec<(u64, u64)>) {
    let (mut bytes, mut starts, mut pointers) = (Vec::new(), Vec::new(), Vec::new());
    for entry in entries {
        let (kind, name, ints) = match *entry {
            Meta::Depend(name, ints) => (1u32, name, ints.to_vec()),
            Meta::Version(name, version) => (3, name, vec![version]),
        };
        let start = bytes.len() as u64;
        starts.push(start);
        bytes.extend_from_slice(&1u32.to_le_bytes());
        bytes.extend_from_slice(&kind.to_le_bytes());
        let data = start + 24;
        let text = data + 4 * ints.len() as u64;
        for target in [data, text] {
            pointers.push((bytes.len() as u64, target));
            bytes.extend_from_slice(&(base + target).to_le_bytes());
        }
        for int in ints {
            bytes.extend_from_slice(&int.to_le_bytes());
        }
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    (bytes, starts, pointers)
}

/// A relocatable module with 100 bytes of text, its metadata, and 0x200 bytes of bss.
pub fn module(entries: &[Meta]) -> Vec<u8> {
    module_with(entries, Vec::new())
}

/// The same with more sections, from section 9 on.
pub fn module_with(entries: &[Meta], more: Vec<Section>) -> Vec<u8> {
    let (mut data, starts, pointers) = metadata(entries, 0);
    // Zeros until the kernel relocates them.
    for (at, _) in &pointers {
        data[*at as usize..*at as usize + 8].fill(0);
    }
    let rela = |pointers: &mut dyn Iterator<Item = (u64, u64)>| {
        // R_X86_64_64 against symbol 1, the section .data.
        let words = pointers.flat_map(|(at, target)| [at, 1 << 32 | 1, target]);
        words.flat_map(u64::to_le_bytes).collect::<Vec<_>>()
    };
    let mut symbols = vec![0; 24];
    symbols.extend_from_slice(&[0, 0, 0, 0, 3, 0, 2, 0]);
    symbols.extend_from_slice(&[0; 16]);
    let of = |name, kind, align, bytes| Section {
        name,
        kind,
        align,
        bytes,
        ..Section::default()
    };
    let related = |name, bytes, info| Section {
        link: 7,
        info,
        ..of(name, RELA, 8, bytes)
    };
    let set = vec![0; 8 * starts.len()];
    let mut set_pointers = (0..).step_by(8).zip(starts);
    let mut sections = vec![
        of(".text", PROGBITS, 16, vec![0xc3; 100]),
        of(".data", PROGBITS, 8, data),
        Section {
            size: 0x200,
            ..of(".bss", NOBITS, 32, Vec::new())
        },
        of("set_modmetadata_set", PROGBITS, 8, set),
        related(".rela.data", rela(&mut pointers.into_iter()), 2),
        related(".relaset", rela(&mut set_pointers), 4),
        Section {
            link: 8,
            ..of(".symtab", SYMTAB, 8, symbols)
        },
        of(".strtab", STRTAB, 1, b"\0".to_vec()),
    ];
    sections.extend(more);
    let mut file = elf(9, 0, &[]);
    file[16..18].copy_from_slice(&1u16.to_le_bytes());
    file[32..40].fill(0);
    add_sections(&mut file, sections);
    file
}

/// A kernel with text at 2 MiB, data with bss at 4 MiB, symbols, and the modules that it has.
pub fn kernel(entries: &[Meta]) -> Vec<u8> {
    kernel_with(entries, &[])
}

/// The same with constructors, whose section is at 5 MiB.
pub fn kernel_with_ctors(entries: &[Meta]) -> Vec<u8> {
    let ctors = Section {
        name: ".ctors",
        kind: PROGBITS,
        addr: KERNBASE + 0x50_0000,
        align: 8,
        bytes: vec![0; 24],
        ..Section::default()
    };
    kernel_of(entries, &[], vec![ctors])
}

/// A shared object of such parts, which counts its addresses from 0 (e_type ET_DYN).
pub fn shared(entries: &[Meta]) -> Vec<u8> {
    to_shared(kernel(entries))
}

/// A kernel as a shared object.
pub fn to_shared(mut file: Vec<u8>) -> Vec<u8> {
    file[16..18].copy_from_slice(&3u16.to_le_bytes());
    let base = KERNBASE + 0x20_0000;
    // Virtual addresses: of the entry point, the segments, the sections, and in the metadata.
    for at in (0..file.len() - 7).step_by(4) {
        let word = u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
        if (base..base + 0x40_0000).contains(&word) {
            file[at..at + 8].copy_from_slice(&(word - base).to_le_bytes());
        }
    }
    file
}

/// A kernel with more program headers.
pub fn kernel_with(entries: &[Meta], more: &[Ph]) -> Vec<u8> {
    kernel_of(entries, more, Vec::new())
}

fn kernel_of(entries: &[Meta], more: &[Ph], sections: Vec<Section>) -> Vec<u8> {
    let data_at = KERNBASE + 0x40_0000;
    let (data, starts, _) = metadata(entries, data_at);
    let set_at = data_at + data.len() as u64;
    let set: Vec<u8> = starts
        .iter()
        .flat_map(|start| (data_at + start).to_le_bytes())
        .collect();
    let segment = [&data[..], &set[..]].concat();
    let text = Ph::load(KERNBASE + 0x20_0000, 5, &[0x90; 0x80], 0x80);
    let data_ph = Ph::load(data_at, 6, &segment, 0x1_0000);
    let headers = [&[text, data_ph], more].concat();
    let mut file = elf(9, KERNBASE + 0x20_0010, &headers);
    // The segments' bytes lie behind the headers, one behind the other.
    let data_offset = 64 + headers.len() * 56 + 0x80;
    let own = vec![
        Section {
            name: ".symtab",
            kind: SYMTAB,
            align: 8,
            bytes: (0..24 * 5).collect(),
            link: 2,
            ..Section::default()
        },
        Section {
            name: ".strtab",
            kind: STRTAB,
            align: 1,
            bytes: b"\0first\0second\0".to_vec(),
            ..Section::default()
        },
        Section {
            name: ".data",
            kind: PROGBITS,
            addr: data_at,
            size: data.len() as u64,
            ..Section::default()
        },
        Section {
            name: "set_modmetadata_set",
            kind: PROGBITS,
            addr: set_at,
            size: set.len() as u64,
            ..Section::default()
        },
    ];
    add_sections(&mut file, [own, sections].concat());
    // Sections 3 and 4 are views of the data segment.
    let headers = u64::from_le_bytes(file[40..48].try_into().unwrap()) as usize;
    for (section, offset) in [(3, data_offset), (4, data_offset + data.len())] {
        let at = headers + 64 * section + 24;
        file[at..at + 8].copy_from_slice(&(offset as u64).to_le_bytes());
    }
    file
}
