//! What a guest tells of its memory (5.5.6.3).

use crate::virtio::Reader;

/// Tags, by their numbers.
const NAMES: [&str; 16] = [
    "guest swapped in",
    "guest swapped out",
    "guest major faults",
    "guest minor faults",
    "guest free",
    "guest total",
    "guest available",
    "guest caches",
    "guest huge pages",
    "guest huge page failures",
    "guest oom kills",
    "guest alloc stalls",
    "guest async scans",
    "guest direct scans",
    "guest async reclaims",
    "guest direct reclaims",
];

/// The last numbers that came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Stats {
    values: [Option<u64>; NAMES.len()],
    updates: u64,
}

impl Stats {
    /// Takes a buffer: tags of 16 bits, each with a value of 64. Tags that nobody knows are passed
    /// over.
    pub(super) fn update(&mut self, mut reader: Reader<'_, '_>) {
        // As many as there are tags, twice: a driver cannot keep us busy.
        for _ in 0..2 * NAMES.len() {
            let Some(tag) = reader.read_obj::<u16>() else {
                break;
            };
            let Some(value) = reader.read_obj::<u64>() else {
                break;
            };
            let place = self.values.get_mut(usize::from(u16::from_le(tag)));
            // Linux says by all ones that it does not know.
            let value = Some(u64::from_le(value)).filter(|&value| value != u64::MAX);
            place.into_iter().for_each(|place| *place = value);
        }
        self.updates += 1;
    }

    /// How many buffers have come.
    pub(super) fn updates(&self) -> u64 {
        self.updates
    }

    /// Those that are known, with their names.
    pub(super) fn shown(&self) -> impl Iterator<Item = (&'static str, String)> {
        let known = NAMES.into_iter().zip(self.values);
        known.filter_map(|(name, value)| Some((name, value?.to_string())))
    }
}
