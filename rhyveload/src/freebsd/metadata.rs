//! The module list ("preload metadata") that a FreeBSD kernel is handed (sys/sys/linker.h,
//! sys/x86/include/metadata.h, sys/boot/userboot/userboot/bootinfo64.c).
//!
//! These are the records that bhyve's userboot makes. Other loaders of FreeBSD's make more, of what
//! they alone know: the BIOS loader MODINFOMD_SMAP_XATTR, if the BIOS has attributes with each range
//! of memory (sys/boot/i386/libi386/biossmap.c; userboot's biossmap.c has none), MODINFOMD_MODULEP
//! (libi386/bootinfo64.c), the console's screen and font (MODINFOMD_VBE_FB, MODINFOMD_FONT) and keys
//! of encrypted disks (MODINFOMD_KEYBUF); the EFI loader MODINFOMD_FW_HANDLE, MODINFOMD_EFI_MAP and
//! MODINFOMD_EFI_FB. Of those, MODINFOMD_MODULEP is made for a kernel that is entered by PVH, which
//! looks for it (sys/x86/xen/pv.c). MODINFOMD_DEPLIST is the loader's own, and never handed over.

use vmm_api::state::SymbolTables;

const MODINFO_END: u32 = 0x0000;
const MODINFO_NAME: u32 = 0x0001;
const MODINFO_TYPE: u32 = 0x0002;
const MODINFO_ADDR: u32 = 0x0003;
const MODINFO_SIZE: u32 = 0x0004;
const MODINFO_ARGS: u32 = 0x0006;
const MODINFO_METADATA: u32 = 0x8000;

/// The ELF file header.
pub const MODINFOMD_ELFHDR: u32 = 0x0002;
/// Where the symbols begin.
pub const MODINFOMD_SSYM: u32 = 0x0003;
/// Where the symbols end.
pub const MODINFOMD_ESYM: u32 = 0x0004;
/// Virtual address of the dynamic section.
pub const MODINFOMD_DYNAMIC: u32 = 0x0005;
/// Where the environment is.
pub const MODINFOMD_ENVP: u32 = 0x0006;
/// Boot flags (RB_*).
pub const MODINFOMD_HOWTO: u32 = 0x0007;
/// First byte that is free behind everything that was loaded.
pub const MODINFOMD_KERNEND: u32 = 0x0008;
/// The ELF section headers.
pub const MODINFOMD_SHDR: u32 = 0x0009;
/// Virtual address of the section `.ctors`, whose functions the kernel calls (since 11.0).
pub const MODINFOMD_CTORS_ADDR: u32 = 0x000a;
/// That section's length.
pub const MODINFOMD_CTORS_SIZE: u32 = 0x000b;
/// The memory map.
pub const MODINFOMD_SMAP: u32 = 0x1001;

/// Where the module list itself is.
pub const MODINFOMD_MODULEP: u32 = 0x1006;

/// One range of the memory map (struct bios_smap).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Smap {
    /// First byte.
    pub base: u64,
    /// Length in bytes.
    pub length: u64,
    /// 1 memory, 2 reserved.
    pub kind: u32,
}

impl Smap {
    /// Usable memory.
    pub fn ram(base: u64, length: u64) -> Self {
        Self {
            base,
            length,
            kind: 1,
        }
    }
}

/// One file in the module list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileRecords {
    /// Path it was loaded from.
    pub name: String,
    /// What it is: `elf kernel`, `elf obj module`, `md_image`, ...
    pub kind: String,
    /// Its arguments, if there are any.
    pub args: String,
    /// Guest-physical address of its first byte.
    pub addr: u64,
    /// Length in memory.
    pub size: u64,
    records: Vec<(u32, Vec<u8>)>,
}

impl FileRecords {
    /// A file without a name, in `size` bytes from `addr` on.
    pub fn new(kind: &str, addr: u64, size: u64) -> Self {
        Self {
            kind: kind.to_owned(),
            addr,
            size,
            ..Self::default()
        }
    }

