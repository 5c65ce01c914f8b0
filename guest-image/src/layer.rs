//! A qcow2 image over a disk: what a guest writes goes to it, and the disk stays as it was made.

use std::fs::File;
use std::io;
use std::path::Path;

use imago::file::File as Storage;
use imago::format::builder::FormatCreateBuilder;
use imago::qcow2::Qcow2CreateBuilder;

use crate::file::{FileError, at};

/// Makes an empty image at `path` over the raw image `disk`, which is in the same directory.
///
/// # Errors
///
/// `disk` is not there, or `path` cannot be written.
pub fn make(path: &Path, disk: &Path) -> Result<(), FileError> {
    let size = std::fs::metadata(disk).map_err(at(disk))?.len();
    let below = disk.file_name().and_then(|name| name.to_str());
    let below = below.ok_or(io::ErrorKind::InvalidFilename.into());
    let below = below.map_err(at(disk))?.to_owned();
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path);
    let file = file.map_err(at(path))?;
    let storage = Storage::try_from(file).map_err(at(path))?;
    Qcow2CreateBuilder::<Storage>::new(storage)
        .size(size)
        .backing(below, "raw".into())
        .create()
        .map_err(at(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_names_its_disk_and_has_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, layer) = (dir.path().join("disk.img"), dir.path().join("disk.qcow2"));
        assert!(make(&layer, &disk).is_err(), "there is no disk");
        let raw = File::create(&disk).unwrap();
        raw.set_len(3 << 20).unwrap();
        make(&layer, &disk).unwrap();
        let bytes = std::fs::read(&layer).unwrap();
        // Offsets of QEMU's docs/interop/qcow2.rst.
        assert_eq!(&bytes[..4], b"QFI\xfb");
        assert_eq!(bytes[24..32], (3u64 << 20).to_be_bytes());
        let at = usize::try_from(u64::from_be_bytes(bytes[8..16].try_into().unwrap())).unwrap();
        assert_eq!(&bytes[at..at + 8], b"disk.img");
    }
}
