//! Makes kernel files.

/// One PT_LOAD (or another type) of an ELF file.
#[derive(Clone, Debug)]
pub struct Ph {
    pub kind: u32,
    pub flags: u32,
    pub vaddr: u64,
    pub paddr: u64,
    pub bytes: Vec<u8>,
    pub memsz: u64,
}

impl Ph {
    pub fn load(addr: u64, flags: u32, bytes: &[u8], memsz: u64) -> Self {
        Self {
            kind: 1,
            flags,
            vaddr: addr,
            paddr: addr,
            bytes: bytes.to_vec(),
            memsz,
        }
    }
}

/// An ELF64 file with its segments' bytes behind the headers.
pub fn elf(os_abi: u8, entry: u64, headers: &[Ph]) -> Vec<u8> {
    let mut file = vec![0; 64 + 56 * headers.len()];
    file[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, os_abi]);
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(24, &entry.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &(headers.len() as u16).to_le_bytes());
    for (index, ph) in headers.iter().enumerate() {
        let at = 64 + 56 * index;
        let offset = file.len() as u64;
        let len = ph.bytes.len() as u64;
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(at, &ph.kind.to_le_bytes());
        put(at + 4, &ph.flags.to_le_bytes());
        let words = [offset, ph.vaddr, ph.paddr, len, ph.memsz, 8];
        for (n, word) in words.into_iter().enumerate() {
            put(at + 8 + 8 * n, &word.to_le_bytes());
        }
        file.extend_from_slice(&ph.bytes);
    }
    file
}

/// A plain kernel with text at 2 MiB and data with bss behind it.
pub fn plain() -> Vec<u8> {
    let text = Ph::load(0x20_0000, 5, b"\xf4text", 5);
    let data = Ph::load(0x20_1000, 6, b"data", 0x2000);
    elf(0, 0x20_0000, &[text, data])
}

/// A PT_NOTE with Xen's PHYS32_ENTRY.
pub fn xen_note(entry: u32) -> Ph {
    let mut bytes = Vec::new();
    for word in [4, 4, 18] {
        bytes.extend_from_slice(&u32::to_le_bytes(word));
    }
    bytes.extend_from_slice(b"Xen\0");
    bytes.extend_from_slice(&entry.to_le_bytes());
    Ph {
        kind: 4,
        flags: 4,
        vaddr: 0,
        paddr: 0,
        memsz: bytes.len() as u64,
        bytes,
    }
}

/// An ELF file as Linux is linked: virtual addresses high, the entry point physical.
pub fn vmlinux() -> Vec<u8> {
    let high = |addr: u64, flags, bytes: &[u8], memsz| Ph {
        vaddr: 0xffff_ffff_8000_0000 + addr,
        ..Ph::load(addr, flags, bytes, memsz)
    };
    let text = high(0x100_0000, 5, &[0x90; 0x100], 0x100);
    let data = high(0x120_0000, 6, b"data", 0x10_0000);
    elf(0, 0x100_0000, &[text, data, xen_note(0x100_0040)])
}

/// A bzImage: one boot sector, four of setup, and a kernel of 64 KiB.
pub fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 5 * 512];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[4]);
    put(0x1f4, &0x1000u32.to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x20_0000u32.to_le_bytes());
    file.resize(5 * 512 + 0x1_0000, 0xcc);
    file
}
