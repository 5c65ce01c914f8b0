//! Commands on the control queue (5.1.6.5).

use std::collections::BTreeSet;

use vm_memory::GuestMemoryMmap;

use super::config::feature;
use super::filter::{Filter, MAX_ADDRESSES};
use crate::config::MacAddress;
use crate::virtio::{Chain, Reader};

/// What a command comes to, as the driver reads it.
pub(super) const OK: u8 = 0;
pub(super) const ERR: u8 = 1;

/// One command, read once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Changes one of [`Filter`]'s switches.
    Receive(Switch, bool),
    /// Replaces the addresses the driver wants; none are too many.
    Table {
        /// One card's.
        unicast: Option<BTreeSet<[u8; 6]>>,
        /// Groups'.
        multicast: Option<BTreeSet<[u8; 6]>>,
    },
    /// Changes the card's address.
    Address(MacAddress),
    /// Lets a VLAN pass, or not.
    Vlan(u16, bool),
    /// Uses this many pairs of queues.
    Pairs(u16),
    /// Does this for the host, by the features' bits.
    Offloads(u64),
}

/// A switch of the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Switch {
    Promiscuous,
    AllMulticast,
    AllUnicast,
    NoMulticast,
    NoUnicast,
    NoBroadcast,
}

impl Command {
    /// The feature that has it.
    pub(super) fn feature(&self) -> u64 {
        match self {
            Self::Receive(Switch::Promiscuous | Switch::AllMulticast, _) | Self::Table { .. } => {
                feature::CTRL_RX
            }
            Self::Receive(..) => feature::CTRL_RX_EXTRA,
            Self::Address(_) => feature::CTRL_MAC_ADDR,
            Self::Vlan(..) => feature::CTRL_VLAN,
            Self::Pairs(_) => feature::MQ,
            Self::Offloads(_) => feature::CTRL_GUEST_OFFLOADS,
        }
    }

    /// Reads what the device may read of a chain; none if it is no command.
    pub fn parse(memory: &GuestMemoryMmap, chain: &Chain) -> Option<Self> {
        let mut reader = chain.reader(memory);
        let [class, command] = reader.read_obj::<[u8; 2]>()?;
        let parsed = match (class, command) {
            (0, 0..=5) => {
                let switch = match command {
                    0 => Switch::Promiscuous,
                    1 => Switch::AllMulticast,
                    2 => Switch::AllUnicast,
                    3 => Switch::NoMulticast,
                    4 => Switch::NoUnicast,
                    _ => Switch::NoBroadcast,
                };
                Self::Receive(switch, reader.read_obj::<u8>()? != 0)
            }
            (1, 0) => Self::Table {
                unicast: addresses(&mut reader)?,
                multicast: addresses(&mut reader)?,
            },
            (1, 1) => Self::Address(MacAddress(reader.read_obj()?)),
            (2, 0..=1) => Self::Vlan(u16::from_le(reader.read_obj()?), command == 0),
            (4, 0) => Self::Pairs(u16::from_le(reader.read_obj()?)),
            (5, 0) => Self::Offloads(u64::from_le(reader.read_obj()?)),
            _ => return None,
        };
        // What follows is nothing that was asked for.
        (reader.remaining() == 0).then_some(parsed)
    }
}

/// A table of addresses: how many, and then each. None if there is less than that, and no table if
/// there are more than [`MAX_ADDRESSES`].
#[allow(
    clippy::option_option,
    reason = "a broken request and an overfull table"
)]
fn addresses(reader: &mut Reader<'_, '_>) -> Option<Option<BTreeSet<[u8; 6]>>> {
    let count = u32::from_le(reader.read_obj()?);
    let bytes = count
        .checked_mul(6)
        .filter(|bytes| *bytes <= reader.remaining())?;
    if count as usize > MAX_ADDRESSES {
        reader.skip(bytes);
        return Some(None);
    }
    let mut table = BTreeSet::new();
    for _ in 0..count {
        table.insert(reader.read_obj()?);
    }
    Some(Some(table))
}

impl Switch {
    /// Sets it.
    pub(super) fn set(self, filter: &mut Filter, on: bool) {
        let place = match self {
            Self::Promiscuous => &mut filter.promiscuous,
            Self::AllMulticast => &mut filter.all_multicast,
            Self::AllUnicast => &mut filter.all_unicast,
            Self::NoMulticast => &mut filter.no_multicast,
            Self::NoUnicast => &mut filter.no_unicast,
            Self::NoBroadcast => &mut filter.no_broadcast,
        };
        *place = on;
    }
}
