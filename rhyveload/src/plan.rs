//! What a load will do, worked out before anything is touched.
//!
//! [`plan`] looks at a kernel's headers and at what the user asked for and says which bytes of the
//! file go where, what the loader adds, and how the first vCPU starts. It reads no file but the
//! kernel and writes nothing, so a damaged kernel leaves every VM as it was, and any bytes at all
//! can be planned ([`plan_kernel`]).

use std::fmt;

use serde::Serialize;
use vmm_api::memory::{MemSize, MemoryLayout};
use vmm_api::regs::Registers;
use vmm_api::state::SymbolTables;

use crate::elf::{self, Elf, ElfError};
use crate::freebsd::env::EnvVar;
use crate::freebsd::{self, FreebsdError};
use crate::image::{Compression, ImageError, expand};
use crate::linux::bzimage::{self, BzImage, BzImageError};
use crate::linux::vmlinux;
use crate::progress::Progress;
use crate::pvh;
use crate::source::Source;
use crate::space::SpaceError;

/// What to load, beside the kernel's bytes.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The VM's RAM.
    pub layout: MemoryLayout,
    /// Which boot protocol.
    pub boot: Boot,
    /// The kernel's path: a FreeBSD kernel is told what it was loaded from.
    pub kernel: &'a str,
    /// Command line, without a NUL.
    pub cmdline: Option<&'a str>,
    /// FreeBSD kernel environment.
    pub env: &'a [EnvVar],
    /// Length of the initial RAM disk in bytes.
    pub initrd: Option<u64>,
}

/// Which boot protocol is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Boot {
    /// What the file's content says; a vmlinux is entered by `linux64`.
    #[default]
    Auto,
    /// Linux's 64-bit boot protocol.
    Linux64,
    /// The 32-bit entry point that an ELF file's Xen note names.
    Pvh,
    /// FreeBSD's hand-off, by an ELF file's virtual addresses.
    Freebsd,
    /// The same, by a static ELF file's physical addresses.
    Plain,
}

/// Which boot protocol a plan follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Linux's 64-bit boot protocol.
    Linux64,
    /// Xen's PVH entry.
    Pvh,
    /// FreeBSD/amd64.
    Freebsd,
    /// A static ELF64 file, entered as a FreeBSD kernel is.
    Plain,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Linux64 => "linux64",
            Self::Pvh => "pvh",
            Self::Freebsd => "freebsd",
            Self::Plain => "plain",
        })
    }
}

/// Bytes of the kernel file and where they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Segment {
    /// First byte in the file (in the decompressed file, if it is compressed).
    pub offset: u64,
    /// Bytes that are copied.
    pub filesz: u64,
    /// Bytes in memory; what is not copied stays zero, because the RAM is fresh.
    pub memsz: u64,
    /// Guest-physical address of the first byte.
    pub gpa: u64,
}

/// Bytes that the loader makes itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Everything a load does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadPlan {
    /// How the kernel is entered.
    pub protocol: Protocol,
    /// What is copied from the kernel file.
    pub segments: Vec<Segment>,
    /// What the loader adds.
    pub blobs: Vec<Blob>,
    /// Where the initial RAM disk goes.
    pub initrd: Option<u64>,
    /// The state in which vCPU 0 starts.
    pub registers: Registers,
    /// What is said of the kernel behind its name: bhyveload's `text=0x... data=0x...+0x...`.
    pub summary: String,
    /// Where a FreeBSD kernel's symbols go.
    pub symbols: Option<SymbolTables>,
}

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The file cannot be read.
    #[error("cannot read it")]
    Read(#[source] std::io::Error),
    /// It is compressed, and that went wrong.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No kernel of any kind.
    #[error(
        "not a kernel that rhyveload knows: neither an ELF64 file nor a Linux bzImage, and not \
        compressed with gzip, zstd, xz or lz4"
    )]
    Unknown,
    /// An option that the protocol has no use for.
    #[error("{option} is not for {protocol} kernels: {why}")]
    Option {
        /// The option.
        option: &'static str,
        /// The protocol.
        protocol: Protocol,
        /// Why.
        why: &'static str,
    },
    /// The command line is longer than the kernel takes.
    #[error("the command line has {len} bytes, but this kernel takes {max} at most")]
    Cmdline {
        /// What it has.
        len: u64,
        /// What is allowed.
        max: u64,
    },
    /// No PVH entry point.
    #[error("it has no PVH entry point (no Xen note PHYS32_ENTRY): try --boot auto")]
    NoPvh,
    /// A bzImage with another protocol.
    #[error(
        "a bzImage has only the linux64 entry: give the vmlinux it was made of, or --boot auto"
    )]
    BzImageBoot,
    /// bzImage header.
    #[error(transparent)]
    BzImage(#[from] BzImageError),
    /// ELF headers.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// No place in memory.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// FreeBSD's hand-off.
    #[error(transparent)]
    Freebsd(#[from] FreebsdError),
}

/// Plans the load of a kernel, which is recognized by its content.
///
/// # Errors
///
/// It is no kernel, its headers lie, it does not fit, or the request asks what its boot protocol
/// cannot do.
pub fn plan(image: &(impl Source + ?Sized), request: &Request<'_>) -> Result<LoadPlan, PlanError> {
    let head = image.head(elf::HEAD).map_err(PlanError::Read)?;
    if bzimage::is_bzimage(&head) && !head.starts_with(elf::MAGIC) {
        if !matches!(request.boot, Boot::Auto | Boot::Linux64) {
            return Err(PlanError::BzImageBoot);
        }
        return BzImage::parse(&head, image.size())?.plan(request);
    }
    if !head.starts_with(elf::MAGIC) {
        return Err(PlanError::Unknown);
    }
    let elf = Elf::parse(&head, image)?;
    match protocol(&elf, request.boot) {
        Protocol::Linux64 => vmlinux::plan(&elf, request),
        Protocol::Pvh => pvh::plan(&elf, request),
        other => freebsd::plan(&elf, image, other, request),
    }
}

/// How an ELF kernel is entered. A vmlinux may have a PVH note as well; its 64-bit entry is as quick
/// and does not depend on how the kernel was configured.
fn protocol(elf: &Elf, boot: Boot) -> Protocol {
    match boot {
        Boot::Linux64 => Protocol::Linux64,
        Boot::Pvh => Protocol::Pvh,
        Boot::Freebsd => Protocol::Freebsd,
        Boot::Plain => Protocol::Plain,
        Boot::Auto if elf.os_abi == elf::OSABI_FREEBSD => Protocol::Freebsd,
        Boot::Auto if vmlinux::is_vmlinux(elf) => Protocol::Linux64,
        Boot::Auto if elf.pvh_entry.is_some() => Protocol::Pvh,
        Boot::Auto => Protocol::Plain,
    }
}

/// Plans the load of arbitrary bytes, compressed or not, into a VM of 256 MiB, for fuzz targets:
/// never panics, touches nothing.
///
/// # Errors
///
/// As [`plan`], and what is wrong with compressed bytes.
pub fn plan_kernel(bytes: &[u8]) -> Result<LoadPlan, PlanError> {
    let request = Request {
        layout: MemoryLayout::split(MemSize(256 << 20)),
        boot: Boot::Auto,
        kernel: "kernel",
        cmdline: Some("console=ttyS0"),
        env: &[],
        initrd: None,
    };
    match Compression::of(bytes) {
        None => plan(bytes, &request),
        Some(kind) => {
            let limit = request.layout.total();
            let expanded = expand(kind, bytes, limit, &mut Progress::hidden())?;
            plan(&expanded[..], &request)
        }
    }
}
