//! probe: a freestanding 64-bit kernel that reports what a hypervisor gives its guest.
//!
//! It runs on the first CPU, in ring 0, without a heap, a scheduler or user mode: [`entry`] saves
//! the registers it was entered with and calls [`report::run`], which prints one line a finding
//! (`probe: NAME ... ok` or `... FAILED (why)`) and ends with `probe: report done`; then
//! [`shell::run`] answers commands on the first serial port for ever.
//!
//! Two rules keep it alive on hosts that emulate ring 0 one instruction at a time (KVM-PVM: about
//! 1.6 us each, and no SSE at all): no floating-point or vector register, which guest-image's build
//! script checks on the linked file, and no long loops. Every wait is bounded, by the time-stamp
//! counter. Nothing here may panic either: `core`'s panic messages format numbers with SSE, so a
//! panic path fails that check.

#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn)]

mod acpi;
mod apic;
mod blk;
mod boot;
mod console;
mod cpu;
mod entry;
mod interrupts;
mod memory;
mod mptable;
mod net;
mod pci;
mod report;
mod rtc;
mod shell;
mod smp;
mod startup;
mod tables;
mod traps;
mod uart;
mod virtio;

use core::panic::PanicInfo;

use console::say;
/// Where [`console`] prints.
use uart as terminal;

#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    say!("probe: panic FAILED (the probe's own code)");
    cpu::halt()
}

/// The precompiled `core` names its unwinder's hook even where nothing unwinds.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
