//! The ELF headers of a kernel, checked once and owned.
//!
//! linux-loader's ELF loader serves Linux only: it copies to `p_paddr` while it parses, knows
//! neither FreeBSD's load rule nor overlaps, and reads segments through the mapping, where a full
//! tmpfs is a SIGBUS. Here the headers are parsed with `object`, and nothing is written.

use object::elf::{
    EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PF_W, PT_DYNAMIC, PT_INTERP, PT_LOAD, PT_NOTE,
};
use object::read::elf::{FileHeader, NoteIterator, ProgramHeader};
use object::{LittleEndian, elf};

use crate::source::Source;

/// The first bytes of every ELF file.
pub const MAGIC: &[u8] = b"\x7fELF";

/// Program headers must lie in this many first bytes. FreeBSD's loader allows 4096 (sys/boot/common/
/// load_elf.c); linkers put them right behind the file header.
pub const HEAD: usize = 64 << 10;

/// OSABI of FreeBSD.
pub const OSABI_FREEBSD: u8 = 9;

/// The interpreter that FreeBSD's kernels name, which is no file (sys/conf/kern.pre.mk).
const RED_HERRING: &[u8] = b"/red/herring\0";

/// Xen's PHYS32_ENTRY note (xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Longer notes than a linker writes are not looked at.
const NOTES_MAX: u64 = 64 << 10;

/// More program headers than any kernel has.
const PHNUM_MAX: usize = 128;

/// Why an ELF file is no kernel that can be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// Class, byte order or version.
    #[error("not a 64-bit little-endian ELF file of version 1")]
    Ident,
    /// ELFCLASS32.
    #[error("a 32-bit ELF file for {name}: only amd64 kernels can be loaded", name = machine(*.0))]
    Class(u16),
    /// Machine.
    #[error("an ELF file for {name} (e_machine {0}), not x86-64", name = machine(*.0))]
    Machine(u16),
    /// Position-independent.
    #[error("a position-independent ELF file (ET_DYN), not a kernel: link it with -no-pie")]
    Dynamic,
    /// Some other type.
    #[error("not an executable ELF file (e_type {0})")]
    Type(u16),
    /// Wants ld.so.
    #[error("a dynamically linked program, not a kernel: it asks for an interpreter")]
    Interpreter,
    /// The program headers are not where they should be.
    #[error(
        "the ELF program headers (e_phoff {offset:#x}, e_phnum {count}) are truncated, too many, \
        or beyond the first 64 KiB"
    )]
    ProgramHeaders {
        /// e_phoff.
        offset: u64,
        /// e_phnum.
        count: u16,
    },
    /// Nothing to load.
    #[error("the ELF file has no segment to load")]
    NoSegment,
    /// A segment's bytes are not in the file.
    #[error(
        "ELF segment {index} has 0x{filesz:x} bytes at file offset {offset:#x}, but the file ends \
        at {size:#x}: it is truncated"
    )]
    Truncated {
        /// Number of the program header.
        index: usize,
        /// p_offset.
        offset: u64,
        /// p_filesz.
        filesz: u64,
        /// The file's length.
        size: u64,
    },
    /// More in the file than in memory.
    #[error("ELF segment {0} has more bytes in the file than in memory")]
    Sizes(usize),
    /// The entry point is nowhere.
    #[error("the ELF entry point {0:#x} is in no loaded segment")]
    Entry(u64),
}

/// What kernels are made for, by e_machine (System V ABI, figure 4-4, and its supplements).
fn machine(number: u16) -> &'static str {
    match number {
        3 => "i386",
        8 => "mips",
        20 => "powerpc",
        21 => "powerpc64",
        40 => "arm",
        43 => "sparc64",
        62 => "x86-64",
        183 => "arm64",
        243 => "riscv",
        _ => "another machine",
    }
}

/// What a kernel's ELF headers say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// e_entry.
    pub entry: u64,
    /// EI_OSABI.
    pub os_abi: u8,
    /// The PT_LOAD headers in the file's order, never empty.
    pub loads: Vec<Load>,
    /// Where the last byte ends that is loaded or looked at, in the file.
    pub extent: u64,
    /// What Xen's PHYS32_ENTRY note says, if there is one.
    pub pvh_entry: Option<u64>,
    /// Virtual address of the dynamic section, if there is one.
    pub dynamic: Option<u64>,
    /// The file header itself.
    pub header: [u8; 64],
}

/// One PT_LOAD header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// First byte in the file; checked against the file's length.
    pub offset: u64,
    /// Virtual address.
    pub vaddr: u64,
    /// Physical address.
    pub paddr: u64,
    /// Bytes in the file.
    pub filesz: u64,
    /// Bytes in memory, at least `filesz`.
    pub memsz: u64,
    /// PF_W.
    pub writable: bool,
}

impl Load {
    /// Whether `address` is inside, if the segment begins at `base`.
    pub fn holds(&self, base: u64, address: u64) -> bool {
        address.checked_sub(base).is_some_and(|at| at < self.memsz)
    }
}

impl Elf {
    /// Parses and checks the headers; `head` is the image's first [`HEAD`] bytes.
    ///
    /// # Errors
    ///
    /// Not an ELF kernel for this machine, or its headers lie.
    pub fn parse(head: &[u8], image: &(impl Source + ?Sized)) -> Result<Self, ElfError> {
        Self::parse_type(head, image, ET_EXEC)
    }

