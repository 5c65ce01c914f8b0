//! How another process reaches a virtual machine that runs.
//!
//! `rhyve` serves `control.sock` in the object ([`server`]); `vmmctl` connects ([`client`]). Both
//! speak the lines of [`proto`]. What the server asks of the machine is [`ControlTarget`], so that
//! neither the protocol nor its tests need a hypervisor.

pub mod client;
pub mod proto;
pub mod server;

#[cfg(test)]
mod tests;

pub use client::{Client, ClientError};
pub use proto::{Change, Event, Hello, Refusal, RtcState, RunPhase, Status};
pub use server::{ServeError, Server};

use std::collections::BTreeSet;

use crate::inspect::{DeviceDetail, MachineDetail, VcpuDetail};
use crate::profile::ExitStats;
use crate::regs::Registers;
use crate::stats::{VcpuStats, VmStats};

/// The machine, as the control server sees it.
///
/// One thread calls these, one call at a time, in the order in which requests arrive; other clients
/// wait meanwhile. Hence each call returns within about a second, with [`Refusal::Timeout`] if a
/// vCPU does not answer, and none waits for the VM to end: [`ControlTarget::stop`],
/// [`ControlTarget::reset`] and [`ControlTarget::power_button`] only set it going, and the reply is
/// sent before the machine takes its server down. When the machine is already ending, calls return
/// [`Refusal::Ending`].
pub trait ControlTarget: Send + Sync {
    /// What the machine is doing. Never waits for a vCPU.
    fn status(&self) -> Status;

    /// All registers of one vCPU, in a consistent state: no half-done I/O instruction.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or it does not answer.
    fn registers(&self, vcpu: u32) -> Result<Registers, Refusal>;

    /// Changes registers of one vCPU: all of `changes`, in their order, or none.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, a change is refused ([`Change::apply_all`]), or KVM refuses the result.
    fn update(&self, vcpu: u32, changes: &[Change]) -> Result<(), Refusal>;

    /// What one vCPU has counted since it was made.
    ///
    /// # Errors
    ///
    /// There is no such vCPU.
    fn vcpu_stats(&self, vcpu: u32) -> Result<VcpuStats, Refusal>;

    /// What the machine as a whole has counted.
    ///
    /// # Errors
    ///
    /// KVM does not tell.
    fn vm_stats(&self) -> Result<VmStats, Refusal>;

    /// Why one vCPU left the guest since it was made or the counting began anew.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or it does not answer.
    fn exits(&self, vcpu: u32) -> Result<ExitStats, Refusal> {
        Err(unsupported("exits of", vcpu))
    }

    /// Begins to count anew: exits, times and accesses of every vCPU. KVM's own statistics go on.
    ///
    /// # Errors
    ///
    /// A vCPU does not answer.
    fn reset_stats(&self) -> Result<(), Refusal> {
        Err(Refusal::Unsupported("counting anew".into()))
    }

    /// Holds every vCPU; when it returns, no guest instruction is being executed. Pausing a paused
    /// machine succeeds.
    ///
    /// # Errors
    ///
    /// A vCPU does not stop.
    fn pause(&self) -> Result<(), Refusal>;

    /// Lets every vCPU go on. Resuming a running machine succeeds.
    ///
    /// # Errors
    ///
    /// The machine is ending.
    fn resume(&self) -> Result<(), Refusal>;

    /// Holds one vCPU; the others go on (libvmmapi's vm_suspend_cpu).
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or it does not stop.
    fn suspend_cpu(&self, vcpu: u32) -> Result<(), Refusal> {
        Err(unsupported("suspending", vcpu))
    }

    /// Lets one vCPU go on, whatever the others do (libvmmapi's vm_resume_cpu).
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or the machine is ending.
    fn resume_cpu(&self, vcpu: u32) -> Result<(), Refusal> {
        Err(unsupported("resuming", vcpu))
    }

    /// Has one vCPU execute one instruction while the others wait. The machine is paused afterwards.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, it executes nothing, or the machine cannot be debugged.
    fn step(&self, vcpu: u32) -> Result<(), Refusal> {
        Err(unsupported("a step of", vcpu))
    }

    /// Lets the machine run until a vCPU is about to execute what is at this linear address, for `ms`
    /// milliseconds at most: which one, or none so far. The machine is paused afterwards.
    ///
    /// # Errors
    ///
    /// The machine is ending, or cannot be debugged.
    fn run_until(&self, address: u64, ms: u32) -> Result<Option<u32>, Refusal> {
        let _ = ms;
        Err(Refusal::Unsupported(format!(
            "a breakpoint at {address:#x}"
        )))
    }

    /// Ends the machine in the middle, with all of it stored, to be run again from there. When it
    /// returns the state is settled; that it is stored shows in the lock.
    ///
    /// # Errors
    ///
    /// A device's state cannot be saved, or a vCPU does not answer: then the machine goes on.
    fn suspend(&self) -> Result<(), Refusal> {
        Err(Refusal::Unsupported("being suspended".into()))
    }

