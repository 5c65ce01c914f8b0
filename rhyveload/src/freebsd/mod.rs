//! FreeBSD's hand-off: a kernel entered in long mode with a module list, as bhyve's userboot does
//! it (sys/boot/userboot/userboot/elf64_freebsd.c).
//!
//! [`kernel`] places the ELF segments, [`mod@env`] and [`metadata`] make what the kernel reads,
//! [`pagetable`] the fixed low pages. A plain static ELF64 file, as our probe guest is, is entered
//! the same way, but loaded at its physical addresses.

pub mod env;
pub mod kernel;
pub mod metadata;
pub mod pagetable;

use vmm_api::boot::setup_freebsd_registers;
use vmm_api::memory::HIGHMEM_BASE;

use crate::elf::{Elf, ElfError};
use crate::plan::{Blob, LoadPlan, PlanError, Protocol, Request};
use crate::space::Space;
use kernel::Kernel;
use metadata::{Metadata, Smap};

/// The page tables map this much, over and over, so everything lies below.
pub const REACH: u64 = 1 << 30;

const PAGE: u64 = 4096;

/// Why a kernel cannot be entered as FreeBSD's is.
#[derive(Debug, thiserror::Error)]
pub enum FreebsdError {
    /// The page tables do not map the entry point to where its segment lies.
    #[error(
        "entry point {entry:#x} is loaded at {gpa:#x}, but the boot page tables map it to \
        {mapped:#x}: link the kernel so that virtual and physical addresses agree modulo 1 GiB"
    )]
    Mapping {
        /// e_entry.
        entry: u64,
        /// Where its segment is put.
        gpa: u64,
        /// Where the page tables point.
        mapped: u64,
    },
    /// The environment is too large.
    #[error("the kernel environment has {0} bytes: at most 1 MiB is allowed")]
    Environment(u64),
}

/// Plans the load of an ELF kernel.
///
/// # Errors
///
/// A segment has no place, the entry point is not mapped, or an initial RAM disk is wanted.
pub fn plan(elf: &Elf, protocol: Protocol, request: &Request<'_>) -> Result<LoadPlan, PlanError> {
    if request.initrd.is_some() {
        return Err(PlanError::Option {
            option: "--initrd",
            protocol,
            why: "their root disk is a module of type mfs_root or a virtual disk",
        });
    }
    let mut space = Space::new(request.layout, REACH);
    space.claim("the loader's own pages", 0, pagetable::END)?;
    let kernel = Kernel::place(elf, protocol, &mut space)?;
    check_entry(elf, &kernel)?;

    let env_base = kernel.end.next_multiple_of(PAGE);
    let env = env::encode(request.env, request.cmdline);
    let env_len = env.len() as u64;
    if env_len > 1 << 20 {
        return Err(FreebsdError::Environment(env_len).into());
    }
    space.claim("the kernel environment", env_base, env_len)?;

    let modulep = (env_base + env_len).next_multiple_of(PAGE);
    let mut metadata = Metadata {
        name: request.kernel,
        base: kernel.base,
        size: kernel.end - kernel.base,
        howto: env::howto(request.env),
        envp: env_base,
        kernend: 0,
        smap: smap(request),
    };
    let kernend = (modulep + metadata.encode().len() as u64).next_multiple_of(PAGE);
    metadata.kernend = kernend;
    space.claim("the kernel metadata", modulep, kernend - modulep)?;

    let low_pages = pagetable::encode(modulep, kernend);
    Ok(LoadPlan {
        protocol,
        summary: kernel.summary(),
        segments: kernel.segments,
        blobs: vec![
            Blob {
                gpa: env_base,
                bytes: env,
            },
            Blob {
                gpa: modulep,
                bytes: metadata.encode(),
            },
            Blob {
                gpa: pagetable::STACK,
                bytes: low_pages,
            },
        ],
        initrd: None,
        registers: setup_freebsd_registers(
            elf.entry,
            pagetable::PML4,
            pagetable::GDT,
            pagetable::STACK,
        ),
    })
}

fn check_entry(elf: &Elf, kernel: &Kernel) -> Result<(), PlanError> {
    let entry = elf.entry;
    let loads = elf.loads.iter().zip(&kernel.segments);
    let at = loads
        .into_iter()
        .find(|(load, _)| load.holds(load.vaddr, entry));
    let (load, segment) = at.ok_or(ElfError::Entry(entry))?;
    // Both were claimed below 1 GiB, so this cannot overflow.
    let gpa = segment.gpa + (entry - load.vaddr);
    let mapped = entry % REACH;
    if gpa == mapped {
        Ok(())
    } else {
        Err(FreebsdError::Mapping { entry, gpa, mapped }.into())
    }
}

/// The memory map that bhyve's userboot hands over (biossmap.c): no entry for the BIOS area.
fn smap(request: &Request<'_>) -> Vec<Smap> {
    let layout = request.layout;
    let low = Smap::ram(0, 640 << 10);
    let main = Smap::ram(1 << 20, layout.lowmem.saturating_sub(1 << 20));
    let high = (layout.highmem != 0).then(|| Smap::ram(HIGHMEM_BASE, layout.highmem));
    [low, main].into_iter().chain(high).collect()
}
