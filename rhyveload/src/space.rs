//! Guest-physical memory while a load is planned: who has claimed what.
//!
//! Every range that a loader fills goes through [`Space::claim`], so that a lying header can
//! neither leave RAM nor overwrite another part of the load: each is an error that names both.

use std::borrow::Cow;

use vmm_api::memory::MemoryLayout;

/// Start of the area that a PC's firmware and video memory lie in. It is RAM in the object, but
/// `rhyve` puts the MPtable, ACPI and SMBIOS tables there.
pub const BIOS_AREA: u64 = 0xa_0000;

/// End of that area, where a kernel may begin.
pub const BIOS_AREA_END: u64 = 0x10_0000;

/// Why something has no place in the guest's memory.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpaceError {
    /// Not inside RAM that the boot protocol reaches.
    #[error("{what} ({base:#x}-{end:#x}) does not fit below {limit:#x}: {mend}")]
    Outside {
        /// What was to be placed.
        what: Cow<'static, str>,
        /// Its first byte.
        base: u64,
        /// The byte after its last, saturated.
        end: u64,
        /// Where usable memory ends.
        limit: u64,
        /// What to do about it.
        mend: &'static str,
    },
    /// Two parts of the load want the same memory.
    #[error("{what} ({base:#x}-{end:#x}) overlaps {other}")]
    Overlap {
        /// What was to be placed.
        what: Cow<'static, str>,
        /// Its first byte.
        base: u64,
        /// The byte after its last.
        end: u64,
        /// What is there already.
        other: Cow<'static, str>,
    },
    /// There is no gap of this size.
    #[error("there is no room for {what} (0x{len:x} bytes) below {limit:#x}: {mend}")]
    NoRoom {
        /// What was to be placed.
        what: &'static str,
        /// Its length in bytes.
        len: u64,
        /// Where usable memory ends.
        limit: u64,
        /// What to do about it.
        mend: &'static str,
    },
}

/// Lowmem, and what of it is taken.
#[derive(Clone, Debug)]
pub struct Space {
    lowmem: u64,
    limit: u64,
    claims: Vec<Claim>,
}

#[derive(Clone, Debug)]
struct Claim {
    what: Cow<'static, str>,
    base: u64,
    end: u64,
}

impl Space {
    /// The lowmem of `layout` below `limit`, with the BIOS area taken.
    pub fn new(layout: MemoryLayout, limit: u64) -> Self {
        Self {
            lowmem: layout.lowmem,
            limit: limit.min(layout.lowmem),
            claims: vec![Claim {
                what: "the BIOS area (0xa0000-0x100000)".into(),
                base: BIOS_AREA,
                end: BIOS_AREA_END,
            }],
        }
    }

    /// Where usable memory ends.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    fn mend(&self, limit: u64) -> &'static str {
        if limit >= self.lowmem {
            "give the VM more memory (-m)"
        } else {
            "this boot protocol reaches no further"
        }
    }

    /// Takes `len` bytes at `base` for `what`. Nothing at all fits everywhere.
    ///
    /// # Errors
    ///
    /// Not inside usable memory, or taken already.
    pub fn claim(
        &mut self,
        what: impl Into<Cow<'static, str>>,
        base: u64,
        len: u64,
    ) -> Result<(), SpaceError> {
        if len == 0 {
            return Ok(());
        }
        let what = what.into();
        let end = base.saturating_add(len);
        self.fits(what.clone(), base, len)?;
        self.claims.push(Claim { what, base, end });
        Ok(())
    }

    /// Whether `len` bytes at `base` could be taken for `what`.
    ///
    /// # Errors
    ///
    /// Not inside usable memory, or taken already.
    pub fn fits(
        &self,
        what: impl Into<Cow<'static, str>>,
        base: u64,
        len: u64,
    ) -> Result<(), SpaceError> {
        let what = what.into();
        let end = base.saturating_add(len);
        if end > self.limit {
            return Err(SpaceError::Outside {
                what,
                base,
                end,
                limit: self.limit,
                mend: self.mend(self.limit),
            });
        }
        match self.claims.iter().find(|c| base < c.end && c.base < end) {
            None => Ok(()),
            Some(other) => Err(SpaceError::Overlap {
                what,
                base,
                end,
                other: other.what.clone(),
            }),
        }
    }

    /// Finds the highest free `len` bytes that end at or below `limit`, aligned to `align` (a power
    /// of two), not below 1 MiB, and takes them.
    ///
    /// # Errors
    ///
    /// There is no such gap.
    pub fn claim_highest(
        &mut self,
        what: &'static str,
        len: u64,
        align: u64,
        limit: u64,
    ) -> Result<u64, SpaceError> {
        let limit = limit.min(self.limit);
        let tops = self.claims.iter().map(|c| c.base).chain([limit]);
        let base = tops
            .filter(|&top| top <= limit)
            .filter_map(|top| top.checked_sub(len))
            .map(|base| base & !(align - 1))
            .filter(|&base| base >= BIOS_AREA_END)
            .filter(|&base| {
                self.claims
                    .iter()
                    .all(|c| base + len <= c.base || c.end <= base)
            })
            .max();
        let base = base.ok_or(SpaceError::NoRoom {
            what,
            len,
            limit,
            mend: self.mend(limit),
        })?;
        self.claim(what, base, len)?;
        Ok(base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(lowmem: u64, limit: u64) -> Space {
        Space::new(MemoryLayout { lowmem, highmem: 0 }, limit)
    }

    #[test]
    fn claims_stay_inside_and_apart() {
        let mut space = space(0x40_0000, 0x30_0000);
        space.claim("a", 0x10_0000, 0x1000).unwrap();
        space.claim("b", 0x10_1000, 0x1000).unwrap();
        space.claim("nothing", u64::MAX, 0).unwrap();
        let error = |space: &mut Space, base, len| space.claim("x", base, len).unwrap_err();
        assert!(matches!(
            error(&mut space, 0x9_f000, 0x1001),
            SpaceError::Overlap { .. }
        ));
        assert!(
            matches!(error(&mut space, 0x10_0fff, 1), SpaceError::Overlap { other, .. } if other == "a")
        );
        assert!(matches!(
            error(&mut space, 0x30_0000, 1),
            SpaceError::Outside { .. }
        ));
        assert!(matches!(
            error(&mut space, u64::MAX, u64::MAX),
            SpaceError::Outside { .. }
        ));
        let text = error(&mut space, 0x2f_ffff, 2).to_string();
        assert!(text.contains("reaches no further"), "{text}");
    }

    #[test]
    fn the_highest_gap_is_found() {
        let mut space = space(0x40_0000, 0x40_0000);
        space.claim("kernel", 0x20_0000, 0x10_0000).unwrap();
        let mut take = |len, limit| space.claim_highest("initrd", len, 0x1000, limit);
        assert_eq!(take(0x8_0001, u64::MAX), Ok(0x37_f000));
        assert_eq!(take(0x8_0000, 0x38_0000), Ok(0x18_0000));
        assert!(matches!(
            take(0x20_0000, u64::MAX),
            Err(SpaceError::NoRoom { .. })
        ));
        assert!(matches!(
            take(u64::MAX, u64::MAX),
            Err(SpaceError::NoRoom { .. })
        ));
        assert!(matches!(take(1, 0x1000), Err(SpaceError::NoRoom { .. })));
    }
}
