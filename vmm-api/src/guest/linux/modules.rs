//! Linux's modules: the list that begins at `modules` (kernel/module/main.c, before 5.19
//! kernel/module.c). Each of them has a table of symbols and a table for unwinding of its own.
//!
//! Symbols are an ELF symbol table and strings as in the module's file, with the addresses of this
//! guest, and nm(1)'s letters beside (`struct mod_kallsyms`).

use std::collections::HashSet;
use std::ops::Range;

use super::Linux;
use crate::guest::symbols::Kind;
use crate::guest::{GuestError, View};

/// More than any kernel has loaded at once.
const MODULES_MAX: usize = 10_000;
/// More symbols than a module has.
const SYMBOLS_MAX: u64 = 1 << 20;
/// More than the names of a module's symbols have together.
const STRINGS_MAX: u64 = 16 << 20;
/// KSYM_NAME_LEN, since 6.1; the longest name.
const NAME_MAX: u64 = 512;
/// `Elf64_Sym`: name (32 bits), info, other, section (16 bits), value, size (64 bits each).
const SYMBOL: usize = 24;
/// MODULE_STATE_UNFORMED: nothing of it is there yet.
const UNFORMED: u64 = 3;
/// MOD_TEXT and MOD_INIT_TEXT of `enum mod_mem_type` (include/linux/module.h).
const TEXTS: [u64; 2] = [0, 4];

/// A module that is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Where its code is.
    pub code: Vec<Range<u64>>,
    /// Its unwind table, if it has one.
    pub orc: Option<Orc>,
}

/// Where a module's unwind table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Orc {
    /// The addresses.
    pub addresses: u64,
    /// What is known of each of them.
    pub entries: u64,
    /// How many there are.
    pub count: u64,
}

/// A name in a module, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// The address.
    pub address: u64,
    /// What it names.
    pub kind: Kind,
    /// The name.
    pub name: String,
}

/// All modules that are loaded, with their names. One whose table makes no sense, as it is on its way
/// in or out just now, has none.
///
/// # Errors
///
/// The kernel does not say where its modules are, or their list makes no sense.
pub fn modules(linux: &Linux<'_>) -> Result<Vec<(Module, Vec<Name>)>, GuestError> {
    const MODULE: &str = "module";
    let head = linux.address("modules")?;
    let list = linux.btf.member(MODULE, "list.next")?.offset;
    let name = linux.btf.member(MODULE, "name")?;
    let mut seen = HashSet::new();
    let mut modules = Vec::new();
    let mut entry = linux.view.word(head)?;
    while entry != head {
        if !seen.insert(entry) || seen.len() > MODULES_MAX {
            return Err(GuestError::Damaged(format!(
                "the kernel's list of modules comes back to {entry:#x}"
            )));
        }
        let at = entry.wrapping_sub(list);
        if linux.member(at, MODULE, "state")? != UNFORMED {
            let module = Module {
                name: linux.view.text_of(at, name)?,
                code: code(linux, at)?,
                orc: orc(linux, at),
            };
            modules.push((module, names(linux, at).unwrap_or_default()));
        }
        entry = linux.view.word(entry)?;
    }
    Ok(modules)
}

/// Where a module's code is: since 6.4 there is an array of its parts.
fn code(linux: &Linux<'_>, module: u64) -> Result<Vec<Range<u64>>, GuestError> {
    let mut code = Vec::new();
    let mut add = |base: u64, size: u64| {
        if base != 0 && size != 0 {
            code.push(base..base.saturating_add(size));
        }
    };
    match linux.btf.member("module", "mem") {
        Ok(parts) => {
            let each = linux.btf.size_of_struct("module_memory")?;
            let types = TEXTS.into_iter();
            for part in types.filter(|part| (part + 1) * each <= parts.size) {
                let at = module.wrapping_add(parts.offset + part * each);
                let field = |path| linux.member(at, "module_memory", path);
                add(field("base")?, field("size")?);
            }
        }
        Err(_) => {
            for part in ["core_layout", "init_layout"] {
                let at = module.wrapping_add(linux.btf.member("module", part)?.offset);
                let field = |path| linux.member(at, "module_layout", path);
                add(field("base")?, field("text_size")?);
            }
        }
    }
    Ok(code)
}

