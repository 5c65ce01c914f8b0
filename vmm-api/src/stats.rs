//! What a virtual machine counts: exits, time in guest and host, and KVM's own statistics.
//!
//! KVM hands its statistics out as a file that describes itself: a header, descriptors with names
//! and units, values. [`read`] takes it in, [`parse`] is the pure part. [`VcpuStats::bhyve`] says
//! what of it answers to bhyve's own list.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use kvm_bindings::{
    KVM_STATS_BASE_MASK, KVM_STATS_BASE_POW2, KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT,
    KVM_STATS_TYPE_LINEAR_HIST, KVM_STATS_TYPE_LOG_HIST, KVM_STATS_TYPE_MASK, KVM_STATS_TYPE_PEAK,
    KVM_STATS_UNIT_BOOLEAN, KVM_STATS_UNIT_BYTES, KVM_STATS_UNIT_CYCLES, KVM_STATS_UNIT_MASK,
    KVM_STATS_UNIT_NONE, KVM_STATS_UNIT_SECONDS,
};
use serde::{Deserialize, Serialize};

/// Statistics files longer than this are refused: KVM's have some 10 KiB.
const FILE_MAX: usize = 1 << 20;

/// What one vCPU has counted since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStats {
    /// Exits to user space by reason.
    pub exits: BTreeMap<String, u64>,
    /// Nanoseconds inside KVM_RUN.
    pub guest_ns: u64,
    /// Nanoseconds of its thread outside of KVM_RUN.
    pub host_ns: u64,
    /// KVM's statistics of this vCPU; empty where the host's KVM has none.
    #[serde(default)]
    pub kvm: Vec<Stat>,
}

/// What the machine as a whole has counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStats {
    /// The monitor's own counters by name.
    pub counters: BTreeMap<String, u64>,
    /// KVM's statistics of this VM; empty where the host's KVM has none.
    #[serde(default)]
    pub kvm: Vec<Stat>,
}

/// One of KVM's statistics (Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// KVM's name for it.
    pub name: String,
    /// How its values change.
    pub kind: StatKind,
    /// What its values count.
    pub unit: StatUnit,
    /// The unit is multiplied by `base` to this power: nanoseconds are seconds with base 10 and -9.
    pub exponent: i16,
    /// 10 or 2.
    pub base: u8,
    /// Width of one bucket of a linear histogram, in units.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bucket: Option<u32>,
    /// One value, or one for each bucket of a histogram.
    pub values: Vec<u64>,
}

/// How a statistic's values change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StatKind {
    /// Only grows.
    Cumulative,
    /// Goes up and down.
    Instant,
    /// The largest so far.
    Peak,
    /// Counts by buckets of equal width.
    LinearHistogram,
    /// Counts by buckets of which each is twice as wide as the one before.
    LogHistogram,
    /// A kind that is newer than this program.
    Unknown,
}

/// What a statistic counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StatUnit {
    /// Events or objects.
    None,
    /// Bytes.
    Bytes,
    /// Seconds.
    Seconds,
    /// Processor cycles.
    Cycles,
    /// 0 or 1.
    Boolean,
    /// A unit that is newer than this program.
    Unknown,
}

/// Why KVM's statistics cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// The file cannot be read.
    #[error("KVM's statistics cannot be read")]
    Io(#[from] io::Error),
    /// The file says that something is where nothing is.
    #[error("KVM's statistics are cut off: {what} at {offset:#x}")]
    Truncated {
        /// What should be there.
        what: &'static str,
        /// Where, from the file's beginning.
        offset: usize,
    },
    /// The file is larger than 1 MiB.
    #[error("KVM's statistics have more than {FILE_MAX} bytes")]
    TooLarge,
}

