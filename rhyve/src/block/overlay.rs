//! Changes that are forgotten: writes go to an anonymous file in memory, the image stays as it is.
//!
//! The file is as large as the disk and sparse (memfd_create(2)); a sector is in it, at its own
//! offset, once it has been written, which a bitmap of sectors remembers. The bitmap grows by pieces
//! where the guest writes, so that an untouched disk costs nothing.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc::off_t;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::VolatileSlice;
use vmm_api::scatter;

use super::{Backend, Extent, Info, SECTOR, part, total_len};

/// Sectors of one piece of the bitmap: 16 MiB of disk, 4 KiB of bitmap.
const PIECE: u64 = 1 << 15;

/// A disk whose changes last as long as this.
pub struct Overlay {
    base: Arc<dyn Backend>,
    changes: File,
    changed: RwLock<Sectors>,
}

impl Overlay {
    /// Puts an empty layer over `base`.
    ///
    /// # Errors
    /// The host has no anonymous file of that size.
    pub fn new(base: Arc<dyn Backend>) -> io::Result<Self> {
        let changes = File::from(memfd_create("rhyve-snapshot", MFdFlags::MFD_CLOEXEC)?);
        changes.set_len(base.info().capacity)?;
        Ok(Self {
            base,
            changes,
            changed: RwLock::default(),
        })
    }

    fn mark(&self, extent: Extent) {
        let mut changed = self.changed.write().unwrap_or_else(PoisonError::into_inner);
        changed.insert(extent.offset / SECTOR, extent.end().div_ceil(SECTOR));
    }

    /// Makes `extent` zeros that are in this layer.
    fn clear(&self, extent: Extent) -> io::Result<()> {
        let number = |n| off_t::try_from(n).map_err(|_| Errno::EFBIG);
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if extent.len > 0 {
            fallocate(
                &self.changes,
                mode,
                number(extent.offset)?,
                number(extent.len)?,
            )?;
            self.mark(extent);
        }
        Ok(())
    }
}

impl Backend for Overlay {
    fn info(&self) -> Info {
        let base = self.base.info();
        Info {
            discard: !base.read_only,
            ..base
        }
    }

    fn read(&self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        let end = offset + total_len(to);
        let mut at = offset;
        while at < end {
            let (changed, run) = {
                let changed = self.changed.read().unwrap_or_else(PoisonError::into_inner);
                changed.run(at / SECTOR, end.div_ceil(SECTOR))
            };
            let next = (run * SECTOR).min(end);
            let to = part(to, at - offset, next - at);
            if changed {
                scatter::read_exact_at(&self.changes, &to, at)?;
            } else {
                self.base.read(at, &to)?;
            }
            at = next;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[VolatileSlice<'_>], _durable: bool) -> io::Result<()> {
        scatter::write_all_at(&self.changes, from, offset, false)?;
        self.mark(Extent {
            offset,
            len: total_len(from),
        });
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        // Nothing of it is to last.
        Ok(())
    }

    fn discard(&self, extent: Extent) -> io::Result<()> {
        self.clear(extent)
    }

    fn write_zeroes(&self, extent: Extent, _may_discard: bool) -> io::Result<()> {
        self.clear(extent)
    }

    fn is_fleeting(&self) -> bool {
        let changed = self.changed.read().unwrap_or_else(PoisonError::into_inner);
        !changed.pieces.is_empty()
    }
}

/// A set of sector numbers.
#[derive(Default)]
struct Sectors {
    pieces: HashMap<u64, Box<[u64; PIECE as usize / 64]>>,
}

impl Sectors {
    /// Adds `first` to `end - 1`.
    fn insert(&mut self, first: u64, end: u64) {
        let mut at = first;
        while at < end {
            let piece = self.pieces.entry(at / PIECE);
            let words = piece.or_insert_with(|| Box::new([0; PIECE as usize / 64]));
            let stop = end.min((at / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
            // The index is below PIECE / 64 by its own remainder.
            words[(at % PIECE / 64) as usize] |= mask;
            at = stop;
        }
    }

    /// Whether `first` is in, and where that ends to be so: at `end` at the latest.
    fn run(&self, first: u64, end: u64) -> (bool, u64) {
        let state = self.word(first) >> (first % 64) & 1 != 0;
        let mut at = first;
        while at < end {
            // Bits that differ from the first one's state, from `at` on.
            let word = self.word(at) ^ if state { u64::MAX } else { 0 };
            let differing = word >> (at % 64);
            if differing != 0 {
                return (state, (at + u64::from(differing.trailing_zeros())).min(end));
            }
            at = if !state && !self.pieces.contains_key(&(at / PIECE)) {
                (at / PIECE + 1) * PIECE
            } else {
                (at / 64 + 1) * 64
            };
        }
        (state, end)
    }

    fn word(&self, sector: u64) -> u64 {
        let piece = self.pieces.get(&(sector / PIECE));
        piece.map_or(0, |words| words[(sector % PIECE / 64) as usize])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_are_those_of_a_set(
            inserts in prop::collection::vec((0u64..100_000, 1u64..300), 0..40),
            queries in prop::collection::vec((0u64..100_000, 1u64..70_000), 1..40),
        ) {
            let (mut sectors, mut set) = (Sectors::default(), BTreeSet::new());
            for (first, len) in inserts {
                sectors.insert(first, first + len);
                set.extend(first..first + len);
            }
            for (first, len) in queries {
                let (state, stop) = sectors.run(first, first + len);
                prop_assert_eq!(state, set.contains(&first));
                prop_assert!(stop > first && stop <= first + len);
                prop_assert!((first..stop).all(|sector| set.contains(&sector) == state));
                prop_assert!(stop == first + len || set.contains(&stop) != state);
            }
        }
    }
}
