//! The report that is written by itself when a guest ends badly, or makes no progress: beside its
//! state in the object, so that it is there when somebody comes to look.

use std::path::PathBuf;

use vmm_api::guest::{Kernel, Report, View};
use vmm_api::memory::GuestRam;
use vmm_api::regs::Registers;
use vmm_api::say;
use vmm_api::state::{BootInfo, StopReason, VmState};
use vmm_api::vm::LockedVm;

use crate::machine::Machine;
use crate::sequencer::Cause;

/// Writes a report of a guest whose last state was captured, if its end calls for one: a triple
/// fault, an error, a halt that nothing can end, or a reset after its kernel's panic. Says where.
pub fn at_end(vm: &LockedVm, state: &VmState, cause: &Cause, ram: &GuestRam) -> Option<PathBuf> {
    let registers: Vec<_> = state.vcpus.iter().map(|v| v.registers.clone()).collect();
    let wanted = match cause.reason {
        StopReason::TripleFault | StopReason::Error => true,
        StopReason::Reset | StopReason::Halt => {
            let boot = state.machine.boot.as_ref();
            Death::find(ram, &registers, boot).is_some_and(|d| d.is(ram))
        }
        _ => false,
    };
    wanted.then(|| write(vm, state, &registers, &cause.words(), ram))?
}

/// Writes a report of a guest that goes on, but not on its way.
pub fn of_stall(vm: &LockedVm, state: &VmState, machine: &Machine, why: &str, ram: &GuestRam) {
    let vcpus = 0..machine.vcpu_count();
    let registers = vcpus.map_while(|vcpu| machine.ask(vcpu, |kvm| kvm.registers()).ok()?.ok());
    if let Some(path) = write(vm, state, &registers.collect::<Vec<_>>(), why, ram) {
        say!("rhyve: {}: {why}; see {}", vm.name(), path.display());
    }
}

fn write(
    vm: &LockedVm,
    state: &VmState,
    registers: &[Registers],
    why: &str,
    ram: &GuestRam,
) -> Option<PathBuf> {
    let report = Report::new(ram, registers, None, state.machine.boot.as_ref());
    let text = report.text(&format!("{}: {why}", vm.name()));
    // As where the file system is full, which is why the guest has ended then.
    let no_report = |error| tracing::info!(target: "rhyve", "no report: {}", crate::chain(&error));
    vm.write_report(text.as_bytes()).map_err(no_report).ok()
}

/// Where a kernel notes that it has panicked.
pub struct Death {
    registers: Registers,
    address: u64,
    /// Bytes that stand there.
    size: u64,
    /// What they are as long as it lives.
    alive: u64,
}

impl Death {
    /// Finds it in a kernel that is known by what is in memory: Linux, FreeBSD.
    pub fn find(ram: &GuestRam, vcpus: &[Registers], boot: Option<&BootInfo>) -> Option<Self> {
        let boot = boot.filter(|boot| boot.symbols.is_some());
        let kernel = Kernel::find(ram, vcpus, None, boot).ok()?;
        // FreeBSD, sys/kern/kern_shutdown.c: a pointer to the panic's words. Linux, kernel/panic.c: an
        // atomic_t that is PANIC_CPU_INVALID, -1. FreeBSD has a variable of that name as well.
        let places = [("panicstr", 8, 0), ("panic_cpu", 4, u32::MAX.into())];
        let found = places.into_iter().find_map(|(name, size, alive)| {
            let address = kernel.symbols.address(name)?;
            Some((address, size, alive))
        });
        let (address, size, alive) = found?;
        Some(Self {
            registers: kernel.registers,
            address,
            size,
            alive,
        })
    }

    /// Whether the kernel has panicked.
    pub fn is(&self, ram: &GuestRam) -> bool {
        let view = View {
            memory: ram,
            registers: &self.registers,
        };
        let now = view.number(self.address, self.size);
        now.is_ok_and(|now| now != self.alive)
    }
}
