//! Features and the configuration space (5.2.3, 5.2.4).

use crate::block::{Info, SECTOR};

/// Descriptors of a queue.
pub const QUEUE_SIZE: u16 = 256;
/// Sectors of one segment of a discard.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Segments of a discard.
pub const MAX_DISCARD_SEGMENTS: u32 = 32;
/// Sectors of one segment of a write-zeroes: few enough that writing them does not keep a queue
/// from its other requests for long.
pub const MAX_ZERO_SECTORS: u32 = 1 << 16;
/// Segments of a write-zeroes.
pub const MAX_ZERO_SEGMENTS: u32 = 1;

/// Feature bits, as masks.
pub(super) mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Where the one field is that a driver may write: 1 lets writes complete before they are stable.
pub(super) const WRITEBACK: usize = 32;
/// Bytes of the configuration space.
pub(super) const LEN: usize = 60;

/// What a disk offers.
pub(super) fn features(info: &Info, queues: u16) -> u64 {
    use feature::*;
    let mut bits = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE;
    if queues > 1 {
        bits |= MQ;
    }
    if info.read_only {
        return bits | RO;
    }
    if info.discard {
        bits |= DISCARD;
    }
    bits | WRITE_ZEROES
}

/// The configuration space, little endian.
pub(super) fn space(info: &Info, queues: u16, writeback: bool) -> [u8; LEN] {
    let mut space = [0; LEN];
    let mut set = |at: usize, bytes: &[u8]| {
        for (to, from) in space.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    let ratio = info.physical / info.logical;
    let alignment = info.physical / SECTOR as u32;
    set(0, &(info.capacity / SECTOR).to_le_bytes());
    // A request's header and status take a descriptor each.
    set(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
    set(20, &info.logical.to_le_bytes());
    set(24, &[ratio.trailing_zeros() as u8]);
    set(26, &u16::try_from(ratio).unwrap_or(1).to_le_bytes());
    set(WRITEBACK, &[writeback.into()]);
    set(34, &queues.to_le_bytes());
    if info.discard && !info.read_only {
        set(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        set(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
        set(44, &alignment.to_le_bytes());
    }
    if !info.read_only {
        set(48, &MAX_ZERO_SECTORS.to_le_bytes());
        set(52, &MAX_ZERO_SEGMENTS.to_le_bytes());
        set(56, &[info.discard.into()]);
    }
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Info = Info {
        capacity: 400 << 20,
        logical: 512,
        physical: 4096,
        read_only: false,
        discard: true,
    };

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let space = space(&DISK, 4, true);
        let u32_at = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), 819_200);
        assert_eq!(
            [u32_at(8), u32_at(12), u32_at(16), u32_at(20)],
            [0, 254, 0, 512]
        );
        // 2^3 logical blocks in a physical one, the first is aligned; 8 blocks are a good minimum.
        assert_eq!(space[24..32], [3, 0, 8, 0, 0, 0, 0, 0]);
        assert_eq!(space[32..36], [1, 0, 4, 0]);
        assert_eq!([u32_at(36), u32_at(40), u32_at(44)], [1 << 22, 32, 8]);
        assert_eq!([u32_at(48), u32_at(52), u32_at(56)], [1 << 16, 1, 1]);
    }

    #[test]
    fn a_disk_offers_what_it_can() {
        use feature::*;
        let common = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE;
        assert_eq!(features(&DISK, 1), common | DISCARD | WRITE_ZEROES);
        assert_eq!(features(&DISK, 2), common | DISCARD | WRITE_ZEROES | MQ);
        let no_discard = Info {
            discard: false,
            ..DISK
        };
        assert_eq!(features(&no_discard, 1), common | WRITE_ZEROES);
        let read_only = Info {
            read_only: true,
            ..DISK
        };
        assert_eq!(features(&read_only, 1), common | RO);
        assert_eq!(space(&read_only, 1, true)[36..], [0; 24]);
        assert_eq!(space(&no_discard, 1, false)[36..48], [0; 12]);
    }
}
