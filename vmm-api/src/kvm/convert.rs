//! Between our registers and KVM's structures.

use kvm_bindings::{
    kvm_debugregs, kvm_dtable, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
};

use crate::regs::{Access, Registers, Segment, Table};
use crate::state::{Activity, VcpuEvents};

fn segment(from: &kvm_segment) -> Segment {
    let flags = [
        (4, from.s),
        (7, from.present),
        (12, from.avl),
        (13, from.l),
        (14, from.db),
        (15, from.g),
        (16, from.unusable),
    ];
    Segment {
        selector: from.selector,
        base: from.base,
        limit: from.limit,
        access: Access::from_parts(from.type_, from.dpl, flags.map(|(bit, on)| (bit, on != 0))),
    }
}

fn kvm_seg(from: &Segment) -> kvm_segment {
    let access = from.access;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: access.kind(),
        present: access.bit(7).into(),
        dpl: access.dpl(),
        db: access.bit(14).into(),
        s: access.bit(4).into(),
        l: access.bit(13).into(),
        g: access.bit(15).into(),
        avl: access.bit(12).into(),
        unusable: access.bit(16).into(),
        padding: 0,
    }
}

fn table(from: &kvm_dtable) -> Table {
    Table {
        base: from.base,
        limit: from.limit,
    }
}

fn kvm_table(from: &Table) -> kvm_dtable {
    kvm_dtable {
        base: from.base,
        limit: from.limit,
        ..kvm_dtable::default()
    }
}

macro_rules! same_names {
    ($from:expr => $to:expr; $($field:ident)*) => { $($to.$field = $from.$field;)* };
}

/// Fills in what KVM_GET_REGS tells.
pub(super) fn from_regs(kvm: &kvm_regs, regs: &mut Registers) {
    same_names!(kvm => regs; rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags);
}

/// What KVM_SET_REGS takes.
pub(super) fn to_regs(regs: &Registers) -> kvm_regs {
    let mut kvm = kvm_regs::default();
    same_names!(regs => kvm; rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags);
    kvm
}

/// Fills in what KVM_GET_SREGS tells.
pub(super) fn from_sregs(kvm: &kvm_sregs, regs: &mut Registers) {
    same_names!(kvm => regs; cr0 cr2 cr3 cr4 cr8 efer);
    regs.cs = segment(&kvm.cs);
    regs.ds = segment(&kvm.ds);
    regs.es = segment(&kvm.es);
    regs.fs = segment(&kvm.fs);
    regs.gs = segment(&kvm.gs);
    regs.ss = segment(&kvm.ss);
    regs.tr = segment(&kvm.tr);
    regs.ldtr = segment(&kvm.ldt);
    regs.gdtr = table(&kvm.gdt);
    regs.idtr = table(&kvm.idt);
}

/// What KVM_SET_SREGS takes; `current` has what is not a register: APIC base, pending interrupt.
pub(super) fn to_sregs(regs: &Registers, current: &kvm_sregs) -> kvm_sregs {
    let mut kvm = *current;
    same_names!(regs => kvm; cr0 cr2 cr3 cr4 cr8 efer);
    kvm.cs = kvm_seg(&regs.cs);
    kvm.ds = kvm_seg(&regs.ds);
    kvm.es = kvm_seg(&regs.es);
    kvm.fs = kvm_seg(&regs.fs);
    kvm.gs = kvm_seg(&regs.gs);
    kvm.ss = kvm_seg(&regs.ss);
    kvm.tr = kvm_seg(&regs.tr);
    kvm.ldt = kvm_seg(&regs.ldtr);
    kvm.gdt = kvm_table(&regs.gdtr);
    kvm.idt = kvm_table(&regs.idtr);
    kvm
}

/// Fills in what KVM_GET_DEBUGREGS tells.
pub(super) fn from_debugregs(kvm: &kvm_debugregs, regs: &mut Registers) {
    [regs.dr0, regs.dr1, regs.dr2, regs.dr3] = kvm.db;
    same_names!(kvm => regs; dr6 dr7);
}

/// What KVM_SET_DEBUGREGS takes.
pub(super) fn to_debugregs(regs: &Registers) -> kvm_debugregs {
    kvm_debugregs {
        db: [regs.dr0, regs.dr1, regs.dr2, regs.dr3],
        dr6: regs.dr6,
        dr7: regs.dr7,
        ..kvm_debugregs::default()
    }
}

/// What KVM_GET_MP_STATE tells.
pub(super) fn activity(kvm: &kvm_mp_state) -> Option<Activity> {
    Some(match kvm.mp_state {
        kvm_bindings::KVM_MP_STATE_RUNNABLE => Activity::Runnable,
        kvm_bindings::KVM_MP_STATE_UNINITIALIZED => Activity::Uninitialized,
        kvm_bindings::KVM_MP_STATE_INIT_RECEIVED => Activity::InitReceived,
        kvm_bindings::KVM_MP_STATE_HALTED => Activity::Halted,
        kvm_bindings::KVM_MP_STATE_SIPI_RECEIVED => Activity::SipiReceived,
        _ => return None,
    })
}

