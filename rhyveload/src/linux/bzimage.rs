//! bzImage: a setup header, real-mode code that is of no use here, and a kernel that unpacks itself.
//!
//! linux-loader's structures describe the header; its loader is not used: it checks neither the
//! lengths nor the 64-bit entry point, and copies through the mapping.

use linux_loader::bootparam::{
    LOADED_HIGH, XLF_CAN_BE_LOADED_ABOVE_4G, XLF_KERNEL_64, setup_header,
};
use vm_memory::ByteValued;
use vmm_api::memory::HIGHMEM_BASE;

use super::boot_params::{BOOT_FLAG, HEADER_MAGIC, Params};
use super::{claim_low, finish};
use crate::plan::{LoadPlan, PlanError, Protocol, Request, Segment};
use crate::space::{BIOS_AREA_END, Space};

/// Where the setup header begins in the file, and its magic number.
const HEADER: usize = 0x1f1;
const MAGIC: usize = 0x202;

/// 64-bit entry points came with this version (Linux 3.8).
const VERSION_MIN: u16 = 0x20c;

const SECTOR: u64 = 512;

/// The 64-bit entry point lies here in the protected-mode kernel.
const ENTRY_64: u64 = 0x200;

/// Why a bzImage cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// The file ends in the header.
    #[error("the bzImage ends in its setup header: it is truncated")]
    Header,
    /// No boot sector.
    #[error("the bzImage's boot_flag is {0:#x}, not 0xaa55")]
    BootFlag(u16),
    /// Too old.
    #[error(
        "the bzImage's boot protocol is {major}.{minor:02}, but 2.12 is needed (Linux 3.8 or later)",
        major = .0 >> 8, minor = .0 & 0xff
    )]
    Version(u16),
    /// A zImage.
    #[error("a zImage for low memory, not a bzImage (loadflags {0:#x})")]
    Low(u8),
    /// No 64-bit entry point.
    #[error("a 32-bit kernel: it has no 64-bit entry point (xloadflags {0:#x})")]
    No64(u16),
    /// The file is shorter than its header says.
    #[error("the bzImage should have 0x{expected:x} bytes, but has 0x{size:x}: it is truncated")]
    Truncated {
        /// What the header says.
        expected: u64,
        /// What there is.
        size: u64,
    },
    /// A field that no kernel build makes.
    #[error("the bzImage's {field} {value:#x} is impossible: the file is damaged")]
    Field {
        /// The field's name in struct setup_header.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// Whether these are the first bytes of a bzImage.
pub fn is_bzimage(head: &[u8]) -> bool {
    head.get(MAGIC..MAGIC + 4) == Some(HEADER_MAGIC.to_le_bytes().as_slice())
}

/// The setup header's fields that matter, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BzImage {
    /// The setup header's bytes, as they are copied into `boot_params`.
    header: Vec<u8>,
    /// Offset of the protected-mode kernel in the file.
    pub offset: u64,
    /// Its length.
    pub len: u64,
    /// Where it is loaded.
    pub load: u64,
    /// The memory it needs to unpack itself: first byte and end.
    pub needs: (u64, u64),
    /// Longest command line, without its NUL.
    pub cmdline_max: u64,
    /// The last byte that an initial RAM disk may have.
    pub initrd_max: u64,
    /// An initial RAM disk may lie above 4 GiB.
    pub above_4g: bool,
}

impl BzImage {
    /// Parses the setup header out of the file's first bytes; `size` is the file's length.
    ///
    /// # Errors
    ///
    /// It is truncated, too old, for 32 bits, or has impossible fields.
    pub fn parse(head: &[u8], size: u64) -> Result<Self, BzImageError> {
        // The jump over the header says where it ends (boot.rst, "Details of Header Fields").
        let jump = *head.get(MAGIC - 1).ok_or(BzImageError::Header)?;
        let end = (MAGIC + usize::from(jump)).min(HEADER + size_of::<setup_header>());
        let bytes = head.get(HEADER..end).ok_or(BzImageError::Header)?;
        let mut h = setup_header::default();
        h.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);

