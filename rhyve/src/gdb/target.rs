//! What gdbstub calls: the machine as a debugger's target, its vCPUs the threads.
//!
//! [`Inferior`] is the machine as far as this needs it, so that tests need no KVM.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
    SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use vmm_api::kvm::{DebugControl, Point, PointKind};
use vmm_api::memory::GuestRam;
use vmm_api::pagewalk;
use vmm_api::regs::Registers;

use super::points::Points;
use super::registers::{VcpuRegisters, X86};
use super::{BREAKPOINT_EXCEPTION, DEBUG_EXCEPTION, DR6_SINGLE_STEP, Stop};

const EFAULT: u8 = 14;
const EINVAL: u8 = 22;
const PAGE: u64 = 0x1000;

/// Why the machine does not do what a debugger wants.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct InferiorError(pub String);

/// A machine that is debugged.
pub trait Inferior {
    /// Number of vCPUs.
    fn vcpus(&self) -> u32;

    /// Whether vCPUs can stop at breakpoints and after steps.
    fn can_stop(&self) -> bool;

    /// Guest memory.
    fn ram(&self) -> &GuestRam;

    /// Reads a vCPU's registers.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or it does not answer.
    fn registers(&self, vcpu: u32) -> Result<VcpuRegisters, InferiorError>;

    /// Sets what was changed of a vCPU's registers.
    ///
    /// # Errors
    ///
    /// As [`Inferior::registers`], or a value cannot be.
    fn change(&self, vcpu: u32, wanted: &VcpuRegisters) -> Result<(), InferiorError>;

    /// Says what a vCPU stops at.
    ///
    /// # Errors
    ///
    /// This KVM cannot do it.
    fn arm(&self, vcpu: u32, control: &DebugControl) -> Result<(), InferiorError>;

    /// Gives a vCPU the exception that was none of the debugger's, and lets it go on.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    fn pass_on(
        &self,
        vcpu: u32,
        exception: u32,
        control: &DebugControl,
    ) -> Result<(), InferiorError>;

    /// Stops all vCPUs.
    ///
    /// # Errors
    ///
    /// One does not come out of the guest.
    fn hold(&self) -> Result<(), InferiorError>;

    /// Lets these vCPUs go on.
    ///
    /// # Errors
    ///
    /// The machine is ending.
    fn release(&self, vcpus: &BTreeSet<u32>) -> Result<(), InferiorError>;
}

/// A machine with a debugger's breakpoints and wishes.
pub struct GuestTarget<I> {
    inferior: I,
    points: Points,
    steps: BTreeSet<u32>,
    /// Those that were named to go on.
    named: BTreeSet<u32>,
    /// The others wait.
    locked: bool,
    /// What each vCPU was told last.
    armed: Vec<DebugControl>,
}

fn tid(vcpu: u32) -> Tid {
    let number = usize::try_from(vcpu).unwrap_or(0).saturating_add(1);
    NonZeroUsize::new(number).unwrap_or(NonZeroUsize::MIN)
}

fn vcpu(tid: Tid) -> u32 {
    u32::try_from(tid.get() - 1).unwrap_or(u32::MAX)
}

fn told<E: std::error::Error>(errno: u8) -> impl Fn(E) -> TargetError<InferiorError> {
    move |error| {
        tracing::debug!(target: "rhyve::gdb", "{}", crate::chain(&error));
        TargetError::Errno(errno)
    }
}

impl<I: Inferior> GuestTarget<I> {
    /// The machine with no breakpoints.
    pub fn new(inferior: I) -> Self {
        let vcpus = usize::try_from(inferior.vcpus()).unwrap_or(0);
        Self {
            inferior,
            points: Points::default(),
            steps: BTreeSet::new(),
            named: BTreeSet::new(),
            locked: false,
            armed: vec![DebugControl::default(); vcpus],
        }
    }

    /// Stops all vCPUs.
    ///
    /// # Errors
    ///
    /// One does not come out of the guest.
    pub fn hold(&self) -> Result<(), InferiorError> {
        self.inferior.hold()
    }

