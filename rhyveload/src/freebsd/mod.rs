//! FreeBSD's hand-off: a kernel entered in long mode with a module list, as bhyve's userboot does
//! it (sys/boot/userboot/userboot/elf64_freebsd.c).
//!
//! [`session`] is a loader from its banner to the boot; [`menu`] and the commands of [`shell`] are its
//! user's. [`loader`] does the work: [`config`] reads loader.conf (its grammar is [`loader_conf`]),
//! [`search`] finds files, [`kernel`] and [`module`] say where their parts go, [`modmeta`] what they
//! need. [`mod@env`] and [`metadata`] make what the kernel reads, [`pagetable`] the fixed low pages;
//! [`hand_off`] puts these behind what was loaded. A plain static ELF64 file, as our probe guest is, is
//! entered the same way, but loaded at its physical addresses.

pub mod config;
pub mod console;
pub mod env;
pub mod kernel;
pub mod loader;
pub mod loader_conf;
pub mod menu;
pub mod metadata;
pub mod modmeta;
pub mod module;
pub mod pagetable;
pub mod search;
pub mod sections;
pub mod session;
pub mod shell;
pub mod words;

use vmm_api::boot::{setup_freebsd_registers, setup_pvh_registers};
use vmm_api::memory::{HIGHMEM_BASE, MemoryLayout};
use vmm_api::regs::Registers;

use crate::elf::{Elf, ElfError};
use crate::plan::{Blob, LoadPlan, PlanError, Protocol, Request};
use crate::pvh;
use crate::source::Source;
use crate::space::{Space, SpaceError};
use env::Environment;
use kernel::{Description, Kernel};
use metadata::{
    FileRecords, MODINFOMD_ENVP, MODINFOMD_HOWTO, MODINFOMD_KERNEND, MODINFOMD_MODULEP, Smap,
};
use modmeta::Modules;
use sections::SectionError;

/// The page tables map this much, over and over, so everything lies below.
pub const REACH: u64 = 1 << 30;

const PAGE: u64 = 4096;

/// A kernel environment may have so many bytes.
const ENVIRONMENT_MAX: u64 = 1 << 20;

/// How a FreeBSD kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Via {
    /// In long mode, as userboot does it.
    #[default]
    LongMode,
    /// By its Xen note, with the module list as PVH's first module (sys/x86/xen/pv.c).
    Pvh,
}

impl Via {
    /// The protocol's name.
    pub fn protocol(self) -> Protocol {
        match self {
            Self::LongMode => Protocol::Freebsd,
            Self::Pvh => Protocol::Pvh,
        }
    }

    /// The registers with which a kernel starts that was put into its place.
    ///
    /// # Errors
    ///
    /// Its entry point is not loaded, or not mapped to where it is loaded, or it has none for PVH.
    pub fn registers(self, elf: &Elf, kernel: &Kernel) -> Result<Registers, PlanError> {
        match self {
            Self::LongMode => {
                check_entry(elf, kernel)?;
                Ok(registers(elf.entry))
            }
            Self::Pvh => {
                let entry = elf.pvh_entry.ok_or(PlanError::NoPvh)?;
                let holds = |segment: &&crate::plan::Segment| {
                    entry
                        .checked_sub(segment.gpa)
                        .is_some_and(|at| at < segment.memsz)
                };
                let segment = kernel.segments.iter().find(holds);
                segment.ok_or(ElfError::Entry(entry))?;
                // Segments lie below 1 GiB.
                Ok(setup_pvh_registers(entry as u32, pvh::START_INFO as u32))
            }
        }
    }
}

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
    /// Linux, where FreeBSD was expected.
    #[error("a Linux kernel, not FreeBSD's: load it by --kernel")]
    Linux,
    /// ELF section headers.
    #[error(transparent)]
    Sections(#[from] SectionError),
}