    /// Writes what a clone's memory holds to its own file, where everybody finds it; another machine's
    /// is there anyway.
    ///
    /// # Errors
    ///
    /// The file system is full.
    fn settle(&self) -> Result<(), Refusal> {
        Ok(())
    }

    /// Makes a suspended VM of this name that is as this machine is now, and lets this one go on.
    /// Unlike other calls it takes as long as memory takes to copy.
    ///
    /// # Errors
    ///
    /// There is one of this name, there is no room for it, or what is here cannot be copied.
    fn snapshot(&self, name: &str) -> Result<(), Refusal> {
        Err(Refusal::Unsupported(format!("a snapshot {name}")))
    }

    /// Sets a forced power-off going, without asking the guest.
    ///
    /// # Errors
    ///
    /// The machine is already ending.
    fn stop(&self) -> Result<(), Refusal>;

    /// Sets a forced reset going, without asking the guest.
    ///
    /// # Errors
    ///
    /// The machine is already ending.
    fn reset(&self) -> Result<(), Refusal>;

    /// Presses the ACPI power button; whether anything comes of it is the guest's affair.
    ///
    /// # Errors
    ///
    /// The machine has no power button, or is ending.
    fn power_button(&self) -> Result<(), Refusal>;

    /// Injects a non-maskable interrupt.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or KVM refuses.
    fn nmi(&self, vcpu: u32) -> Result<(), Refusal>;

    /// What one vCPU has beyond registers, in a consistent state.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or it does not answer.
    fn vcpu_detail(&self, vcpu: u32) -> Result<VcpuDetail, Refusal> {
        Err(unsupported("details of", vcpu))
    }

    /// What the machine is made of.
    ///
    /// # Errors
    ///
    /// A vCPU does not answer.
    fn machine_detail(&self) -> Result<MachineDetail, Refusal> {
        Err(Refusal::Unsupported("details of the machine".into()))
    }

    /// What its devices are and what they have served, by their slots.
    ///
    /// # Errors
    ///
    /// It cannot be asked.
    fn devices(&self) -> Result<Vec<DeviceDetail>, Refusal> {
        Err(Refusal::Unsupported("a list of devices".into()))
    }

    /// Asks the guest to lend this many bytes of its memory in all.
    ///
    /// # Errors
    ///
    /// The machine has no balloon.
    fn set_balloon(&self, bytes: u64) -> Result<(), Refusal> {
        let _ = bytes;
        Err(Refusal::Unsupported("a balloon".into()))
    }

    /// Plugs the cable of the network card at `slot` in, or out.
    ///
    /// # Errors
    ///
    /// There is no card there.
    fn set_link(&self, slot: &str, up: bool) -> Result<(), Refusal> {
        let _ = up;
        Err(Refusal::Unsupported(format!("a network card at {slot}")))
    }

    /// Makes the disk at `slot` this many bytes large, or without a size as large as its image has
    /// become.
    ///
    /// # Errors
    ///
    /// There is no disk there, or it cannot have that size.
    fn set_disk(&self, slot: &str, bytes: Option<u64>) -> Result<(), Refusal> {
        let _ = bytes;
        Err(Refusal::Unsupported(format!("a disk at {slot}")))
    }

    /// Moves a vCPU's thread to these host processors, now and for good; to any, if there are none.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or the host refuses all of these processors.
    fn pin(&self, vcpu: u32, cpus: &BTreeSet<usize>) -> Result<(), Refusal> {
        let _ = cpus;
        Err(unsupported("pinning", vcpu))
    }

    /// Turns a local APIC's x2APIC mode on or off.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or its CPUID has no x2APIC.
    fn set_x2apic(&self, vcpu: u32, on: bool) -> Result<(), Refusal> {
        let _ = on;
        Err(unsupported("x2APIC mode of", vcpu))
    }

    /// Puts an event into a vCPU.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or KVM refuses the event.
    fn inject(&self, vcpu: u32, event: Event) -> Result<(), Refusal> {
        let _ = event;
        Err(unsupported("events for", vcpu))
    }

    /// What the CMOS clock shows and holds.
    ///
    /// # Errors
    ///
    /// The machine has none.
    fn rtc(&self) -> Result<RtcState, Refusal> {
        Err(Refusal::Unsupported("a CMOS clock".into()))
    }

    /// Sets the CMOS clock.
    ///
    /// # Errors
    ///
    /// The machine has none, or it cannot show this time.
    fn set_rtc_time(&self, seconds: i64) -> Result<(), Refusal> {
        let _ = seconds;
        Err(Refusal::Unsupported("a CMOS clock".into()))
    }

    /// Writes a byte of the CMOS memory.
    ///
    /// # Errors
    ///
    /// The machine has none, or the clock itself is at this offset.
    fn set_rtc_nvram(&self, offset: u8, value: u8) -> Result<(), Refusal> {
        let _ = (offset, value);
        Err(Refusal::Unsupported("a CMOS clock".into()))
    }
}

/// What a machine says that has no such thing.
fn unsupported(what: &str, vcpu: u32) -> Refusal {
    Refusal::Unsupported(format!("{what} vCPU {vcpu}"))
}
