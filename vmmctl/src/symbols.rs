//! Names for code addresses: of an ELF file's symbol table, or of a System.map or kallsyms text.

use std::path::{Path, PathBuf};

use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSymbol, SymbolKind};

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
}

/// Functions by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Symbols {
    /// Address and name, in the order of addresses.
    functions: Vec<(u64, String)>,
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
        let bytes = std::fs::read(path).map_err(|source| SymbolError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&bytes).ok_or_else(|| SymbolError::None(path.to_owned()))
    }

    /// The same of what stands in a file; none if there is no function's name in it.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut functions = if bytes.starts_with(b"\x7fELF") {
            elf(bytes)?
        } else {
            map(bytes)
        };
        functions.sort();
        functions.dedup_by_key(|(address, _)| *address);
        (!functions.is_empty()).then_some(Self {
            functions,
            slide: 0,
        })
    }

    /// The address of a function in the guest.
    pub fn address(&self, name: &str) -> Option<u64> {
        let found = self.functions.iter().find(|(_, n)| n == name);
        found.map(|&(address, _)| address.wrapping_add(self.slide))
    }

    /// Moves all of them, as a kernel moves itself at a random start (KASLR).
    #[must_use]
    pub fn moved(self, slide: u64) -> Self {
        Self { slide, ..self }
    }

    /// `function+0xoffset` of an address in the guest; none where no function begins within 1 MiB
    /// before it.
    pub fn name(&self, address: u64) -> Option<String> {
        const FAR: u64 = 1 << 20;
        let address = address.wrapping_sub(self.slide);
        let behind = self
            .functions
            .partition_point(|&(start, _)| start <= address);
        let (start, name) = self.functions.get(behind.checked_sub(1)?)?;
        let offset = address - start;
        (offset < FAR).then(|| format!("{name}+{offset:#x}"))
    }
}

fn elf(bytes: &[u8]) -> Option<Vec<(u64, String)>> {
    let file = ElfFile64::<Endianness>::parse(bytes).ok()?;
    let functions = file.symbols().filter(|symbol| {
        symbol.kind() == SymbolKind::Text && symbol.address() != 0 && symbol.is_definition()
    });
    let named = functions.filter_map(|s| Some((s.address(), s.name().ok()?.to_owned())));
    Some(named.filter(|(_, name)| !name.is_empty()).collect())
}

/// Lines of nm(1): address, type, name, and for a module's function its name in brackets.
fn map(bytes: &[u8]) -> Vec<(u64, String)> {
    let lines = bytes.split(|&b| b == b'\n');
    let function = |line: &[u8]| {
        let mut words = std::str::from_utf8(line).ok()?.split_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        let text = matches!(words.next()?, "t" | "T" | "w" | "W");
        (text && address != 0).then_some((address, words.next()?.to_owned()))
    };
    lines.filter_map(function).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_names_addresses() {
        let text = b"0000000000000000 A zero\nffffffff81000000 T _text\nffffffff81000100 t inner\n\
                     ffffffff81000080 D data\nnot a line\nffffffff81000200 T outer [mod]\n";
        let symbols = Symbols::parse(text).unwrap();
        let name = |address| symbols.name(address);
        assert_eq!(name(0xffff_ffff_8100_0000).as_deref(), Some("_text+0x0"));
        assert_eq!(name(0xffff_ffff_8100_01ff).as_deref(), Some("inner+0xff"));
        assert_eq!(name(0xffff_ffff_8100_0200).as_deref(), Some("outer+0x0"));
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
