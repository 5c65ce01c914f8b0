//! What is known of one device of a machine: the answer to `vmmctl --get-devices`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What is known of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceDetail {
    /// Where it is, as `-s` has it: `bus:slot:function`.
    pub slot: String,
    /// What `-s` calls it.
    pub kind: String,
    /// What is of virtio, if it is a virtio device.
    #[serde(default)]
    pub virtio: Option<VirtioDetail>,
    /// How it is set up, and what it is in, by name.
    #[serde(default)]
    pub properties: BTreeMap<String, String>,
    /// What it has served, by name: requests, bytes and errors, counted since the machine started.
    #[serde(default)]
    pub counters: BTreeMap<String, u64>,
}

/// A virtio device and its driver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioDetail {
    /// The interfaces it has: `legacy`, `modern` or `transitional`, which is both.
    pub offered: String,
    /// The interface its driver uses; none: no driver is ready.
    #[serde(default)]
    pub transport: Option<String>,
    /// Its status register, by the names of the bits.
    pub status: Vec<String>,
    /// How it interrupts: `msi-x` or `intx`.
    pub interrupts: String,
    /// The features that were negotiated, by name; `bit-N` where there is none.
    pub features: Vec<String>,
    /// Features that were offered and not taken.
    pub declined: Vec<String>,
    /// Its queues that a driver has set up.
    pub queues: Vec<QueueDetail>,
}

/// A virtqueue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueDetail {
    /// Its number.
    pub index: u16,
    /// Descriptors.
    pub size: u16,
    /// Available ring index up to which requests were taken, modulo 2^16.
    pub next_avail: u16,
    /// Used ring index up to which requests were answered, modulo 2^16.
    pub next_used: u16,
    /// Requests answered.
    pub requests: u64,
    /// Interrupts sent.
    pub interrupts: u64,
}
