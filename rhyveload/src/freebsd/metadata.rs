//! The module list ("preload metadata") that a FreeBSD kernel is handed (sys/sys/linker.h,
//! sys/x86/include/metadata.h, sys/boot/userboot/userboot/bootinfo64.c).

const MODINFO_END: u32 = 0x0000;
const MODINFO_NAME: u32 = 0x0001;
const MODINFO_TYPE: u32 = 0x0002;
const MODINFO_ADDR: u32 = 0x0003;
const MODINFO_SIZE: u32 = 0x0004;
const MODINFO_METADATA: u32 = 0x8000;
const MODINFOMD_ENVP: u32 = MODINFO_METADATA | 0x0006;
const MODINFOMD_HOWTO: u32 = MODINFO_METADATA | 0x0007;
const MODINFOMD_KERNEND: u32 = MODINFO_METADATA | 0x0008;
const MODINFOMD_SMAP: u32 = MODINFO_METADATA | 0x1001;

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

/// What a kernel is told.
#[derive(Clone, Debug)]
pub struct Metadata<'a> {
    /// Path the kernel was loaded from.
    pub name: &'a str,
    /// Guest-physical address of its first byte.
    pub base: u64,
    /// Length in memory.
    pub size: u64,
    /// Boot flags (RB_*).
    pub howto: u32,
    /// Guest-physical address of the environment.
    pub envp: u64,
    /// First byte that is free behind everything that was loaded.
    pub kernend: u64,
    /// The memory map.
    pub smap: Vec<Smap>,
}

impl Metadata<'_> {
    /// The records in the kernel's format: u32 type, u32 length, payload, padded to 8 bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut record = |kind: u32, payload: &[u8]| {
            bytes.extend_from_slice(&kind.to_le_bytes());
            bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
            bytes.extend_from_slice(payload);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        };
        record(MODINFO_NAME, &text(self.name));
        record(MODINFO_TYPE, &text("elf kernel"));
        record(MODINFO_ADDR, &self.base.to_le_bytes());
        record(MODINFO_SIZE, &self.size.to_le_bytes());
        record(MODINFOMD_HOWTO, &self.howto.to_le_bytes());
        record(MODINFOMD_ENVP, &self.envp.to_le_bytes());
        record(MODINFOMD_KERNEND, &self.kernend.to_le_bytes());
        let smap = self.smap.iter().flat_map(|entry| {
            let base = entry.base.to_le_bytes();
            let length = entry.length.to_le_bytes();
            base.into_iter()
                .chain(length)
                .chain(entry.kind.to_le_bytes())
        });
        record(MODINFOMD_SMAP, &smap.collect::<Vec<_>>());
        record(MODINFO_END, &[]);
        bytes
    }
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
        let metadata = Metadata {
            name: "/boot/kernel",
            base: 0x20_0000,
            size: 0x1234,
            howto: 0x800,
            envp: 0x30_0000,
            kernend: 0x40_0000,
            smap: vec![Smap::ram(0, 0xa_0000), Smap::ram(1 << 20, 1 << 28)],
        };
        let bytes = metadata.encode();
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
        assert_eq!(found[4], (0x8007, 0x800u32.to_le_bytes().to_vec()));
        assert_eq!((found[7].0, found[7].1.len()), (0x9001, 40));
        assert_eq!(found[8], (0, Vec::new()));
    }
}
