//! Nested lane: what KVM-PVM cannot do, on a real kvm-amd.

#![cfg(test)]

mod support;

use support::{real_mode, vcpu};
use vmm_api::regs::{Access, Registers, Segment};

#[test]
#[ignore = "nested lane"]
fn page_directory_pointers_show_where_paging_uses_them() {
    let (vcpu, ram) = vcpu(&[0xf4]);
    assert_eq!(vcpu.registers().unwrap().pdpte, None, "no paging");
    let entries = [0x3001u64, 0x4001, 0, 0];
    ram.write(0x2000, &entries.map(u64::to_le_bytes).concat())
        .unwrap();
    let flat = |access| Segment {
        selector: 8,
        base: 0,
        limit: u32::MAX,
        access: Access(access),
    };
    let regs = Registers {
        cr0: 0x8000_0031,
        cr3: 0x2000,
        cr4: 0x20,
        cs: flat(0xc09b),
        ss: flat(0xc093),
        ..real_mode()
    };
    vcpu.set_registers(&regs).unwrap();
    assert_eq!(vcpu.registers().unwrap().pdpte, Some(entries));
}
