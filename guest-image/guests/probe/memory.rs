//! Physical memory, seen through the identity map, and accesses that may fault.
//!
//! Tables come from outside: addresses may point anywhere. Every read goes through an instruction
//! that the exception handler knows how to step over ([`recovery`]).

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};

/// Where the exception handler continues instead of giving up; 0: no access is being tried. There
/// is one for all CPUs: only one at a time may try, and no interrupt handler may.
static RECOVERY: AtomicU64 = AtomicU64::new(0);

/// The address to continue at after a fault, once.
pub fn recovery() -> Option<u64> {
    match RECOVERY.swap(0, Ordering::Relaxed) {
        0 => None,
        rip => Some(rip),
    }
}

/// Executes one instruction that may fault; evaluates to whether it did not.
macro_rules! attempt {
    ($instruction:literal, $($operand:tt)*) => {{
        let ok: u64;
        asm!(
            "lea {ok}, [rip + 2f]",
            "mov [{recovery}], {ok}",
            "xor {ok:e}, {ok:e}",
            $instruction,
            "mov {ok:e}, 1",
            "2:",
            "mov qword ptr [{recovery}], 0",
            ok = out(reg) ok,
            recovery = in(reg) RECOVERY.as_ptr(),
            $($operand)*
        );
        ok != 0
    }};
}

/// Reads a byte.
pub fn peek8(address: u64) -> Option<u8> {
    let value: u64;
    // SAFETY: the identity map makes any address readable or a fault, and a fault is stepped over.
    let ok = unsafe {
        attempt!(
            "movzx {value:e}, byte ptr [{address}]",
            value = out(reg) value,
            address = in(reg) address,
            options(nostack),
        )
    };
    ok.then_some(value as u8)
}

/// Reads a little-endian 32-bit word, aligned or not.
pub fn peek32(address: u64) -> Option<u32> {
    let value: u64;
    // SAFETY: as for `peek8`.
    let ok = unsafe {
        attempt!(
            "mov {value:e}, [{address}]",
            value = out(reg) value,
            address = in(reg) address,
            options(nostack),
        )
    };
    ok.then_some(value as u32)
}

/// Reads a little-endian 64-bit word, aligned or not.
pub fn peek64(address: u64) -> Option<u64> {
    let value: u64;
    // SAFETY: as for `peek8`.
    let ok = unsafe {
        attempt!(
            "mov {value}, [{address}]",
            value = out(reg) value,
            address = in(reg) address,
            options(nostack),
        )
    };
    ok.then_some(value)
}

/// The most bytes of a text that are looked at.
pub const MAX_TEXT: u64 = 2048;

/// The length of a NUL-terminated string, cut at 2 KiB and where memory ends.
pub fn string_length(address: u64) -> u64 {
    let mut length = 0;
    while length < MAX_TEXT && !matches!(peek8(address + length), Some(0) | None) {
        length += 1;
    }
    length
}

/// Exchanges a 64-bit word, so that the page is written and holds again what it held: whether it
/// can be both read and written.
pub fn writable(address: u64) -> bool {
    let Some(old) = peek64(address) else {
        return false;
    };
    let pattern = !old;
    // SAFETY: the same value is written back before anything else runs; callers only name RAM that
    // the memory map lists, with interrupts off.
    unsafe {
        let written = attempt!(
            "mov [{address}], {value}",
            value = in(reg) pattern,
            address = in(reg) address,
            options(nostack),
        );
        let held = peek64(address) == Some(pattern);
        let restored = attempt!(
            "mov [{address}], {value}",
            value = in(reg) old,
            address = in(reg) address,
            options(nostack),
        );
        written && held && restored
    }
}

/// Reads a 32-bit device register.
///
/// # Safety
///
/// `address` is that of a register which can be read.
pub unsafe fn mmio_read(address: u64) -> u32 {
    let value;
    // SAFETY: the caller's promise. One plain MOV: hypervisors decode what touches a device.
    unsafe {
        asm!("mov {:e}, [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags))
    };
    value
}

/// Writes a 32-bit device register.
///
/// # Safety
///
/// `address` is that of a register for which the value has no effect on memory in use.
pub unsafe fn mmio_write(address: u64, value: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("mov [{}], {:e}", in(reg) address, in(reg) value, options(nostack, preserves_flags))
    };
}