/// Plans the load of an ELF kernel.
///
/// # Errors
///
/// A segment has no place, the entry point is not mapped, or an initial RAM disk is wanted.
pub fn plan(
    elf: &Elf,
    image: &(impl Source + ?Sized),
    protocol: Protocol,
    request: &Request<'_>,
) -> Result<LoadPlan, PlanError> {
    if request.initrd.is_some() {
        return Err(PlanError::Option {
            option: "--initrd",
            protocol,
            why: "their root disk is a module of type mfs_root or a virtual disk",
        });
    }
    let mut space = new_space(request.layout, Via::LongMode)?;
    let mut kernel = Kernel::place(elf, protocol, &mut space)?;
    check_entry(elf, &kernel)?;
    let mut blobs = Vec::new();
    let mut description = match protocol {
        Protocol::Freebsd => kernel.describe(elf, image, &mut space, &mut blobs)?,
        // A plain kernel reads no symbols.
        _ => Description {
            records: FileRecords::new("elf kernel", kernel.base, kernel.end - kernel.base),
            summary: kernel.summary(),
            modules: Modules::default(),
        },
    };
    description.records.name = request.kernel.to_owned();
    let mut env = Environment::new(request.env);
    if let Some(cmdline) = request.cmdline {
        env.force("cmdline", cmdline);
    }
    let mut files = [description.records];
    let low = hand_off(&mut files, &env, request.layout, Via::LongMode, &mut space)?;
    blobs.extend(low);
    Ok(LoadPlan {
        protocol,
        summary: description.summary,
        segments: kernel.segments,
        blobs,
        initrd: None,
        registers: registers(elf.entry),
        symbols: files[0].symbols(),
    })
}

/// Guest memory as far as a FreeBSD kernel's page tables reach, less the loader's own pages. Those
/// that it makes for itself when it is entered by PVH reach as far.
///
/// # Errors
///
/// There is less memory than that.
pub fn new_space(layout: MemoryLayout, via: Via) -> Result<Space, SpaceError> {
    let mut space = Space::new(layout, REACH);
    let end = match via {
        Via::LongMode => pagetable::END,
        Via::Pvh => pvh::END,
    };
    space.claim("the loader's own pages", 0, end)?;
    Ok(space)
}

/// The registers with which a kernel starts.
pub fn registers(entry: u64) -> Registers {
    setup_freebsd_registers(entry, pagetable::PML4, pagetable::GDT, pagetable::STACK)
}

/// What follows the files in memory, and the low pages: environment, module list; stack, page
/// tables, GDT, or PVH's start information. The first of `files` is the kernel.
///
/// # Errors
///
/// There is no room.
pub fn hand_off(
    files: &mut [FileRecords],
    env: &Environment,
    layout: MemoryLayout,
    via: Via,
    space: &mut Space,
) -> Result<[Blob; 3], PlanError> {
    // All of these were claimed below 1 GiB.
    let ends = files.iter().map(|file| file.addr + file.size);
    let envp = ends.max().unwrap_or(0).next_multiple_of(PAGE);
    let strings = env.encode();
    let len = strings.len() as u64;
    if len > ENVIRONMENT_MAX {
        return Err(FreebsdError::Environment(len).into());
    }
    space.claim("the kernel environment", envp, len)?;

    let modulep = (envp + len).next_multiple_of(PAGE);
    if let Some(kernel) = files.first_mut() {
        kernel.add(MODINFOMD_HOWTO, env.howto(&kernel.args).to_le_bytes());
        kernel.add(MODINFOMD_ENVP, envp.to_le_bytes());
        kernel.add(MODINFOMD_KERNEND, 0u64.to_le_bytes());
        if via == Via::Pvh {
            kernel.add(MODINFOMD_MODULEP, modulep.to_le_bytes());
        }
        kernel.add_smap(&smap(layout));
    }
    let size = metadata::encode(files.iter()).len() as u64;
    let kernend = (modulep + size).next_multiple_of(PAGE);
    space.claim("the kernel metadata", modulep, kernend - modulep)?;
    if let Some(kernel) = files.first_mut() {
        kernel.replace(MODINFOMD_KERNEND, kernend.to_le_bytes());
    }
    Ok([
        Blob {
            gpa: envp,
            bytes: strings,
        },
        Blob {
            gpa: modulep,
            bytes: metadata::encode(files.iter()),
        },
        match via {
            Via::LongMode => Blob {
                gpa: pagetable::STACK,
                bytes: pagetable::encode(modulep, kernend),
            },
            Via::Pvh => pvh::freebsd_start_info(layout, modulep, kernend),
        },
    ])
}

/// Whether the page tables map the entry point to where it is loaded.
pub(crate) fn check_entry(elf: &Elf, kernel: &Kernel) -> Result<(), PlanError> {
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
fn smap(layout: MemoryLayout) -> Vec<Smap> {
    let low = Smap::ram(0, 640 << 10);
    let main = Smap::ram(1 << 20, layout.lowmem.saturating_sub(1 << 20));
    let high = (layout.highmem != 0).then(|| Smap::ram(HIGHMEM_BASE, layout.highmem));
    [low, main].into_iter().chain(high).collect()
}
