//! What rhyve needs of the host: [`open`] and [`check`] are the door to /dev/kvm, with one readable
//! error for each way in which it can be closed; [`host`] is the same as a report of every
//! requirement.

pub mod host;

use std::ffi::CStr;
use std::path::Path;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_ADJUST_CLOCK, KVM_CAP_BINARY_STATS_FD, KVM_CAP_DEBUGREGS,
    KVM_CAP_EXT_CPUID, KVM_CAP_GET_TSC_KHZ, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IOEVENTFD,
    KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQCHIP, KVM_CAP_IRQFD, KVM_CAP_MP_STATE, KVM_CAP_PIT2,
    KVM_CAP_SET_GUEST_DEBUG, KVM_CAP_SET_IDENTITY_MAP_ADDR, KVM_CAP_SET_TSS_ADDR,
    KVM_CAP_SIGNAL_MSI, KVM_CAP_SREGS2, KVM_CAP_TSC_CONTROL, KVM_CAP_TSC_DEADLINE_TIMER,
    KVM_CAP_USER_MEMORY, KVM_CAP_USER_NMI, KVM_CAP_VCPU_EVENTS, KVM_CAP_X86_DISABLE_EXITS,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_XCRS, KVM_CAP_XSAVE, KVM_CAP_XSAVE2,
};
use kvm_ioctls::Kvm;
use nix::errno::Errno;

pub use host::{HostReport, Requirement, Standing};

const DEVICE: &CStr = c"/dev/kvm";

/// One of KVM's capabilities (Documentation/virt/kvm/api.rst, KVM_CHECK_EXTENSION).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// KVM's name, without `KVM_CAP_`.
    pub name: &'static str,
    /// What rhyve does with it; for one that is not needed, what is missed without it.
    pub purpose: &'static str,
    /// No VM runs without it.
    pub needed: bool,
    number: u32,
}

const fn needed(name: &'static str, number: u32, purpose: &'static str) -> Capability {
    Capability {
        name,
        purpose,
        needed: true,
        number,
    }
}

const fn wanted(name: &'static str, number: u32, purpose: &'static str) -> Capability {
    Capability {
        needed: false,
        ..needed(name, number, purpose)
    }
}

/// Every capability that rhyve uses.
pub const CAPABILITIES: &[Capability] = &[
    needed(
        "USER_MEMORY",
        KVM_CAP_USER_MEMORY,
        "guest RAM from the VM's memory file",
    ),
    needed(
        "IRQCHIP",
        KVM_CAP_IRQCHIP,
        "local APICs, I/O APIC and PIC in the kernel",
    ),
    needed("PIT2", KVM_CAP_PIT2, "interval timer in the kernel"),
    needed(
        "IRQ_ROUTING",
        KVM_CAP_IRQ_ROUTING,
        "interrupt lines as the firmware tables say",
    ),
    needed("SET_TSS_ADDR", KVM_CAP_SET_TSS_ADDR, "real mode on Intel"),
    needed(
        "SET_IDENTITY_MAP_ADDR",
        KVM_CAP_SET_IDENTITY_MAP_ADDR,
        "real mode on Intel",
    ),
    needed("EXT_CPUID", KVM_CAP_EXT_CPUID, "CPUID of the guest"),
    needed(
        "MP_STATE",
        KVM_CAP_MP_STATE,
        "starting and capturing several vCPUs",
    ),
    needed(
        "IMMEDIATE_EXIT",
        KVM_CAP_IMMEDIATE_EXIT,
        "getting a vCPU out of the guest without a race",
    ),
    needed(
        "VCPU_EVENTS",
        KVM_CAP_VCPU_EVENTS,
        "capture of pending exceptions and interrupts",
    ),
    needed("DEBUGREGS", KVM_CAP_DEBUGREGS, "capture of DR0-DR7"),
    needed(
        "XSAVE",
        KVM_CAP_XSAVE,
        "capture of floating point and vector registers",
    ),
    needed("XCRS", KVM_CAP_XCRS, "capture of XCR0"),
    needed("USER_NMI", KVM_CAP_USER_NMI, "vmmctl --inject-nmi"),
    needed(
        "GET_TSC_KHZ",
        KVM_CAP_GET_TSC_KHZ,
        "the guest's time stamp counter frequency",
    ),
    needed(
        "IRQFD",
        KVM_CAP_IRQFD,
        "device interrupts without a system call of a vCPU",
    ),
    needed(
        "IOEVENTFD",
        KVM_CAP_IOEVENTFD,
        "device notifications without an exit to user space",
    ),
    needed(
        "SIGNAL_MSI",
        KVM_CAP_SIGNAL_MSI,
        "message signalled interrupts",
    ),
    wanted(
        "XSAVE2",
        KVM_CAP_XSAVE2,
        "without it no AMX tile registers in the guest",
    ),
    wanted(
        "TSC_CONTROL",
        KVM_CAP_TSC_CONTROL,
        "without it a captured guest goes on only where the time stamp counter is as fast",
    ),
    wanted(
        "TSC_DEADLINE_TIMER",
        KVM_CAP_TSC_DEADLINE_TIMER,
        "without it guests use the slower one-shot timer",
    ),
    wanted(
        "ADJUST_CLOCK",
        KVM_CAP_ADJUST_CLOCK,
        "without it kvmclock jumps when a captured guest goes on",
    ),
    wanted(
        "SREGS2",
        KVM_CAP_SREGS2,
        "without it --get-pdpteN is not available",
    ),
    wanted(
        "BINARY_STATS_FD",
        KVM_CAP_BINARY_STATS_FD,
        "without it --get-stats has rhyve's own counters only (Linux 5.14)",
    ),
    wanted(
        "X86_USER_SPACE_MSR",
        KVM_CAP_X86_USER_SPACE_MSR,
        "without it unknown MSRs fault in the guest whatever rhyve -w says (Linux 5.10)",
    ),
    wanted(
        "X86_DISABLE_EXITS",
        KVM_CAP_X86_DISABLE_EXITS,
        "without it HLT and PAUSE always leave the guest",
    ),
    wanted(
        "SET_GUEST_DEBUG",
        KVM_CAP_SET_GUEST_DEBUG,
        "without it no breakpoints from outside",
    ),
];

