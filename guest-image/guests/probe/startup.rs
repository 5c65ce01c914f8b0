//! Starting the other CPUs, by INIT and start-up interrupts (Intel SDM volume 3, 9.4.4). Each ends up
//! in `crate::smp::main`, with the IDT loaded and its local APIC on.
//!
//! A CPU begins in real mode and can reach the first 4 GiB only, so link.ld names what it needs by
//! physical address: `boot_pml4_low`, `boot_gdt_low`, `trampoline_long_low`.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::cpu::{self, Deadline};
use crate::{apic, smp, traps};

/// The most CPUs that are started.
pub const MAX_CPUS: usize = 64;

/// The page that a CPU starts at in real mode: below 640 KiB, and not one that a loader uses.
const TRAMPOLINE: u64 = 0x10000;

const STACK_SIZE: usize = 2048;

#[repr(C, align(16))]
struct Stacks([[u8; STACK_SIZE]; MAX_CPUS]);

static mut STACKS: Stacks = Stacks([[0; STACK_SIZE]; MAX_CPUS]);

/// The stack of the CPU being started.
static NEXT_STACK: AtomicU64 = AtomicU64::new(0);
/// The APIC id of the CPU that came up last.
static LAST_UP: AtomicU32 = AtomicU32::new(u32::MAX);
/// The APIC ids of the CPUs that came up, and how many.
static STARTED: [AtomicU32; MAX_CPUS] = [const { AtomicU32::new(0) }; MAX_CPUS];
static STARTED_COUNT: AtomicU32 = AtomicU32::new(0);

/// APIC ids of enabled CPUs, as a table lists them.
#[derive(Clone, Copy)]
pub struct CpuList {
    ids: [u32; MAX_CPUS],
    /// How many there are, those beyond [`MAX_CPUS`] included.
    pub count: u32,
}

impl CpuList {
    /// An empty list.
    pub const fn new() -> Self {
        Self {
            ids: [0; MAX_CPUS],
            count: 0,
        }
    }

    /// Adds a CPU.
    pub fn add(&mut self, id: u32) {
        if let Some(slot) = self.ids.get_mut(self.count as usize) {
            *slot = id;
        }
        self.count += 1;
    }

    /// The ids.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        self.ids.iter().copied().take(self.count as usize)
    }
}

/// Copies the real-mode code to its page. Once, before [`start`].
pub fn prepare() {
    let (from, to) = (&raw const trampoline, &raw const trampoline_end);
    let length = (to as usize).wrapping_sub(from as usize);
    // SAFETY: the page is RAM that neither the loader's tables nor this kernel use.
    unsafe { from.copy_to_nonoverlapping(TRAMPOLINE as *mut u8, length) };
}

/// Starts the CPU with the APIC id `id`; an error says how far it came.
pub fn start(id: u32) -> Result<(), &'static str> {
    let index = STARTED_COUNT.load(Ordering::Relaxed);
    let slot = STARTED
        .get(index as usize)
        .ok_or("more CPUs than this kernel has stacks for")?;
    let stacks = &raw mut STACKS as u64;
    NEXT_STACK.store(
        stacks + (u64::from(index) + 1) * STACK_SIZE as u64,
        Ordering::SeqCst,
    );
    apic::send(id, apic::INIT);
    // The specification wants 10 ms here, for real hardware; a hypervisor's CPU is ready at once.
    Deadline::after(Deadline::SHORT).wait(|| false);
    // And two start-up interrupts: the first may be lost, the second is ignored if it was not.
    for ticks in [Deadline::SHORT * 40, Deadline::LONG] {
        apic::send(id, apic::STARTUP | (TRAMPOLINE >> 12) as u32);
        if Deadline::after(ticks).wait(|| LAST_UP.load(Ordering::SeqCst) == id) {
            slot.store(id, Ordering::Relaxed);
            STARTED_COUNT.store(index + 1, Ordering::Relaxed);
            return Ok(());
        }
    }
    Err("no sign of life after INIT and two start-up interrupts")
}

/// The APIC ids of the CPUs that were started.
pub fn started() -> impl Iterator<Item = u32> {
    let count = STARTED_COUNT.load(Ordering::Relaxed) as usize;
    STARTED
        .iter()
        .take(count)
        .map(|id| id.load(Ordering::Relaxed))
}

/// Where a started CPU arrives.
extern "C" fn main() -> ! {
    traps::load();
    if apic::enable().is_err() {
        cpu::halt();
    }
    let id = apic::id();
    LAST_UP.store(id, Ordering::SeqCst);
    smp::main(id)
}

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

global_asm!(
    // Real mode at TRAMPOLINE:0, straight into long mode: paging and protection in one step.
    ".pushsection .text16, \"ax\"",
    ".att_syntax",
    ".code16",
    "trampoline:",
    "cli",
    "movw %cs, %ax",
    "movw %ax, %ds",
    "lgdtl trampoline_gdtr - trampoline",
    "movl $0x20, %eax", // CR4.PAE
    "movl %eax, %cr4",
    "movl $boot_pml4_low, %eax",
    "movl %eax, %cr3",
    "movl $0xc0000080, %ecx", // EFER
    "xorl %edx, %edx",
    "movl $0x100, %eax", // LME
    "wrmsr",
    "movl $0x80000021, %eax", // CR0.PG, NE, PE
    "movl %eax, %cr0",
    "ljmpl $8, $trampoline_long_low",
    ".balign 4",
    "trampoline_gdtr:",
    ".word 23",
    ".long boot_gdt_low",
    "trampoline_end:",
    ".code64",
    ".intel_syntax noprefix",
    ".popsection",
    ".pushsection .text.trampoline, \"ax\"",
    ".globl trampoline_long",
    "trampoline_long:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov rsp, [rip + {stack}]",
    "xor ebp, ebp",
    // From the identity map to where the kernel is linked.
    "movabs rax, offset {main}",
    "call rax",
    "ud2",
    ".popsection",
    stack = sym NEXT_STACK,
    main = sym main,
);
