//! The two ways in, the CPU's first page tables and GDT, and what the registers held.
//!
//! `probe_start` is the ELF entry: long mode, as FreeBSD's loader leaves it, with the 32-bit words
//! {0, modulep, kernend} at RSP. `probe_start_pvh` is named by the Xen note of type 18: 32-bit
//! protected mode without paging, EBX pointing at an hvm_start_info (Xen, docs/misc/pvh). Both save
//! every register in [`ENTRY`] before they change it, then meet at `probe_common`.

use core::arch::global_asm;
use core::mem::offset_of;

/// A GDTR or IDTR as the processor stores it.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct TableRegister {
    pub limit: u16,
    pub base: u64,
}

/// The registers at entry.
#[repr(C)]
pub struct EntryState {
    /// RAX RBX RCX RDX RSI RDI RBP RSP R8-R15.
    pub general: [u64; 16],
    pub rflags: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// CS DS ES FS GS SS TR LDTR.
    pub selectors: [u64; 8],
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    /// [`PROTOCOL_METADATA`] or [`PROTOCOL_PVH`].
    pub protocol: u32,
    /// The second and third word on the stack (modulep, kernend), or the start_info and 0.
    pub words: [u32; 2],
}

pub const PROTOCOL_METADATA: u32 = 1;
pub const PROTOCOL_PVH: u32 = 2;

static mut ENTRY: EntryState = EntryState {
    general: [0; 16],
    rflags: 0,
    cr0: 0,
    cr3: 0,
    cr4: 0,
    efer: 0,
    selectors: [0; 8],
    gdtr: TableRegister { limit: 0, base: 0 },
    idtr: TableRegister { limit: 0, base: 0 },
    protocol: 0,
    words: [0; 2],
};

/// What the registers held when the kernel was entered.
pub fn state() -> &'static EntryState {
    // SAFETY: only the entry code below writes it, before any Rust code runs.
    unsafe { &*&raw const ENTRY }
}