        if h.boot_flag != BOOT_FLAG {
            return Err(BzImageError::BootFlag(h.boot_flag));
        }
        if h.version < VERSION_MIN {
            return Err(BzImageError::Version(h.version));
        }
        if h.loadflags & LOADED_HIGH == 0 {
            return Err(BzImageError::Low(h.loadflags));
        }
        if h.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(BzImageError::No64(h.xloadflags));
        }
        let (offset, len) = payload(&h, size)?;
        let (load, start) = place(&h)?;
        // Both are at most a few 2^32 above a 64-bit address that was checked, see `place`.
        let needs = (
            load.min(start),
            (load + len).max(start + u64::from(h.init_size)),
        );
        Ok(Self {
            header: bytes.to_vec(),
            offset,
            len,
            load,
            needs,
            cmdline_max: h.cmdline_size.into(),
            initrd_max: h.initrd_addr_max.into(),
            above_4g: h.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0,
        })
    }

    /// Plans the load.
    ///
    /// # Errors
    ///
    /// It does not fit, the initial RAM disk does not, or the command line is too long.
    pub fn plan(&self, request: &Request<'_>) -> Result<LoadPlan, PlanError> {
        let protocol = Protocol::Linux64;
        let mut space = Space::new(request.layout, u64::MAX);
        claim_low(&mut space, protocol, request, self.cmdline_max)?;
        let (start, end) = self.needs;
        space.claim("the kernel, unpacked,", start, end - start)?;
        let initrd = match request.initrd {
            Some(len) => Some((self.place_initrd(&mut space, request, len)?, len)),
            None => None,
        };
        let params = Params {
            header: &self.header,
            initrd,
        };
        let (blobs, registers) = finish(params, request, self.load + ENTRY_64, end);
        Ok(LoadPlan {
            protocol,
            segments: vec![Segment {
                offset: self.offset,
                filesz: self.len,
                memsz: self.len,
                gpa: self.load,
            }],
            blobs,
            initrd: initrd.map(|(gpa, _)| gpa),
            registers,
            summary: format!("setup={:#x} kernel={:#x}", self.offset, self.len),
            symbols: None,
        })
    }

    /// As high as the kernel allows; above 4 GiB only if there is no other way, because a kernel
    /// reaches memory there later.
    fn place_initrd(
        &self,
        space: &mut Space,
        request: &Request<'_>,
        len: u64,
    ) -> Result<u64, PlanError> {
        let limit = if self.above_4g {
            u64::MAX
        } else {
            self.initrd_max.saturating_add(1)
        };
        let low = space.claim_highest("the initial RAM disk", len, 4096, limit);
        let highmem = request.layout.highmem;
        match low {
            Err(_) if self.above_4g && len <= highmem => {
                Ok((HIGHMEM_BASE + highmem - len) & !0xfff)
            }
            other => Ok(other?),
        }
    }
}

/// Where the protected-mode kernel is in the file.
fn payload(h: &setup_header, size: u64) -> Result<(u64, u64), BzImageError> {
    // 0 means 4, for very old kernels.
    let sectors = match h.setup_sects {
        0 => 4,
        n => u64::from(n),
    };
    let offset = (sectors + 1) * SECTOR;
    let len = u64::from(h.syssize) * 16;
    // The length is rounded up to 16; a signature may follow.
    let there = size.saturating_sub(offset);
    if there + 15 < len || there < ENTRY_64 {
        return Err(BzImageError::Truncated {
            expected: offset + len,
            size,
        });
    }
    if len <= ENTRY_64 {
        return Err(field("syssize", h.syssize));
    }
    Ok((offset, len.min(there)))
}

/// Where the kernel is loaded, and where it unpacks itself to (boot.rst, pref_address).
fn place(h: &setup_header) -> Result<(u64, u64), BzImageError> {
    let pref = h.pref_address;
    // No 64-bit kernel wants to be in the last terabytes: what follows cannot overflow.
    if !(BIOS_AREA_END..1 << 46).contains(&pref) {
        return Err(field("pref_address", pref));
    }
    if h.init_size == 0 {
        return Err(field("init_size", h.init_size));
    }
    if h.relocatable_kernel == 0 {
        return Ok((BIOS_AREA_END, pref));
    }
    let align = u64::from(h.kernel_alignment);
    if !align.is_power_of_two() || align < 4096 {
        return Err(field("kernel_alignment", align));
    }
    let load = pref.next_multiple_of(align);
    Ok((load, load))
}

fn field(field: &'static str, value: impl Into<u64>) -> BzImageError {
    BzImageError::Field {
        field,
        value: value.into(),
    }
}
