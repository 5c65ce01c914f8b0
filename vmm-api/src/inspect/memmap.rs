//! What lies where in guest-physical space: RAM, devices, and the holes between them.

use serde::{Deserialize, Serialize};

use crate::encoding::hex;
use crate::memory::MemoryLayout;

/// The end of what is below 4 GiB: holes are told up to here, or to the end of highmem.
const LOW_END: u64 = 1 << 32;

/// What an address range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionKind {
    /// Memory.
    Ram,
    /// A device's registers.
    Device,
    /// Nobody answers there.
    Hole,
}

/// One address range.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Guest-physical address of its first byte.
    #[serde(with = "hex")]
    pub gpa: u64,
    /// Bytes.
    #[serde(with = "hex")]
    pub len: u64,
    /// What it is.
    pub kind: RegionKind,
    /// Its name: bhyve's `sysmem` for RAM, a device's.
    pub name: String,
    /// Offset in the memory file; 0 for what is no RAM.
    #[serde(with = "hex")]
    pub offset: u64,
    /// RAM that is allocated up front.
    #[serde(default)]
    pub wired: bool,
}

impl Region {
    /// A device's range.
    pub fn device(name: &str, gpa: u64, len: u64) -> Self {
        Self {
            gpa,
            len,
            kind: RegionKind::Device,
            name: name.to_owned(),
            offset: 0,
            wired: false,
        }
    }

    fn end(&self) -> u64 {
        self.gpa.saturating_add(self.len)
    }
}

/// Guest-physical space without gaps and overlaps, from 0 on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MemoryMap(pub Vec<Region>);

impl MemoryMap {
    /// RAM of this layout and these devices, with the holes between them. A device that lies in RAM
    /// or in another device is left out where it does.
    pub fn new(layout: MemoryLayout, wired: bool, devices: &[Region]) -> Self {
        let ram = layout.segments().map(|(gpa, len, offset)| Region {
            gpa,
            len,
            kind: RegionKind::Ram,
            name: "sysmem".into(),
            offset,
            wired,
        });
        let mut known: Vec<Region> = ram.chain(devices.iter().cloned()).collect();
        known.sort_by_key(|region| (region.gpa, region.kind != RegionKind::Ram));
        let mut map = Vec::new();
        let mut next = 0;
        for mut region in known {
            let end = region.end();
            if end <= next {
                continue;
            }
            if region.gpa < next {
                region.len = end - next;
                region.gpa = next;
            }
            map.extend(hole(next, region.gpa));
            next = end;
            map.push(region);
        }
        map.extend(hole(next, LOW_END));
        Self(map)
    }
}

fn hole(from: u64, to: u64) -> Option<Region> {
    (from < to).then(|| Region {
        gpa: from,
        len: to - from,
        kind: RegionKind::Hole,
        name: "hole".into(),
        offset: 0,
        wired: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_devices_and_holes_are_told_in_their_order() {
        let layout = MemoryLayout {
            lowmem: 64 << 20,
            highmem: 1 << 30,
        };
        let devices = [
            Region::device("lapic", 0xfee0_0000, 0x1000),
            Region::device("ioapic", 0xfec0_0000, 0x1000),
        ];
        let map = MemoryMap::new(layout, true, &devices);
        let names: Vec<_> = map.0.iter().map(|r| (&*r.name, r.gpa)).collect();
        assert_eq!(
            names,
            [
                ("sysmem", 0),
                ("hole", 64 << 20),
                ("ioapic", 0xfec0_0000),
                ("hole", 0xfec0_1000),
                ("lapic", 0xfee0_0000),
                ("hole", 0xfee0_1000),
                ("sysmem", 4 << 30),
            ]
        );
        assert_eq!(map.0[6].offset, 64 << 20);
    }

    proptest::proptest! {
        #[test]
        fn the_map_has_neither_gaps_nor_overlaps(
            low in 0u64..=0xc0000, high in 0u64..=0x10000,
            devices in proptest::collection::vec((0u64..1 << 33, 0u64..1 << 30), 0..8),
        ) {
            let layout = MemoryLayout { lowmem: low << 12, highmem: high << 12 };
            let devices: Vec<_> = devices.iter().map(|&(a, l)| Region::device("d", a, l)).collect();
            let map = MemoryMap::new(layout, false, &devices);
            let mut next = 0;
            for region in &map.0 {
                proptest::prop_assert_eq!(region.gpa, next);
                proptest::prop_assert!(region.len > 0);
                next = region.end();
            }
            proptest::prop_assert!(next >= LOW_END);
        }
    }
}
