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
    fn pvh_enters_with_paging_off() {
        let regs = setup_pvh_registers(0x10_0000, 0x6000);
        assert_eq!((regs.cr0, regs.cr4, regs.efer, regs.cr3), (0x11, 0, 0, 0));
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x10_0000, 0x6000, 2));
        assert!(!regs.cs.access.bit(13), "32-bit code");
    }
}
