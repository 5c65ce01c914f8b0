//! What a program for Linux guests has in place of a C library: where it starts, system calls, an end.

use core::arch::{asm, global_asm};

global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {entry}",
    entry = sym super::entry,
);

const EXIT: usize = 60;

/// A system call (arch/x86/entry/syscalls/syscall_64.tbl); if it fails, so does the program.
pub fn call(number: usize, a: usize, b: usize, c: usize) -> usize {
    let result: isize;
    // SAFETY: the calls made here read and write nothing but what their arguments point to.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    match usize::try_from(result) {
        Ok(result) => result,
        Err(_) => exit(1),
    }
}

/// The end, with this status.
pub fn exit(status: usize) -> ! {
    loop {
        // SAFETY: it does not return.
        unsafe { asm!("syscall", in("rax") EXIT, in("rdi") status, options(noreturn)) }
    }
}

/// The decimal number that a word is.
///
/// # Safety
/// A zero ends the word.
pub unsafe fn number(mut word: *const u8) -> u32 {
    let mut number = 0u32;
    // SAFETY: the loop ends at the zero.
    while let digit @ b'0'..=b'9' = unsafe { *word } {
        number = number.wrapping_mul(10).wrapping_add(u32::from(digit - b'0'));
        // SAFETY: what was there is not the end.
        word = unsafe { word.add(1) };
    }
    number
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(3)
}