/// Reads the statistics behind a KVM_GET_STATS_FD descriptor. The file's position is of no account.
///
/// # Errors
///
/// It cannot be read, or does not describe itself well.
pub fn read(file: &File) -> Result<Vec<Stat>, StatsError> {
    let mut bytes = vec![0; 16 << 10];
    let mut len = 0;
    loop {
        if len == bytes.len() {
            if len >= FILE_MAX {
                return Err(StatsError::TooLarge);
            }
            bytes.resize(2 * len, 0);
        }
        match file.read_at(&mut bytes[len..], len as u64) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    parse(&bytes[..len])
}

/// The statistics that a whole file of them describes. Integers are in the host's byte order.
///
/// # Errors
///
/// Something lies outside of the file.
pub fn parse(file: &[u8]) -> Result<Vec<Stat>, StatsError> {
    let file = Bytes(file);
    // struct kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset.
    let name_size = file.u32(4, "the header")? as usize;
    let count = file.u32(8, "the header")? as usize;
    let descriptors = file.u32(16, "the header")? as usize;
    let data = file.u32(20, "the header")? as usize;
    let size = DESCRIPTOR + name_size;
    // Checked as a whole, so that a lying count costs nothing.
    let whole = size.saturating_mul(count);
    file.at(descriptors, whole, "the descriptors")?
        .chunks_exact(size)
        .map(|descriptor| stat(file, Bytes(descriptor), data))
        .collect()
}

/// Bytes of struct kvm_stats_desc before the name.
const DESCRIPTOR: usize = 16;

/// One statistic. struct kvm_stats_desc: flags, exponent, size, offset, bucket_size, name.
fn stat(file: Bytes<'_>, descriptor: Bytes<'_>, data: usize) -> Result<Stat, StatsError> {
    let flags = descriptor.u32(0, "a descriptor")?;
    let [e0, e1, s0, s1] = descriptor.u32(4, "a descriptor")?.to_ne_bytes();
    let offset = descriptor.u32(8, "a descriptor")? as usize;
    let bucket = descriptor.u32(12, "a descriptor")?;
    let name = descriptor.0.get(DESCRIPTOR..).unwrap_or_default();
    let name = name.split(|&b| b == 0).next().unwrap_or_default();
    let len = usize::from(u16::from_ne_bytes([s0, s1])) * 8;
    let values = file.at(data.saturating_add(offset), len, "values")?;
    let kind = match flags & KVM_STATS_TYPE_MASK {
        KVM_STATS_TYPE_CUMULATIVE => StatKind::Cumulative,
        KVM_STATS_TYPE_INSTANT => StatKind::Instant,
        KVM_STATS_TYPE_PEAK => StatKind::Peak,
        KVM_STATS_TYPE_LINEAR_HIST => StatKind::LinearHistogram,
        KVM_STATS_TYPE_LOG_HIST => StatKind::LogHistogram,
        _ => StatKind::Unknown,
    };
    let unit = match flags & KVM_STATS_UNIT_MASK {
        KVM_STATS_UNIT_NONE => StatUnit::None,
        KVM_STATS_UNIT_BYTES => StatUnit::Bytes,
        KVM_STATS_UNIT_SECONDS => StatUnit::Seconds,
        KVM_STATS_UNIT_CYCLES => StatUnit::Cycles,
        KVM_STATS_UNIT_BOOLEAN => StatUnit::Boolean,
        _ => StatUnit::Unknown,
    };
    let base = match flags & KVM_STATS_BASE_MASK {
        KVM_STATS_BASE_POW2 => 2,
        _ => 10,
    };
    Ok(Stat {
        name: String::from_utf8_lossy(name).into_owned(),
        kind,
        unit,
        exponent: i16::from_ne_bytes([e0, e1]),
        base,
        bucket: (kind == StatKind::LinearHistogram).then_some(bucket),
        values: values
            .as_chunks()
            .0
            .iter()
            .map(|&value| u64::from_ne_bytes(value))
            .collect(),
    })
}

/// A file in memory whose every access is checked.
#[derive(Clone, Copy)]
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn at(self, offset: usize, len: usize, what: &'static str) -> Result<&'a [u8], StatsError> {
        let end = offset.checked_add(len);
        end.and_then(|end| self.0.get(offset..end))
            .ok_or(StatsError::Truncated { what, offset })
    }

    fn u32(self, offset: usize, what: &'static str) -> Result<u32, StatsError> {
        let bytes = self.at(offset, 4, what)?;
        let bytes = bytes.first_chunk().copied().unwrap_or_default();
        Ok(u32::from_ne_bytes(bytes))
    }
}

impl Stat {
    /// The value, of a statistic that has only one.
    pub fn value(&self) -> Option<u64> {
        match *self.values {
            [value] => Some(value),
            _ => None,
        }
    }
}

/// bhyve's statistics of 2012 (sys/amd64/vmm/vmm_stat.c), each with the KVM statistic that counts
/// the same, where there is one.
///
/// KVM counts no accesses to control registers, MSRs or CPUID, no PAUSE and no monitor traps of
/// their own, and no migrations. Its `signal_exits` are fewer than bhyve's pending ASTs, which
/// include every reschedule: no counterpart.
const BHYVE: [(&str, Option<&str>); 16] = [
    ("vcpu migration across host cpus", None),
    ("total number of vm exits", Some("exits")),
    ("vm exits due to external interrupt", Some("irq_exits")),
    ("number of times hlt was intercepted", Some("halt_exits")),
    ("number of times %cr access was intercepted", None),
    ("number of times rdmsr was intercepted", None),
    ("number of times wrmsr was intercepted", None),
    ("number of monitor trap exits", None),
    ("number of times pause was intercepted", None),
    (
        "vm exits due to interrupt window opening",
        Some("irq_window_exits"),
    ),
    (
        "vm exits due to nmi window opening",
        Some("nmi_window_exits"),
    ),
    ("number of times in/out was intercepted", Some("io_exits")),
    ("number of times cpuid was intercepted", None),
    ("vm exits due to nested page fault", Some("pf_taken")),
    ("number of vm exits for unknown reason", None),
    ("number of times astpending at exit", None),
];

impl VcpuStats {
    /// bhyve's seventeen statistics of 2012 in their order; none where KVM has no counterpart.
    pub fn bhyve(&self) -> Vec<(&'static str, Option<u64>)> {
        let kvm = |name| self.kvm.iter().find(|s| s.name == name)?.value();
        let mut all: Vec<_> = BHYVE
            .iter()
            .map(|&(description, name)| (description, name.and_then(kvm)))
            .collect();
        let userspace = self.exits.values().sum();
        all.push(("number of vm exits handled in userspace", Some(userspace)));
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAME: usize = 48;

    /// A file as KVM writes it (virt/kvm/binary_stats.c): header, id, descriptors, values.
    fn file(stats: &[(u32, i16, u32, &str, Vec<u64>)]) -> Vec<u8> {
        let descriptors = 24 + NAME;
        let data = descriptors + stats.len() * (DESCRIPTOR + NAME);
        let mut file = Vec::new();
        let header = [0, NAME, stats.len(), 24, descriptors, data];
        file.extend(header.iter().flat_map(|&n| (n as u32).to_ne_bytes()));
        file.extend([b'k'; NAME]);
        let mut offset = 0;
        for (flags, exponent, bucket, name, values) in stats {
            file.extend(flags.to_ne_bytes());
            file.extend(exponent.to_ne_bytes());
            file.extend((values.len() as u16).to_ne_bytes());
            file.extend((offset as u32).to_ne_bytes());
            file.extend(bucket.to_ne_bytes());
            let mut name = name.as_bytes().to_vec();
            name.resize(NAME, 0);
            file.extend(name);
            offset += values.len() * 8;
        }
        file.extend(
            stats
                .iter()
                .flat_map(|s| &s.4)
                .flat_map(|v| v.to_ne_bytes()),
        );
        file
    }

    fn sample() -> Vec<u8> {
        file(&[
            (0, 0, 0, "exits", vec![4711]),
            (0x20, -9, 0, "halt_wait_ns", vec![u64::MAX]),
            (0x23, -9, 500, "halt_hist", vec![1, 2, 3]),
            (0x141, 0, 0, "guest_mode", vec![1]),
            (0xff, 0, 0, "of_the_future", vec![]),
        ])
    }

    #[test]
    fn a_file_is_read_as_it_describes_itself() {
        let stats = parse(&sample()).unwrap();
        let brief: Vec<_> = stats
            .iter()
            .map(|s| {
                (
                    &*s.name, s.kind, s.unit, s.base, s.exponent, s.bucket, &*s.values,
                )
            })
            .collect();
        use StatKind::*;
        use StatUnit as U;
        assert_eq!(
            brief,
            [
                ("exits", Cumulative, U::None, 10, 0, None, &[4711][..]),
                (
                    "halt_wait_ns",
                    Cumulative,
                    U::Seconds,
                    10,
                    -9,
                    None,
                    &[u64::MAX]
                ),
                (
                    "halt_hist",
                    LinearHistogram,
                    U::Seconds,
                    10,
                    -9,
                    Some(500),
                    &[1, 2, 3]
                ),
                ("guest_mode", Instant, U::Boolean, 2, 0, None, &[1]),
                ("of_the_future", Unknown, U::Unknown, 10, 0, None, &[]),
            ]
        );
        let json = serde_json::to_string(&stats).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Stat>>(&json).unwrap(), stats);
    }

    #[test]
    fn bhyves_list_has_what_kvm_counts_and_nothing_invented() {
        let stats = VcpuStats {
            exits: [("io".into(), 3), ("mmio".into(), 4)].into(),
            kvm: parse(&sample()).unwrap(),
            ..VcpuStats::default()
        };
        let list = stats.bhyve();
        assert_eq!(list.len(), 17);
        let known: Vec<_> = list.iter().filter(|(_, n)| n.is_some()).collect();
        assert_eq!(
            known,
            [
                &("total number of vm exits", Some(4711)),
                &("number of vm exits handled in userspace", Some(7))
            ]
        );
    }

    #[test]
    fn every_cut_is_an_error() {
        let whole = sample();
        for len in 0..whole.len() {
            assert!(
                matches!(parse(&whole[..len]), Err(StatsError::Truncated { .. })),
                "{len} bytes"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn no_change_of_a_good_file_makes_it_panic_or_swell(at: prop::sample::Index, word: u32) {
            let mut bytes = sample();
            let at = at.index(bytes.len() - 4);
            bytes[at..at + 4].copy_from_slice(&word.to_ne_bytes());
            if let Ok(stats) = parse(&bytes) {
                prop_assert!(stats.len() <= bytes.len() / DESCRIPTOR);
            }
        }
    }
}
