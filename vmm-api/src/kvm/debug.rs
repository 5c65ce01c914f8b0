//! Debugging a guest from outside: breakpoints, watchpoints and single steps (KVM_SET_GUEST_DEBUG).

use kvm_bindings::{
    KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_fpu,
    kvm_guest_debug,
};

use super::{KvmError, KvmVcpu, ioctl};

/// What a debug register looks out for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointKind {
    /// The instruction at the address is about to be executed.
    Execute,
    /// Memory there was written.
    Write,
    /// Memory there was read or written.
    Access,
}

/// A hardware breakpoint or watchpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Linear address, a multiple of `len`.
    pub address: u64,
    /// 1, 2, 4 or 8 bytes; 1 to execute.
    pub len: u8,
    /// What happens there.
    pub kind: PointKind,
}

impl Point {
    /// A point that the processor can have (Intel SDM volume 3, 17.2.4).
    pub fn new(address: u64, len: u64, kind: PointKind) -> Option<Self> {
        let fits = matches!(len, 1 | 2 | 4 | 8) && address.is_multiple_of(len);
        let len = u8::try_from(len).ok().filter(|_| fits)?;
        (kind != PointKind::Execute || len == 1).then_some(Self { address, len, kind })
    }

    /// Its bits of DR7 as the debug register `index`.
    fn dr7(&self, index: usize) -> u64 {
        let kind = match self.kind {
            PointKind::Execute => 0b00,
            PointKind::Write => 0b01,
            PointKind::Access => 0b11,
        };
        let len = match self.len {
            1 => 0b00,
            2 => 0b01,
            8 => 0b10,
            _ => 0b11,
        };
        1 << (2 * index) | (kind | len << 2) << (16 + 4 * index)
    }
}

/// How many [`Point`]s a vCPU has.
pub const POINTS: usize = 4;

/// What a vCPU stops at, with [`crate::exit::VmExit::Debug`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DebugControl {
    /// After each instruction. Interrupts wait, where KVM can have them wait (Linux 5.15).
    pub step: bool,
    /// At every INT3, whoever put it there.
    pub software: bool,
    /// At these points. The guest's own debug registers do not work meanwhile.
    pub points: [Option<Point>; POINTS],
    /// The guest gets the breakpoint exception that the last exit was.
    pub pass_on: bool,
}

/// The x87 and SSE registers of a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fpu {
    /// ST0 to ST7, 80 bits each.
    pub st: [[u8; 10]; 8],
    /// XMM0 to XMM15.
    pub xmm: [[u8; 16]; 16],
    /// Control word.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// A bit for each register that is not empty.
    pub ftw: u8,
    /// Last opcode.
    pub fop: u16,
    /// Last instruction pointer.
    pub ip: u64,
    /// Last data pointer.
    pub dp: u64,
    /// SSE's control and status.
    pub mxcsr: u32,
}

impl KvmVcpu {
    /// Changes what it stops at; the default is nothing.
    ///
    /// # Errors
    ///
    /// This KVM cannot debug guests.
    pub fn set_debug(&self, control: &DebugControl) -> Result<(), KvmError> {
        let mut debug = kvm_guest_debug::default();
        for (index, point) in control.points.iter().enumerate() {
            let Some(point) = point else { continue };
            if let Some(place) = debug.arch.debugreg.get_mut(index) {
                *place = point.address;
            }
            debug.arch.debugreg[7] |= point.dr7(index);
        }
        // The flags that may be used, since Linux 5.10; before, those that there are.
        let known = self
            .vm
            .fd
            .check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
        let block = u32::try_from(known).unwrap_or(0) & KVM_GUESTDBG_BLOCKIRQ;
        for (wanted, flags) in [
            (debug.arch.debugreg[7] != 0, KVM_GUESTDBG_USE_HW_BP),
            (control.software, KVM_GUESTDBG_USE_SW_BP),
            (control.step, KVM_GUESTDBG_SINGLESTEP | block),
            (control.pass_on, KVM_GUESTDBG_INJECT_BP),
        ] {
            if wanted {
                debug.control |= KVM_GUESTDBG_ENABLE | flags;
            }
        }
        self.fd
            .set_guest_debug(&debug)
            .map_err(ioctl("debug a guest"))
    }

    /// Takes back the exception that the guest would get next, if there is one.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn forget_exception(&self) -> Result<(), KvmError> {
        let events = self.fd.get_vcpu_events();
        let mut events = events.map_err(ioctl("read pending events"))?;
        events.exception = Default::default();
        self.fd
            .set_vcpu_events(&events)
            .map_err(ioctl("take back an exception"))
    }

    /// The x87 and SSE registers.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn fpu(&self) -> Result<Fpu, KvmError> {
        let kvm = self.fd.get_fpu().map_err(ioctl("read the FPU"))?;
        let mut fpu = Fpu {
            xmm: kvm.xmm,
            fcw: kvm.fcw,
            fsw: kvm.fsw,
            ftw: kvm.ftwx,
            fop: kvm.last_opcode,
            ip: kvm.last_ip,
            dp: kvm.last_dp,
            mxcsr: kvm.mxcsr,
            ..Fpu::default()
        };
        for (to, from) in fpu.st.iter_mut().zip(&kvm.fpr) {
            to.copy_from_slice(&from[..10]);
        }
        Ok(fpu)
    }

    /// Sets the x87 and SSE registers.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn set_fpu(&self, fpu: &Fpu) -> Result<(), KvmError> {
        let mut kvm = kvm_fpu {
            xmm: fpu.xmm,
            fcw: fpu.fcw,
            fsw: fpu.fsw,
            ftwx: fpu.ftw,
            last_opcode: fpu.fop,
            last_ip: fpu.ip,
            last_dp: fpu.dp,
            mxcsr: fpu.mxcsr,
            ..kvm_fpu::default()
        };
        for (to, from) in kvm.fpr.iter_mut().zip(&fpu.st) {
            to[..10].copy_from_slice(from);
        }
        self.fd.set_fpu(&kvm).map_err(ioctl("set the FPU"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_what_the_processor_has() {
        let dr7 = |address, len, kind, index| {
            Point::new(address, len, kind).map(|point| point.dr7(index))
        };
        assert_eq!(dr7(0x1001, 1, PointKind::Execute, 0), Some(0x0000_0001));
        assert_eq!(dr7(0x1000, 4, PointKind::Write, 1), Some(0x00d0_0004));
        assert_eq!(dr7(0x1000, 8, PointKind::Access, 3), Some(0xb000_0040));
        assert_eq!(dr7(0x1002, 4, PointKind::Write, 0), None);
        assert_eq!(dr7(0x1000, 3, PointKind::Write, 0), None);
        assert_eq!(dr7(0x1000, 2, PointKind::Execute, 0), None);
    }
}
