//! The way in, as FreeBSD's locore has it (sys/amd64/amd64/locore.S), and the kernel's own map: all
//! memory where it is, and the first 2 GiB at KERNBASE as well.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Where physical 0 is mapped for code that is linked high.
pub const KERNBASE: u64 = 0xffff_ffff_8000_0000;

/// A GDTR or IDTR as the processor stores it.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct TableRegister {
    pub limit: u16,
    pub base: u64,
}

/// The second and third word on the stack, RSP, CR3, and modulep's and kernend's.
static MODULEP: AtomicU32 = AtomicU32::new(0);
static KERNEND: AtomicU32 = AtomicU32::new(0);
static STACK_POINTER: AtomicU64 = AtomicU64::new(0);
static PAGE_TABLES: AtomicU64 = AtomicU64::new(0);

/// Physical address of the metadata.
pub fn modulep() -> u64 {
    MODULEP.load(Ordering::Relaxed).into()
}

/// The first physical byte that is free.
pub fn kernend() -> u64 {
    KERNEND.load(Ordering::Relaxed).into()
}

/// RSP and CR3 at entry.
pub fn registers() -> [u64; 2] {
    [&STACK_POINTER, &PAGE_TABLES].map(|register| register.load(Ordering::Relaxed))
}

global_asm!(
    ".pushsection .text.entry, \"ax\"",
    ".globl btext",
    "btext:",
    // The BIOS is not to test memory after a warm start: page 0 has to be writable.
    "mov word ptr ds:[0x472], 0x1234",
    // Known flags, by a push below what the loader left.
    "push 2",
    "popfq",
    "mov eax, [rsp + 4]",
    "mov [rip + {modulep}], eax",
    "mov eax, [rsp + 8]",
    "mov [rip + {kernend}], eax",
    "mov [rip + {stack_pointer}], rsp",
    "mov rax, cr3",
    "mov [rip + {page_tables}], rax",
    "mov eax, offset boot_pml4_low",
    "mov cr3, rax",
    "lea rsp, [rip + {stack} + {stack_size}]",
    "lgdt [rip + boot_gdtr]",
    "push 8",
    "lea rax, [rip + 2f]",
    "push rax",
    "retfq",
    "2:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor ebp, ebp",
    "call {main}",
    "ud2",
    ".popsection",

    // The last 512 GiB: the first two, at KERNBASE.
    ".pushsection .data.tables, \"aw\"",
    ".balign 4096",
    ".globl boot_high",
    "boot_high:",
    ".fill 510, 8, 0",
    ".quad boot_pd_low + 0x3",
    ".quad boot_pd_low + 0x1003",
    ".popsection",

    modulep = sym MODULEP,
    kernend = sym KERNEND,
    stack_pointer = sym STACK_POINTER,
    page_tables = sym PAGE_TABLES,
    stack = sym STACK,
    stack_size = const STACK_SIZE,
    main = sym crate::report::main,
);

const STACK_SIZE: usize = 16 * 1024;

#[repr(C, align(16))]
struct Stack([u8; STACK_SIZE]);

static mut STACK: Stack = Stack([0; STACK_SIZE]);
