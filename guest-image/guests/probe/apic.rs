//! The local APIC, by its MSRs (x2APIC) or its page, and one line of the I/O APIC (Intel SDM volume
//! 3, chapter 10; Intel 82093AA data sheet).

use core::sync::atomic::{AtomicBool, Ordering};

use crate::cpu::{self, rdmsr, wrmsr};
use crate::interrupts;
use crate::memory::{mmio_read, mmio_write, try_rdmsr, try_wrmsr};

const APIC_BASE_MSR: u32 = 0x1b;
const APIC_BASE_ENABLE: u64 = 1 << 11;
const APIC_BASE_X2APIC: u64 = 1 << 10;
const X2APIC_MSRS: u32 = 0x800;
const PAGE: u64 = 0xfee0_0000;

// Register numbers: the page's offset divided by 16, and the MSR less 0x800.
const ID: u32 = 0x02;
const VERSION: u32 = 0x03;
const TASK_PRIORITY: u32 = 0x08;
const END_OF_INTERRUPT: u32 = 0x0b;
const SPURIOUS: u32 = 0x0f;
const COMMAND: u32 = 0x30;
const COMMAND_HIGH: u32 = 0x31;
const LVT_TIMER: u32 = 0x32;
const LVT_LINT0: u32 = 0x35;
const TIMER_INITIAL: u32 = 0x38;
const TIMER_CURRENT: u32 = 0x39;
const TIMER_DIVIDE: u32 = 0x3e;

const MASKED: u32 = 1 << 16;
const SOFTWARE_ENABLE: u32 = 1 << 8;
const DELIVERY_PENDING: u32 = 1 << 12;
const DIVIDE_BY_1: u32 = 0b1011;

/// Interrupt commands: INIT (level, assert), start-up, and a fixed vector.
pub const INIT: u32 = 0x4500;
pub const STARTUP: u32 = 0x4600;
pub const FIXED: u32 = 0x4000;

static X2APIC: AtomicBool = AtomicBool::new(false);

/// Whether the registers are reached as MSRs.
pub fn is_x2apic() -> bool {
    X2APIC.load(Ordering::Relaxed)
}

fn read(register: u32) -> u32 {
    if is_x2apic() {
        // SAFETY: these registers exist once x2APIC mode is on.
        unsafe { rdmsr(X2APIC_MSRS + register) as u32 }
    } else {
        // SAFETY: these registers of the local APIC's page can be read without effect.
        unsafe { mmio_read(PAGE + u64::from(register) * 16) }
    }
}

fn write(register: u32, value: u32) {
    if is_x2apic() {
        // SAFETY: no register of the local APIC touches memory.
        unsafe { wrmsr(X2APIC_MSRS + register, u64::from(value)) };
    } else {
        // SAFETY: as above.
        unsafe { mmio_write(PAGE + u64::from(register) * 16, value) };
    }
}

/// Switches this CPU's local APIC on, as an x2APIC if CPUID offers one; an error says what is
/// wrong.
///
/// LINT0 is masked: the 8259s have nothing to say here, whatever is written to them later.
pub fn enable() -> Result<(), &'static str> {
    let base = try_rdmsr(APIC_BASE_MSR).ok_or("reading IA32_APIC_BASE faults")?;
    if cpu::cpuid(1, 0).ecx & 1 << 21 != 0 {
        // SAFETY: it changes how the APIC is reached, and every access here asks is_x2apic.
        if !unsafe { try_wrmsr(APIC_BASE_MSR, base | APIC_BASE_ENABLE | APIC_BASE_X2APIC) } {
            return Err("CPUID offers x2APIC, but enabling it faults");
        }
        X2APIC.store(true, Ordering::Relaxed);
    } else if base & APIC_BASE_ENABLE == 0 {
        return Err("disabled in IA32_APIC_BASE");
    }
    if matches!(read(VERSION), 0 | 0xffff_ffff) {
        return Err("nothing answers");
    }
    write(LVT_TIMER, MASKED);
    write(LVT_LINT0, MASKED);
    write(TASK_PRIORITY, 0);
    write(SPURIOUS, SOFTWARE_ENABLE | u32::from(interrupts::SPURIOUS));
    Ok(())
}

/// This CPU's APIC id.
pub fn id() -> u32 {
    if is_x2apic() {
        read(ID)
    } else {
        read(ID) >> 24
    }
}

/// The version register.
pub fn version() -> u32 {
    read(VERSION)
}

/// Acknowledges the interrupt in service.
pub fn end_of_interrupt() {
    write(END_OF_INTERRUPT, 0);
}

/// Starts the timer for one interrupt after `count` periods of its clock.
pub fn start_timer(count: u32) {
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(LVT_TIMER, u32::from(interrupts::TIMER));
    write(TIMER_INITIAL, count);
}

/// Stops the timer.
pub fn stop_timer() {
    write(LVT_TIMER, MASKED);
    write(TIMER_INITIAL, 0);
}

/// What the timer still has to count.
pub fn timer_left() -> u32 {
    read(TIMER_CURRENT)
}

/// Sends an interrupt command to the CPU with the APIC id `to`. An xAPIC addresses ids below 255.
pub fn send(to: u32, command: u32) {
    if is_x2apic() {
        // SAFETY: an IPI reaches another CPU, which is either not started or has our IDT.
        unsafe {
            wrmsr(
                X2APIC_MSRS + COMMAND,
                u64::from(to) << 32 | u64::from(command),
            )
        };
    } else {
        write(COMMAND_HIGH, to << 24);
        write(COMMAND, command);
        cpu::Deadline::after(cpu::Deadline::SHORT).wait(|| read(COMMAND) & DELIVERY_PENDING == 0);
    }
}

/// Routes pin `pin` of the I/O APIC at `base` to `vector` on this CPU (edge, active high), and says
/// how many pins the chip has; an error says why it cannot be done.
pub fn route(base: u64, pin: u32, vector: u8) -> Result<u32, &'static str> {
    let access = |register: u32| {
        // SAFETY: the I/O APIC's index register, at the address that a table names or the customary
        // one.
        unsafe { mmio_write(base, register) };
        base + 0x10
    };
    // SAFETY: the data register of the same chip.
    let version = unsafe { mmio_read(access(1)) };
    if matches!(version, 0 | 0xffff_ffff) {
        return Err("no I/O APIC answers");
    }
    let pins = (version >> 16 & 0xff) + 1;
    if pin >= pins {
        return Err("the I/O APIC has no such pin");
    }
    // SAFETY: redirection entries only say which interrupt to send.
    unsafe {
        mmio_write(access(0x11 + 2 * pin), id() << 24);
        mmio_write(access(0x10 + 2 * pin), u32::from(vector));
    }
    Ok(pins)
}
