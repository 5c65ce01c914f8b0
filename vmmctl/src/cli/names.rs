//! The names of the options that come in families.

use std::sync::LazyLock;

use vmm_api::regs::{Reg, Registers, SegReg};

/// An option's names for getting and setting one thing.
pub(super) struct Named<T> {
    pub what: T,
    pub get: String,
    pub set: Option<String>,
}

pub(super) static REGISTERS: LazyLock<Vec<Named<Reg>>> = LazyLock::new(|| {
    let settable = |reg| Registers::reset().set(reg, 0).is_ok();
    Reg::all()
        .map(|reg| {
            let name = reg.name().replace('_', "-");
            Named {
                what: reg,
                get: format!("get-{name}"),
                set: settable(reg).then(|| format!("set-{name}")),
            }
        })
        .collect()
});

pub(super) static DESCRIPTORS: LazyLock<Vec<Named<SegReg>>> = LazyLock::new(|| {
    SegReg::ALL
        .map(|seg| Named {
            what: seg,
            get: format!("get-desc-{seg}"),
            set: Some(format!("set-desc-{seg}")),
        })
        .into()
});

/// vmmctl's and bhyvectl's options for fields of the VMCS (Intel) and the VMCB and AVIC (AMD): KVM
/// keeps these to itself.
pub(super) const UNAVAILABLE_GETS: &[&str] = &[
    "get-vmcs-pinbased-ctls",
    "get-vmcs-procbased-ctls",
    "get-vmcs-procbased-ctls2",
    "get-vmcs-entry-interruption-info",
    "get-vmcs-eptp",
    "get-vmcs-guest-physical-address",
    "get-vmcs-guest-linear-address",
    "get-vmcs-exception-bitmap",
    "get-vmcs-io-bitmap-address",
    "get-vmcs-host-pat",
    "get-vmcs-host-cr0",
    "get-vmcs-host-cr3",
    "get-vmcs-host-cr4",
    "get-vmcs-host-rip",
    "get-vmcs-host-rsp",
    "get-vmcs-cr0-mask",
    "get-vmcs-cr0-shadow",
    "get-vmcs-cr4-mask",
    "get-vmcs-cr4-shadow",
    "get-vmcs-cr3-targets",
    "get-vmcs-apic-access-address",
    "get-apic-access-address",
    "get-vmcs-virtual-apic-address",
    "get-virtual-apic-address",
    "get-vmcs-tpr-threshold",
    "get-vmcs-msr-bitmap",
    "get-vmcs-msr-bitmap-address",
    "get-vmcs-vpid",
    "get-vmcs-ple-gap",
    "get-vmcs-ple-window",
    "get-vmcs-instruction-error",
    "get-vmcs-exit-ctls",
    "get-vmcs-entry-ctls",
    "get-vmcs-link",
    "get-vmcs-exit-reason",
    "get-vmcs-exit-qualification",
    "get-vmcs-exit-interruption-info",
    "get-vmcs-exit-interruption-error",
    "get-vmcs-exit-inst-length",
    "get-vmcs-interruptibility",
    "get-eptp",
    "get-exception-bitmap",
    "get-io-bitmap-address",
    "get-msr-bitmap",
    "get-msr-bitmap-address",
    "get-vmcb-intercepts",
    "get-vmcb-asid",
    "get-vmcb-exit-details",
    "get-vmcb-tlb-ctrl",
    "get-vmcb-virq",
    "get-avic-apic-bar",
    "get-avic-backing-page",
    "get-avic-table",
];

pub(super) const UNAVAILABLE_SETS: &[&str] = &[
    "set-vmcs-exception-bitmap",
    "set-vmcs-entry-interruption-info",
];
