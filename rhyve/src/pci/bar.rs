//! Base address registers: what a function decodes, and where firmware puts it.

use std::ops::{Range, RangeInclusive};

use super::ConfigSpace;
use super::config::{BAR0, COMMAND};
use crate::bus::IoSize;

/// COMMAND: the function answers at its ports, and in memory (6.2.2).
const IO_SPACE: u32 = 1 << 0;
const MEMORY_SPACE: u32 = 1 << 1;

/// What a BAR says of itself in its low bits (6.2.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two registers.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

impl BarKind {
    fn low_bits(self) -> u32 {
        match self {
            Self::Io => 1,
            Self::Memory32 => 0,
            Self::Memory64 { prefetchable } => 4 | u32::from(prefetchable) << 3,
        }
    }

    fn is_wide(self) -> bool {
        matches!(self, Self::Memory64 { .. })
    }
}

/// One BAR of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its register: 0 to 5, or 0 to 4 if it takes two.
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// How much: a power of two, at least 4 for ports and 16 for memory.
    pub size: u64,
}

impl Bar {
    fn register(&self) -> u8 {
        BAR0 + 4 * self.index
    }

    /// Puts the BAR into `space`, at `base`: a guest can then set the address bits from the size
    /// up, which is also how it learns the size (6.2.5.1).
    pub fn install(&self, space: &mut ConfigSpace, base: u64) {
        let value = base | u64::from(self.kind.low_bits());
        let mask = !(self.size - 1);
        let len = if self.kind.is_wide() { 8 } else { 4 };
        let at = usize::from(self.register());
        space.set(at, &value.to_le_bytes()[..len]);
        space.allow(at, &mask.to_le_bytes()[..len]);
    }

    /// The addresses that the function decodes for this BAR now, if any.
    pub fn decoded(&self, space: &ConfigSpace) -> Option<RangeInclusive<u64>> {
        let enable = match self.kind {
            BarKind::Io => IO_SPACE,
            _ => MEMORY_SPACE,
        };
        if space.read(COMMAND, IoSize::Word) & enable == 0 {
            return None;
        }
        let mut base = u64::from(space.read(self.register(), IoSize::Dword));
        if self.kind.is_wide() {
            base |= u64::from(space.read(self.register() + 4, IoSize::Dword)) << 32;
        }
        let base = base & !(self.size - 1);
        let last = base.checked_add(self.size - 1)?;
        let limit = match self.kind {
            BarKind::Io => 0xffff,
            BarKind::Memory32 => u64::from(u32::MAX),
            BarKind::Memory64 { .. } => u64::MAX,
        };
        // An address of 0 is none, as after reset.
        (base != 0 && last <= limit).then_some(base..=last)
    }
}

/// No room for a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no room for a PCI device's {size:#x} bytes of {space}: use fewer devices on its bus{}",
    if *space == "ports" { ", or virtio=modern, which takes fewer ports" } else { "" }
)]
pub struct NoRoom {
    /// What was wanted.
    pub size: u64,
    /// `ports` or `memory`.
    pub space: &'static str,
}

/// What a PC's firmware does with BARs before a guest starts: each gets a place.
#[derive(Debug)]
pub struct Placement {
    ports: Range<u64>,
    memory: Range<u64>,
}

impl Placement {
    /// In these ports and this memory, from their starts up.
    pub fn new(ports: Range<u64>, memory: Range<u64>) -> Self {
        Self { ports, memory }
    }

    /// The next place for `bar`, on a multiple of its size.
    ///
    /// # Errors
    /// [`NoRoom`].
    pub fn place(&mut self, bar: &Bar) -> Result<u64, NoRoom> {
        let (left, space) = match bar.kind {
            BarKind::Io => (&mut self.ports, "ports"),
            _ => (&mut self.memory, "memory"),
        };
        let base = left.start.next_multiple_of(bar.size);
        if base + bar.size > left.end {
            let size = bar.size;
            return Err(NoRoom { size, space });
        }
        left.start = base + bar.size;
        Ok(base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Ident;

    const WIDE: BarKind = BarKind::Memory64 { prefetchable: true };

    fn bar(index: u8, kind: BarKind, size: u64) -> Bar {
        Bar { index, kind, size }
    }

    #[test]
    fn a_guest_sizes_moves_and_disables_them() {
        let bars = [
            (bar(0, BarKind::Io, 32), 0x2000, 0xffff_ffe1),
            (bar(1, BarKind::Memory32, 0x2000), 0xc000_0000, 0xffff_e000),
            (bar(2, WIDE, 0x4000), 0xc000_4000, 0xffff_c00c),
        ];
        let mut space = ConfigSpace::new(Ident::default());
        for (bar, base, _) in &bars {
            bar.install(&mut space, *base);
            assert_eq!(bar.decoded(&space), None, "not enabled");
        }
        space.write(COMMAND, IoSize::Word, 3);
        for (bar, base, sized) in &bars {
            let decoded = *base..=base + bar.size - 1;
            assert_eq!(bar.decoded(&space), Some(decoded));
            space.write(bar.register(), IoSize::Dword, u32::MAX);
            assert_eq!(space.read(bar.register(), IoSize::Dword), *sized);
        }
        space.write(0x1c, IoSize::Dword, 1);
        assert_eq!(space.read(0x1c, IoSize::Dword), 1);
        space.write(0x18, IoSize::Dword, 0x1234_5678);
        assert_eq!(
            bars[2].0.decoded(&space),
            Some(0x1_1234_4000..=0x1_1234_7fff)
        );
        // A byte of it, as a guest without 32-bit accesses would.
        space.write(0x1b, IoSize::Byte, 0x20);
        assert_eq!(
            bars[2].0.decoded(&space),
            Some(0x1_2034_4000..=0x1_2034_7fff)
        );
        space.write(0x10, IoSize::Dword, 0x1_0000);
        assert_eq!(bars[0].0.decoded(&space), None, "there are no such ports");
        space.write(0x10, IoSize::Dword, 0);
        assert_eq!(bars[0].0.decoded(&space), None, "0 is no place");
        assert_eq!(space.read(0x20, IoSize::Dword), 0, "there is no BAR 4");
        space.write(COMMAND, IoSize::Word, 1);
        assert_eq!(bars[2].0.decoded(&space), None);
    }

    #[test]
    fn firmware_places_them_as_bhyve_did() {
        let mut places = Placement::new(0x2000..0x1_0000, 0xc000_0000..0xc000_8000);
        let io = |size| bar(0, BarKind::Io, size);
        assert_eq!(places.place(&io(32)), Ok(0x2000));
        assert_eq!(places.place(&io(64)), Ok(0x2040));
        assert_eq!(
            places.place(&bar(1, BarKind::Memory32, 0x2000)),
            Ok(0xc000_0000)
        );
        assert_eq!(places.place(&bar(4, WIDE, 0x4000)), Ok(0xc000_4000));
        let full = places.place(&bar(1, BarKind::Memory32, 16)).unwrap_err();
        assert_eq!(
            full.to_string(),
            "no room for a PCI device's 0x10 bytes of memory: use fewer devices on its bus"
        );
        let full = places.place(&io(0x1_0000)).unwrap_err();
        assert_eq!(
            full.to_string(),
            "no room for a PCI device's 0x10000 bytes of ports: use fewer devices on its bus, or \
             virtio=modern, which takes fewer ports"
        );
    }
}
