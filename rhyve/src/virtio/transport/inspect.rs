//! What a transport tells whoever looks at its device from outside.

use std::sync::atomic::Ordering::Relaxed;

use vmm_api::inspect::{DeviceDetail, QueueDetail, VirtioDetail};

use super::VirtioPci;
use super::core::{Core, Interface, QueueSetup};
use crate::virtio::feature;

/// Names of the status bits (2.1).
const STATUS: [(u8, &str); 6] = [
    (1, "acknowledge"),
    (2, "driver"),
    (8, "features-ok"),
    (4, "driver-ok"),
    (0x40, "device-needs-reset"),
    (0x80, "failed"),
];

impl VirtioPci {
    /// The device, its driver and its queues as they are now; where it is and what `-s` calls it is
    /// left to the caller.
    pub fn inspect(&self) -> DeviceDetail {
        let virtio = self.virtio(&self.lock());
        // The device is asked without the transport's lock, as it is for its configuration.
        let inspection = self.device.inspect();
        let named = |(name, value): (&str, String)| (name.to_owned(), value);
        let counted = |(name, count): (&str, u64)| (name.to_owned(), count);
        DeviceDetail {
            virtio: Some(virtio),
            properties: inspection.properties.into_iter().map(named).collect(),
            counters: inspection.counters.into_iter().map(counted).collect(),
            ..DeviceDetail::default()
        }
    }

    fn virtio(&self, core: &Core) -> VirtioDetail {
        let status = core.device_status();
        let status = STATUS.iter().filter(|(bit, _)| status & bit != 0);
        let (taken, left) = match core.active {
            Some(interface) => {
                let offered = core.offered(interface);
                let taken = core.driver_features & offered;
                (taken, offered & !taken)
            }
            None => (0, 0),
        };
        VirtioDetail {
            offered: self.offered.to_owned(),
            transport: core.active.map(|interface| interface.word().to_owned()),
            status: status.map(|(_, name)| (*name).to_owned()).collect(),
            interrupts: self.link.word().to_owned(),
            features: names(taken, self.device.feature_names()),
            declined: names(left, self.device.feature_names()),
            queues: (0..)
                .zip(&core.queues)
                .filter_map(|(index, queue)| queue.detail(index))
                .collect(),
        }
    }
}

impl Interface {
    fn word(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Modern => "modern",
        }
    }
}

impl QueueSetup {
    /// None if the device does not have it.
    fn detail(&self, index: u16) -> Option<QueueDetail> {
        let counters = self.running.as_ref()?;
        Some(QueueDetail {
            index,
            size: self.rings.size,
            next_avail: counters.next_avail.load(Relaxed),
            next_used: counters.next_used.load(Relaxed),
            requests: counters.requests.load(Relaxed),
            interrupts: counters.interrupts.load(Relaxed),
        })
    }
}

/// The names of feature bits, lowest first.
fn names(features: u64, own: &[(u64, &str)]) -> Vec<String> {
    let set = (0..u64::BITS).filter(|bit| features & 1 << bit != 0);
    set.map(|bit| {
        let mut known = own.iter().chain(feature::NAMES);
        match known.find(|(mask, _)| *mask == 1 << bit) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("bit-{bit}"),
        }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_names_or_numbers() {
        let own = &[(1 << 5, "own")];
        let features = feature::VERSION_1 | 1 << 5 | 1 << 6 | feature::RING_EVENT_IDX;
        assert_eq!(
            names(features, own),
            ["own", "bit-6", "event-idx", "version-1"]
        );
        assert!(names(0, own).is_empty());
        assert_eq!(names(u64::MAX, &[]).len(), 64);
    }
}
