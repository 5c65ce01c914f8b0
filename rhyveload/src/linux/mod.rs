//! Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst): a kernel entered in long mode
//! with `boot_params` in RSI.
//!
//! [`bzimage`] reads the setup header of a compressed kernel, which unpacks itself; [`vmlinux`]
//! enters an ELF kernel at once, which saves the guest that work. Both share the low pages that
//! [`boot_params`] and [`pagetable`] make.

pub mod boot_params;
pub mod bzimage;
pub mod pagetable;
pub mod vmlinux;

use vmm_api::boot::setup_linux64_registers;
use vmm_api::regs::Registers;

use crate::plan::{Blob, PlanError, Protocol, Request};
use crate::space::Space;

/// The GDT.
pub const GDT: u64 = 0x1000;

/// The zero page.
pub const BOOT_PARAMS: u64 = 0x7000;

/// The page tables, from here on.
pub const PML4: u64 = 0x9000;

/// The command line.
pub const CMDLINE: u64 = 0x2_0000;

/// End of the low RAM that the memory map shows; an extended BIOS data area would follow.
pub const LOW_END: u64 = 0x9_fc00;

/// Longest command line, without its NUL, of an x86 kernel that does not say (COMMAND_LINE_SIZE).
pub const CMDLINE_MAX: u64 = 2047;

/// Where a kernel that does not say takes an initial RAM disk: below 2 GiB, as bzImages say.
pub const INITRD_MAX: u64 = 0x7fff_ffff;

/// Takes room for what lies low, and refuses what Linux has no use for.
fn claim_low(
    space: &mut Space,
    protocol: Protocol,
    request: &Request<'_>,
    cmdline_max: u64,
) -> Result<(), PlanError> {
    refuse_env(protocol, request)?;
    let len = request.cmdline.unwrap_or_default().len() as u64;
    if len > cmdline_max {
        return Err(PlanError::Cmdline {
            len,
            max: cmdline_max,
        });
    }
    space.claim("the boot parameters", 0, CMDLINE)?;
    space.claim("the command line", CMDLINE, len + 1)?;
    Ok(())
}

/// `-e` is FreeBSD's.
pub(crate) fn refuse_env(protocol: Protocol, request: &Request<'_>) -> Result<(), PlanError> {
    if request.env.is_empty() {
        return Ok(());
    }
    Err(PlanError::Option {
        option: "-e",
        protocol,
        why: "the kernel environment is FreeBSD's; use --cmdline",
    })
}

/// The command line with its NUL.
pub(crate) fn cmdline_blob(request: &Request<'_>) -> Blob {
    let mut bytes = request.cmdline.unwrap_or_default().as_bytes().to_vec();
    bytes.push(0);
    Blob {
        gpa: CMDLINE,
        bytes,
    }
}

/// What the loader adds, and the state of the first vCPU, for a kernel that is entered at `entry`
/// and lies below `kernel_end`.
fn finish(
    params: boot_params::Params<'_>,
    request: &Request<'_>,
    entry: u64,
    kernel_end: u64,
) -> (Vec<Blob>, Registers) {
    let blobs = vec![
        Blob {
            gpa: BOOT_PARAMS,
            bytes: params.encode(request),
        },
        cmdline_blob(request),
        Blob {
            gpa: PML4,
            bytes: pagetable::identity(kernel_end),
        },
        Blob {
            gpa: GDT,
            bytes: pagetable::gdt(),
        },
    ];
    let registers = setup_linux64_registers(entry, BOOT_PARAMS, PML4, pagetable::gdt_register());
    (blobs, registers)
}
