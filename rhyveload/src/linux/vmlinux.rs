//! vmlinux: Linux's ELF file, entered at its physical entry point.

use super::boot_params::Params;
use super::{CMDLINE_MAX, INITRD_MAX, claim_low, finish};
use crate::elf::{Elf, ElfError};
use crate::freebsd::kernel::Kernel;
use crate::plan::{LoadPlan, PlanError, Protocol, Request};
use crate::space::Space;

/// Whether this looks like Linux: it is linked at high virtual addresses, but its entry point is a
/// physical one (arch/x86/kernel/vmlinux.lds.S, phys_startup_64).
pub fn is_vmlinux(elf: &Elf) -> bool {
    let entry = elf.entry;
    let physical = elf.loads.iter().any(|load| load.holds(load.paddr, entry));
    let virt = elf.loads.iter().any(|load| load.holds(load.vaddr, entry));
    physical && !virt
}

/// Plans the load.
///
/// # Errors
///
/// It does not fit, the initial RAM disk does not, or the command line is too long.
pub fn plan(elf: &Elf, request: &Request<'_>) -> Result<LoadPlan, PlanError> {
    let protocol = Protocol::Linux64;
    let mut space = Space::new(request.layout, u64::MAX);
    claim_low(&mut space, protocol, request, CMDLINE_MAX)?;
    let kernel = Kernel::place(elf, protocol, &mut space)?;
    check_entry(elf, elf.entry)?;
    let initrd = place_initrd(&mut space, request)?;
    let params = Params {
        header: &[],
        initrd: initrd.zip(request.initrd),
    };
    let (blobs, registers) = finish(params, request, elf.entry, kernel.end);
    Ok(LoadPlan {
        protocol,
        summary: kernel.summary(),
        segments: kernel.segments,
        blobs,
        initrd,
        registers,
        symbols: None,
    })
}

/// A physical entry point must be loaded.
pub(crate) fn check_entry(elf: &Elf, entry: u64) -> Result<(), ElfError> {
    let loaded = elf.loads.iter().any(|load| load.holds(load.paddr, entry));
    loaded.then_some(()).ok_or(ElfError::Entry(entry))
}

pub(crate) fn place_initrd(
    space: &mut Space,
    request: &Request<'_>,
) -> Result<Option<u64>, PlanError> {
    let place = |len| space.claim_highest("the initial RAM disk", len, 4096, INITRD_MAX + 1);
    Ok(request.initrd.map(place).transpose()?)
}
