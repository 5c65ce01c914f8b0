//! Names for addresses: of an ELF file's symbol table, of a System.map or kallsyms text, or of what a
//! kernel carries with it or was handed by its loader.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSymbol, SymbolKind};

use crate::pagewalk::PhysicalMemory;
use crate::state::SymbolTables;

/// Larger tables than any kernel's are not read.
const TABLES_MAX: u64 = 64 << 20;

/// Why a file gives no symbols.
#[derive(Debug, thiserror::Error)]
pub enum SymbolError {
    /// It cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// There are none in it.
    #[error(
        "{}: no symbols in it: give an ELF file that is not stripped, or a System.map, with --symbols",
        .0.display()
    )]
    None(PathBuf),
    /// There are none in memory either.
    #[error(
        "no names for addresses: there is no Linux in memory that carries its symbols, and no kernel file is known; give one with --symbols"
    )]
    Nowhere,
}

/// What a symbol names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Code.
    Text,
    /// Anything else.
    Data,
}

impl Kind {
    /// By nm(1)'s letter.
    pub fn of(letter: u8) -> Self {
        match letter {
            b't' | b'T' | b'w' | b'W' => Self::Text,
            _ => Self::Data,
        }
    }
}

/// How far behind its beginning an address may be a function's.
const FAR: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Symbol {
    address: u64,
    /// Of its name in all of them.
    at: u32,
    len: u16,
    /// Which module's it is, counted from 1; the kernel's own is 0.
    module: u16,
}

/// A part of the kernel that came later: a module of Linux's.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Module {
    name: String,
    /// Where its code is; nothing where that is not known.
    code: Vec<Range<u64>>,
}

/// A place in a function. Written as Linux does: `function+0xoffset [module]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function<'a> {
    /// The function.
    pub name: &'a str,
    /// Bytes from its beginning.
    pub offset: u64,
    /// The module that it is in, if it is not the kernel's own.
    pub module: Option<&'a str>,
}

impl fmt::Display for Function<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:#x}", self.name, self.offset)?;
        match self.module {
            Some(module) => write!(f, " [{module}]"),
            None => Ok(()),
        }
    }
}

/// Names by address and addresses by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Symbols {
    /// In the order of addresses.
    functions: Vec<Symbol>,
    data: Vec<Symbol>,
    names: String,
    modules: Vec<Module>,
    /// What is added to an address of the file to get one of the guest.
    slide: u64,
}

