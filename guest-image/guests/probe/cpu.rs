//! Instructions that Rust has no word for.

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, CpuidResult};

/// Reads a byte from an I/O port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: port I/O does not touch memory that the compiler knows of; no device here does DMA.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) };
    value
}

/// Reads a 16-bit word from an I/O port.
pub fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: as for `inb`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nostack, preserves_flags)) };
    value
}

/// Reads a 32-bit word from an I/O port.
pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as for `inb`.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags))
    };
    value
}

/// Writes a byte to an I/O port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// Writes a 16-bit word to an I/O port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) };
}

/// Writes a 32-bit word to an I/O port.
pub fn outl(port: u16, value: u32) {
    // SAFETY: as for `inb`.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags))
    };
}

/// Writes the bytes to one I/O port, with a single string instruction.
pub fn outsb(port: u16, bytes: &[u8]) {
    // SAFETY: it reads exactly the slice; DF is clear since entry.
    unsafe {
        asm!(
            "rep outsb",
            in("dx") port,
            inout("rsi") bytes.as_ptr() => _,
            inout("rcx") bytes.len() => _,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// CPUID.
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

/// Reads a model-specific register.
///
/// # Safety
///
/// It exists.
pub unsafe fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "rdmsr",
            in("ecx") index,
            out("eax") low,
            out("edx") high,
            options(nostack, preserves_flags),
        )
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
///
/// It exists, takes this value, and does not change how memory in use is reached.
pub unsafe fn wrmsr(index: u32, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "wrmsr",
            in("ecx") index,
            in("eax") value as u32,
            in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags),
        )
    };
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: every 64-bit processor has it, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// CR0, CR2, CR3 and CR4.
pub fn control() -> [u64; 4] {
    let (cr0, cr2, cr3, cr4);
    // SAFETY: reading control registers in ring 0 has no effect.
    unsafe {
        asm!("mov {}, cr0", "mov {}, cr2", "mov {}, cr3", "mov {}, cr4",
            out(reg) cr0, out(reg) cr2, out(reg) cr3, out(reg) cr4,
            options(nomem, nostack, preserves_flags));
    }
    [cr0, cr2, cr3, cr4]
}

/// Lets interrupts in.
pub fn enable_interrupts() {
    // SAFETY: the IDT is loaded before anything calls this, and handlers restore every register.
    unsafe { asm!("sti", options(nostack)) };
}

/// Keeps interrupts out.
pub fn disable_interrupts() {
    // SAFETY: no memory or register is affected.
    unsafe { asm!("cli", options(nostack)) };
}

/// Lets interrupts in and sleeps until the next one; comes back with interrupts off. STI holds
/// interrupts for one instruction more, so that one which is pending wakes the HLT.
pub fn sleep() {
    // SAFETY: as for `enable_interrupts`.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// Stops this CPU for good, interrupts off.
pub fn halt() -> ! {
    loop {
        // SAFETY: an NMI may end the HLT; the loop is there for that.
        unsafe { asm!("cli", "hlt", options(nostack)) };
    }
}

/// Loads an empty IDT and raises an exception: #BP with `breakpoint`, otherwise #UD. Neither it nor
/// the double fault that follows finds a handler, so the processor shuts down: a triple fault.
pub fn triple_fault(breakpoint: bool) -> ! {
    let empty = [0u16; 5];
    // SAFETY: the point is that nothing is executed after this.
    unsafe {
        asm!("cli", "lidt [{}]", in(reg) &raw const empty, options(nostack));
        if breakpoint {
            asm!("int3", "ud2", options(noreturn));
        }
        asm!("ud2", options(noreturn))
    }
}

/// A bound on a wait, in ticks of the time-stamp counter, whose frequency is not known: between
/// 1 and 5 GHz on the machines of today.
pub struct Deadline(u64);

impl Deadline {
    /// About a millisecond to five.
    pub const SHORT: u64 = 5_000_000;
    /// About one to five seconds.
    pub const LONG: u64 = 5_000_000_000;

    /// A deadline so many ticks away.
    pub fn after(ticks: u64) -> Self {
        Self(tsc().wrapping_add(ticks))
    }

    /// Whether it lies in the past.
    pub fn passed(&self) -> bool {
        tsc().wrapping_sub(self.0) < 1 << 63
    }

    /// Waits until `done` answers true; false when the deadline passes first.
    pub fn wait(&self, mut done: impl FnMut() -> bool) -> bool {
        loop {
            if done() {
                return true;
            }
            if self.passed() {
                return done();
            }
            core::hint::spin_loop();
        }
    }
}
