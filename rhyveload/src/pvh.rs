//! PVH: a kernel entered in 32-bit protected mode with `hvm_start_info` in EBX (Xen,
//! docs/misc/pvh.pandoc; xen/include/public/arch-x86/hvm/start_info.h).

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;
use vmm_api::boot::{RSDP_BASE, setup_pvh_registers};
use vmm_api::memory::MemoryLayout;

use crate::elf::{Elf, OSABI_FREEBSD};
use crate::freebsd::kernel::Kernel;
use crate::linux::boot_params::memory_map;
use crate::linux::vmlinux::{check_entry, is_vmlinux, place_initrd};
use crate::linux::{CMDLINE, CMDLINE_MAX, cmdline_blob, refuse_env};
use crate::plan::{Blob, LoadPlan, PlanError, Protocol, Request};
use crate::space::Space;

/// Where hvm_start_info is.
pub const START_INFO: u64 = 0x6000;
const MODULES: u64 = START_INFO + size_of::<hvm_start_info>() as u64;
const MEMMAP: u64 = 0x6100;
/// The text that goes with a module.
const TEXT: u64 = 0x6800;
/// End of all this.
pub const END: u64 = 0x7000;

/// Longest command line of a kernel other than Linux, without its NUL.
const CMDLINE_MAX_OTHER: u64 = 4095;

/// Plans the load of a kernel with a PVH note.
///
/// # Errors
///
/// There is no such note, it does not fit, the initial RAM disk does not, or the command line is
/// too long.
pub fn plan(elf: &Elf, request: &Request<'_>) -> Result<LoadPlan, PlanError> {
    let protocol = Protocol::Pvh;
    let cmdline = cmdline(elf, request)?;
    let request = &Request {
        cmdline: Some(&cmdline),
        ..request.clone()
    };
    let entry = elf.pvh_entry.ok_or(PlanError::NoPvh)?;
    let max = if is_vmlinux(elf) {
        CMDLINE_MAX
    } else {
        CMDLINE_MAX_OTHER
    };
    let len = cmdline.len() as u64;
    if len > max {
        return Err(PlanError::Cmdline { len, max });
    }
    let mut space = Space::new(request.layout, u64::MAX);
    space.claim("the start information", 0, END)?;
    space.claim("the command line", CMDLINE, len + 1)?;
    let kernel = Kernel::place(elf, protocol, &mut space)?;
    check_entry(elf, entry)?;
    let initrd = place_initrd(&mut space, request)?;
    Ok(LoadPlan {
        protocol,
        summary: kernel.summary(),
        segments: kernel.segments,
        blobs: vec![
            Blob {
                gpa: START_INFO,
                bytes: start_info(request, initrd),
            },
            cmdline_blob(request),
        ],
        initrd,
        // Loaded segments lie in lowmem, so the entry point has 32 bits.
        registers: setup_pvh_registers(entry as u32, START_INFO as u32),
        symbols: None,
    })
}

/// The command line; FreeBSD takes variables there (sys/kern/subr_boot.c, boot_parse_cmdline).
fn cmdline(elf: &Elf, request: &Request<'_>) -> Result<String, PlanError> {
    let text = request.cmdline.unwrap_or_default().to_owned();
    if elf.os_abi != OSABI_FREEBSD {
        refuse_env(Protocol::Pvh, request)?;
        return Ok(text);
    }
    let vars = request.env.iter().map(ToString::to_string);
    let all = vars.chain(Some(text).filter(|text| !text.is_empty()));
    Ok(all.collect::<Vec<_>>().join(","))
}

/// The start information for what was asked for.
fn start_info(request: &Request<'_>, initrd: Option<u64>) -> Vec<u8> {
    let initrd = initrd.zip(request.initrd);
    let module = initrd.map(|(paddr, size)| hvm_modlist_entry {
        paddr,
        size,
        ..Default::default()
    });
    let info = hvm_start_info {
        cmdline_paddr: CMDLINE,
        ..Default::default()
    };
    pages(request.layout, info, module)
}

/// The start information for a FreeBSD kernel whose module list lies from `modulep` to `kernend`: it
/// takes the first module for one (sys/x86/xen/pv.c, xen_pvh_parse_preload_data), and the end of the
/// last for the end of everything that was loaded.
pub fn freebsd_start_info(layout: MemoryLayout, modulep: u64, kernend: u64) -> Blob {
    let module = hvm_modlist_entry {
        paddr: modulep,
        size: kernend - modulep,
        // It is compared with "header", which would say that something precedes the list.
        cmdline_paddr: TEXT,
        ..Default::default()
    };
    let info = hvm_start_info {
        rsdp_paddr: RSDP_BASE,
        ..Default::default()
    };
    let mut bytes = pages(layout, info, Some(module));
    bytes.resize((TEXT - START_INFO) as usize, 0);
    bytes.extend_from_slice(b"metadata\0");
    Blob {
        gpa: START_INFO,
        bytes,
    }
}

/// The start information, the module list and the memory map, one behind the other.
fn pages(layout: MemoryLayout, info: hvm_start_info, module: Option<hvm_modlist_entry>) -> Vec<u8> {
    let map = memory_map(layout);
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: module.is_some().into(),
        // FreeBSD takes any list for its own: none is better than an empty one.
        modlist_paddr: if module.is_some() { MODULES } else { 0 },
        memmap_paddr: MEMMAP,
        memmap_entries: map.len() as u32,
        ..info
    };
    let mut bytes = info.as_slice().to_vec();
    bytes.extend_from_slice(module.unwrap_or_default().as_slice());
    bytes.resize((MEMMAP - START_INFO) as usize, 0);
    for (addr, size, type_) in map {
        let entry = hvm_memmap_table_entry {
            addr,
            size,
            type_,
            reserved: 0,
        };
        bytes.extend_from_slice(entry.as_slice());
    }
    bytes
}
