//! How much RAM there is, and where it lies in guest-physical space and in the memory file.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::MemoryError;

/// Lowmem ends here at the latest; from here to [`HIGHMEM_BASE`] is the PCI hole.
pub const LOWMEM_LIMIT: u64 = 3 << 30;

/// Guest-physical address of highmem's first byte.
pub const HIGHMEM_BASE: u64 = 4 << 30;

const MIB: u64 = 1 << 20;

/// A memory size in bytes, as libvmmapi's vm_parse_memsize reads it: a plain number below 1 MiB
/// counts MiB, a larger one bytes; a suffix of K, M, G or T (in either case) says the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemSize(pub u64);

/// Why a text is no memory size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemSizeError {
    /// Not a number with an optional suffix.
    #[error("'{0}' is no memory size: give a number, with K, M, G or T behind it if it is not MiB")]
    Syntax(String),
    /// More bytes than 64 bits can count.
    #[error("memory size '{0}' is out of range")]
    Overflow(String),
    /// Not a whole number of pages.
    #[error("memory size '{0}' is not a multiple of 4 KiB")]
    Unaligned(String),
}

impl FromStr for MemSize {
    type Err = MemSizeError;

    fn from_str(s: &str) -> Result<Self, MemSizeError> {
        let syntax = || MemSizeError::Syntax(s.to_owned());
        let (digits, unit) = match s.char_indices().last() {
            Some((at, c)) if !c.is_ascii_digit() => (&s[..at], Some(c.to_ascii_lowercase())),
            _ => (s, None),
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(syntax());
        }
        let overflow = || MemSizeError::Overflow(s.to_owned());
        let number: u64 = digits.parse().map_err(|_| overflow())?;
        let unit = match unit {
            None if number < MIB => MIB,
            None | Some('b') => 1,
            Some('k') => 1 << 10,
            Some('m') => MIB,
            Some('g') => 1 << 30,
            Some('t') => 1 << 40,
            Some(_) => return Err(syntax()),
        };
        let bytes = number.checked_mul(unit).ok_or_else(overflow)?;
        if bytes % 4096 != 0 {
            return Err(MemSizeError::Unaligned(s.to_owned()));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MemSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
        let exact = units
            .iter()
            .find(|(shift, _)| self.0 != 0 && self.0.is_multiple_of(1 << shift));
        match exact {
            Some((shift, unit)) => f.pad(&format!("{}{unit}", self.0 >> shift)),
            None => f.pad(&self.0.to_string()),
        }
    }
}

/// How much RAM lies where. Both lengths are in bytes and multiples of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLayout {
    /// From guest-physical 0, at most [`LOWMEM_LIMIT`].
    pub lowmem: u64,
    /// From [`HIGHMEM_BASE`].
    pub highmem: u64,
}

impl MemoryLayout {
    /// Splits one size as bhyve does: up to 3 GiB of lowmem, the rest from 4 GiB.
    pub fn split(size: MemSize) -> Self {
        let lowmem = size.0.min(LOWMEM_LIMIT);
        Self {
            lowmem,
            highmem: size.0 - lowmem,
        }
    }

    /// All RAM in bytes.
    pub fn total(&self) -> u64 {
        self.lowmem.saturating_add(self.highmem)
    }

    /// The segments that have memory, as (guest-physical base, length, offset in the file).
    pub fn segments(&self) -> impl Iterator<Item = (u64, u64, u64)> + use<> {
        let all = [
            (0, self.lowmem, 0),
            (HIGHMEM_BASE, self.highmem, self.lowmem),
        ];
        all.into_iter().filter(|&(_, len, _)| len != 0)
    }

    /// Where `len` bytes at `gpa` are in the file, if all of them are RAM of one segment.
    pub fn offset_of(&self, gpa: u64, len: u64) -> Option<u64> {
        let end = gpa.checked_add(len)?;
        self.segments().find_map(|(base, size, offset)| {
            (gpa >= base && end <= base + size).then(|| offset + (gpa - base))
        })
    }

    /// Checks lengths that came from a user or from a file.
    ///
    /// # Errors
    ///
    /// Lowmem beyond its limit, a length that is not whole pages, or more than 2^46 bytes in all.
    pub fn validate(&self) -> Result<(), MemoryError> {
        let bad = self.lowmem > LOWMEM_LIMIT
            || self.highmem > 1 << 46
            || !(self.lowmem | self.highmem).is_multiple_of(4096);
        if bad {
            Err(MemoryError::Layout(*self))
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_bhyve_reads_them() {
        let size = |s: &str| s.parse::<MemSize>().map(|m| m.0);
        assert_eq!(size("256"), Ok(256 << 20));
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("2g"), Ok(2 << 30));
        assert_eq!(size("1T"), Ok(1 << 40));
        assert_eq!(size("1048576"), Ok(1 << 20));
        assert!(matches!(size("5000001"), Err(MemSizeError::Unaligned(_))));
        for bad in ["", "M", "12X", "-1", "1.5G", "+4", "4 M"] {
            assert!(matches!(size(bad), Err(MemSizeError::Syntax(_))), "{bad}");
        }
        assert!(matches!(
            size("99999999999999999999"),
            Err(MemSizeError::Overflow(_))
        ));
        assert!(matches!(
            size("99999999999T"),
            Err(MemSizeError::Overflow(_))
        ));
        assert_eq!(MemSize(5 << 30).to_string(), "5G");
        assert_eq!(MemSize(1536 << 20).to_string(), "1536M");
    }

    #[test]
    fn memory_is_split_around_the_pci_hole() {
        let layout = MemoryLayout::split(MemSize(5 << 30));
        assert_eq!(
            layout,
            MemoryLayout {
                lowmem: 3 << 30,
                highmem: 2 << 30
            }
        );
        assert_eq!(layout.offset_of(HIGHMEM_BASE, 1), Some(3 << 30));
        assert_eq!(layout.offset_of(LOWMEM_LIMIT - 1, 1), Some((3 << 30) - 1));
        assert_eq!(layout.offset_of(LOWMEM_LIMIT - 1, 2), None);
        assert_eq!(layout.offset_of(u64::MAX, 2), None);
        assert!(
            MemoryLayout {
                lowmem: LOWMEM_LIMIT + 4096,
                highmem: 0
            }
            .validate()
            .is_err()
        );
        assert!(
            MemoryLayout {
                lowmem: 1,
                highmem: 0
            }
            .validate()
            .is_err()
        );
    }
}