    /// The same for a shared object.
    ///
    /// # Errors
    ///
    /// Not an ELF file of that type for this machine, or its headers lie.
    pub fn parse_shared(head: &[u8], image: &(impl Source + ?Sized)) -> Result<Self, ElfError> {
        Self::parse_type(head, image, ET_DYN)
    }

    fn parse_type(
        head: &[u8],
        image: &(impl Source + ?Sized),
        wanted: object::elf::FileType,
    ) -> Result<Self, ElfError> {
        // ELFCLASS32, ELFDATA2LSB; e_machine is where it is in a 64-bit header.
        if let [_, _, _, _, 1, 1, ..] = head
            && let Some(&[low, high]) = head.get(18..20)
        {
            return Err(ElfError::Class(u16::from_le_bytes([low, high])));
        }
        let header = FileHeader64::<LittleEndian>::parse(head).map_err(|_| ElfError::Ident)?;
        let endian = header.endian().map_err(|_| ElfError::Ident)?;
        if header.e_machine(endian) != EM_X86_64 {
            return Err(ElfError::Machine(header.e_machine(endian).0));
        }
        match header.e_type(endian) {
            found if found == wanted => {}
            ET_DYN => return Err(ElfError::Dynamic),
            other => return Err(ElfError::Type(other.0)),
        }
        let count = header.e_phnum.get(endian);
        let bad_headers = || ElfError::ProgramHeaders {
            offset: header.e_phoff(endian),
            count,
        };
        if usize::from(count) > PHNUM_MAX {
            return Err(bad_headers());
        }
        let headers = header
            .program_headers(endian, head)
            .map_err(|_| bad_headers())?;
        let mut this = Self {
            entry: header.e_entry(endian),
            os_abi: header.e_ident().os_abi.0,
            loads: Vec::new(),
            extent: 0,
            pvh_entry: None,
            dynamic: None,
            header: *head.first_chunk().ok_or(ElfError::Ident)?,
        };
        for (index, ph) in headers.iter().enumerate() {
            match ph.p_type(endian) {
                PT_LOAD => {
                    let load = Load {
                        offset: ph.p_offset(endian),
                        vaddr: ph.p_vaddr(endian),
                        paddr: ph.p_paddr(endian),
                        filesz: ph.p_filesz(endian),
                        memsz: ph.p_memsz(endian),
                        writable: ph.p_flags(endian).0 & PF_W.0 != 0,
                    };
                    let end = load.check(index, image.size())?;
                    this.extent = this.extent.max(end);
                    if load.memsz != 0 {
                        this.loads.push(load);
                    }
                }
                PT_INTERP if !is_red_herring(ph, head, image) => {
                    return Err(ElfError::Interpreter);
                }
                PT_DYNAMIC => this.dynamic = this.dynamic.or(Some(ph.p_vaddr(endian))),
                PT_NOTE if ph.p_filesz(endian) <= NOTES_MAX => {
                    let end = ph.p_offset(endian).saturating_add(ph.p_filesz(endian));
                    if end <= image.size() {
                        this.extent = this.extent.max(end);
                        this.pvh_entry = this.pvh_entry.or_else(|| pvh_entry(ph, image));
                    }
                }
                _ => {}
            }
        }
        if this.loads.is_empty() {
            return Err(ElfError::NoSegment);
        }
        Ok(this)
    }
}

impl Load {
    /// Where the segment ends in the file.
    fn check(&self, index: usize, size: u64) -> Result<u64, ElfError> {
        if self.filesz > self.memsz {
            return Err(ElfError::Sizes(index));
        }
        let end = self.offset.checked_add(self.filesz);
        end.filter(|&end| end <= size).ok_or(ElfError::Truncated {
            index,
            offset: self.offset,
            filesz: self.filesz,
            size,
        })
    }
}

/// Whether an interpreter is named for form's sake only. What cannot be read, as it is not yet
/// decompressed, decides nothing.
fn is_red_herring(
    ph: &elf::ProgramHeader64<LittleEndian>,
    head: &[u8],
    image: &(impl Source + ?Sized),
) -> bool {
    if ph.p_filesz(LittleEndian) != RED_HERRING.len() as u64 {
        return false;
    }
    let mut name = [0; RED_HERRING.len()];
    let offset = ph.p_offset(LittleEndian);
    let read = head
        .read(offset, &mut name)
        .or_else(|_| image.read(offset, &mut name));
    read.is_err() || name == RED_HERRING
}

/// Notes decide nothing unless they are whole: a damaged one is as good as none.
fn pvh_entry(
    ph: &elf::ProgramHeader64<LittleEndian>,
    image: &(impl Source + ?Sized),
) -> Option<u64> {
    let len = usize::try_from(ph.p_filesz(LittleEndian)).ok()?;
    let mut bytes = vec![0; len];
    image.read(ph.p_offset(LittleEndian), &mut bytes).ok()?;
    let align = ph.p_align(LittleEndian);
    let notes = NoteIterator::<FileHeader64<LittleEndian>>::new(LittleEndian, align, &bytes);
    notes.ok()?.map_while(Result::ok).find_map(|note| {
        let wanted =
            note.name() == b"Xen" && note.n_type(LittleEndian).0 == XEN_ELFNOTE_PHYS32_ENTRY;
        match *note.desc() {
            // "The physical entry point as a 32-bit or 64-bit value" (elfnote.h).
            [a, b, c, d] if wanted => Some(u32::from_le_bytes([a, b, c, d]).into()),
            ref desc if wanted => Some(u64::from_le_bytes(desc.try_into().ok()?)),
            _ => None,
        }
    })
}