    /// The guest gets its exception itself.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn pass_on(&self, stop: &Stop) -> Result<(), InferiorError> {
        let index = usize::try_from(stop.vcpu).ok();
        let control = index.and_then(|n| self.armed.get(n)).copied();
        let control = control.unwrap_or_default();
        self.inferior.pass_on(stop.vcpu, stop.exception, &control)
    }

    /// What gdb is told of a stop; none if it is no affair of its.
    pub fn reason(&self, stop: &Stop) -> Option<MultiThreadStopReason<u64>> {
        let tid = tid(stop.vcpu);
        if stop.exception == BREAKPOINT_EXCEPTION {
            let ours = self.points.is_software(stop.pc);
            return ours.then_some(MultiThreadStopReason::SwBreak(tid));
        }
        if stop.exception != DEBUG_EXCEPTION {
            return None;
        }
        if let Some(point) = self.points.hit(stop.dr6) {
            let kind = match point.kind {
                PointKind::Execute => return Some(MultiThreadStopReason::HwBreak(tid)),
                PointKind::Write => WatchKind::Write,
                PointKind::Access => WatchKind::ReadWrite,
            };
            let addr = point.address;
            return Some(MultiThreadStopReason::Watch { tid, kind, addr });
        }
        let stepped = stop.dr6 & DR6_SINGLE_STEP != 0 && self.steps.contains(&stop.vcpu);
        stepped.then_some(MultiThreadStopReason::SignalWithThread {
            tid,
            signal: Signal::SIGTRAP,
        })
    }

    /// Whether a stop that was not told yet has to be: it does not come again by itself.
    pub fn is_lasting(&self, stop: &Stop) -> bool {
        matches!(self.reason(stop), Some(MultiThreadStopReason::Watch { .. }))
    }

    /// Stopped by the debugger's wish.
    pub fn interrupted(&self) -> MultiThreadStopReason<u64> {
        MultiThreadStopReason::SignalWithThread {
            tid: tid(0),
            signal: Signal::SIGINT,
        }
    }

    /// Takes back all that the debugger has set.
    ///
    /// # Errors
    ///
    /// A vCPU does not answer.
    pub fn disarm(&mut self) -> Result<(), InferiorError> {
        self.points.clear(self.inferior.ram());
        self.steps.clear();
        self.arm()
    }

    /// Takes the INT3s out of memory.
    pub fn clean(&mut self) {
        self.points.clear(self.inferior.ram());
    }

    fn arm(&mut self) -> Result<(), InferiorError> {
        for (vcpu, armed) in (0..).zip(&mut self.armed) {
            let control = DebugControl {
                step: self.steps.contains(&vcpu),
                software: self.points.has_software(),
                points: self.points.hardware(),
                pass_on: false,
            };
            if control != *armed {
                self.inferior.arm(vcpu, &control)?;
                *armed = control;
            }
        }
        Ok(())
    }

    /// Where a linear address is: by the page tables of the vCPU that has them first.
    fn find(&self, gla: u64) -> Option<u64> {
        (0..self.inferior.vcpus()).find_map(|vcpu| {
            let system = self.inferior.registers(vcpu).ok()?.system;
            self.translate(&system, gla).ok()
        })
    }

    fn translate(&self, system: &Registers, gla: u64) -> TargetResult<u64, Self> {
        let walk = pagewalk::gla2gpa_nofault(self.inferior.ram(), system, gla);
        Ok(walk.map_err(told(EFAULT))?.gpa)
    }

    fn point(address: u64, len: u64, kind: WatchKind) -> Option<Point> {
        let kind = match kind {
            WatchKind::Write => PointKind::Write,
            WatchKind::ReadWrite => PointKind::Access,
            // The processor has no such thing.
            WatchKind::Read => return None,
        };
        Point::new(address, len, kind)
    }
}

/// A range cut at the borders of pages: address and length.
fn pieces(start: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let (mut gla, mut left) = (start, len);
    std::iter::from_fn(move || {
        let room = usize::try_from(PAGE - gla % PAGE).unwrap_or(left).min(left);
        let piece = (room > 0).then_some((gla, room));
        gla = gla.wrapping_add(room as u64);
        left -= room;
        piece
    })
}

impl<I: Inferior> Target for GuestTarget<I> {
    type Arch = X86;
    type Error = InferiorError;

    fn base_ops(&mut self) -> BaseOps<'_, X86, InferiorError> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl<I: Inferior> MultiThreadBase for GuestTarget<I> {
    fn read_registers(&mut self, regs: &mut VcpuRegisters, tid: Tid) -> TargetResult<(), Self> {
        *regs = self.inferior.registers(vcpu(tid)).map_err(told(EINVAL))?;
        Ok(())
    }

