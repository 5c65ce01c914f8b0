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
pub use proto::{Change, Hello, Refusal, RunPhase, Status};
pub use server::{ServeError, Server};

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
}
