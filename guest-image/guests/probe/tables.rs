//! The kernel's page tables and GDT, as data.
//!
//! link.ld names what the tables hold by physical address: `boot_pdpt_low`, `boot_pd_low`, and
//! `boot_high_low`, the entry for the last 512 GiB, or 0.

use core::arch::global_asm;

global_asm!(
    // Identity map: the first 8 GiB by 2 MiB pages (the fourth uncached, where devices are), the
    // rest up to 512 GiB by 1 GiB pages, which fault on a processor without them; [`crate::memory`]
    // copes. Data, not code, because it costs no instruction.
    ".pushsection .data.tables, \"aw\"",
    ".balign 4096",
    ".globl boot_pml4, boot_pdpt, boot_pd, boot_gdt, boot_gdtr",
    "boot_pml4:",
    ".quad boot_pdpt_low + 0x3",
    ".fill 510, 8, 0",
    ".quad boot_high_low",
    "boot_pdpt:",
    ".set index, 0",
    ".rept 8",
    ".quad boot_pd_low + (index << 12) + 0x3",
    ".set index, index + 1",
    ".endr",
    ".rept 504",
    ".quad (index << 30) + 0x83",
    ".set index, index + 1",
    ".endr",
    "boot_pd:",
    ".set index, 0",
    ".rept 1536",
    ".quad (index << 21) + 0x83",
    ".set index, index + 1",
    ".endr",
    ".rept 512",
    ".quad (index << 21) + 0x93",
    ".set index, index + 1",
    ".endr",
    ".rept 2048",
    ".quad (index << 21) + 0x83",
    ".set index, index + 1",
    ".endr",
    "boot_gdt:",
    ".quad 0, 0x00209b0000000000, 0x00cf93000000ffff",
    "boot_gdtr:",
    ".word 23",
    ".quad boot_gdt",
    ".popsection",
);