    fn write_registers(&mut self, regs: &VcpuRegisters, tid: Tid) -> TargetResult<(), Self> {
        let changed = self.inferior.change(vcpu(tid), regs);
        changed.map_err(told(EINVAL))
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let system = self
            .inferior
            .registers(vcpu(tid))
            .map_err(told(EINVAL))?
            .system;
        let mut done = 0;
        for (gla, len) in pieces(start, data.len()) {
            let piece = data.get_mut(done..done + len).unwrap_or(&mut []);
            let read = self.translate(&system, gla).and_then(|gpa| {
                self.inferior.ram().read(gpa, piece).map_err(told(EFAULT))?;
                self.points.hide(gpa, piece);
                Ok(())
            });
            match read {
                Ok(()) => done += len,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let system = self
            .inferior
            .registers(vcpu(tid))
            .map_err(told(EINVAL))?
            .system;
        let ram = self.inferior.ram();
        pagewalk::copyout(ram, &system, start, data).map_err(told(EFAULT))?;
        let mut done = 0;
        for (gla, len) in pieces(start, data.len()) {
            let gpa = self.translate(&system, gla)?;
            let piece = data.get(done..done + len).unwrap_or(&[]);
            let ram = self.inferior.ram();
            self.points.written(ram, gpa, piece).map_err(told(EFAULT))?;
            done += len;
        }
        Ok(())
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), InferiorError> {
        (0..self.inferior.vcpus()).for_each(|vcpu| active(tid(vcpu)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl<I: Inferior> ThreadExtraInfo for GuestTarget<I> {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, InferiorError> {
        let text = format!("vCPU {}", vcpu(tid));
        let len = text.len().min(buf.len());
        buf.iter_mut()
            .zip(text.bytes())
            .for_each(|(to, from)| *to = from);
        Ok(len)
    }
}

impl<I: Inferior> MultiThreadResume for GuestTarget<I> {
    fn resume(&mut self) -> Result<(), InferiorError> {
        self.arm()?;
        let all = 0..self.inferior.vcpus();
        let run = all.filter(|vcpu| !self.locked || self.named.contains(vcpu));
        self.inferior.release(&run.collect())
    }

    fn clear_resume_actions(&mut self) -> Result<(), InferiorError> {
        self.steps.clear();
        self.named.clear();
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(
        &mut self,
        tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), InferiorError> {
        // A machine knows no signals: that is gdb's word for the stop that it was told of.
        self.named.insert(vcpu(tid));
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        self.inferior.can_stop().then_some(self as _)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl<I: Inferior> MultiThreadSingleStep for GuestTarget<I> {
    fn set_resume_action_step(
        &mut self,
        tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), InferiorError> {
        self.named.insert(vcpu(tid));
        self.steps.insert(vcpu(tid));
        Ok(())
    }
}

impl<I: Inferior> MultiThreadSchedulerLocking for GuestTarget<I> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), InferiorError> {
        self.locked = true;
        Ok(())
    }
}

impl<I: Inferior> Breakpoints for GuestTarget<I> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        self.inferior.can_stop().then_some(self as _)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        self.inferior.can_stop().then_some(self as _)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        self.inferior.can_stop().then_some(self as _)
    }
}

impl<I: Inferior> SwBreakpoint for GuestTarget<I> {
    fn add_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        let Some(gpa) = self.find(addr) else {
            return Ok(false);
        };
        let ram = self.inferior.ram();
        let added = self.points.add_software(ram, addr, gpa);
        added.map_err(told(EFAULT))?;
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        let ram = self.inferior.ram();
        self.points.remove_software(ram, addr).map_err(told(EFAULT))
    }
}

impl<I: Inferior> HwBreakpoint for GuestTarget<I> {
    fn add_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        let point = Point::new(addr, 1, PointKind::Execute);
        Ok(point.is_some_and(|point| self.points.add_hardware(point)))
    }

    fn remove_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        let point = Point::new(addr, 1, PointKind::Execute);
        Ok(point.is_some_and(|point| self.points.remove_hardware(point)))
    }
}

impl<I: Inferior> HwWatchpoint for GuestTarget<I> {
    fn add_hw_watchpoint(
        &mut self,
        addr: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let point = Self::point(addr, len, kind);
        Ok(point.is_some_and(|point| self.points.add_hardware(point)))
    }

    fn remove_hw_watchpoint(
        &mut self,
        addr: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let point = Self::point(addr, len, kind);
        Ok(point.is_some_and(|point| self.points.remove_hardware(point)))
    }
}
