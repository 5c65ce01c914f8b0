//! The other CPUs: asleep until the boot CPU has work for them.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::cpu::{self, Deadline};
use crate::startup::started;
use crate::{apic, interrupts, shell};

/// How many calls were answered.
static CALLS: AtomicU32 = AtomicU32::new(0);
/// What the other CPUs do: see [`Work`].
static WORK: AtomicU32 = AtomicU32::new(Work::Sleep as u32);
/// What the other CPUs can do.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Work {
    /// HLT, interrupts on.
    Sleep,
    /// HLT for ever, interrupts off.
    Halt,
    /// A busy loop.
    Spin,
    /// [`shell::random_ports`].
    Ports,
}

/// Interrupts the CPU; whether it answered.
pub fn call(id: u32) -> bool {
    let before = CALLS.load(Ordering::SeqCst);
    apic::send(id, apic::FIXED | u32::from(interrupts::CALL));
    Deadline::after(Deadline::LONG).wait(|| CALLS.load(Ordering::SeqCst) != before)
}

/// The interrupt handler of a call: waking up is all it is for.
pub fn called() {
    CALLS.fetch_add(1, Ordering::SeqCst);
}

/// Gives all other CPUs something to do.
pub fn give(work: Work) {
    WORK.store(work as u32, Ordering::SeqCst);
    for id in started() {
        apic::send(id, apic::FIXED | u32::from(interrupts::CALL));
    }
}

/// Where a started CPU arrives.
pub fn main(id: u32) -> ! {
    let is = |work: Work| WORK.load(Ordering::SeqCst) == work as u32;
    loop {
        if is(Work::Halt) {
            cpu::halt();
        } else if is(Work::Spin) {
            cpu::enable_interrupts();
            core::hint::spin_loop();
            cpu::disable_interrupts();
        } else if is(Work::Ports) {
            shell::random_ports(u64::from(id), 64);
        } else {
            cpu::sleep();
        }
    }
}