/// What KVM_SET_MP_STATE takes.
pub(super) fn mp_state(activity: Activity) -> kvm_mp_state {
    let mp_state = match activity {
        Activity::Runnable => kvm_bindings::KVM_MP_STATE_RUNNABLE,
        Activity::Uninitialized => kvm_bindings::KVM_MP_STATE_UNINITIALIZED,
        Activity::InitReceived => kvm_bindings::KVM_MP_STATE_INIT_RECEIVED,
        Activity::Halted => kvm_bindings::KVM_MP_STATE_HALTED,
        Activity::SipiReceived => kvm_bindings::KVM_MP_STATE_SIPI_RECEIVED,
    };
    kvm_mp_state { mp_state }
}

/// What KVM_GET_VCPU_EVENTS tells.
pub(super) fn events(kvm: &kvm_vcpu_events) -> VcpuEvents {
    let exception = &kvm.exception;
    let present = exception.injected != 0 || exception.pending != 0;
    VcpuEvents {
        exception: present.then_some(exception.nr),
        exception_error: (exception.has_error_code != 0).then_some(exception.error_code),
        exception_pending: exception.pending != 0,
        exception_payload: (kvm.exception_has_payload != 0).then_some(kvm.exception_payload),
        interrupt: (kvm.interrupt.injected != 0).then_some(kvm.interrupt.nr),
        interrupt_soft: kvm.interrupt.soft != 0,
        nmi_injected: kvm.nmi.injected != 0,
        nmi_pending: kvm.nmi.pending != 0,
        nmi_masked: kvm.nmi.masked != 0,
        sipi_vector: kvm.sipi_vector,
        smm: kvm.smi.smm != 0,
        smi_pending: kvm.smi.pending != 0,
        smm_inside_nmi: kvm.smi.smm_inside_nmi != 0,
        latched_init: kvm.smi.latched_init != 0,
    }
}

/// What KVM_SET_VCPU_EVENTS takes. `shadow` is the interrupt shadow register.
pub(super) fn kvm_events(events: &VcpuEvents, shadow: u64) -> kvm_vcpu_events {
    let mut kvm = kvm_vcpu_events::default();
    if let Some(vector) = events.exception {
        kvm.exception.nr = vector;
        // A pending exception would need the payload capability; injecting it comes to the same.
        kvm.exception.injected = 1;
        kvm.exception.has_error_code = events.exception_error.is_some().into();
        kvm.exception.error_code = events.exception_error.unwrap_or(0);
    }
    if let Some(vector) = events.interrupt {
        kvm.interrupt.nr = vector;
        kvm.interrupt.injected = 1;
        kvm.interrupt.soft = events.interrupt_soft.into();
    }
    kvm.interrupt.shadow = (shadow & 3) as u8;
    kvm.nmi.injected = events.nmi_injected.into();
    kvm.nmi.pending = events.nmi_pending.into();
    kvm.nmi.masked = events.nmi_masked.into();
    kvm.sipi_vector = events.sipi_vector;
    kvm.smi.smm = events.smm.into();
    kvm.smi.pending = events.smi_pending.into();
    kvm.smi.smm_inside_nmi = events.smm_inside_nmi.into();
    kvm.smi.latched_init = events.latched_init.into();
    kvm.flags = kvm_bindings::KVM_VCPUEVENT_VALID_NMI_PENDING
        | kvm_bindings::KVM_VCPUEVENT_VALID_SIPI_VECTOR
        | kvm_bindings::KVM_VCPUEVENT_VALID_SHADOW
        | kvm_bindings::KVM_VCPUEVENT_VALID_SMM;
    kvm
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn access_rights_survive_kvm(bits in 0u32..=0x1ffff) {
            let access = Access(bits & Access::VALID);
            let there = kvm_seg(&Segment { access, ..Segment::default() });
            proptest::prop_assert_eq!(segment(&there).access, access);
        }
    }

    #[test]
    fn registers_survive_kvm() {
        let mut regs = Registers::reset();
        regs.r15 = 15;
        regs.cr3 = 0x2000;
        regs.dr3 = 0x1234;
        let mut back = Registers {
            xcr0: regs.xcr0,
            ..Registers::default()
        };
        from_regs(&to_regs(&regs), &mut back);
        from_sregs(&to_sregs(&regs, &kvm_sregs::default()), &mut back);
        from_debugregs(&to_debugregs(&regs), &mut back);
        assert_eq!(back, regs);
    }

    #[test]
    fn events_survive_kvm() {
        let before = VcpuEvents {
            exception: Some(14),
            exception_error: Some(2),
            interrupt: Some(0x30),
            nmi_masked: true,
            sipi_vector: 9,
            ..VcpuEvents::default()
        };
        assert_eq!(events(&kvm_events(&before, 1)), before);
        assert_eq!(kvm_events(&before, 1).interrupt.shadow, 1);
    }
}