/// Why no virtual machine can run here. The texts begin as bhyve's do: what the system said of
/// making a virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum CapabilityError {
    /// The kernel has no KVM device.
    #[error("vm_create: No such file or directory: /dev/kvm: {0}")]
    Absent(&'static str),
    /// The device is not for this user.
    #[error("vm_create: Permission denied: /dev/kvm: {0}")]
    Denied(String),
    /// The device cannot be opened for another reason.
    #[error("vm_create: {}: /dev/kvm", .0.desc())]
    Open(Errno),
    /// What was opened is not a KVM whose interface is known.
    #[error(
        "vm_create: Invalid argument: /dev/kvm: its API version is {found}, not {KVM_API_VERSION}: this is no KVM that rhyve knows"
    )]
    Api {
        /// The version; negative if the device knows no such call.
        found: i32,
    },
    /// A needed capability is not there.
    #[error("vm_create: Invalid argument: this machine's KVM lacks KVM_CAP_{}, needed for {}: see vmmctl --host", .0.name, .0.purpose)]
    Missing(Capability),
}

/// Opens /dev/kvm and checks that it is all that rhyve needs.
///
/// # Errors
///
/// It is not there, not permitted, or lacks something.
pub fn open() -> Result<Kvm, CapabilityError> {
    let kvm = open_device(DEVICE)?;
    check(&kvm)?;
    Ok(kvm)
}

/// Checks KVM's interface and every capability that is needed.
///
/// # Errors
///
/// The first that is not there.
pub fn check(kvm: &Kvm) -> Result<(), CapabilityError> {
    let found = kvm.get_api_version();
    if u32::try_from(found) != Ok(KVM_API_VERSION) {
        return Err(CapabilityError::Api { found });
    }
    first_missing(|number| kvm.check_extension_raw(number.into()) > 0)
        .map_or(Ok(()), |capability| {
            Err(CapabilityError::Missing(capability))
        })
}

fn first_missing(has: impl Fn(u32) -> bool) -> Option<Capability> {
    let mut all = CAPABILITIES.iter().copied();
    all.find(|capability| capability.needed && !has(capability.number))
}

fn open_device(path: &CStr) -> Result<Kvm, CapabilityError> {
    Kvm::new_with_path(path).map_err(|e| match Errno::from_raw(e.errno()) {
        // The node may be there without the module: ENODEV, ENXIO.
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => CapabilityError::Absent(host::load_hint()),
        Errno::EACCES | Errno::EPERM => CapabilityError::Denied(denied_hint(path)),
        errno => CapabilityError::Open(errno),
    })
}

/// How to become one of those who may use the device.
fn denied_hint(path: &CStr) -> String {
    use std::os::unix::fs::MetadataExt;
    let group = std::fs::metadata(Path::new(&*path.to_string_lossy()))
        .ok()
        .filter(|m| m.mode() & 0o060 == 0o060)
        .and_then(|m| nix::unistd::Group::from_gid(m.gid().into()).ok().flatten());
    match group {
        Some(group) if group.gid.as_raw() != 0 => format!(
            "it is for group {0}: usermod -aG {0} USER, then log in again",
            group.name
        ),
        _ => "its owner must let you in: chgrp kvm /dev/kvm and chmod 660 /dev/kvm, then usermod -aG kvm USER and log in again".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_closed_door_says_how_to_open_it() {
        let error = open_device(c"/dev/there/is/none").unwrap_err().to_string();
        assert!(
            error.starts_with("vm_create: No such file or directory: /dev/kvm: "),
            "{error}"
        );
        let denied = denied_hint(c"/dev/null");
        assert!(denied.contains("usermod -aG"), "{denied}");
        let other = open_device(c"/dev/null").and_then(|kvm| check(&kvm));
        let text = other.unwrap_err().to_string();
        assert!(text.contains("API version is -1, not 12"), "{text}");
    }

    #[test]
    fn a_missing_capability_is_named_with_its_purpose() {
        assert_eq!(first_missing(|_| true), None);
        let lacks = |number| first_missing(move |n| n != number);
        let found = CapabilityError::Missing(lacks(KVM_CAP_PIT2).unwrap());
        assert_eq!(
            found.to_string(),
            "vm_create: Invalid argument: this machine's KVM lacks KVM_CAP_PIT2, needed for interval timer in the kernel: see vmmctl --host"
        );
        assert_eq!(lacks(KVM_CAP_SREGS2), None, "only wanted");
    }
}
