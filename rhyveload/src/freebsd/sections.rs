//! The section headers of an ELF64 file: symbol tables of kernels, everything of modules.

use object::LittleEndian;
use object::elf::{SHT_NOBITS, SectionHeader64, SectionType};
use object::pod::{bytes_of, slice_from_all_bytes};

use crate::source::Source;

/// A section header as it is in the file.
pub type Header = SectionHeader64<LittleEndian>;

/// Bytes in a section header.
const HEADER: u64 = size_of::<Header>() as u64;

/// Why the section headers are of no use.
#[derive(Debug, thiserror::Error)]
pub enum SectionError {
    /// They are not in the file.
    #[error(
        "the ELF section headers (e_shoff {offset:#x}, e_shnum {count}) are not in the file: it is \
        truncated"
    )]
    Truncated {
        /// e_shoff.
        offset: u64,
        /// e_shnum.
        count: u16,
    },
    /// Of another size.
    #[error("the ELF section headers have {0} bytes each, not 64")]
    Size(u16),
    /// A section is not in the file.
    #[error("ELF section {0} is not in the file: it is truncated")]
    Section(usize),
    /// Reading failed.
    #[error("cannot read the ELF section headers")]
    Read(#[source] std::io::Error),
}

/// The section headers of a file, all of whose contents are inside of it.
#[derive(Clone, Debug, Default)]
pub struct Sections {
    /// The headers; never more than 65535.
    pub headers: Vec<Header>,
    /// The section with the sections' names (e_shstrndx).
    pub names: usize,
}

impl Sections {
    /// Reads the headers that `ehdr`, the file's first 64 bytes, points to. A file may have none.
    ///
    /// # Errors
    ///
    /// They are not in the file, or what they describe is not.
    pub fn read(ehdr: &[u8; 64], image: &dyn Source) -> Result<Self, SectionError> {
        let half = |at: usize| u16::from_le_bytes([ehdr[at], ehdr[at + 1]]);
        let mut offset = [0; 8];
        offset.copy_from_slice(&ehdr[40..48]);
        let offset = u64::from_le_bytes(offset);
        let (entsize, count, names) = (half(58), half(60), half(62));
        if offset == 0 || count == 0 {
            return Ok(Self::default());
        }
        if u64::from(entsize) != HEADER {
            return Err(SectionError::Size(entsize));
        }
        let len = u64::from(count) * HEADER;
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > image.size()) {
            return Err(SectionError::Truncated { offset, count });
        }
        let mut bytes = vec![0; len as usize];
        image.read(offset, &mut bytes).map_err(SectionError::Read)?;
        // Whole headers, and without an alignment of their own: this cannot fail.
        let headers = slice_from_all_bytes::<Header>(&bytes).unwrap_or_default();
        for (index, header) in headers.iter().enumerate() {
            let start = header.sh_offset.get(LittleEndian);
            let end = start.checked_add(header.sh_size.get(LittleEndian));
            if kind(header) != SHT_NOBITS && end.is_none_or(|end| end > image.size()) {
                return Err(SectionError::Section(index));
            }
        }
        Ok(Self {
            headers: headers.to_vec(),
            names: names.into(),
        })
    }

    /// The headers as they are in a file.
    pub fn encode(&self) -> Vec<u8> {
        self.headers.iter().flat_map(bytes_of).copied().collect()
    }

    /// The section of a name, if the names can be read.
    pub fn find(&self, name: &str, image: &dyn Source) -> Option<&Header> {
        let names = self.headers.get(self.names)?;
        self.headers.iter().find(|header| {
            let at = u64::from(header.sh_name.get(LittleEndian));
            let room = size(names).saturating_sub(at);
            let mut bytes = vec![0; name.len() + 1];
            room >= bytes.len() as u64
                && image.read(offset(names) + at, &mut bytes).is_ok()
                && bytes.strip_suffix(b"\0") == Some(name.as_bytes())
        })
    }
}

/// sh_type.
pub fn kind(header: &Header) -> SectionType {
    header.sh_type.get(LittleEndian)
}

/// sh_offset.
pub fn offset(header: &Header) -> u64 {
    header.sh_offset.get(LittleEndian)
}

/// sh_size.
pub fn size(header: &Header) -> u64 {
    header.sh_size.get(LittleEndian)
}

/// sh_addr.
pub fn addr(header: &Header) -> u64 {
    header.sh_addr.get(LittleEndian)
}

/// sh_link.
pub fn link(header: &Header) -> usize {
    header.sh_link.get(LittleEndian) as usize
}