global_asm!(
    // 64-bit entry. Only MOV until the flags are saved: PUSHF wants a stack, and the given one is
    // not ours.
    ".pushsection .text.entry, \"ax\"",
    ".globl probe_start",
    "probe_start:",
    "mov [rip + {entry} + 0], rax",
    "mov [rip + {entry} + 8], rbx",
    "mov [rip + {entry} + 16], rcx",
    "mov [rip + {entry} + 24], rdx",
    "mov [rip + {entry} + 32], rsi",
    "mov [rip + {entry} + 40], rdi",
    "mov [rip + {entry} + 48], rbp",
    "mov [rip + {entry} + 56], rsp",
    "mov [rip + {entry} + 64], r8",
    "mov [rip + {entry} + 72], r9",
    "mov [rip + {entry} + 80], r10",
    "mov [rip + {entry} + 88], r11",
    "mov [rip + {entry} + 96], r12",
    "mov [rip + {entry} + 104], r13",
    "mov [rip + {entry} + 112], r14",
    "mov [rip + {entry} + 120], r15",
    "mov eax, [rsp + 4]",
    "mov [rip + {entry} + {words}], eax",
    "mov eax, [rsp + 8]",
    "mov [rip + {entry} + {words} + 4], eax",
    "lea rsp, [rip + {stack} + {stack_size}]",
    "pushfq",
    "pop qword ptr [rip + {entry} + {rflags}]",
    "mov rax, cr0",
    "mov [rip + {entry} + {cr0}], rax",
    "mov rax, cr3",
    "mov [rip + {entry} + {cr3}], rax",
    "mov rax, cr4",
    "mov [rip + {entry} + {cr4}], rax",
    "mov ecx, 0xc0000080", // EFER
    "rdmsr",
    "mov [rip + {entry} + {efer}], eax",
    "mov [rip + {entry} + {efer} + 4], edx",
    "mov [rip + {entry} + {selectors} + 0], cs",
    "mov [rip + {entry} + {selectors} + 8], ds",
    "mov [rip + {entry} + {selectors} + 16], es",
    "mov [rip + {entry} + {selectors} + 24], fs",
    "mov [rip + {entry} + {selectors} + 32], gs",
    "mov [rip + {entry} + {selectors} + 40], ss",
    "str [rip + {entry} + {selectors} + 48]",
    "sldt [rip + {entry} + {selectors} + 56]",
    "sgdt [rip + {entry} + {gdtr}]",
    "sidt [rip + {entry} + {idtr}]",
    "mov dword ptr [rip + {entry} + {protocol}], {metadata}",
    "cld",
    "lea rax, [rip + boot_pml4]",
    "mov cr3, rax",
    // The same selectors as the loader's GDT (8 code, 0x10 data), so what is loaded stays valid.
    "lgdt [rip + boot_gdtr]",
    "probe_common:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor ebp, ebp",
    "call {main}",
    "ud2",
    ".popsection",

    // PVH entry.
    ".pushsection .text32, \"ax\"",
    ".code32",
    "probe_start_pvh:",
    "mov [{entry} + 0], eax",
    "mov [{entry} + 8], ebx",
    "mov [{entry} + 16], ecx",
    "mov [{entry} + 24], edx",
    "mov [{entry} + 32], esi",
    "mov [{entry} + 40], edi",
    "mov [{entry} + 48], ebp",
    "mov [{entry} + 56], esp",
    "mov [{entry} + {words}], ebx",
    "lea esp, [{stack} + {stack_size}]",
    "pushfd",
    "pop dword ptr [{entry} + {rflags}]",
    "mov eax, cr0",
    "mov [{entry} + {cr0}], eax",
    "mov eax, cr3",
    "mov [{entry} + {cr3}], eax",
    "mov eax, cr4",
    "mov [{entry} + {cr4}], eax",
    "mov ecx, 0xc0000080", // EFER
    "rdmsr",
    "mov [{entry} + {efer}], eax",
    "mov [{entry} + {efer} + 4], edx",
    "mov [{entry} + {selectors} + 0], cs",
    "mov [{entry} + {selectors} + 8], ds",
    "mov [{entry} + {selectors} + 16], es",
    "mov [{entry} + {selectors} + 24], fs",
    "mov [{entry} + {selectors} + 32], gs",
    "mov [{entry} + {selectors} + 40], ss",
    "str [{entry} + {selectors} + 48]",
    "sldt [{entry} + {selectors} + 56]",
    "sgdt [{entry} + {gdtr}]",
    "sidt [{entry} + {idtr}]",
    "mov dword ptr [{entry} + {protocol}], {pvh}",
    "cld",
    "lgdt [boot_gdtr]",
    "mov eax, 0x20", // CR4.PAE
    "mov cr4, eax",
    "lea eax, [boot_pml4]",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "xor edx, edx",
    "mov eax, 0x100", // EFER.LME
    "wrmsr",
    "mov eax, 0x80000021", // CR0.PG, NE, PE
    "mov cr0, eax",
    ".att_syntax",
    "ljmp $8, $probe_common",
    ".intel_syntax noprefix",
    ".code64",
    ".popsection",

    // Xen ELF note 18, XEN_ELFNOTE_PHYS32_ENTRY.
    ".pushsection .note.xen, \"a\", @note",
    ".balign 4",
    ".long 4, 4, 18",
    ".asciz \"Xen\"",
    ".long probe_start_pvh",
    ".popsection",

    entry = sym ENTRY,
    stack = sym STACK,
    stack_size = const STACK_SIZE,
    main = sym crate::report::main,
    metadata = const PROTOCOL_METADATA,
    pvh = const PROTOCOL_PVH,
    rflags = const offset_of!(EntryState, rflags),
    cr0 = const offset_of!(EntryState, cr0),
    cr3 = const offset_of!(EntryState, cr3),
    cr4 = const offset_of!(EntryState, cr4),
    efer = const offset_of!(EntryState, efer),
    selectors = const offset_of!(EntryState, selectors),
    gdtr = const offset_of!(EntryState, gdtr),
    idtr = const offset_of!(EntryState, idtr),
    protocol = const offset_of!(EntryState, protocol),
    words = const offset_of!(EntryState, words),
);

const STACK_SIZE: usize = 16 * 1024;

#[repr(C, align(16))]
struct Stack([u8; STACK_SIZE]);

static mut STACK: Stack = Stack([0; STACK_SIZE]);

/// Abandons whatever runs and enters `next` on an empty boot stack: how the command prompt survives
/// an exception.
pub fn restart(next: extern "C" fn() -> !) -> ! {
    // SAFETY: nothing of the old stack is used again, because `next` does not return.
    unsafe {
        core::arch::asm!(
            "lea rsp, [{stack} + {size}]",
            "xor ebp, ebp",
            "call {next}",
            "ud2",
            stack = in(reg) &raw mut STACK,
            size = const STACK_SIZE,
            next = in(reg) next,
            options(noreturn),
        )
    }
}
