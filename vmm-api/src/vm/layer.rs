//! qcow2 images that hold what a copy of a machine writes to its disk, over a file that stays as it is.
//!
//! Only what makes and moves such an image is here (QEMU's docs/interop/qcow2.rst, version 3); who
//! reads and writes its sectors is rhyve. Numbers are big endian. A new image has its header, with the
//! name of what is below it, in the first cluster; then a refcount table, one block of refcounts, and
//! an L1 table without entries, so that every sector comes from below.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::state::DiskFormat;

const MAGIC: [u8; 4] = *b"QFI\xfb";
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;

/// Bytes of a version 3 header without later additions.
const HEADER: u32 = 104;
/// The header extension that names the format of what is below.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Where the name is in a new image: behind all extensions, with room for the longest.
const NAME_AT: u64 = 512;
/// Longest name, in bytes.
const NAME_MAX: usize = 1023;

// Fields of the header.
const NAME_OFFSET: u64 = 8;
const SIZE: u64 = 24;

/// Makes an empty file an image of `size` bytes over the file `below`, a name relative to its own
/// directory.
pub(super) fn make(file: &File, size: u64, below: &str, format: DiskFormat) -> io::Result<()> {
    // One entry for each L2 table, which fills a cluster with entries of 8 bytes.
    let entries = size.div_ceil(CLUSTER * CLUSTER / 8);
    let l1_clusters = (entries * 8).div_ceil(CLUSTER).max(1);
    let mut header = Vec::new();
    header.extend(MAGIC);
    put32(&mut header, 3);
    put64(&mut header, NAME_AT);
    put32(&mut header, name_len(below)?);
    put32(&mut header, CLUSTER_BITS);
    put64(&mut header, size);
    put32(&mut header, 0); // not encrypted
    let entries = u32::try_from(entries).map_err(|_| io::ErrorKind::FileTooLarge)?;
    put32(&mut header, entries);
    put64(&mut header, 3 * CLUSTER); // L1 table
    put64(&mut header, CLUSTER); // refcount table
    put32(&mut header, 1); // its clusters
    put32(&mut header, 0); // no internal snapshots
    put64(&mut header, 0);
    put64(&mut header, 0); // incompatible features
    put64(&mut header, 0); // compatible
    put64(&mut header, 0); // autoclear
    put32(&mut header, 4); // refcounts of 1 << 4 bits
    put32(&mut header, HEADER);
    let format = match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    };
    put32(&mut header, BACKING_FORMAT);
    put32(&mut header, format.len() as u32);
    header.extend(format.as_bytes());
    // Extensions are multiples of 8 bytes; the last one has type 0.
    header.resize(header.len().next_multiple_of(8) + 8, 0);
    header.resize(NAME_AT as usize, 0);
    header.extend(below.as_bytes());
    file.write_all_at(&header, 0)?;
    file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER)?;
    let used = 3 + l1_clusters;
    let counts = 1_u16.to_be_bytes().repeat(used as usize);
    if counts.len() as u64 > CLUSTER {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    file.write_all_at(&counts, 2 * CLUSTER)?;
    file.set_len(used * CLUSTER)
}

fn put32(header: &mut Vec<u8>, value: u32) {
    header.extend(value.to_be_bytes());
}

fn put64(header: &mut Vec<u8>, value: u64) {
    header.extend(value.to_be_bytes());
}

/// The bytes of the disk in a qcow2 image.
pub(super) fn size(file: &File) -> io::Result<u64> {
    Ok(u64::from_be_bytes(field(file, SIZE)?))
}

/// The name of the file below an image, if there is one.
pub(super) fn below(file: &File) -> io::Result<Option<String>> {
    let Some((at, len)) = name(file)? else {
        return Ok(None);
    };
    let mut text = vec![0; len];
    file.read_exact_at(&mut text, at)?;
    let text = String::from_utf8(text);
    text.map(Some)
        .map_err(|_| damaged("the name of the file below it is no text"))
}

/// Gives the file below an image another name.
pub(super) fn rename_below(file: &File, below: &str) -> io::Result<()> {
    let (at, old) = name(file)?.ok_or_else(|| damaged("there is no file below it"))?;
    let len = name_len(below)?;
    let cluster_bits = u32::from_be_bytes(field(file, 20)?);
    let room = 1_u64.checked_shl(cluster_bits).unwrap_or(0);
    // Nothing but the name is in the header's cluster behind the header and its extensions.
    if at + u64::from(len) > room {
        return Err(damaged(
            "there is no room for the name of the file below it",
        ));
    }
    let mut text = below.as_bytes().to_vec();
    text.resize(text.len().max(old), 0);
    file.write_all_at(&text, at)?;
    file.write_all_at(&len.to_be_bytes(), NAME_OFFSET + 8)
}

/// Where the name of the file below is, and its length in bytes.
fn name(file: &File) -> io::Result<Option<(u64, usize)>> {
    let magic: [u8; 4] = field(file, 0)?;
    if magic != MAGIC {
        return Err(damaged("it is no qcow2 image"));
    }
    let at = u64::from_be_bytes(field(file, NAME_OFFSET)?);
    let len = u32::from_be_bytes(field(file, NAME_OFFSET + 8)?) as usize;
    match (at, len) {
        (0, _) => Ok(None),
        (_, 1..=NAME_MAX) => Ok(Some((at, len))),
        _ => Err(damaged("the name of the file below it is too long")),
    }
}

fn name_len(name: &str) -> io::Result<u32> {
    if name.len() > NAME_MAX {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    Ok(name.len() as u32)
}

fn field<const N: usize>(file: &File, at: u64) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_are_found_again() {
        let file = tempfile::tempfile().unwrap();
        // One more than an L1 table of one cluster reaches.
        let large = (CLUSTER / 8) * (CLUSTER * CLUSTER / 8) + 512;
        make(&file, large, "disk.base", DiskFormat::Qcow2).unwrap();
        assert_eq!(size(&file).unwrap(), large);
        assert_eq!(below(&file).unwrap().as_deref(), Some("disk.base"));
        assert_eq!(file.metadata().unwrap().len(), 5 * CLUSTER);
        for name in ["x", &"y".repeat(NAME_MAX)] {
            rename_below(&file, name).unwrap();
            assert_eq!(below(&file).unwrap().as_deref(), Some(name));
        }
        assert!(rename_below(&file, &"y".repeat(NAME_MAX + 1)).is_err());
        assert_eq!(size(&file).unwrap(), large);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(below(&file).is_err());
        file.set_len(4096).unwrap();
        assert!(rename_below(&file, "x").is_err());
        file.write_all_at(&MAGIC, 0).unwrap();
        assert_eq!(below(&file).unwrap(), None);
        // A name as long as can be written, and one in clusters of 512 bytes.
        file.write_all_at(&[0xff; 4], NAME_OFFSET + 4).unwrap();
        assert!(below(&file).is_err());
        file.write_all_at(&500_u64.to_be_bytes(), NAME_OFFSET)
            .unwrap();
        file.write_all_at(&5_u32.to_be_bytes(), NAME_OFFSET + 8)
            .unwrap();
        file.write_all_at(&9_u32.to_be_bytes(), 20).unwrap();
        assert!(rename_below(&file, "something long").is_err());
        rename_below(&file, "short").unwrap();
    }
}
