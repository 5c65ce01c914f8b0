//! Which frames the driver wants (5.1.6.5.1 to 5.1.6.5.3).

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::config::MacAddress;

/// Addresses that are kept of each kind; a driver that wants more gets all.
pub(super) const MAX_ADDRESSES: usize = 64;
/// VLANs there are.
const VLANS: u16 = 4096;
/// What says that a frame is tagged (IEEE 802.1Q).
const TAGGED: [u8; 2] = [0x81, 0x00];
/// Bytes of a frame that are looked at: addresses, and a tag or type.
pub(super) const LOOKED_AT: usize = 16;

/// What a driver wants to receive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Everything.
    pub promiscuous: bool,
    /// All multicast frames.
    pub all_multicast: bool,
    /// All unicast frames.
    pub all_unicast: bool,
    /// No multicast frames.
    pub no_multicast: bool,
    /// No unicast frames.
    pub no_unicast: bool,
    /// No broadcasts.
    pub no_broadcast: bool,
    /// Further unicast addresses; none of them if there are too many.
    pub unicast: Option<BTreeSet<[u8; 6]>>,
    /// Multicast addresses; likewise.
    pub multicast: Option<BTreeSet<[u8; 6]>>,
    /// The VLANs whose frames pass, if they are filtered.
    vlans: Option<BTreeSet<u16>>,
}

impl Filter {
    /// Before the driver has said anything it gets everything, as the driver that never says
    /// anything needs; of VLANs nothing, if it is one that says which (5.1.6.5.3).
    pub fn new(vlans: bool) -> Self {
        Self {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Some(BTreeSet::new()),
            multicast: Some(BTreeSet::new()),
            vlans: vlans.then(BTreeSet::new),
        }
    }

    /// Lets a VLAN's frames pass, or not; false if there is no such VLAN.
    pub fn set_vlan(&mut self, vlan: u16, passes: bool) -> bool {
        if vlan >= VLANS {
            return false;
        }
        match &mut self.vlans {
            Some(vlans) if passes => drop(vlans.insert(vlan)),
            Some(vlans) => drop(vlans.remove(&vlan)),
            None => {}
        }
        true
    }

    /// Whether a frame that begins like this is for a card with the address `mac`.
    pub fn passes(&self, start: &[u8; LOOKED_AT], mac: MacAddress) -> bool {
        if self.promiscuous {
            return true;
        }
        let [to @ .., _, _, _, _, _, _, t, u, v, w] = start;
        if [*t, *u] == TAGGED && !self.has_vlan(u16::from_be_bytes([*v, *w]) % VLANS) {
            return false;
        }
        let listed = |list: &Option<BTreeSet<_>>| list.as_ref().is_none_or(|l| l.contains(to));
        if *to == [0xff; 6] {
            !self.no_broadcast
        } else if to.first().is_some_and(|first| first & 1 != 0) {
            !self.no_multicast && (self.all_multicast || listed(&self.multicast))
        } else {
            !self.no_unicast && (self.all_unicast || *to == mac.0 || listed(&self.unicast))
        }
    }

    fn has_vlan(&self, vlan: u16) -> bool {
        self.vlans
            .as_ref()
            .is_none_or(|vlans| vlans.contains(&vlan))
    }

    /// Whether it has no more than drivers can ask for.
    pub fn is_sensible(&self) -> bool {
        let fits = |list: &Option<BTreeSet<[u8; 6]>>| {
            list.as_ref().is_none_or(|list| list.len() <= MAX_ADDRESSES)
        };
        let vlans = self.vlans.as_ref().and_then(BTreeSet::last);
        fits(&self.unicast) && fits(&self.multicast) && vlans.is_none_or(|last| *last < VLANS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = MacAddress([0, 0xa0, 0x98, 1, 2, 3]);
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];
    const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];

    fn frame(to: [u8; 6], tail: [u8; 4]) -> [u8; LOOKED_AT] {
        let mut start = [0; LOOKED_AT];
        start[..6].copy_from_slice(&to);
        start[12..].copy_from_slice(&tail);
        start
    }

    fn plain(filter: &Filter, to: [u8; 6]) -> bool {
        filter.passes(&frame(to, [8, 0, 0, 0]), MAC)
    }

    #[test]
    fn a_frame_passes_by_its_address() {
        let mut filter = Filter::new(true);
        let all = |filter: &Filter| [MAC.0, OTHER, GROUP, [0xff; 6]].map(|to| plain(filter, to));
        assert_eq!(all(&filter), [true; 4]);
        filter.promiscuous = false;
        assert_eq!(all(&filter), [true, false, false, true]);
        filter.unicast = Some([OTHER].into());
        filter.multicast = Some([GROUP].into());
        assert_eq!(all(&filter), [true; 4]);
        (filter.no_unicast, filter.no_multicast, filter.no_broadcast) = (true, true, true);
        assert_eq!(all(&filter), [false; 4]);
        let mut filter = Filter::new(true);
        filter.promiscuous = false;
        (filter.all_unicast, filter.all_multicast) = (true, true);
        assert_eq!(all(&filter), [true; 4]);
        filter = Filter::new(true);
        filter.promiscuous = false;
        (filter.unicast, filter.multicast) = (None, None);
        assert_eq!(all(&filter), [true; 4], "too many are all");
    }

    #[test]
    fn a_tagged_frame_passes_by_its_vlan() {
        let mut filter = Filter::new(true);
        filter.promiscuous = false;
        let tagged = |filter: &Filter| filter.passes(&frame(MAC.0, [0x81, 0, 0x20, 5]), MAC);
        assert!(!tagged(&filter));
        assert!(filter.set_vlan(5, true) && tagged(&filter));
        assert!(filter.set_vlan(5, false) && !tagged(&filter));
        assert!(!filter.set_vlan(4096, true));
        let mut untold = Filter::new(false);
        untold.promiscuous = false;
        assert!(tagged(&untold));
    }
}
