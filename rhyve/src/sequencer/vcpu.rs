//! The run loop of one vCPU.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use vmm_api::exit::{Direction, InternalError, PortAccess, VmExit};
use vmm_api::kvm::{KvmError, KvmVcpu};
use vmm_api::memory::GuestRam;
use vmm_api::regs::Reg;

use super::{Cause, Ending, Mailbox, Next, pinning};
use crate::bus::{IoSize, PortBus};
use crate::dump;
use crate::gdb::{Debugger, Stop};
use crate::mmio::MmioBus;
use crate::suspend::{SuspendHow, SuspendSink};

/// KVM_SYSTEM_EVENT_*: what a guest asks for by hypercall.
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
const SYSTEM_EVENT_RESET: u32 = 2;

/// What the command line says about exits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitPolicy {
    /// Stop the machine at an access that nobody answers (-e).
    pub strict_io: bool,
}

/// A vCPU with all that its thread needs.
pub struct Vcpu {
    /// KVM's side.
    pub kvm: KvmVcpu,
    /// Notes to it.
    pub mailbox: Arc<Mailbox>,
    /// Who answers at which port.
    pub ports: Arc<PortBus>,
    /// Who answers where there is no RAM.
    pub mmio: Arc<MmioBus>,
    /// Where the machine's end is announced.
    pub ending: Arc<Ending>,
    /// Where it tells that it stopped for a debugger.
    pub debugger: Arc<Debugger>,
    /// Guest memory, to show code bytes when KVM gives up.
    pub ram: GuestRam,
    /// How to take exits.
    pub policy: ExitPolicy,
    /// Host processors to run on; all if empty.
    pub pin: BTreeSet<usize>,
}

impl Vcpu {
    /// Runs until the mailbox says to quit.
    pub fn run(mut self) {
        self.mailbox.bind(self.kvm.bind_thread());
        // There it could be a moment ago.
        if let Err(error) = pinning::pin(self.kvm.index(), &self.pin) {
            self.ending.end(Cause::error(crate::chain(&error)));
        }
        trace_start();
        loop {
            if self.mailbox.posted() {
                if let Err(error) = self.complete() {
                    self.fail(&error);
                }
                match self.mailbox.serve(&mut self.kvm) {
                    Next::Run => self.kvm.skip_time(),
                    Next::Quit => break,
                }
            }
            match self.kvm.run() {
                Ok(exit) => self.dispatch(exit),
                Err(error) => self.fail(&error),
            }
        }
        self.mailbox.leave();
    }

    /// Finishes the access of the last exit, part by part, so that the registers are consistent.
    fn complete(&mut self) -> Result<(), KvmError> {
        loop {
            match self.kvm.complete()? {
                VmExit::Interrupted => return Ok(()),
                exit @ (VmExit::Port(_) | VmExit::MmioRead { .. } | VmExit::MmioWrite { .. }) => {
                    self.dispatch(exit);
                }
                exit => {
                    self.dispatch(exit);
                    return Ok(());
                }
            }
        }
    }

    fn dispatch(&mut self, exit: VmExit) {
        tracing::trace!(target: "rhyve::exit", vcpu = self.kvm.index(), ?exit);
        match exit {
            VmExit::Port(access) => self.inout(access),
            VmExit::MmioRead { gpa, len } => {
                let mut data = [0xff; 8];
                let bytes = data.get_mut(..len).unwrap_or_default();
                if self.mmio.read(gpa, bytes).is_err() {
                    self.unclaimed_memory("read", gpa, len);
                }
                self.kvm.set_mmio_data(u64::from_le_bytes(data));
            }
            VmExit::MmioWrite { gpa, data, len } => {
                let bytes = data.get(..len).unwrap_or_default();
                if self.mmio.write(gpa, bytes).is_err() {
                    self.unclaimed_memory("write", gpa, len);
                }
            }
            VmExit::Rdmsr { index } => {
                tracing::debug!(target: "rhyve::msr", "rdmsr {index:#x} reads 0");
                self.kvm.answer_msr(Some(0));
            }
            VmExit::Wrmsr { index, value } => {
                tracing::debug!(target: "rhyve::msr", "wrmsr {index:#x} {value:#x} ignored");
                self.kvm.answer_msr(Some(0));
            }
            VmExit::Interrupted => {}
            VmExit::Hlt => self.ending.suspend(SuspendHow::Halt),
            VmExit::Shutdown => self.ending.suspend(SuspendHow::TripleFault),
            VmExit::SystemEvent(SYSTEM_EVENT_SHUTDOWN) => {
                self.ending.suspend(SuspendHow::PowerOff);
            }
            VmExit::SystemEvent(SYSTEM_EVENT_RESET) => self.ending.suspend(SuspendHow::Reset),
            VmExit::SystemEvent(event) => {
                self.give_up(format!("the guest reported system event {event}"));
            }
            VmExit::InternalError(error) => {
                if !self.stopped_at_int3(&error) {
                    self.give_up(error.to_string());
                }
            }
            VmExit::EntryFailed { reason } => {
                self.give_up(format!(
                    "the processor refused to enter the guest: {reason:#x}"
                ));
            }
            VmExit::OutOfMemory => self.out_of_memory(),
            VmExit::Debug { exception, pc, dr6 } => {
                let stop = Stop {
                    vcpu: self.kvm.index(),
                    exception,
                    pc,
                    dr6,
                };
                if !self.debugger.stopped(stop) {
                    self.give_up(format!("unexpected debug exception {exception} at {pc:#x}"));
                }
            }
            VmExit::Other(reason) => self.give_up(format!("unknown KVM exit reason {reason}")),
        }
    }

