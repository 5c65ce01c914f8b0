//! Partition tables: GPT, MBR with BSD labels in its slices, a BSD label on the bare disk.
//!
//! Names are those of FreeBSD's loader: `p2` for a GPT partition, `s1a` for a partition of an MBR
//! slice, `a` for one of a bare label, nothing for the whole disk.

use std::io;

use flate2::Crc;

use super::Source;

const SECTOR: u64 = 512;

/// More entries than a table of 128 is not looked at (UEFI 2.10, 5.3.2, asks for at least 128).
const GPT_ENTRIES_MAX: u32 = 1024;

/// Largest entry that is looked at.
const GPT_ENTRY_MAX: u32 = 4096;

const MBR_PROTECTIVE: u8 = 0xee;
const MBR_FREEBSD: u8 = 0xa5;

/// d_magic of a disk label (sys/sys/disklabel.h).
const LABEL_MAGIC: u32 = 0x8256_4557;

/// FreeBSD's UFS partition type, 516e7cb6-6ecf-11d6-8ff8-00022d09712b, in the order of the bytes on
/// the disk.
const GPT_FREEBSD_UFS: [u8; 16] = [
    0xb6, 0x7c, 0x6e, 0x51, 0xcf, 0x6e, 0xd6, 0x11, 0x8f, 0xf8, 0x00, 0x02, 0x2d, 0x09, 0x71, 0x2b,
];

/// A part of a disk that may hold a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// What follows `diskN` in its name.
    pub name: String,
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whether its type says that FreeBSD's file system is in it.
    pub freebsd: bool,
}

/// Finds the partitions of a disk in the table's order. The last is always the whole disk, for a
/// file system without any table.
///
/// # Errors
///
/// Reading failed. A damaged table is as good as none.
pub fn partitions(disk: &dyn Source) -> io::Result<Vec<Partition>> {
    let mut found = Vec::new();
    let boot = sector(disk, 0)?;
    if let Some(slices) = boot.as_ref().and_then(mbr) {
        if slices.iter().any(|slice| slice.kind == MBR_PROTECTIVE) {
            found = gpt(disk)?;
        }
        if found.is_empty() {
            for slice in slices {
                found.extend(slice.partitions(disk)?);
            }
        }
    }
    found.extend(label(disk, 0, "")?);
    found.retain(|partition| partition.len > 0 && partition.start < disk.size());
    found.push(Partition {
        name: String::new(),
        start: 0,
        len: disk.size(),
        freebsd: false,
    });
    Ok(found)
}

type Sector = [u8; SECTOR as usize];

