//! What each vector of the IDT does: traps belong to the debugger, the rest is not used.

use crate::console::{Hex, say};
use crate::traps::Frame;
use crate::{apic, cpu, gdb, memory};

/// The local APIC's timer, which is never started.
pub const TIMER: u8 = 0x20;
/// The local APIC's spurious interrupt.
pub const SPURIOUS: u8 = 0x2f;

/// Debug exception and breakpoint.
const DEBUG: u8 = 1;
const BREAKPOINT: u8 = 3;

/// Serves one interrupt or exception.
pub fn handle(frame: &mut Frame) {
    match frame.vector as u8 {
        DEBUG | BREAKPOINT => gdb::trap(frame),
        vector @ 0..32 => {
            if let Some(rip) = memory::recovery() {
                frame.rip = rip;
                return;
            }
            say!(
                "probe: exception FAILED (vector ",
                u32::from(vector),
                " error ",
                Hex(frame.error),
                " rip ",
                Hex(frame.rip),
                ")"
            );
            cpu::halt();
        }
        SPURIOUS => {}
        _ => apic::end_of_interrupt(),
    }
}
