//! What the loader says of the kernel itself, compared with the kernel.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::access::peek16;
use crate::console::{Hex, Print, Stored, print, say};
use crate::entry::{self, KERNBASE};
use crate::memory::{self, peek8, peek32, peek64};
use crate::metadata::{self as md, File, Metadata};
use crate::symbols;

/// Program header and section header types and flags (System V ABI, chapters 4 and 5).
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PF_W: u32 = 2;
const SHT_SYMTAB: u32 = 2;

unsafe extern "C" {
    static kernel_start: u8;
    static kernel_end: u8;
    static _DYNAMIC: u8;
}

/// Where symbols are: the table, its end, and the strings and their end.
static SYMBOLS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

/// Why a number is missing.
const MISSING: &str = "a record is missing";

/// The kernel's name, type and place.
pub fn place(file: &File) -> Result<(), &'static str> {
    if !file.is("elf kernel") && !file.is("elf64 kernel") {
        return Err("the first file is no kernel");
    }
    let [start, end] = file.place().ok_or(MISSING)?;
    let (first, last) = (&raw const kernel_start as u64, &raw const kernel_end as u64);
    if start != first - KERNBASE {
        return Err("it is said to be elsewhere");
    }
    if end < last - KERNBASE {
        return Err("its size leaves out some of it");
    }
    Ok(())
}

/// The ELF header, which the first segment has as well.
pub fn header(file: &File) -> Result<(), &'static str> {
    let record = file.info(md::ELFHDR).ok_or(MISSING)?;
    let own = &raw const kernel_start as u64;
    let same = (0..64)
        .step_by(8)
        .all(|offset| peek64(record.payload + offset) == peek64(own + offset));
    if record.length != 64 || !same {
        return Err("it is not the file's");
    }
    if peek8(own + 7) != Some(9) {
        return Err("it is not branded as FreeBSD's");
    }
    match file.info(md::DYNAMIC) {
        Some(dynamic) if dynamic.number() == Some(&raw const _DYNAMIC as u64) => Ok(()),
        Some(_) => Err("the dynamic section is said to be elsewhere"),
        None => Ok(()),
    }
}

/// Prints what the loader printed of the segments: filesz, and memsz - filesz, of each.
pub fn segments(own: u64) {
    let Some([table, count]) = program_headers(own) else {
        return;
    };
    for index in 0..count {
        let at = table + index * 56;
        let word = |offset| peek64(at + offset).unwrap_or(0);
        let (kind, flags) = (word(0) as u32, (word(0) >> 32) as u32);
        let (filesz, memsz) = (word(32), word(40));
        if kind != PT_LOAD {
            continue;
        }
        if flags & PF_W == 0 {
            print!(" text=", Hex(filesz));
        } else {
            print!(" data=", Hex(filesz));
            if memsz > filesz {
                print!("+", Hex(memsz - filesz));
            }
        }
    }
}

/// The program headers' address and number.
fn program_headers(own: u64) -> Option<[u64; 2]> {
    Some([own + peek64(own + 32)?, peek16(own + 56)?.into()])
}

/// Whether the kernel has a dynamic section that a loader should tell of.
pub fn is_dynamic() -> bool {
    let own = &raw const kernel_start as u64;
    let Some([table, count]) = program_headers(own) else {
        return false;
    };
    (0..count).any(|index| peek32(table + index * 56) == Some(PT_DYNAMIC))
}

/// The symbol and string tables behind the kernel, and the section headers that speak of them.
pub fn symbols(file: &File) -> Result<[u64; 2], &'static str> {
    let [start, end] = [md::SSYM, md::ESYM].map(|kind| file.number(kind));
    let (start, end) = (start.ok_or("no ssym")?, end.ok_or("no esym")?);
    let [_, file_end] = file.place().ok_or(MISSING)?;
    const CUT: &str = "symbols end in unmapped memory";
    let symtab = peek64(start).ok_or(CUT)?;
    let strings = start + 8 + (symtab + 7 & !7);
    let strtab = peek64(strings).ok_or(CUT)?;
    // As link_elf wants it: both, and nothing else.
    if strings + 8 + (strtab + 7 & !7) != end {
        return Err("the two tables do not fill ssym to esym");
    }
    // bhyveload counts the symbols as a part of the kernel, GRUB puts them behind it.
    if end != file_end && start < file_end {
        return Err("the kernel's size ends in them");
    }
    let places = [
        start + 8,
        start + 8 + symtab,
        strings + 8,
        strings + 8 + strtab,
    ];
    for (place, value) in SYMBOLS.iter().zip(places) {
        place.store(value, Ordering::Relaxed);
    }
    if file.info(md::SHDR).is_some() {
        sections(file, symtab, strtab)?;
    }
    match lookup(b"probe_kernel_double") {
        Some(at) if at == crate::modmeta::probe_kernel_double as *const () as u64 => {}
        Some(_) => return Err("a symbol has another value"),
        None => return Err("a symbol is not there"),
    }
    if lookup(b"no_such_symbol_anywhere").is_some() {
        return Err("a symbol is there that should not be");
    }
    Ok([symtab, strtab])
}

