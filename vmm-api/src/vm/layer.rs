//! qcow2 images that hold what a copy of a machine writes to its disk, over a file that stays as it is.
//!
//! imago makes such an image, and rhyve reads and writes its sectors by it. What is here besides looks
//! into the header, and gives the file below another name (QEMU's docs/interop/qcow2.rst, version 3);
//! numbers are big endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use imago::file::File as Storage;
use imago::format::builder::FormatCreateBuilder;
use imago::qcow2::Qcow2CreateBuilder;

use crate::state::DiskFormat;

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Longest name, in bytes.
const NAME_MAX: usize = 1023;

// Fields of the header.
const NAME_OFFSET: u64 = 8;
const SIZE: u64 = 24;

/// Makes an empty file an image of `size` bytes over the file `below`, a name relative to its own
/// directory.
pub(super) fn make(file: &File, size: u64, below: &str, format: DiskFormat) -> io::Result<()> {
    let format = match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    };
    Qcow2CreateBuilder::<Storage>::new(Storage::try_from(file.try_clone()?)?)
        .size(size)
        .backing(below.to_owned(), format.to_owned())
        .create()
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
        let large = (4 << 40) + 512;
        make(&file, large, "disk.base", DiskFormat::Qcow2).unwrap();
        assert_eq!(size(&file).unwrap(), large);
        assert_eq!(below(&file).unwrap().as_deref(), Some("disk.base"));
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
