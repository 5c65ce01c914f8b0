//! What each vector of the IDT does.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::console::{Hex, say};
use crate::traps::Frame;
use crate::{apic, cpu, entry, memory, shell, smp, uart};

/// The local APIC's timer.
pub const TIMER: u8 = 0x20;
/// The serial port, through the I/O APIC.
pub const SERIAL: u8 = 0x21;
/// One CPU calls another.
pub const CALL: u8 = 0x22;
/// A device's message.
pub const MESSAGE: u8 = 0x23;
/// The local APIC's spurious interrupt; the low four bits are fixed at 1 on old processors.
pub const SPURIOUS: u8 = 0x2f;

/// How many timer interrupts came.
static TICKS: AtomicU32 = AtomicU32::new(0);

/// How many timer interrupts came.
pub fn ticks() -> u32 {
    TICKS.load(Ordering::Relaxed)
}

/// How many messages of devices came and were not asked for yet.
static MESSAGES: AtomicU32 = AtomicU32::new(0);

/// Whether a device's message has come since this was last asked.
pub fn take_messages() -> bool {
    MESSAGES.swap(0, Ordering::Relaxed) != 0
}

/// Serves one interrupt or exception.
pub fn handle(frame: &mut Frame) {
    match frame.vector as u8 {
        TIMER => {
            TICKS.fetch_add(1, Ordering::Relaxed);
            apic::end_of_interrupt();
        }
        SERIAL => {
            uart::interrupt();
            apic::end_of_interrupt();
        }
        CALL => {
            smp::called();
            apic::end_of_interrupt();
        }
        MESSAGE => {
            MESSAGES.fetch_add(1, Ordering::Relaxed);
            apic::end_of_interrupt();
        }
        SPURIOUS => {}
        2 => say!("probe: nmi at ", Hex(frame.rip)),
        vector @ 0..32 => exception(vector, frame),
        vector => say!(
            "probe: interrupt FAILED (vector ",
            u32::from(vector),
            " is not ours)"
        ),
    }
}

fn exception(vector: u8, frame: &mut Frame) {
    static DYING: AtomicBool = AtomicBool::new(false);
    if let Some(rip) = memory::recovery() {
        frame.rip = rip;
        return;
    }
    if DYING.swap(true, Ordering::Relaxed) {
        cpu::halt();
    }
    let [_, cr2, ..] = cpu::control();
    say!(
        "probe: exception FAILED (vector ",
        u32::from(vector),
        " error ",
        Hex(frame.error),
        " rip ",
        Hex(frame.rip),
        " rsp ",
        Hex(frame.rsp),
        " rflags ",
        Hex(frame.rflags),
        " cr2 ",
        Hex(cr2),
        ")",
    );
    DYING.store(false, Ordering::Relaxed);
    entry::restart(shell::run);
}
