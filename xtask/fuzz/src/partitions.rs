//! Partition tables: whatever is found begins on the disk, and the whole disk is always there.

use rhyveload::source::Source;
use rhyveload::source::partition::partitions;

/// The bytes are a disk, padded to whole sectors. True if it has partitions.
///
/// # Panics
///
/// A partition begins behind the disk's end or is empty, or the whole disk is missing.
pub fn check(data: &[u8]) -> bool {
    let mut disk = data.to_vec();
    disk.resize(data.len().next_multiple_of(512), 0);
    let found = partitions(&disk);
    assert!(found.is_ok(), "memory can always be read");
    let Ok(found) = found else { return false };
    let whole = found.last().map(|part| (part.start, part.len));
    assert_eq!(whole, Some((0, disk.size())));
    for part in &found[..found.len() - 1] {
        assert!(part.start < disk.size() && part.len > 0, "{part:?}");
    }
    found.len() > 1
}

fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
    disk[at..at + bytes.len()].copy_from_slice(bytes);
}

fn mbr(kind: u8, start: u32, sectors: u32) -> Vec<u8> {
    let mut disk = vec![0; 512 * 16];
    put(&mut disk, 446 + 4, &[kind]);
    put(&mut disk, 446 + 8, &start.to_le_bytes());
    put(&mut disk, 446 + 12, &sectors.to_le_bytes());
    put(&mut disk, 510, &[0x55, 0xaa]);
    disk
}

/// A label in a sector, with partition a.
fn label(disk: &mut [u8], sector: usize) {
    let label = &mut disk[512 * sector..512 * (sector + 1)];
    for (at, word) in [(0, 0x8256_4557u32), (132, 0x8256_4557), (148, 5), (152, 4)] {
        put(label, at, &word.to_le_bytes());
    }
    put(label, 138, &8u16.to_le_bytes());
    put(label, 160, &[7]);
    let words = label.chunks(2).map(|w| u16::from_le_bytes([w[0], w[1]]));
    let sum = words.fold(0, |sum, word| sum ^ word);
    put(label, 136, &sum.to_le_bytes());
}

fn crc(bytes: &[u8]) -> [u8; 4] {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum().to_le_bytes()
}

fn gpt() -> Vec<u8> {
    let mut disk = mbr(0xee, 1, 15);
    put(&mut disk, 1024, b"\xb6|nQ\xcfn\xd6\x11\x8f\xf8\0\x02-\tq+");
    put(&mut disk, 1024 + 32, &[4]);
    put(&mut disk, 1024 + 40, &[9]);
    let table = crc(&disk[1024..1024 + 4 * 128]);
    put(&mut disk, 512, b"EFI PART\0\0\x01\0\x5c");
    for (at, byte) in [(72, 2), (80, 4), (84, 128)] {
        disk[512 + at] = byte;
    }
    put(&mut disk, 512 + 88, &table);
    let sum = crc(&disk[512..512 + 92]);
    put(&mut disk, 512 + 16, &sum);
    disk
}

/// A GPT, an MBR, an MBR with a label in its slice, a label alone.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut sliced = mbr(0xa5, 2, 12);
    label(&mut sliced, 3);
    let mut bare = vec![0; 512 * 16];
    label(&mut bare, 1);
    vec![gpt(), mbr(0x83, 2, 12), sliced, bare]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_have_partitions() {
        assert!(seeds().iter().all(|seed| check(seed)));
    }
}
