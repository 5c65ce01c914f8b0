//! What a virtual machine counts: exits, time in guest and host, and KVM's own statistics.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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
