//! The IDT, its 48 entries, and what their stubs leave on the stack. What each vector does is
//! `crate::interrupts::handle`'s.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};

use crate::entry;

const VECTORS: usize = 48;

/// The registers of what was interrupted; they are loaded again at the end.
#[repr(C)]
pub struct Frame {
    /// R15 down to R8, RBP RDI RSI RDX RCX RBX RAX.
    pub registers: [u64; 15],
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

extern "C" fn interrupt(frame: &mut Frame) {
    crate::interrupts::handle(frame);
}

static IDT: [[AtomicU64; 2]; VECTORS] = [const { [const { AtomicU64::new(0) }; 2] }; VECTORS];

/// Fills the table. Once, on the boot CPU.
pub fn init() {
    let mut stub = &raw const interrupt_stubs as u64;
    for [low, high] in &IDT {
        // Present, DPL 0, 64-bit interrupt gate, selector 8 (Intel SDM volume 3, figure 6-8).
        let gate = stub & 0xffff | 8 << 16 | 0x8e00 << 32 | (stub & 0xffff_0000) << 32;
        low.store(gate, Ordering::Relaxed);
        high.store(stub >> 32, Ordering::Relaxed);
        stub += 16;
    }
}

/// Loads the table on this CPU.
pub fn load() {
    let register = entry::TableRegister {
        limit: size_of_val(&IDT) as u16 - 1,
        base: &raw const IDT as u64,
    };
    // SAFETY: the table is static and its stubs restore what they change.
    unsafe { asm!("lidt [{}]", in(reg) &raw const register, options(nostack, readonly)) };
}

unsafe extern "C" {
    static interrupt_stubs: u8;
}

global_asm!(
    // One stub of 16 bytes a vector: an error code where the processor pushes none (it does for 8,
    // 10-14, 17, 21, 29 and 30), and the vector.
    ".pushsection .text.stubs, \"ax\"",
    ".balign 16",
    "interrupt_stubs:",
    ".set vector, 0",
    ".rept 48",
    ".balign 16",
    ".if vector < 32",
    ".if ((0x60227d00 >> vector) & 1) == 0",
    "push 0",
    ".endif",
    ".else",
    "push 0",
    ".endif",
    ".byte 0x6a, vector", // push imm8
    "jmp interrupt_common",
    ".set vector, vector + 1",
    ".endr",
    ".globl interrupt_common",
    "interrupt_common:",
    "push rax",
    "push rbx",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push rbp",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov rdi, rsp",
    "cld",
    // The processor has aligned the stack before it pushed five words; 17 more keep it so.
    "call {interrupt}",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rbp",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    ".popsection",
    interrupt = sym interrupt,
);