    /// Adds a record of a MODINFOMD type.
    pub fn add(&mut self, kind: u32, payload: impl Into<Vec<u8>>) {
        self.records.push((kind, payload.into()));
    }

    /// Gives the records of a type another payload.
    pub fn replace(&mut self, kind: u32, payload: impl Into<Vec<u8>>) {
        let payload = payload.into();
        for (_, old) in self.records.iter_mut().filter(|(of, _)| *of == kind) {
            old.clone_from(&payload);
        }
    }

    /// Where the symbols are, if these records tell.
    pub fn symbols(&self) -> Option<SymbolTables> {
        let number = |kind| {
            let (_, payload) = self.records.iter().find(|(of, _)| *of == kind)?;
            Some(u64::from_le_bytes(*payload.first_chunk()?))
        };
        Some(SymbolTables {
            start: number(MODINFOMD_SSYM)?,
            end: number(MODINFOMD_ESYM)?,
        })
    }

    /// Adds the memory map.
    pub fn add_smap(&mut self, smap: &[Smap]) {
        let entries = smap.iter().flat_map(|entry| {
            let base = entry.base.to_le_bytes();
            let length = entry.length.to_le_bytes();
            base.into_iter()
                .chain(length)
                .chain(entry.kind.to_le_bytes())
        });
        self.add(MODINFOMD_SMAP, entries.collect::<Vec<_>>());
    }

    fn encode(&self, bytes: &mut Vec<u8>) {
        record(bytes, MODINFO_NAME, &text(&self.name));
        record(bytes, MODINFO_TYPE, &text(&self.kind));
        if !self.args.is_empty() {
            record(bytes, MODINFO_ARGS, &text(&self.args));
        }
        record(bytes, MODINFO_ADDR, &self.addr.to_le_bytes());
        record(bytes, MODINFO_SIZE, &self.size.to_le_bytes());
        // FreeBSD's loader keeps them in a list that it adds to in front.
        for (kind, payload) in self.records.iter().rev() {
            record(bytes, MODINFO_METADATA | kind, payload);
        }
    }
}

/// The list in the kernel's format: u32 type, u32 length, payload, padded to 8 bytes.
pub fn encode<'a>(files: impl Iterator<Item = &'a FileRecords>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for file in files {
        file.encode(&mut bytes);
    }
    record(&mut bytes, MODINFO_END, &[]);
    bytes
}

fn record(bytes: &mut Vec<u8>, kind: u32, payload: &[u8]) {
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_aligned_and_end() {
        let mut kernel = FileRecords {
            name: "/boot/kernel".into(),
            kind: "elf kernel".into(),
            addr: 0x20_0000,
            size: 0x1234,
            ..FileRecords::default()
        };
        kernel.add(MODINFOMD_HOWTO, 0x800u32.to_le_bytes());
        kernel.add_smap(&[Smap::ram(0, 0xa_0000), Smap::ram(1 << 20, 1 << 28)]);
        let module = FileRecords {
            name: "m".into(),
            args: "-v".into(),
            ..FileRecords::default()
        };
        assert_eq!(kernel.symbols(), None);
        let bytes = encode([&kernel, &module].into_iter());
        let mut found = Vec::new();
        let mut at = 0;
        loop {
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            let (kind, len) = (word(at), word(at + 4) as usize);
            found.push((kind, bytes[at + 8..at + 8 + len].to_vec()));
            at += (8 + len).next_multiple_of(8);
            if kind == MODINFO_END {
                break;
            }
        }
        assert_eq!(at, bytes.len());
        assert_eq!(found[0], (1, b"/boot/kernel\0".to_vec()));
        assert_eq!(found[1], (2, b"elf kernel\0".to_vec()));
        assert_eq!((found[4].0, found[4].1.len()), (0x9001, 40));
        assert_eq!(found[5], (0x8007, 0x800u32.to_le_bytes().to_vec()));
        assert_eq!(found[6], (1, b"m\0".to_vec()));
        assert_eq!(found[8], (6, b"-v\0".to_vec()));
        assert_eq!(found[11], (0, Vec::new()));
    }
}
