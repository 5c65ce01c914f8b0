//! `boot_params`, the "zero page" (Documentation/arch/x86/zero-page.rst), with linux-loader's
//! structures.

use linux_loader::bootparam::{self, boot_e820_entry, setup_header};
use vm_memory::ByteValued;
use vmm_api::memory::{HIGHMEM_BASE, MemoryLayout};

use super::{CMDLINE, LOW_END};
use crate::plan::Request;
use crate::space::BIOS_AREA_END;

/// "HdrS".
pub const HEADER_MAGIC: u32 = 0x5372_6448;

/// At the end of the boot sector.
pub const BOOT_FLAG: u16 = 0xaa55;

/// A loader without a number of its own (boot.rst, type_of_loader).
const LOADER_UNDEFINED: u8 = 0xff;

const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// What differs between kernels.
#[derive(Debug)]
pub struct Params<'a> {
    /// The bytes of the kernel's own setup header, or none for one that has none.
    pub header: &'a [u8],
    /// The initial RAM disk: address and length.
    pub initrd: Option<(u64, u64)>,
}

impl Params<'_> {
    /// The zero page: 4096 bytes.
    pub fn encode(&self, request: &Request<'_>) -> Vec<u8> {
        let mut params = bootparam::boot_params {
            hdr: self.setup_header(),
            ..Default::default()
        };
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.cmd_line_ptr = CMDLINE as u32;
        if let Some((gpa, len)) = self.initrd {
            params.hdr.ramdisk_image = gpa as u32;
            params.hdr.ramdisk_size = len as u32;
            params.ext_ramdisk_image = (gpa >> 32) as u32;
            params.ext_ramdisk_size = (len >> 32) as u32;
        }
        let map = memory_map(request.layout);
        for (entry, &(addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
            *entry = boot_e820_entry {
                addr,
                size,
                r#type: kind,
            };
        }
        params.e820_entries = map.len() as u8;
        params.as_slice().to_vec()
    }

    fn setup_header(&self) -> setup_header {
        let mut header = setup_header::default();
        if self.header.is_empty() {
            // A vmlinux has none; this says which fields of ours mean something.
            header.boot_flag = BOOT_FLAG;
            header.header = HEADER_MAGIC;
            header.version = 0x20c;
            header.loadflags = bootparam::LOADED_HIGH;
            header.kernel_alignment = 0x100_0000;
        } else {
            let bytes = header.as_mut_slice();
            let len = self.header.len().min(bytes.len());
            bytes[..len].copy_from_slice(&self.header[..len]);
        }
        header
    }
}

/// The guest's memory as e820 shows it: (base, length, type). From the end of low RAM to 1 MiB all
/// is reserved: `rhyve` puts its tables there.
pub fn memory_map(layout: MemoryLayout) -> Vec<(u64, u64, u32)> {
    let main = layout.lowmem.saturating_sub(BIOS_AREA_END);
    let mut map = vec![
        (0, LOW_END, RAM),
        (LOW_END, BIOS_AREA_END - LOW_END, RESERVED),
        (BIOS_AREA_END, main, RAM),
    ];
    if layout.highmem != 0 {
        map.push((HIGHMEM_BASE, layout.highmem, RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_covers_ram_and_nothing_else() {
        let layout = MemoryLayout {
            lowmem: 3 << 30,
            highmem: 2 << 30,
        };
        let map = memory_map(layout);
        let ram: u64 = map.iter().filter(|e| e.2 == RAM).map(|e| e.1).sum();
        assert_eq!(ram, layout.total() - (BIOS_AREA_END - LOW_END));
        assert!(map.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        assert_eq!(map[2].0 + map[2].1, 3 << 30);
        assert_eq!(map[3].0, 4 << 30);
    }

    #[test]
    fn the_zero_page_is_a_page() {
        assert_eq!(size_of::<bootparam::boot_params>(), 4096);
    }
}