    /// Whether KVM has given up at a debugger's breakpoint. Where it emulates ring 0 (KVM-PVM), an INT3
    /// is no exit of its own: its emulator knows the instruction in real mode only.
    fn stopped_at_int3(&self, error: &InternalError) -> bool {
        const INT3: u8 = 0xcc;
        let code = error.instruction().unwrap_or_default();
        if code.first() != Some(&INT3) || !self.debugger.is_attached() {
            return false;
        }
        // KVM has a #UD ready for the guest.
        let pc = self.kvm.forget_exception().ok().and_then(|()| {
            let registers = self.kvm.registers().ok()?;
            registers.get(Reg::Rip).ok()
        });
        pc.is_some_and(|pc| {
            self.debugger.stopped(Stop {
                vcpu: self.kvm.index(),
                exception: 3,
                pc,
                dr6: 0,
            })
        })
    }

    fn inout(&mut self, access: PortAccess) {
        let Some(size) = IoSize::from_bytes(access.size.into()) else {
            return self.give_up(format!("port access of {} bytes", access.size));
        };
        let mut unclaimed = None;
        for element in self.kvm.pio_data().chunks_exact_mut(access.size.into()) {
            let served = match access.direction {
                Direction::In => {
                    let read = self.ports.read(access.port, size);
                    let value = read.unwrap_or(size.ones()).to_le_bytes();
                    element.copy_from_slice(&value[..element.len()]);
                    read.map(drop)
                }
                Direction::Out => {
                    let mut value = [0; 4];
                    value[..element.len()].copy_from_slice(element);
                    self.ports
                        .write(access.port, size, u32::from_le_bytes(value))
                }
            };
            unclaimed = unclaimed.or(served.err());
        }
        if let Some(unclaimed) = unclaimed.filter(|_| self.policy.strict_io) {
            self.ending.end(Cause::error(unclaimed.to_string()));
        }
    }

    fn out_of_memory(&self) {
        self.ending.end(Cause::error(
            "no room for guest memory: the file system that holds the VM is full; \
             free some room, then load and run it again",
        ));
    }

    fn unclaimed_memory(&self, what: &str, gpa: u64, len: usize) {
        // RAM without a page: KVM's emulator takes it for a device, where its fast path fails.
        if self.ram.layout().offset_of(gpa, 1).is_some() {
            return self.out_of_memory();
        }
        tracing::debug!(target: "rhyve::mmio", "{what} of {len} bytes at {gpa:#x}: nobody there");
        if self.policy.strict_io {
            self.ending.end(Cause::error(format!(
                "Unhandled memory {what} {len} {gpa:#x}"
            )));
        }
    }

    fn fail(&mut self, error: &KvmError) {
        self.give_up(crate::chain(error));
    }

    /// Ends the machine because of this vCPU, and shows where it was.
    fn give_up(&mut self, why: String) {
        let report = self
            .ending
            .cause()
            .is_none()
            .then(|| dump::vcpu(&self.kvm, &self.ram));
        let why = format!("vCPU {}: {why}", self.kvm.index());
        self.ending.end(Cause {
            report,
            ..Cause::error(why)
        });
    }
}

/// Tells what the start has cost the whole process, right before the guest is entered.
fn trace_start() {
    if tracing::enabled!(target: "rhyve::start", tracing::Level::DEBUG)
        && let Ok(spent) = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)
    {
        let cpu_us = Duration::from(spent).as_micros();
        tracing::debug!(target: "rhyve::start", cpu_us, "first entry");
    }
}
