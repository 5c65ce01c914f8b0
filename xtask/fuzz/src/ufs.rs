//! UFS: whatever an image says, every walk through it ends, and nothing is read from outside of it.

use std::rc::Rc;

use rhyveload::source::ufs::Ufs;
use rhyveload::source::{BootFs, FileKind, Slice};

use crate::ufs_files::small;

/// Of a file so many bytes are read, at its beginning and at its end.
const PIECE: u64 = 8192;

/// The bytes are an image. True if its root directory can be read.
///
/// # Panics
///
/// A name in a listing is longer than names can be.
pub fn check(data: &[u8]) -> bool {
    let len = data.len() as u64;
    let image = Slice::new(Rc::new(data.to_vec()), 0, len);
    let Ok(Some(fs)) = Ufs::probe(&image) else {
        return false;
    };
    let readable = walk(&fs, "", 2);
    let _ = fs.read_file("/hello", PIECE);
    let _ = fs.stat("/link/../long");
    readable
}

/// Reads what is below a directory, a piece of each file. True if the directory can be read.
pub(crate) fn walk(fs: &dyn BootFs, path: &str, depth: usize) -> bool {
    let Ok(entries) = fs.read_dir(path) else {
        return false;
    };
    for entry in entries.iter().take(16) {
        // What is no UTF-8 may be three times as long when it is replaced.
        assert!(entry.name.len() <= 3 * 255);
        let path = format!("{path}/{}", entry.name);
        if let Ok(file) = fs.open(&path) {
            let len = file.size().min(PIECE);
            let mut bytes = vec![0; len as usize];
            let _ = file.read(0, &mut bytes);
            let _ = file.read(file.size() - len, &mut bytes);
        }
        if depth > 0 && entry.kind != FileKind::File {
            walk(fs, &path, depth - 1);
        }
    }
    true
}

/// UFS1 and UFS2, with their superblocks in front.
pub fn seeds() -> Vec<Vec<u8>> {
    let of = |ufs1, place| small(ufs1, place).bytes();
    vec![of(true, 8192), of(false, 8192), of(false, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_read() {
        assert!(seeds().iter().all(|seed| check(seed)));
    }
}
