//! This kernel's own `set_modmetadata_set` (FreeBSD, sys/sys/module.h), and what the modules call.

/// struct mod_metadata.
#[repr(C)]
struct ModMetadata {
    version: i32,
    /// 1 depends, 2 module, 3 version.
    kind: i32,
    data: &'static Version,
    name: *const u8,
}

/// struct mod_version.
#[expect(dead_code, reason = "loaders and other kernels read it, not this code")]
struct Version(i32);

// SAFETY: the pointer is to a constant.
unsafe impl Sync for ModMetadata {}

static VERSION: Version = Version(1);

/// MODULE_VERSION(probe_kernel, 1).
static METADATA: ModMetadata = ModMetadata {
    version: 1,
    kind: 3,
    data: &VERSION,
    name: c"probe_kernel".as_ptr().cast(),
};

#[used]
#[unsafe(link_section = "set_modmetadata_set")]
static ENTRY: &ModMetadata = &METADATA;

// What the modules must find in the kernel's symbol table. In assembly, because the compiler makes
// what it links into a program local.
core::arch::global_asm!(
    ".pushsection .text.probe_kernel_double, \"ax\"",
    ".globl probe_kernel_double",
    "probe_kernel_double:",
    "lea rax, [rdi + rdi]",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    /// Twice its argument.
    pub fn probe_kernel_double(value: u64) -> u64;
}