/// A sector, unless the disk is shorter.
fn sector(disk: &dyn Source, number: u64) -> io::Result<Option<Sector>> {
    let offset = number.saturating_mul(SECTOR);
    if offset.saturating_add(SECTOR) > disk.size() {
        return Ok(None);
    }
    let mut bytes = [0; SECTOR as usize];
    disk.read(offset, &mut bytes)?;
    Ok(Some(bytes))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    array(bytes, at).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    array(bytes, at).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    array(bytes, at).map_or(0, u64::from_le_bytes)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// An entry of the master boot record.
struct Slice {
    number: usize,
    kind: u8,
    start: u64,
    sectors: u64,
}

fn mbr(sector: &Sector) -> Option<Vec<Slice>> {
    if u16_at(sector, 510) != 0xaa55 {
        return None;
    }
    let (entries, _) = sector[446..510].as_chunks::<16>();
    let slices = entries.iter().enumerate().map(|(index, entry)| Slice {
        number: index + 1,
        kind: entry[4],
        start: u32_at(entry, 8).into(),
        sectors: u32_at(entry, 12).into(),
    });
    let slices: Vec<_> = slices.filter(|s| s.kind != 0 && s.sectors != 0).collect();
    (!slices.is_empty()).then_some(slices)
}

impl Slice {
    /// The partitions of its label, and the slice itself.
    fn partitions(&self, disk: &dyn Source) -> io::Result<Vec<Partition>> {
        let name = format!("s{}", self.number);
        let mut found = Vec::new();
        if self.kind == MBR_FREEBSD {
            found = label(disk, self.start, &name)?;
        }
        found.push(Partition {
            name,
            start: self.start * SECTOR,
            len: self.sectors * SECTOR,
            freebsd: self.kind == MBR_FREEBSD,
        });
        Ok(found)
    }
}

/// The partitions of a BSD label in the second sector of a slice (sys/sys/disklabel.h).
fn label(disk: &dyn Source, slice: u64, prefix: &str) -> io::Result<Vec<Partition>> {
    const HEADER: usize = 148;
    const ENTRY: usize = 16;
    const RAW: usize = 2;
    const FS_UFS: u8 = 7;
    let Some(bytes) = sector(disk, slice + 1)? else {
        return Ok(Vec::new());
    };
    let count = usize::from(u16_at(&bytes, 138));
    let end = HEADER + ENTRY * count;
    if u32_at(&bytes, 0) != LABEL_MAGIC || u32_at(&bytes, 132) != LABEL_MAGIC || end > bytes.len() {
        return Ok(Vec::new());
    }
    let (words, _) = bytes[..end].as_chunks::<2>();
    if words.iter().fold(0, |sum, w| sum ^ u16::from_le_bytes(*w)) != 0 {
        return Ok(Vec::new());
    }
    let (entries, _) = bytes[HEADER..end].as_chunks::<ENTRY>();
    // Offsets count from the start of the disk where 'c', the whole slice, says so.
    let base = entries.get(RAW).map_or(0, |raw| u32_at(raw, 4)).into();
    let found = entries.iter().zip(b'a'..=b'z').enumerate();
    let found = found.filter(|(index, (entry, _))| *index != RAW && u32_at(*entry, 0) != 0);
    Ok(found
        .map(|(_, (entry, letter))| {
            let offset = u64::from(u32_at(entry, 4)).saturating_sub(base);
            Partition {
                name: format!("{prefix}{}", char::from(letter)),
                start: (slice + offset) * SECTOR,
                len: u64::from(u32_at(entry, 0)) * SECTOR,
                freebsd: entry[12] == FS_UFS,
            }
        })
        .collect())
}

/// The partitions of a GUID partition table (UEFI 2.10, 5.3), from the backup if the first is bad.
fn gpt(disk: &dyn Source) -> io::Result<Vec<Partition>> {
    let last = (disk.size() / SECTOR).saturating_sub(1);
    for number in [1, last] {
        if let Some(header) = sector(disk, number)?
            && let Some(found) = gpt_table(disk, &header)?
        {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

fn gpt_table(disk: &dyn Source, header: &Sector) -> io::Result<Option<Vec<Partition>>> {
    let size = u32_at(header, 12) as usize;
    if !header.starts_with(b"EFI PART") || !(92..=header.len()).contains(&size) {
        return Ok(None);
    }
    let mut summed = *header;
    summed[16..20].fill(0);
    if crc(&summed[..size]) != u32_at(header, 16) {
        return Ok(None);
    }
    let (count, entry) = (u32_at(header, 80), u32_at(header, 84));
    if count > GPT_ENTRIES_MAX || !(128..=GPT_ENTRY_MAX).contains(&entry) {
        return Ok(None);
    }
    let offset = u64_at(header, 72).saturating_mul(SECTOR);
    let mut table = vec![0; (count * entry) as usize];
    if offset.saturating_add(table.len() as u64) > disk.size() {
        return Ok(None);
    }
    disk.read(offset, &mut table)?;
    if crc(&table) != u32_at(header, 88) {
        return Ok(None);
    }
    let entries = table.chunks_exact(entry as usize).enumerate();
    let used = entries.filter(|(_, entry)| entry[..16] != [0; 16]);
    let found = used.filter_map(|(index, entry)| {
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let sectors = last.checked_sub(first)?.checked_add(1)?;
        Some(Partition {
            name: format!("p{}", index + 1),
            start: first.checked_mul(SECTOR)?,
            len: sectors.checked_mul(SECTOR)?,
            freebsd: entry[..16] == GPT_FREEBSD_UFS,
        })
    });
    Ok(Some(found.collect()))
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(disk: &[u8]) -> Vec<(String, u64, u64)> {
        let found = partitions(&disk.to_vec()).unwrap();
        found
            .into_iter()
            .map(|p| (p.name, p.start / SECTOR, p.len / SECTOR))
            .collect()
    }

    fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn mbr_disk(kind: u8, start: u32, sectors: u32) -> Vec<u8> {
        let mut disk = vec![0; 512 * 200];
        put(&mut disk, 446, &[0x80, 0, 0, 0, kind]);
        put(&mut disk, 446 + 8, &start.to_le_bytes());
        put(&mut disk, 446 + 12, &sectors.to_le_bytes());
        put(&mut disk, 510, &[0x55, 0xaa]);
        disk
    }

    /// A label with 'a' at `first` and 'c' at `raw`.
    fn put_label(disk: &mut [u8], sector: usize, first: u32, raw: u32) {
        let label = &mut disk[512 * sector..512 * (sector + 1)];
        put(label, 0, &LABEL_MAGIC.to_le_bytes());
        put(label, 132, &LABEL_MAGIC.to_le_bytes());
        put(label, 138, &8u16.to_le_bytes());
        put(label, 148, &50u32.to_le_bytes());
        put(label, 152, &first.to_le_bytes());
        put(label, 160, &[7]);
        put(label, 148 + 32, &100u32.to_le_bytes());
        put(label, 152 + 32, &raw.to_le_bytes());
        put(label, 136, &[0, 0]);
        let words = label.chunks(2).map(|w| u16::from_le_bytes([w[0], w[1]]));
        let sum = words.fold(0, |sum, word| sum ^ word);
        put(label, 136, &sum.to_le_bytes());
    }

    fn gpt_disk() -> Vec<u8> {
        let mut disk = mbr_disk(MBR_PROTECTIVE, 1, 199);
        put(&mut disk, 2 * 512 + 128, &GPT_FREEBSD_UFS);
        put(&mut disk, 2 * 512 + 128 + 32, &40u64.to_le_bytes());
        put(&mut disk, 2 * 512 + 128 + 40, &49u64.to_le_bytes());
        let table = crc(&disk[2 * 512..34 * 512]);
        put(&mut disk, 512, b"EFI PART\0\0\x01\0");
        put(&mut disk, 512 + 12, &92u32.to_le_bytes());
        put(&mut disk, 512 + 72, &2u64.to_le_bytes());
        put(&mut disk, 512 + 80, &128u32.to_le_bytes());
        put(&mut disk, 512 + 84, &128u32.to_le_bytes());
        put(&mut disk, 512 + 88, &table.to_le_bytes());
        let sum = crc(&disk[512..512 + 92]);
        put(&mut disk, 512 + 16, &sum.to_le_bytes());
        let header = disk[512..1024].to_vec();
        put(&mut disk, 199 * 512, &header);
        disk
    }

    #[test]
    fn a_gpt_is_read_from_either_end() {
        let whole = (String::new(), 0, 200);
        let expected = vec![("p2".to_owned(), 40, 10), whole];
        let mut disk = gpt_disk();
        assert_eq!(names(&disk), expected);
        disk[512 + 40] ^= 1;
        assert_eq!(names(&disk), expected, "from the backup");
        disk[199 * 512] = 0;
        assert_eq!(names(&disk)[0].0, "s1", "no table is left but the MBR");
    }

    #[test]
    fn labels_are_found_in_slices_and_on_the_bare_disk() {
        let mut disk = mbr_disk(MBR_FREEBSD, 63, 100);
        put_label(&mut disk, 64, 16, 0);
        assert_eq!(names(&disk)[0], ("s1a".into(), 79, 50));
        assert_eq!(names(&disk)[1], ("s1".into(), 63, 100));
        put_label(&mut disk, 64, 63 + 16, 63);
        assert_eq!(names(&disk)[0], ("s1a".into(), 79, 50), "absolute");
        let mut bare = vec![0; 512 * 200];
        put_label(&mut bare, 1, 16, 0);
        assert_eq!(names(&bare)[0], ("a".into(), 16, 50));
        bare[512 + 140] ^= 1;
        assert_eq!(names(&bare).len(), 1, "the sum is wrong");
    }

    proptest! {
        #[test]
        fn damaged_tables_never_panic(
            gpt in any::<bool>(),
            changes in prop::collection::vec((0usize..4096, any::<u8>()), 0..8),
        ) {
            let mut disk = if gpt { gpt_disk() } else { mbr_disk(MBR_FREEBSD, 2, 100) };
            if !gpt {
                put_label(&mut disk, 3, 16, 0);
            }
            for (at, byte) in changes {
                disk[at] = byte;
            }
            for partition in partitions(&disk).unwrap() {
                assert!(partition.start < disk.len() as u64);
            }
        }
    }
}