impl Symbols {
    /// Reads a file of any of the kinds.
    ///
    /// # Errors
    ///
    /// It cannot be read, or has no function's name in it.
    pub fn read(path: &Path) -> Result<Self, SymbolError> {
        let read = || {
            // Some of them never end.
            if std::fs::metadata(path)?.file_type().is_char_device() {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "it is a device",
                ));
            }
            std::fs::read(path)
        };
        let bytes = read().map_err(|source| SymbolError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&bytes).ok_or_else(|| SymbolError::None(path.to_owned()))
    }

    /// The same of what stands in a file; none if there is no function's name in it.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut symbols = Self::default();
        if bytes.starts_with(b"\x7fELF") {
            elf(bytes, &mut symbols)?;
        } else {
            map(bytes, &mut symbols);
        }
        symbols.settle()
    }

    /// Reads what a loader has put into memory for the kernel; none if that is not there, or no
    /// longer.
    pub fn handed_over(memory: &dyn PhysicalMemory, tables: SymbolTables) -> Option<Self> {
        let len = tables.end.checked_sub(tables.start)?;
        if len > TABLES_MAX {
            return None;
        }
        let mut bytes = vec![0; len as usize];
        memory.read_physical(tables.start, &mut bytes).ok()?;
        let (table, rest) = counted(&bytes)?;
        let (strings, _) = counted(rest)?;
        let mut symbols = Self::default();
        for entry in table.as_chunks::<24>().0 {
            if let Some((address, kind, name)) = entry_of(entry, strings) {
                symbols.add(address, kind, name);
            }
        }
        symbols.settle()
    }

    /// Adds a symbol; a name of more than 65,535 bytes is none.
    pub(super) fn add(&mut self, address: u64, kind: Kind, name: &str) {
        self.add_to(0, address, kind, name);
    }

    /// Adds a module; its number for [`Symbols::add_to`]. Of more than 65,534 modules the last ones
    /// are one.
    fn add_module(&mut self, name: &str, code: Vec<Range<u64>>) -> u16 {
        let name = name.to_owned();
        self.modules.push(Module { name, code });
        u16::try_from(self.modules.len()).unwrap_or(u16::MAX)
    }

    /// Adds a module with its names, all at the guest's addresses; only where its code is are they
    /// its functions. [`Symbols::settled`] is to come.
    pub(super) fn learn<'a>(
        &mut self,
        name: &str,
        code: &[Range<u64>],
        names: impl IntoIterator<Item = (u64, Kind, &'a str)>,
    ) {
        let slide = self.slide;
        let own = |address: u64| address.wrapping_sub(slide);
        let code = code.iter().map(|code| own(code.start)..own(code.end));
        let module = self.add_module(name, code.collect());
        for (address, kind, name) in names {
            self.add_to(module, own(address), kind, name);
        }
    }

    /// Adds a symbol of a module's, or with 0 of the kernel's own.
    fn add_to(&mut self, module: u16, address: u64, kind: Kind, name: &str) {
        let (Ok(at), Ok(len)) = (u32::try_from(self.names.len()), u16::try_from(name.len())) else {
            return;
        };
        self.names.push_str(name);
        let list = match kind {
            Kind::Text => &mut self.functions,
            Kind::Data => &mut self.data,
        };
        list.push(Symbol {
            address,
            at,
            len,
            module,
        });
    }

    /// Puts what was added in order; none if there is no function.
    pub(super) fn settle(self) -> Option<Self> {
        Some(self.settled()).filter(|symbols| !symbols.functions.is_empty())
    }

    /// Puts what was added in order.
    pub(super) fn settled(mut self) -> Self {
        for list in [&mut self.functions, &mut self.data] {
            list.sort();
        }
        // The first name of an address is the one that is shown.
        self.functions.dedup_by_key(|symbol| symbol.address);
        self
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.functions.len() + self.data.len()
    }

    /// The address of a function or of data in the guest.
    pub fn address(&self, name: &str) -> Option<u64> {
        let mut all = self.functions.iter().chain(&self.data);
        let found = all.find(|symbol| self.text(symbol) == name)?;
        Some(found.address.wrapping_add(self.slide))
    }

    /// Moves all of them, as a kernel moves itself at a random start (KASLR).
    #[must_use]
    pub fn moved(self, slide: u64) -> Self {
        Self { slide, ..self }
    }

    /// `function+0xoffset` of an address in the guest, as [`Function`] is written; none where no
    /// function begins within 1 MiB before it.
    pub fn name(&self, address: u64) -> Option<String> {
        Some(self.function(address)?.to_string())
    }

    /// The function at an address in the guest.
    pub fn function(&self, address: u64) -> Option<Function<'_>> {
        let address = address.wrapping_sub(self.slide);
        let behind = self
            .functions
            .partition_point(|symbol| symbol.address <= address);
        let symbol = self.functions.get(behind.checked_sub(1)?)?;
        let offset = address - symbol.address;
        let module = usize::from(symbol.module).checked_sub(1);
        let module = module.and_then(|number| self.modules.get(number));
        let inside = module.is_none_or(|module| {
            module.code.is_empty() || module.code.iter().any(|code| code.contains(&address))
        });
        (offset < FAR && inside).then(|| Function {
            name: self.text(symbol),
            offset,
            module: module.map(|module| module.name.as_str()),
        })
    }

    fn text(&self, symbol: &Symbol) -> &str {
        let at = symbol.at as usize;
        self.names
            .get(at..at + usize::from(symbol.len))
            .unwrap_or_default()
    }
}

fn elf(bytes: &[u8], symbols: &mut Symbols) -> Option<()> {
    let file = ElfFile64::<Endianness>::parse(bytes).ok()?;
    for symbol in file.symbols() {
        let kind = match symbol.kind() {
            SymbolKind::Text => Kind::Text,
            SymbolKind::Data => Kind::Data,
            _ => continue,
        };
        let name = symbol.name().unwrap_or_default();
        if symbol.address() != 0 && symbol.is_definition() && !name.is_empty() {
            symbols.add(symbol.address(), kind, name);
        }
    }
    Some(())
}

/// Bytes behind their length, and what follows them on the next multiple of 8.
fn counted(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<8>()?;
    let len = usize::try_from(u64::from_le_bytes(*len)).ok()?;
    let found = rest.get(..len)?;
    let next = len.checked_next_multiple_of(8)?;
    Some((found, rest.get(next..).unwrap_or_default()))
}

/// An Elf64_Sym (System V ABI, figure 4-15) that names a function or data of the kernel's.
fn entry_of<'a>(entry: &[u8; 24], strings: &'a [u8]) -> Option<(u64, Kind, &'a str)> {
    let [
        n0,
        n1,
        n2,
        n3,
        info,
        _,
        s0,
        s1,
        v0,
        v1,
        v2,
        v3,
        v4,
        v5,
        v6,
        v7,
        ..,
    ] = *entry;
    let kind = match info & 0xf {
        1 => Kind::Data,
        2 => Kind::Text,
        _ => return None,
    };
    let address = u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, v7]);
    if address == 0 || [s0, s1] == [0, 0] {
        return None;
    }
    let name = strings.get(u32::from_le_bytes([n0, n1, n2, n3]) as usize..)?;
    let name = name.split(|&byte| byte == 0).next()?;
    let name = std::str::from_utf8(name).ok()?;
    (!name.is_empty()).then_some((address, kind, name))
}