fn sections(file: &File, symtab: u64, strtab: u64) -> Result<(), &'static str> {
    let headers = file.info(md::SHDR).ok_or("no section headers")?;
    let own = &raw const kernel_start as u64;
    let count = u64::from(peek16(own + 60).ok_or(MISSING)?);
    if headers.length != count * 64 {
        return Err("the section headers are not all there");
    }
    let section = |index: u64| headers.payload + index * 64;
    let symbols = (0..count)
        .map(section)
        .find(|&at| peek32(at + 4) == Some(SHT_SYMTAB));
    let symbols = symbols.ok_or("no section is the symbol table")?;
    let link = u64::from(peek32(symbols + 40).unwrap_or(0));
    let sizes = [symbols, section(link)].map(|at| peek64(at + 32));
    if link >= count || sizes != [Some(symtab), Some(strtab)] {
        return Err("the section headers tell other sizes");
    }
    Ok(())
}

/// The value of one of the kernel's global symbols.
pub fn lookup(name: &[u8]) -> Option<u64> {
    let [table, end, strings, strings_end] = [0, 1, 2, 3]
        .map(|index: usize| SYMBOLS.get(index).map_or(0, |s| s.load(Ordering::Relaxed)));
    symbols::find(table..end, strings..strings_end, name).map(|symbol| symbol.value)
}

/// The environment: it lies behind the files, ends before the metadata, and is name=value texts.
pub fn environment(file: &File, modulep: u64, files_end: u64) -> Result<(), &'static str> {
    let start = file.number(md::ENVP).ok_or(MISSING)?;
    if start < files_end {
        return Err("it lies in a file");
    }
    let mut at = start;
    while peek8(at) != Some(0) {
        let length = memory::string_length(at);
        let mut text = (at..at + length).filter_map(peek8);
        if !text.any(|byte| byte == b'=') {
            return Err("a text without =");
        }
        at += length + 1;
        if start < modulep && at >= modulep {
            return Err("it runs into the metadata");
        }
    }
    if at == start {
        return Err("it is empty");
    }
    Ok(())
}

/// Prints the environment.
pub fn print_environment(file: &File) {
    let Some(mut at) = file.number(md::ENVP) else {
        return;
    };
    while !matches!(peek8(at), Some(0) | None) {
        let length = memory::string_length(at);
        say!("env: ", Stored(at, length));
        at += length + 1;
    }
}

/// The value of a variable: its address and length.
pub fn variable(file: &File, name: &str) -> Option<[u64; 2]> {
    let mut at = file.number(md::ENVP)?;
    loop {
        let length = memory::string_length(at);
        if length == 0 {
            return None;
        }
        let start = at + name.len() as u64;
        let same = (at..)
            .zip(name.bytes())
            .all(|(at, byte)| peek8(at) == Some(byte));
        if same && peek8(start) == Some(b'=') {
            return Some([start + 1, at + length - start - 1]);
        }
        at += length + 1;
    }
}

/// kernend: the same in both places, behind everything, and at the start of a page.
pub fn end(file: &File, metadata: &Metadata) -> Result<(), &'static str> {
    let end = file.number(md::KERNEND).ok_or(MISSING)?;
    if end != entry::kernend() {
        return Err("the stack has another");
    }
    // GRUB has its page tables between the two.
    if end % 4096 != 0 || end < metadata.end {
        return Err("it is no page behind the metadata");
    }
    if let Some(envp) = file.number(md::ENVP)
        && envp >= end
    {
        return Err("the environment lies behind it");
    }
    Ok(())
}

/// The memory map: regions that rise, and RAM that can be written at both ends.
pub fn memory_map(file: &File) -> Result<[u64; 2], &'static str> {
    let map = file.info(md::SMAP).ok_or("no SMAP")?;
    if map.length == 0 || map.length % 20 != 0 {
        return Err("its length is not that of whole regions");
    }
    let (mut top, mut available, mut before) = (0, 0, 0);
    for at in (map.payload..map.payload + map.length).step_by(20) {
        let (base, length) = (peek64(at).unwrap_or(0), peek64(at + 8).unwrap_or(0));
        if peek32(at + 16) != Some(1) {
            continue;
        }
        let Some(end) = base.checked_add(length) else {
            return Err("a region wraps around");
        };
        if base < before {
            return Err("regions do not rise");
        }
        before = end;
        // Whole pages, as the kernel counts.
        let (first, last) = (base + 4095 & !4095, end & !4095);
        if last <= first {
            continue;
        }
        if !memory::writable(first.max(8)) || !memory::writable(last - 8) {
            return Err("RAM that cannot be written");
        }
        top = last.max(top);
        available += last - first;
    }
    let start = &raw const kernel_start as u64 - KERNBASE;
    Ok([
        top,
        available.saturating_sub(entry::kernend().saturating_sub(start)),
    ])
}

/// Prints the memory map as a kernel does that boots verbosely.
pub fn print_memory_map(file: &File) {
    let Some(map) = file.info(md::SMAP) else {
        return;
    };
    for at in (map.payload..map.payload + map.length).step_by(20) {
        let kind = u64::from(peek32(at + 16).unwrap_or(0));
        let [base, length] = [at, at + 8].map(|at| Hex(peek64(at).unwrap_or(0)));
        print!("SMAP type=");
        kind.print();
        say!(" base=", base, " len=", length);
    }
}
