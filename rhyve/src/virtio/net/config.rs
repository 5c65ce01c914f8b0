//! Features and the configuration space (5.1.3, 5.1.4).

use crate::config::MacAddress;
use crate::net::{Info, Offloads};
use crate::virtio::feature as common;

/// Descriptors of a queue for frames; bhyve's.
pub const QUEUE_SIZE: u16 = 1024;
/// Descriptors of the control queue.
pub const CONTROL_SIZE: u16 = 64;

/// Feature bits, as masks.
pub(super) mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const CTRL_RX: u64 = 1 << 18;
    pub const CTRL_VLAN: u64 = 1 << 19;
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    pub const MQ: u64 = 1 << 22;
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    pub const HOST_USO: u64 = 1 << 56;
}

/// What the guest does for the host, by feature.
const GUEST: [(Offloads, u64); 5] = [
    (Offloads::CSUM, feature::GUEST_CSUM),
    (Offloads::TSO4, feature::GUEST_TSO4),
    (Offloads::TSO6, feature::GUEST_TSO6),
    (Offloads::ECN, feature::GUEST_ECN),
    (Offloads::USO, feature::GUEST_USO4 | feature::GUEST_USO6),
];

/// What the host does for the guest, by feature.
const HOST: [(Offloads, u64); 5] = [
    (Offloads::CSUM, feature::CSUM),
    (Offloads::TSO4, feature::HOST_TSO4),
    (Offloads::TSO6, feature::HOST_TSO6),
    (Offloads::ECN, feature::HOST_ECN),
    (Offloads::USO, feature::HOST_USO),
];

/// Bytes of the configuration space.
pub(super) const LEN: usize = 12;

/// What a card at such a backend offers.
pub(super) fn features(info: &Info, pairs: u16, mtu: bool) -> u64 {
    use feature::*;
    let mut bits = MAC | MRG_RXBUF | STATUS | common::IN_ORDER;
    bits |= CTRL_VQ | CTRL_RX | CTRL_VLAN | CTRL_RX_EXTRA | CTRL_MAC_ADDR;
    if pairs > 1 {
        bits |= MQ;
    }
    if mtu {
        bits |= MTU;
    }
    for (offload, bit) in GUEST.into_iter().chain(HOST) {
        if info.offloads.contains(offload) {
            bits |= bit;
        }
    }
    if !info.offloads.is_empty() {
        bits |= CTRL_GUEST_OFFLOADS;
    }
    bits
}

/// What a driver that has these features, or has said that it wants these, does for the host.
pub(super) fn guest_offloads(features: u64) -> Offloads {
    // UDP segments are for both protocols or for none: so the tap has it.
    let done = GUEST.iter().filter(|(_, bits)| features & bits == *bits);
    let mut offloads: Offloads = done.map(|(offload, _)| *offload).collect();
    // Segments are cut with their checksums (5.1.3.1).
    if !offloads.contains(Offloads::CSUM) {
        offloads = Offloads::empty();
    }
    offloads
}

/// All bits a driver may ask for by CTRL_GUEST_OFFLOADS.
pub(super) fn all_guest_offloads() -> u64 {
    GUEST.iter().fold(0, |all, (_, bits)| all | bits)
}

/// The configuration space, little endian.
pub(super) fn space(mac: MacAddress, up: bool, pairs: u16, mtu: Option<u16>) -> [u8; LEN] {
    let MacAddress([a, b, c, d, e, f]) = mac;
    let [p, q] = pairs.to_le_bytes();
    let [m, n] = mtu.unwrap_or(0).to_le_bytes();
    [a, b, c, d, e, f, up.into(), 0, p, q, m, n]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let mac = MacAddress([0, 0xa0, 0x98, 1, 2, 3]);
        let space = space(mac, true, 0x102, Some(9000));
        assert_eq!(space, [0, 0xa0, 0x98, 1, 2, 3, 1, 0, 2, 1, 0x28, 0x23]);
    }

    #[test]
    fn a_card_offers_what_its_backend_can() {
        use feature::*;
        let plain = features(&Info::default(), 1, false);
        assert_eq!(plain & (CSUM | GUEST_CSUM | HOST_TSO4 | MQ | MTU), 0);
        let tap = Info {
            offloads: Offloads::all() - Offloads::USO,
            ..Info::default()
        };
        let all = features(&tap, 2, true);
        let wanted = CSUM | GUEST_CSUM | HOST_TSO4 | GUEST_TSO6 | HOST_ECN | MQ | MTU;
        assert_eq!(all & wanted, wanted);
        assert_eq!(all & HOST_USO, 0);
    }

    #[test]
    fn a_driver_that_takes_no_checksums_takes_no_segments() {
        use feature::*;
        let segments = guest_offloads(GUEST_TSO4 | GUEST_CSUM | GUEST_USO4);
        assert_eq!(segments, Offloads::CSUM | Offloads::TSO4);
        assert_eq!(guest_offloads(GUEST_TSO4), Offloads::empty());
    }
}