/// Reads a 8-bit device register.
///
/// # Safety
///
/// As for [`mmio_read`].
pub unsafe fn mmio_read8(address: u64) -> u8 {
    let value;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("mov {}, [{}]", out(reg_byte) value, in(reg) address, options(nostack, preserves_flags))
    };
    value
}

/// Writes a 8-bit device register.
///
/// # Safety
///
/// As for [`mmio_write`].
pub unsafe fn mmio_write8(address: u64, value: u8) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("mov [{}], {}", in(reg) address, in(reg_byte) value, options(nostack, preserves_flags))
    };
}

/// Reads a 16-bit device register.
///
/// # Safety
///
/// As for [`mmio_read`].
pub unsafe fn mmio_read16(address: u64) -> u16 {
    let value;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("mov {:x}, [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags))
    };
    value
}

/// Writes a 16-bit device register.
///
/// # Safety
///
/// As for [`mmio_write`].
pub unsafe fn mmio_write16(address: u64, value: u16) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("mov [{}], {:x}", in(reg) address, in(reg) value, options(nostack, preserves_flags))
    };
}

/// Reads a model-specific register; None if it faults.
pub fn try_rdmsr(index: u32) -> Option<u64> {
    let (low, high): (u32, u32);
    // SAFETY: reading an MSR changes nothing; a missing one faults and is stepped over.
    let ok = unsafe {
        attempt!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nostack))
    };
    ok.then_some(u64::from(high) << 32 | u64::from(low))
}

/// Writes a model-specific register; false if it faults.
///
/// # Safety
///
/// The value must not change how memory in use is reached.
pub unsafe fn try_wrmsr(index: u32, value: u64) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        attempt!(
            "wrmsr",
            in("ecx") index,
            in("eax") value as u32,
            in("edx") (value >> 32) as u32,
            options(nostack),
        )
    }
}

/// Whether the bytes add up to 0, as every firmware table does.
pub fn checksum_is_zero(address: u64, length: u64) -> bool {
    let mut sum = 0u8;
    for offset in 0..length {
        match peek8(address + offset) {
            Some(byte) => sum = sum.wrapping_add(byte),
            None => return false,
        }
    }
    sum == 0
}

/// The first of `count` addresses from `from` on, `step` bytes apart, that holds the 32-bit word
/// `word`. Five instructions a step: whole BIOS areas are searched with it.
pub fn find32(from: u64, step: u64, count: u64, word: u32) -> Option<u64> {
    let (mut at, mut left) = (from, count);
    // SAFETY: callers name ranges below 1 MiB, or a table that was read before, all mapped.
    unsafe {
        asm!(
            "2:",
            "cmp [{at}], {word:e}",
            "je 3f",
            "add {at}, {step}",
            "dec {left}",
            "jnz 2b",
            "3:",
            at = inout(reg) at,
            left = inout(reg) left,
            step = in(reg) step,
            word = in(reg) word,
            options(nostack, readonly),
        );
    }
    (left != 0).then_some(at)
}

// What the compiler calls for copies. String instructions: one of them moves everything.
global_asm!(
    ".pushsection .text.mem, \"ax\"",
    ".globl memcpy, memmove, memset, memcmp, bcmp",
    "memmove:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "cmp rdi, rsi",
    "jbe 2f",
    "lea rdi, [rdi + rcx - 1]",
    "lea rsi, [rsi + rcx - 1]",
    "std",
    "rep movsb",
    "cld",
    "ret",
    "memcpy:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "2: rep movsb",
    "ret",
    "memset:",
    "mov r8, rdi",
    "mov eax, esi",
    "mov rcx, rdx",
    "rep stosb",
    "mov rax, r8",
    "ret",
    "memcmp:",
    "bcmp:",
    "xor eax, eax",
    "mov rcx, rdx",
    "cmp eax, eax", // length 0 is equal
    "repe cmpsb",
    "je 3f",
    "sbb eax, eax",
    "or eax, 1",
    "3: ret",
    ".popsection",
);
