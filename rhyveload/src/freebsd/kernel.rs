//! Where an ELF kernel's segments go (sys/boot/common/load_elf.c).

use std::fmt::Write;

use crate::elf::Elf;
use crate::plan::{PlanError, Protocol, Segment};
use crate::space::Space;

/// bhyveload's copyin keeps these bits of an address.
const COPYIN_MASK: u64 = 0x7fff_ffff;

/// A kernel with its place in guest-physical memory.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The PT_LOAD segments in the file's order.
    pub segments: Vec<Segment>,
    /// First byte of the lowest segment.
    pub base: u64,
    /// End of the highest segment, rounded up to 8 bytes as symbols follow there.
    pub end: u64,
    writable: Vec<bool>,
}

impl Kernel {
    /// Takes room for every segment.
    ///
    /// # Errors
    ///
    /// A segment is outside of memory, or over something else.
    pub fn place(elf: &Elf, protocol: Protocol, space: &mut Space) -> Result<Self, PlanError> {
        // FreeBSD kernels carry p_paddr == p_vaddr, so userboot takes the kernel's base from the
        // entry point, at a granularity of 16 MiB.
        let base = (elf.entry & !0xfff) & 0xffff_ffff_ff00_0000;
        let mut segments = Vec::with_capacity(elf.loads.len());
        for (index, load) in elf.loads.iter().enumerate() {
            let gpa = match protocol {
                Protocol::Freebsd => load.vaddr.wrapping_sub(base) & COPYIN_MASK,
                _ => load.paddr,
            };
            space.claim(format!("ELF segment {index}"), gpa, load.memsz)?;
            segments.push(Segment {
                offset: load.offset,
                filesz: load.filesz,
                memsz: load.memsz,
                gpa,
            });
        }
        // Claimed segments end below 4 GiB.
        let ends = segments.iter().map(|s| s.gpa + s.memsz);
        Ok(Self {
            base: segments.iter().map(|s| s.gpa).min().unwrap_or(0),
            end: ends.max().unwrap_or(0).next_multiple_of(8),
            writable: elf.loads.iter().map(|load| load.writable).collect(),
            segments,
        })
    }

    /// `text=0x... data=0x...+0x...`, as FreeBSD's loader says it.
    pub fn summary(&self) -> String {
        summary(&self.segments, &self.writable)
    }
}

/// `text=0x...` for each segment that is not writable, `data=0x...+0x...` for the others.
pub fn summary(segments: &[Segment], writable: &[bool]) -> String {
    let mut text = String::new();
    for (segment, &writable) in segments.iter().zip(writable) {
        let space = if text.is_empty() { "" } else { " " };
        let name = if writable { "data" } else { "text" };
        // Writing to a String cannot fail.
        let _ = write!(text, "{space}{name}={:#x}", segment.filesz);
        if segment.memsz > segment.filesz {
            let _ = write!(text, "+{:#x}", segment.memsz - segment.filesz);
        }
    }
    text
}
