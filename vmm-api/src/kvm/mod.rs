//! The only code that talks to KVM: a VM with its interrupt controllers, and its vCPUs.
//!
//! Everything here belongs to the process that made it: KVM answers EIO to any other, even to a
//! forked child with the same descriptors.

mod capture;
mod chips;
mod convert;
mod cpuid;
mod debug;
mod inspect;
mod irq;
mod kick;
mod pause;
mod vcpu;
mod vm;

pub use chips::{ChipState, IoApic, Pic, PitChannel};
pub use cpuid::CpuidPolicy;
pub use debug::{DebugControl, Fpu, POINTS, Point, PointKind};
pub use irq::{BoundDoorbell, Doorbell, GsiRouter, MsiMessage, MsiRoute};
pub use kick::Kick;
pub use pause::{Away, host_ns};
pub use vcpu::{Counters, KvmVcpu};
pub use vm::{KvmVm, VmPolicy};

/// What a call to KVM was for, and what it answered.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// An ioctl failed.
    #[error("KVM cannot {action}")]
    Ioctl {
        /// What was to be done.
        action: &'static str,
        /// KVM's answer.
        source: std::io::Error,
    },
    /// KVM took fewer MSRs than it was given.
    #[error("KVM refuses to set MSR {index:#x} to {value:#x}")]
    Msr {
        /// The MSR that it refused.
        index: u32,
        /// The value it was to have.
        value: u64,
    },
    /// A stored state that this KVM cannot take.
    #[error("the stored state does not fit this machine's KVM: {0}")]
    State(String),
}

pub(crate) fn ioctl(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |e| KvmError::Ioctl {
        action,
        source: std::io::Error::from_raw_os_error(e.errno()),
    }
}