/// Lines of nm(1): address, type, name, and in /proc/kallsyms for what is a module's its name in
/// brackets.
fn map(bytes: &[u8], symbols: &mut Symbols) {
    let mut modules = HashMap::<&str, u16>::new();
    for line in bytes.split(|&b| b == b'\n') {
        let mut words = std::str::from_utf8(line)
            .unwrap_or_default()
            .split_whitespace();
        let mut word = || words.next();
        let (Some(address), Some(&[letter]), Some(name)) =
            (word(), word().map(str::as_bytes), word())
        else {
            continue;
        };
        let module = word().and_then(|word| word.strip_prefix('[')?.strip_suffix(']'));
        let module = module.map_or(0, |name| {
            let new = || symbols.add_module(name, Vec::new());
            *modules.entry(name).or_insert_with(new)
        });
        match u64::from_str_radix(address, 16) {
            Ok(address) if address != 0 => symbols.add_to(module, address, Kind::of(letter), name),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_ends_is_not_read() {
        let read = Symbols::read(Path::new("/dev/zero"));
        let Err(SymbolError::Read { source, .. }) = read else {
            panic!("/dev/zero has symbols: {read:?}");
        };
        assert_eq!(source.to_string(), "it is a device");
    }

    #[test]
    fn a_map_names_addresses() {
        let text = b"0000000000000000 A zero\nffffffff81000000 T _text\nffffffff81000100 t inner\n\
                     ffffffff81000080 D data\nnot a line\nffffffff81000200 T outer [mod]\n";
        let symbols = Symbols::parse(text).unwrap();
        let name = |address| symbols.name(address);
        assert_eq!(name(0xffff_ffff_8100_0000).as_deref(), Some("_text+0x0"));
        assert_eq!(name(0xffff_ffff_8100_01ff).as_deref(), Some("inner+0xff"));
        assert_eq!(
            name(0xffff_ffff_8100_0200).as_deref(),
            Some("outer+0x0 [mod]")
        );
        assert_eq!(symbols.address("data"), Some(0xffff_ffff_8100_0080));
        assert_eq!(name(0xffff_ffff_80ff_ffff), None);
        assert_eq!(name(0xffff_ffff_8200_0000), None, "too far");
        let moved = symbols.moved(0x20_0000);
        assert_eq!(moved.address("inner"), Some(0xffff_ffff_8120_0100));
        assert_eq!(
            moved.name(0xffff_ffff_8120_0101).as_deref(),
            Some("inner+0x1")
        );
        assert_eq!(Symbols::parse(b"nothing"), None);
        assert_eq!(Symbols::parse(b"\x7fELF"), None);
    }

    #[test]
    fn a_modules_function_is_named_where_its_code_is() {
        let symbols = Symbols::parse(b"0000000000000800 T kernel\n").unwrap();
        let mut symbols = symbols.moved(0x800);
        let names = [(0x8010, Kind::Text, "read"), (0xa000, Kind::Text, "init")];
        symbols.learn("disk", &[0x8000..0x9000, 0xa000..0xa100], names);
        let symbols = symbols.settled();
        let name = |address| symbols.name(address);
        assert_eq!(name(0x8010).as_deref(), Some("read+0x0 [disk]"));
        assert_eq!(name(0x8fff).as_deref(), Some("read+0xfef [disk]"));
        assert_eq!(name(0xa00f).as_deref(), Some("init+0xf [disk]"));
        assert_eq!(name(0x9000), None, "behind its code");
        assert_eq!(name(0xa100), None);
        assert_eq!(name(0x1001).as_deref(), Some("kernel+0x1"));
        assert_eq!(symbols.function(0x8011).unwrap().name, "read");
        assert_eq!(symbols.address("init"), Some(0xa000));
    }

    #[test]
    fn an_elf_file_names_its_functions() {
        let own = std::env::current_exe().unwrap();
        let symbols = Symbols::read(&own).unwrap();
        let main = symbols.address("main").unwrap();
        assert_eq!(symbols.name(main + 1).as_deref(), Some("main+0x1"));
    }

    proptest::proptest! {
        #[test]
        fn lies_do_not_panic(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300),
            elf: bool, address: u64,
        ) {
            let head: &[u8] = if elf { b"\x7fELF\x02\x01\x01" } else { b"" };
            if let Some(symbols) = Symbols::parse(&[head, &bytes].concat()) {
                let _ = symbols.name(address);
            }
        }
    }
}