fn orc(linux: &Linux<'_>, module: u64) -> Option<Orc> {
    let field = |path| linux.member(module, "module", path).ok();
    let orc = Orc {
        addresses: field("arch.orc_unwind_ip")?,
        entries: field("arch.orc_unwind")?,
        count: field("arch.num_orcs")?,
    };
    (orc.count > 0).then_some(orc)
}

/// The names in one module.
fn names(linux: &Linux<'_>, module: u64) -> Result<Vec<Name>, GuestError> {
    let tables = linux.member(module, "module", "kallsyms")?;
    let field = |path| linux.member(tables, "mod_kallsyms", path);
    let count = field("num_symtab")?.min(SYMBOLS_MAX);
    let table = linux
        .view
        .bytes(field("symtab")?, count as usize * SYMBOL)?;
    // Before 5.2 the letter took the place of ELF's info.
    let letters = match field("typetab") {
        Ok(letters) => Some(linux.view.bytes(letters, count as usize)?),
        Err(_) => None,
    };
    let entries = table.as_chunks::<SYMBOL>().0.iter();
    let entries: Vec<Entry> = entries.map(Entry::read).collect();
    let strings = strings(linux.view, field("strtab")?, &entries);
    let mut names = Vec::new();
    for (n, entry) in entries.iter().enumerate() {
        let letter = letters.as_ref().and_then(|letters| letters.get(n).copied());
        let name = strings.get(entry.name as usize..).unwrap_or_default();
        let name = name.split(|&b| b == 0).next().unwrap_or_default();
        if entry.section != 0 && is_name(name) {
            names.push(Name {
                address: entry.value,
                kind: Kind::of(letter.unwrap_or(entry.info)),
                name: String::from_utf8_lossy(name).into_owned(),
            });
        }
    }
    Ok(names)
}

/// The strings that the entries name, in one piece; what cannot be read is missing at its end.
fn strings(view: View<'_>, at: u64, entries: &[Entry]) -> Vec<u8> {
    let last = entries.iter().map(|entry| u64::from(entry.name)).max();
    let len = last.unwrap_or(0).min(STRINGS_MAX) + NAME_MAX;
    view.bytes_up_to(at, len as usize)
}

#[derive(Clone, Copy)]
struct Entry {
    name: u32,
    info: u8,
    /// 0 is another module's symbol, or the kernel's.
    section: u16,
    value: u64,
}

impl Entry {
    fn read(bytes: &[u8; SYMBOL]) -> Self {
        let number = |from: usize, len: usize| {
            let bytes = bytes.iter().skip(from).take(len).rev();
            bytes.fold(0u64, |word, &byte| word << 8 | u64::from(byte))
        };
        Self {
            name: number(0, 4) as u32,
            info: number(4, 1) as u8,
            section: number(6, 2) as u16,
            value: number(8, 8),
        }
    }
}

/// Whether a symbol is one: compilers' and assemblers' own labels are none (is_mapping_symbol in
/// include/linux/module_symbol.h).
fn is_name(name: &[u8]) -> bool {
    !(name.is_empty() || name.starts_with(b".L") || name.starts_with(b"L0"))
}

#[cfg(test)]
mod tests {
    use super::super::btf::tests::Types;
    use super::*;
    use crate::guest::testing::Ram;
    use crate::guest::{Kernel, Symbols};

    const HEAD: u64 = 0x100;
    const BTF: u64 = 0x8000;
    const FIRST: u64 = 0x200;
    const SECOND: u64 = 0x400;
    const MAP: &[u8] = b"0000000000000100 d modules\n0000000000000110 D init_task
0000000000008000 R __start_BTF\n0000000000001000 T kernel\n";

    /// `struct module` as it is since 6.4, or was before.
    fn types(new: bool) -> Vec<u8> {
        let mut types = Types::new();
        let (byte, half, word) = (types.int(1), types.int(4), types.int(8));
        let list = types.structure("list_head", 16, &[("next", word, 0), ("prev", word, 8)]);
        let name = types.array(byte, 56);
        let orc = [
            ("num_orcs", half, 0),
            ("orc_unwind_ip", word, 8),
            ("orc_unwind", word, 16),
        ];
        let arch = types.structure("mod_arch_specific", 24, &orc);
        let mut members = vec![
            ("state", half, 0),
            ("list", list, 8),
            ("name", name, 24),
            ("kallsyms", word, 80),
            ("arch", arch, 88),
        ];
        if new {
            let part = [("base", word, 0), ("size", half, 8)];
            let part = types.structure("module_memory", 16, &part);
            members.push(("mem", types.array(part, 7), 112));
        } else {
            let part = [
                ("base", word, 0),
                ("size", half, 8),
                ("text_size", half, 12),
            ];
            let part = types.structure("module_layout", 16, &part);
            members.extend([("core_layout", part, 112), ("init_layout", part, 176)]);
        }
        types.structure("module", 224, &members);
        let tables = [
            ("symtab", word, 0),
            ("num_symtab", half, 8),
            ("strtab", word, 16),
            ("typetab", word, 24),
        ];
        types.structure("mod_kallsyms", 32, &tables);
        types.bytes()
    }

