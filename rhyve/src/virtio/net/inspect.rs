//! What a card tells whoever looks from outside.

use std::sync::atomic::Ordering::Relaxed;

use super::config::feature::*;
use super::shared::Shared;
use crate::virtio::Inspection;

/// Names of the feature bits (5.1.3).
pub(super) const FEATURES: &[(u64, &str)] = &[
    (CSUM, "csum"),
    (GUEST_CSUM, "guest-csum"),
    (CTRL_GUEST_OFFLOADS, "ctrl-guest-offloads"),
    (MTU, "mtu"),
    (MAC, "mac"),
    (GUEST_TSO4, "guest-tso4"),
    (GUEST_TSO6, "guest-tso6"),
    (GUEST_ECN, "guest-ecn"),
    (HOST_TSO4, "host-tso4"),
    (HOST_TSO6, "host-tso6"),
    (HOST_ECN, "host-ecn"),
    (MRG_RXBUF, "mrg-rxbuf"),
    (STATUS, "status"),
    (CTRL_VQ, "ctrl-vq"),
    (CTRL_RX, "ctrl-rx"),
    (CTRL_VLAN, "ctrl-vlan"),
    (CTRL_RX_EXTRA, "ctrl-rx-extra"),
    (MQ, "mq"),
    (CTRL_MAC_ADDR, "ctrl-mac-addr"),
    (GUEST_USO4, "guest-uso4"),
    (GUEST_USO6, "guest-uso6"),
    (HOST_USO, "host-uso"),
];

/// What it is plugged into, and what passed.
pub(super) fn inspection(shared: &Shared, pairs: u16, mtu: Option<u16>) -> Inspection {
    let (filter, mac) = shared.receive().clone();
    let link = match (shared.is_lost(), shared.is_up()) {
        (true, _) => "down: its backend has gone",
        (_, true) => "up",
        (_, false) => "down",
    };
    let listed = |list: &Option<std::collections::BTreeSet<_>>| {
        list.as_ref()
            .map_or("all".to_owned(), |list| list.len().to_string())
    };
    let receives = if filter.promiscuous {
        "everything".to_owned()
    } else {
        let (unicast, multicast) = (listed(&filter.unicast), listed(&filter.multicast));
        format!("its address, {unicast} others, {multicast} groups")
    };
    let mut properties = vec![
        ("backend", shared.label().to_owned()),
        ("mac", mac.to_string()),
        ("link", link.to_owned()),
        (
            "queue pairs",
            format!("{} of {pairs}", shared.active_pairs.load(Relaxed)),
        ),
        ("receives", receives),
    ];
    properties.extend(mtu.map(|mtu| ("mtu", mtu.to_string())));
    let counters = &shared.counters;
    Inspection {
        properties,
        counters: vec![
            ("frames received", counters.received.load(Relaxed)),
            ("bytes received", counters.bytes_received.load(Relaxed)),
            ("frames sent", counters.transmitted.load(Relaxed)),
            ("bytes sent", counters.bytes_transmitted.load(Relaxed)),
            ("filtered", counters.filtered.load(Relaxed)),
            ("receive drops", counters.receive_dropped.load(Relaxed)),
            ("transmit drops", counters.transmit_dropped.load(Relaxed)),
            ("control commands", counters.commands.load(Relaxed)),
            ("bad requests", counters.bad_requests.load(Relaxed)),
        ],
    }
}
