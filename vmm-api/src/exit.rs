//! Why a vCPU came back from the guest, as a value of ours.
//!
//! kvm-ioctls' exit borrows the vCPU and drops the element size of string I/O; a [`VmExit`] is
//! owned and small, and the bytes of a port access stay in the shared `kvm_run` page, where
//! [`crate::kvm::KvmVcpu::pio_data`] reaches them.

use std::fmt;

/// Direction of a port or memory access, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest reads.
    In,
    /// The guest writes.
    Out,
}

/// A port access: `count` elements of `size` bytes each, one after the other at one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAccess {
    /// Seen from the guest.
    pub direction: Direction,
    /// The port.
    pub port: u16,
    /// Bytes an element: 1, 2 or 4.
    pub size: u8,
    /// Elements: more than 1 for string I/O.
    pub count: u32,
}

/// Why KVM_RUN returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// IN, OUT, INS, OUTS. The data is in [`crate::kvm::KvmVcpu::pio_data`].
    Port(PortAccess),
    /// A read of memory that is not RAM; answer with [`crate::kvm::KvmVcpu::set_mmio_data`].
    MmioRead {
        /// Guest-physical address.
        gpa: u64,
        /// Number of bytes, at most 8.
        len: usize,
    },
    /// A write to memory that is not RAM.
    MmioWrite {
        /// Guest-physical address.
        gpa: u64,
        /// The bytes, of which `len` count.
        data: [u8; 8],
        /// Number of bytes, at most 8.
        len: usize,
    },
    /// A read of an MSR that KVM does not know; answer with [`crate::kvm::KvmVcpu::answer_msr`].
    Rdmsr {
        /// MSR number.
        index: u32,
    },
    /// A write of an MSR that KVM does not know.
    Wrmsr {
        /// MSR number.
        index: u32,
        /// The value.
        value: u64,
    },
    /// HLT, only without the in-kernel local APIC.
    Hlt,
    /// Triple fault.
    Shutdown,
    /// A signal or a kick; nothing happened.
    Interrupted,
    /// A breakpoint or single step that user space asked for.
    Debug {
        /// The exception.
        exception: u32,
        /// Linear address.
        pc: u64,
        /// DR6: which debug register, or the single step.
        dr6: u64,
    },
    /// The guest's hypervisor call for a crash, reset or shutdown.
    SystemEvent(u32),
    /// KVM cannot go on.
    InternalError(InternalError),
    /// The processor refused the guest's state.
    EntryFailed {
        /// The processor's own code (VMX: exit reason; SVM: exit code).
        reason: u64,
    },
    /// Guest RAM has no page behind it: its file system is full.
    OutOfMemory,
    /// Any other exit reason.
    Other(u32),
}

/// KVM_EXIT_INTERNAL_ERROR: what KVM tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InternalError {
    /// KVM_INTERNAL_ERROR_*.
    pub suberror: u32,
    /// What comes with it.
    pub data: Vec<u64>,
}

impl InternalError {
    /// What the suberror means (Documentation/virt/kvm/api.rst and include/uapi/linux/kvm.h).
    pub fn meaning(&self) -> &'static str {
        match self.suberror {
            1 => "KVM had to emulate an instruction that its emulator does not know",
            2 => "two events were to be delivered at the same time",
            3 => "an exit happened while an event was being delivered",
            4 => "the processor left the guest for a reason that KVM does not know",
            _ => "KVM does not say what",
        }
    }

    /// The instruction bytes that KVM could not emulate, when it tells them
    /// (KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES).
    pub fn instruction(&self) -> Option<Vec<u8>> {
        const HAS_BYTES: u64 = 1;
        let [flags, rest @ ..] = self.data.as_slice() else {
            return None;
        };
        if self.suberror != 1 || flags & HAS_BYTES == 0 || rest.len() < 2 {
            return None;
        }
        // A u8 length, then 15 bytes.
        let bytes: Vec<u8> = rest
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .take(16)
            .collect();
        let (len, bytes) = bytes.split_first()?;
        bytes.get(..usize::from(*len).min(15)).map(<[u8]>::to_vec)
    }
}

impl fmt::Display for InternalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "KVM internal error, suberror {}: {}",
            self.suberror,
            self.meaning()
        )?;
        if let Some(bytes) = self.instruction() {
            f.write_str("; instruction bytes")?;
            for byte in bytes {
                write!(f, " {byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// The kinds of exit that are counted apart, with the names under which they are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExitKind {
    /// Port input or output.
    Inout,
    /// Memory-mapped I/O.
    Mmio,
    /// RDMSR in user space.
    Rdmsr,
    /// WRMSR in user space.
    Wrmsr,
    /// HLT in user space.
    Hlt,
    /// Signals and kicks.
    Interrupted,
    /// Breakpoints and steps.
    Debug,
    /// Everything that ends a guest, and what has no name here.
    Other,
}

impl ExitKind {
    /// All kinds, in the order in which they are shown.
    pub const ALL: [Self; 8] = [
        Self::Inout,
        Self::Mmio,
        Self::Rdmsr,
        Self::Wrmsr,
        Self::Hlt,
        Self::Interrupted,
        Self::Debug,
        Self::Other,
    ];

    /// The name in statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Inout => "inout",
            Self::Mmio => "mmio",
            Self::Rdmsr => "rdmsr",
            Self::Wrmsr => "wrmsr",
            Self::Hlt => "hlt",
            Self::Interrupted => "interrupted",
            Self::Debug => "debug",
            Self::Other => "other",
        }
    }
}

impl VmExit {
    /// What this exit counts as.
    pub fn kind(&self) -> ExitKind {
        match self {
            Self::Port(_) => ExitKind::Inout,
            Self::MmioRead { .. } | Self::MmioWrite { .. } => ExitKind::Mmio,
            Self::Rdmsr { .. } => ExitKind::Rdmsr,
            Self::Wrmsr { .. } => ExitKind::Wrmsr,
            Self::Hlt => ExitKind::Hlt,
            Self::Interrupted => ExitKind::Interrupted,
            Self::Debug { .. } => ExitKind::Debug,
            _ => ExitKind::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulation_failure_shows_its_bytes() {
        let word = |bytes: [u8; 8]| u64::from_le_bytes(bytes);
        let data = vec![1, word([2, 0x0f, 0xae, 0, 0, 0, 0, 0]), word([0xff; 8])];
        let error = InternalError { suberror: 1, data };
        assert_eq!(error.instruction(), Some(vec![0x0f, 0xae]));
        assert!(error.to_string().ends_with("instruction bytes 0f ae"));
        let bare = InternalError {
            suberror: 1,
            data: vec![],
        };
        assert_eq!(bare.instruction(), None);
    }
}
