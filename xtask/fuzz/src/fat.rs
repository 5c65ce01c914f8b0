//! FAT: whatever an image says, every walk through it ends, and nothing is read from outside of it.

use std::rc::Rc;

use rhyveload::source::fat::Fat;
use rhyveload::source::{BootFs, Slice};

use crate::ufs::walk;

/// The bytes are an image. True if its root directory can be read.
///
/// # Panics
///
/// A name in a listing is longer than names can be.
pub fn check(data: &[u8]) -> bool {
    let len = data.len() as u64;
    let image = Slice::new(Rc::new(data.to_vec()), 0, len);
    let Ok(Some(fs)) = Fat::probe(&image) else {
        return false;
    };
    let readable = walk(&fs, "", 2);
    let _ = fs.read_file("/hello.txt", 8192);
    let _ = fs.stat("/boot/../a long name.conf");
    readable
}

/// FAT12, FAT16 and FAT32, which differ in how many clusters they say there are: so few bytes hold
/// the first of them.
pub fn seeds() -> Vec<Vec<u8>> {
    [16, 5000, 70_000].map(image).into()
}

/// An image of so many sectors by its own account (Microsoft, FAT 1.03): a file of two clusters with a
/// long name, one with a short name, a directory.
fn image(sectors: u32) -> Vec<u8> {
    let mut bytes = vec![0; 16 * 512];
    let mut put = |at: usize, data: &[u8]| bytes[at..at + data.len()].copy_from_slice(data);
    // 512 bytes in a sector, one in a cluster; one sector reserved, one table of one sector.
    put(0, b"\xeb\x3c\x90fuzzing \0\x02\x01\x01\0\x01");
    put(21, b"\xf8\x01\0");
    put(32, &sectors.to_le_bytes());
    put(510, b"\x55\xaa");
    let fat32 = sectors > 65_536;
    if fat32 {
        put(22, &[0, 0]);
        put(36, &1u32.to_le_bytes());
        put(44, &2u32.to_le_bytes());
    } else {
        put(17, &16u16.to_le_bytes());
    }
    // The table: clusters 3 and 4 are a file's, the others end at once.
    let table: Vec<u8> = match sectors {
        16 => b"\xf8\xff\xff\xff\x4f\0\xff\xff\xff\xff\xff\xff".to_vec(),
        5000 => [0xfff8_u16, 0xffff, 0xffff, 4, 0xffff, 0xffff, 0xffff]
            .map(u16::to_le_bytes)
            .concat(),
        _ => [0x0fff_fff8_u32, !0, !0, 4, !0, !0, !0]
            .map(u32::to_le_bytes)
            .concat(),
    };
    put(512, &table);
    // The root directory is a sector of its own, or cluster 2; cluster 2 is the next one then.
    let root = 1024;
    let entry = |name: &[u8; 11], attributes: u8, cluster: u16, size: u32| {
        let mut entry = [0; 32];
        entry[..11].copy_from_slice(name);
        entry[11] = attributes;
        entry[26..28].copy_from_slice(&cluster.to_le_bytes());
        entry[28..].copy_from_slice(&size.to_le_bytes());
        entry
    };
    let short = b"ALONGN~1CON";
    let sum = short
        .iter()
        .fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
    let mut name = "a long name.conf".encode_utf16().map(u16::to_le_bytes);
    let mut long = |order: u8| {
        let mut entry = [0xff; 32];
        (entry[0], entry[11], entry[12], entry[13]) = (order, 0x0f, 0, sum);
        entry[26..28].fill(0);
        let places = (1..11)
            .step_by(2)
            .chain((14..26).step_by(2))
            .chain([28, 30]);
        let mut ended = false;
        for at in places {
            match name.next() {
                Some(unit) => entry[at..at + 2].copy_from_slice(&unit),
                None if !ended => {
                    entry[at..at + 2].fill(0);
                    ended = true;
                }
                None => {}
            }
        }
        entry
    };
    let first = long(1);
    let entries = [
        long(0x42),
        first,
        entry(short, 0x20, 3, 700),
        entry(b"HELLO   TXT", 0x20, 5, 5),
        entry(b"BOOT       ", 0x10, 6, 0),
    ];
    put(root, &entries.concat());
    let cluster = |n: usize| root + (n - 2 + usize::from(!fat32)) * 512;
    put(cluster(5), b"hello");
    put(cluster(6), &entry(b"KERNEL     ", 0x20, 5, 5));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_read() {
        for seed in seeds() {
            assert!(check(&seed));
            let whole = Slice::new(Rc::new(seed.clone()), 0, seed.len() as u64);
            let fs = Fat::probe(&whole).unwrap().unwrap();
            let hello = fs.read_file("/boot/kernel", 8192).unwrap();
            assert_eq!(hello, b"hello");
            assert_eq!(fs.read_file("/a long name.conf", 8192).unwrap().len(), 700);
        }
    }
}
