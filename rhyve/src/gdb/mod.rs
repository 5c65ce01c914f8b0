//! The debug server (`-G`): gdb drives the machine over its remote serial protocol.
//!
//! A vCPU that comes out of the guest at a breakpoint, watchpoint or step tells the [`Debugger`] and
//! waits. The server's thread ([`server`]) then holds the whole machine and tells gdb, whose packets
//! gdbstub parses into calls of [`target::GuestTarget`]: registers ([`registers`]), memory by the
//! vCPU's page tables, breakpoints (`points`). What a debugger's bytes can do is stop and change the
//! guest; they cannot stop the monitor.
//!
//! `vmmctl`'s steps and breakpoints (`stepping`) need no server; they and a debugger exclude each other.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use vmm_api::control::Refusal;
use vmm_api::kvm::DebugControl;

use crate::control::refusal;
use crate::machine::Machine;
use crate::sequencer::Mailbox;

mod points;
pub mod registers;
pub mod server;
pub mod session;
mod stepping;
pub mod target;

/// What a vCPU stops with (Intel SDM volume 3, 6.15): at a debug register or after a step, at an INT3.
const DEBUG_EXCEPTION: u32 = 1;
const BREAKPOINT_EXCEPTION: u32 = 3;
/// DR6.BS (Intel SDM volume 3, 17.2.3).
const DR6_SINGLE_STEP: u64 = 1 << 14;

/// A vCPU stopped for the debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// Which.
    pub vcpu: u32,
    /// The exception: 1 (#DB) or 3 (#BP).
    pub exception: u32,
    /// Linear address of the instruction.
    pub pc: u64,
    /// DR6: which debug registers, and whether it was a single step.
    pub dr6: u64,
}

/// Where vCPUs tell that they stopped.
pub struct Debugger {
    vcpus: Vec<Arc<Mailbox>>,
    attached: AtomicBool,
    holding: AtomicBool,
    /// Held by whoever debugs: a debugger for as long as it is connected, or a single step.
    seat: Mutex<()>,
    stops: Mutex<VecDeque<Stop>>,
    event: EventFd,
}

impl Debugger {
    /// For a machine with these vCPUs.
    ///
    /// # Errors
    ///
    /// No event descriptor can be had.
    pub fn new(vcpus: Vec<Arc<Mailbox>>) -> std::io::Result<Arc<Self>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Arc::new(Self {
            vcpus,
            attached: AtomicBool::new(false),
            holding: AtomicBool::new(false),
            seat: Mutex::default(),
            stops: Mutex::default(),
            event: EventFd::from_flags(flags)?,
        }))
    }

    /// Takes a stop, in the vCPU's thread, which waits from then on. False if there is no debugger.
    pub fn stopped(&self, stop: Stop) -> bool {
        if !self.is_attached() {
            return false;
        }
        let vcpu = usize::try_from(stop.vcpu).ok();
        if let Some(mailbox) = vcpu.and_then(|n| self.vcpus.get(n)) {
            mailbox.hold();
        }
        self.stops().push_back(stop);
        // Nobody reads the counter down before it overflows, so this cannot fail.
        let _ = self.event.write(1);
        true
    }

    /// Whether a debugger is connected.
    pub fn is_attached(&self) -> bool {
        self.attached.load(SeqCst)
    }

    /// Whether a debugger has the machine stopped: only it may let it go on.
    pub fn is_holding(&self) -> bool {
        self.holding.load(SeqCst)
    }

    /// A debugger has come, or left.
    pub fn set_attached(&self, attached: bool) {
        self.attached.store(attached, SeqCst);
        if !attached {
            self.stops().clear();
        }
    }

    fn set_holding(&self, holding: bool) {
        self.holding.store(holding, SeqCst);
    }

    /// The oldest stop that nobody took.
    fn take(&self) -> Option<Stop> {
        let stop = self.stops().pop_front();
        if stop.is_none() {
            // Not readable any more, until the next.
            let _ = self.event.read();
            // One may have come between the two.
            return self.stops().pop_front();
        }
        stop
    }

    /// Forgets the stops that will come again, or mean nothing any more.
    fn retain(&self, keep: impl Fn(&Stop) -> bool) {
        self.stops().retain(keep);
    }

    /// Lets a single vCPU go on that had stopped for nothing.
    fn release(&self, vcpu: u32) {
        let vcpu = usize::try_from(vcpu).ok();
        if let Some(mailbox) = vcpu.and_then(|n| self.vcpus.get(n)) {
            mailbox.release();
        }
    }

    fn stops(&self) -> MutexGuard<'_, VecDeque<Stop>> {
        self.stops.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Machine {
    /// Gives a vCPU that stopped the exception that was its guest's own, and lets it go on. `control` is
    /// what it stops at.
    ///
    /// # Errors
    ///
    /// The vCPU does not answer, or KVM refuses.
    fn pass_on(&self, vcpu: u32, exception: u32, control: &DebugControl) -> Result<(), Refusal> {
        let mut control = *control;
        let given = self.ask(vcpu, move |kvm| {
            if exception == BREAKPOINT_EXCEPTION {
                control.pass_on = true;
                kvm.set_debug(&control)
            } else {
                kvm.inject_exception(1, None)
            }
        })?;
        given.map_err(refusal)?;
        // Whoever has paused or ended the machine meanwhile has it so.
        if !self.is_paused() && self.ending.cause().is_none() {
            self.debugger.release(vcpu);
        }
        Ok(())
    }
}

/// Readable once a vCPU has stopped.
impl AsFd for Debugger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
