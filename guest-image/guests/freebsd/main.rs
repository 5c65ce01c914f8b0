//! freebsd-probe: a kernel that is linked, branded and handed over to as FreeBSD/amd64's, and checks
//! what its loader did.
//!
//! [`entry`] keeps what the loader left in registers and on the stack. [`report::main`] finds the
//! console (BVM, else COM1), walks the metadata as FreeBSD does (sys/kern/subr_module.c), compares
//! every record with the memory it speaks of, links and starts the preloaded modules (sys/kern/
//! link_elf_obj.c), looks at the machine, starts the other CPUs, and prints the lines which a FreeBSD
//! kernel of 2012 printed. What is checked beyond them are lines `probe: WHAT ... ok` or
//! `... FAILED (why)`. With RB_KDB, `boot_ddb`, it enters [`gdb`]'s stub first.
//!
//! It shares the probe kernel's modules, and its rules: no vector registers, no long loops, every
//! wait bounded, nothing that may panic.

#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn)]

mod access;
mod entry;
mod gdb;
mod interrupts;
mod kernel;
mod metadata;
mod modmeta;
mod module;
mod pci;
mod report;
mod smp;
mod symbols;
mod terminal;

/// What both probes are made of.
#[path = "../probe"]
#[allow(dead_code, reason = "the other probe needs all of it, this one a part")]
mod shared {
    pub mod apic;
    pub mod console;
    pub mod cpu;
    pub mod memory;
    pub mod mptable;
    #[path = "uart.rs"]
    pub mod serial;
    pub mod startup;
    pub mod tables;
    pub mod traps;
}

use shared::{apic, console, cpu, memory, mptable, serial, startup, traps};

use core::panic::PanicInfo;

use console::say;

#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    say!("probe: panic FAILED (the probe's own code)");
    cpu::halt()
}

/// The precompiled `core` names its unwinder's hook even where nothing unwinds.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