    /// Two modules, the second of which is not formed; the first's init code is still there.
    fn ram(new: bool) -> Ram {
        let mut ram = Ram::new(0x10000);
        ram.word(HEAD, FIRST + 8);
        ram.word(FIRST + 8, SECOND + 8);
        ram.word(SECOND + 8, HEAD);
        ram.half(SECOND, UNFORMED as u32);
        ram.put(FIRST + 24, b"disk\0");
        ram.word(FIRST + 80, 0x600);
        // The text's part, which is the first; its size is its text's, too.
        ram.word(FIRST + 112, 0x5000);
        ram.half(FIRST + 120, 0x1000);
        ram.half(FIRST + 124, 0x1000);
        // The fifth part.
        ram.word(FIRST + 176, 0x7000);
        ram.half(FIRST + 184, 0x100);
        ram.half(FIRST + 188, 0x100);
        for (at, word) in [(0, 0x700), (8, 6), (16, 0x900), (24, 0xa00)] {
            ram.word(0x600 + at, word);
        }
        let strings = b"\0read\0.Lhere\0init\0table\0printk\0";
        ram.put(0x900, strings);
        ram.put(0xa00, b"?ttTdU");
        let symbols = [
            (0, 0, 0u64),
            (1, 1, 0x5010),
            (6, 1, 0x5020),
            (13, 2, 0x7000),
            (18, 3, 0x6000),
            (24, 0, 0),
        ];
        for (n, (name, section, value)) in (0..).zip(symbols) {
            let at = 0x700 + 24 * n;
            ram.half(at, name);
            ram.half(at + 4, section << 16);
            ram.word(at + 8, value);
        }
        ram.put(BTF, &types(new));
        ram
    }

    #[test]
    fn functions_of_modules_have_names_in_both_layouts() {
        for new in [false, true] {
            let ram = ram(new);
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), MAP).unwrap();
            let kernel = Kernel::find(&ram, ram.vcpus(), Some(file.path()), None).unwrap();
            assert_eq!(
                kernel.symbols.name(0x5018).as_deref(),
                Some("kernel+0x4018")
            );
            let kernel = kernel.with_modules(&ram);
            let name = |address| kernel.symbols.name(address);
            assert_eq!(name(0x5018).as_deref(), Some("read+0x8 [disk]"), "{new}");
            assert_eq!(name(0x5028).as_deref(), Some("read+0x18 [disk]"), "a label");
            assert_eq!(name(0x7001).as_deref(), Some("init+0x1 [disk]"));
            assert_eq!(name(0x6000), None, "data of a module is no code");
            assert_eq!(name(0x1002).as_deref(), Some("kernel+0x2"));
            assert_eq!(kernel.symbols.address("table"), Some(0x6000));
            assert_eq!(kernel.symbols.address("printk"), None);
            assert_eq!(kernel.modules.len(), 1);
        }
    }

    #[test]
    fn lists_that_lead_nowhere_end() {
        let mut ram = ram(true);
        ram.word(FIRST + 8, FIRST + 8);
        let symbols = Symbols::parse(MAP).unwrap();
        let all = |ram: &Ram| modules(&Linux::new(ram.view(), &symbols).unwrap());
        let error = all(&ram).unwrap_err().to_string();
        assert!(error.contains("list of modules comes back"), "{error}");
        ram.word(FIRST + 8, u64::MAX - 3);
        assert!(all(&ram).is_err());
        // Tables that are not there leave a module without names.
        ram.word(FIRST + 8, HEAD);
        ram.word(FIRST + 80, 1 << 40);
        let all = all(&ram).unwrap();
        assert_eq!((all.len(), all[0].1.len()), (1, 0));
    }
}
