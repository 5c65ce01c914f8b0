//! The register states in which a boot protocol enters its kernel.

use crate::regs::{Access, Registers, Segment, Table};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// A GDT that agrees with the long-mode register states below: null, 64-bit code, data
/// (FreeBSD's libvmmapi, vmmapi_freebsd.c).
pub const LONG_MODE_GDT: [u64; 3] = [0, 0x0020_9800_0000_0000, 0x0000_9000_0000_0000];

/// The limit that goes with [`LONG_MODE_GDT`].
pub const LONG_MODE_GDT_LIMIT: u16 = 0x17;

/// Where the TSS is, beyond the GDT of [`i386_gdt`], in bytes.
const I386_TSS_OFFSET: u32 = 0x1000;
/// A 386 TSS has 104 bytes.
const I386_TSS_LIMIT: u16 = 103;

/// Where rhyve puts the ACPI RSDP, as in bhyve: a boot protocol may name it (PVH).
pub const RSDP_BASE: u64 = 0xf_2400;

fn flat(selector: u16, access: u32) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: 0xffff_ffff,
        access: Access(access),
    }
}

/// Long mode with paging on, flat segments of `code` and `data` selectors, interrupts off.
fn long_mode(rip: u64, cr3: u64, gdt: Table, code: u16, data: u16) -> Registers {
    let segment = flat(data, 0xc093);
    Registers {
        cr0: CR0_PG | CR0_NE | CR0_ET | CR0_PE,
        cr3,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        rip,
        rdx: 0,
        cs: flat(code, 0xa09b),
        ds: segment,
        es: segment,
        fs: segment,
        gs: segment,
        ss: segment,
        tr: Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            access: Access(0x8b),
        },
        ldtr: Segment {
            selector: 0,
            base: 0,
            limit: 0,
            access: Access(0x1_0082),
        },
        gdtr: gdt,
        ..Registers::reset()
    }
}

/// libvmmapi's vm_setup_freebsd_registers: long mode at the kernel's virtual entry `rip`, the
/// loader's page tables at `cr3`, its GDT ([`LONG_MODE_GDT`]) at `gdtbase`, its stack at `rsp`.
pub fn setup_freebsd_registers(rip: u64, cr3: u64, gdtbase: u64, rsp: u64) -> Registers {
    let gdt = Table {
        base: gdtbase,
        limit: LONG_MODE_GDT_LIMIT,
    };
    Registers {
        rsp,
        ..long_mode(rip, cr3, gdt, 0x08, 0x10)
    }
}

/// The GDT that [`setup_freebsd_registers_i386`] points to, for memory at `gdtbase`: null, flat 32-bit
/// code and data, and the TSS one page above (FreeBSD's libvmmapi, vmmapi_freebsd.c).
pub fn i386_gdt(gdtbase: u32) -> [u64; 4] {
    let base = u64::from(gdtbase.wrapping_add(I386_TSS_OFFSET));
    let limit = u64::from(I386_TSS_LIMIT);
    let tss = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24) << 56;
    [0, 0x00cf_9a00_0000_ffff, 0x00cf_9200_0000_ffff, tss]
}

/// libvmmapi's vm_setup_freebsd_registers_i386: 32-bit protected mode without paging at `eip`, the GDT
/// ([`i386_gdt`]) at `gdtbase`, the stack at `esp`.
pub fn setup_freebsd_registers_i386(eip: u32, gdtbase: u32, esp: u32) -> Registers {
    let data = flat(0x10, 0xc093);
    Registers {
        cr0: CR0_NE | CR0_ET | CR0_PE,
        rip: eip.into(),
        rsp: esp.into(),
        rdx: 0,
        cs: flat(0x08, 0xc09b),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment {
            selector: 0x18,
            base: gdtbase.wrapping_add(I386_TSS_OFFSET).into(),
            limit: I386_TSS_LIMIT.into(),
            access: Access(0x8b),
        },
        ldtr: Segment {
            selector: 0,
            base: 0,
            limit: 0,
            access: Access(0x1_0082),
        },
        gdtr: Table {
            base: gdtbase.into(),
            limit: 0x1f,
        },
        ..Registers::reset()
    }
}

/// Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst): identity-mapped long mode,
/// __BOOT_CS 0x10, __BOOT_DS 0x18, RSI = `boot_params`. `gdt` must hold those two selectors.
pub fn setup_linux64_registers(rip: u64, boot_params: u64, cr3: u64, gdt: Table) -> Registers {
    Registers {
        rsi: boot_params,
        ..long_mode(rip, cr3, gdt, 0x10, 0x18)
    }
}

/// PVH's entry (Xen, docs/misc/pvh.pandoc): 32-bit protected mode without paging, flat segments,
/// RBX = the physical address of `hvm_start_info`.
pub fn setup_pvh_registers(entry: u32, start_info: u32) -> Registers {
    let data = flat(0x10, 0xc093);
    Registers {
        cr0: CR0_PE | CR0_ET,
        cr4: 0,
        efer: 0,
        rip: entry.into(),
        rbx: start_info.into(),
        rdx: 0,
        cs: flat(0x08, 0xc09b),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment {
            selector: 0,
            base: 0,
            limit: 0x67,
            access: Access(0x8b),
        },
        ldtr: Segment {
            selector: 0,
            base: 0,
            limit: 0,
            access: Access(0x1_0082),
        },
        gdtr: Table::default(),
        idtr: Table::default(),
        ..Registers::reset()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_mode_segments_are_what_their_gdt_says() {
        let regs = setup_freebsd_registers(0xffff_ffff_8020_0000, 0x2000, 0x5000, 0x1000);
        let code = LONG_MODE_GDT[usize::from(regs.cs.selector / 8)];
        let data = LONG_MODE_GDT[usize::from(regs.ds.selector / 8)];
        assert_eq!(code >> 53 & 1, u64::from(regs.cs.access.bit(13)), "L");
        assert_eq!(data >> 47 & 1, u64::from(regs.ds.access.bit(7)), "P");
        assert_eq!((regs.cr0, regs.cr4, regs.efer), (0x8000_0031, 0x20, 0x500));
        assert_eq!(
            (regs.rsp, regs.cr3, regs.gdtr.base),
            (0x1000, 0x2000, 0x5000)
        );
        assert_eq!((regs.rflags, regs.rdx), (2, 0));
    }

    #[test]
    fn i386_segments_are_what_their_gdt_says() {
        let regs = setup_freebsd_registers_i386(0x10_0000, 0x12_3000, 0x9000);
        let gdt = i386_gdt(0x12_3000);
        for (segment, kind) in [(regs.cs, 0b1010), (regs.ss, 0b0010), (regs.tr, 0b1001)] {
            let entry = gdt[usize::from(segment.selector / 8)];
            let base = (entry >> 16 & 0xff_ffff) | (entry >> 56) << 24;
            let limit = (entry & 0xffff) | (entry >> 48 & 0xf) << 16;
            let limit = if entry >> 55 & 1 == 1 {
                limit << 12 | 0xfff
            } else {
                limit
            };
            assert_eq!((base, limit), (segment.base, segment.limit.into()));
            assert_eq!(entry >> 40 & 0b1110, kind & 0b1110, "type");
            assert_eq!(entry >> 54 & 1, u64::from(segment.access.bit(14)), "D");
        }
        assert_eq!((regs.cr0, regs.cr4, regs.efer), (0x31, 0, 0));
        assert_eq!((regs.rip, regs.rsp, regs.rflags), (0x10_0000, 0x9000, 2));
        assert_eq!(usize::from(regs.gdtr.limit) + 1, 8 * gdt.len());
    }

    #[test]
    fn pvh_enters_with_paging_off() {
        let regs = setup_pvh_registers(0x10_0000, 0x6000);
        assert_eq!((regs.cr0, regs.cr4, regs.efer, regs.cr3), (0x11, 0, 0, 0));
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x10_0000, 0x6000, 2));
        assert!(!regs.cs.access.bit(13), "32-bit code");
    }
}
