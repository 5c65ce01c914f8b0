//! What the loader hands over: the memory map and texts, by either boot protocol.
//!
//! FreeBSD's metadata is a list of records {u32 type, u32 length, payload padded to 8} (sys/kern/
//! subr_module.c, sys/sys/linker.h, sys/x86/include/metadata.h); PVH's is struct hvm_start_info
//! (Xen, include/public/arch-x86/hvm/ start_info.h).

use crate::entry::{self, PROTOCOL_METADATA, PROTOCOL_PVH};
use crate::memory::{MAX_TEXT, peek32, peek64, string_length};

const MODINFO_END: u32 = 0;
const MODINFO_NAME: u32 = 1;
const MODINFO_TYPE: u32 = 2;
const MODINFOMD_ENVP: u32 = 0x8006;
const MODINFOMD_HOWTO: u32 = 0x8007;
const MODINFOMD_KERNEND: u32 = 0x8008;
const MODINFOMD_SMAP: u32 = 0x9001;
const PVH_MAGIC: u32 = 0x336e_c578;

/// The most records and memory map entries looked at.
const MAX_RECORDS: u32 = 64;
const MAX_REGIONS: u32 = 64;

/// What was found, as physical addresses; 0 is "not given".
#[derive(Clone, Copy, Default)]
pub struct BootInfo {
    /// The memory map's first entry, the number of entries and the bytes from one to the next.
    pub map: u64,
    pub regions: u32,
    pub stride: u64,
    /// name=value strings, each with a NUL, and one more NUL.
    pub environment: u64,
    /// The command line, with its NUL.
    pub command_line: u64,
    /// The first kernel's name and type, with NUL (metadata only).
    pub name: u64,
    pub kind: u64,
    pub howto: Option<u32>,
    pub kernel_end: Option<u64>,
    /// The ACPI RSDP (PVH only).
    pub rsdp: u64,
    /// The records seen (metadata only).
    pub records: u32,
}

/// One region of the memory map.
pub struct Region {
    pub base: u64,
    pub length: u64,
    /// 1 RAM, 2 reserved, 3 ACPI tables, 4 ACPI non-volatile, 5 bad.
    pub kind: u32,
}

/// Reads what the loader handed over; an error says why it cannot be read.
pub fn read() -> Result<BootInfo, &'static str> {
    let state = entry::state();
    match state.protocol {
        PROTOCOL_METADATA => metadata(u64::from(state.words[0])),
        PROTOCOL_PVH => pvh(u64::from(state.words[0])),
        _ => Err("entered in no known way"),
    }
}

fn metadata(modulep: u64) -> Result<BootInfo, &'static str> {
    const ENDS: &str = "metadata ends in unmapped memory";
    if modulep == 0 {
        return Err("no metadata: modulep is 0");
    }
    let mut info = BootInfo::default();
    let mut at = modulep;
    while info.records < MAX_RECORDS {
        let kind = peek32(at).ok_or(ENDS)?;
        let length = u64::from(peek32(at + 4).ok_or(ENDS)?);
        let payload = at + 8;
        match kind {
            MODINFO_END => return Ok(info),
            MODINFO_NAME if info.name == 0 => info.name = payload,
            MODINFO_TYPE if info.kind == 0 => info.kind = payload,
            MODINFOMD_ENVP => info.environment = peek64(payload).ok_or(ENDS)?,
            MODINFOMD_HOWTO => info.howto = peek32(payload),
            MODINFOMD_KERNEND => info.kernel_end = peek64(payload),
            MODINFOMD_SMAP => {
                info.map = payload;
                info.stride = 20;
                info.regions = (length as u32 / 20).min(MAX_REGIONS);
            }
            _ => {}
        }
        info.records += 1;
        at = payload + (length + 7 & !7);
    }
    Err("metadata does not end")
}

fn pvh(start_info: u64) -> Result<BootInfo, &'static str> {
    let word = |offset| peek64(start_info + offset).ok_or("start_info is in unmapped memory");
    if peek32(start_info) != Some(PVH_MAGIC) {
        return Err("no start_info where EBX points");
    }
    let mut info = BootInfo {
        command_line: word(24)?,
        rsdp: word(32)?,
        ..BootInfo::default()
    };
    // Version 1 brought the memory map.
    if peek32(start_info + 4).unwrap_or(0) >= 1 {
        info.map = word(40)?;
        info.stride = 24;
        info.regions = (word(48)? as u32).min(MAX_REGIONS);
    }
    Ok(info)
}

impl BootInfo {
    /// The memory map.
    pub fn map(&self) -> impl Iterator<Item = Region> {
        let (map, stride) = (self.map, self.stride);
        (0..u64::from(self.regions)).map_while(move |index| {
            let at = map + index * stride;
            Some(Region {
                base: peek64(at)?,
                length: peek64(at + 8)?,
                kind: peek32(at + 16)?,
            })
        })
    }

    /// Calls `each` with the address and length of every name=value of the environment.
    pub fn for_each_variable(&self, mut each: impl FnMut(u64, u64)) {
        if self.environment == 0 {
            return;
        }
        let mut at = self.environment;
        while at < self.environment + MAX_TEXT {
            match string_length(at) {
                0 => return,
                length => {
                    each(at, length);
                    at += length + 1;
                }
            }
        }
    }
}
