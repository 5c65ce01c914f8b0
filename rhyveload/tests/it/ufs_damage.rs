//! UFS images that lie, lie by lie: each is an error that says which, and the rest can be read.

use std::rc::Rc;

use rhyveload::source::ufs::Ufs;
use rhyveload::source::{BootFs, FsError, Slice};

use crate::ufs_files::{BLOCK, FRAGMENT, Image, Pointers, small};

fn open(image: &Image) -> Ufs {
    let len = image.len();
    let bytes = Rc::new(image.bytes());
    Ufs::probe(&Slice::new(bytes, 0, len)).unwrap().unwrap()
}

fn failure<T>(result: Result<T, FsError>) -> String {
    let error = result.err().unwrap();
    let source = std::error::Error::source(&error);
    format!(
        "{error} {}",
        source.map(ToString::to_string).unwrap_or_default()
    )
}

#[test]
fn directory_entries_of_no_or_of_wrong_length_are_errors() {
    for ufs1 in [false, true] {
        // Of no length, of less than an entry's head, of an odd one, of more than is left.
        for len in [0u16, 4, 13, 1024] {
            let mut image = small(ufs1, 8192);
            let mut bytes = vec![0; FRAGMENT as usize];
            bytes[..4].copy_from_slice(&4u32.to_le_bytes());
            bytes[4..6].copy_from_slice(&len.to_le_bytes());
            bytes[6..14].copy_from_slice(b"\x08\x05hello\0");
            let address = image.block(&bytes);
            image.inode(2, 0o040755, FRAGMENT, &Pointers::first(address));
            let fs = open(&image);
            for text in [failure(fs.read_dir("")), failure(fs.open("hello"))] {
                let wanted = "a bad directory entry at byte 0 of a block";
                assert!(text.contains(wanted), "{ufs1} {len}: {text}");
            }
        }
        // A name that is longer than its entry.
        let mut image = small(ufs1, 8192);
        let mut bytes = vec![0; FRAGMENT as usize];
        bytes[..8].copy_from_slice(&[4, 0, 0, 0, 12, 0, 8, 200]);
        let address = image.block(&bytes);
        image.inode(2, 0o040755, FRAGMENT, &Pointers::first(address));
        assert!(failure(open(&image).read_dir("")).contains("a bad directory entry"));
    }
}

#[test]
fn pointers_out_of_the_image_are_errors_where_they_are_followed() {
    for ufs1 in [false, true] {
        let behind = if ufs1 { 0x7fff_ffff } else { u64::MAX };
        let mut image = small(ufs1, 8192);
        image.inode(4, 0o100644, 5, &Pointers::first(behind));
        let pointers = Pointers {
            direct: [0; 12],
            indirect: [behind, behind, behind],
        };
        image.inode(6, 0o100644, 16 * BLOCK, &pointers);
        let fs = open(&image);
        let text = failure(fs.read_file("hello", 9));
        assert!(
            text.contains("a block pointer outside of the image"),
            "{text}"
        );
        let far = fs.open("far").unwrap();
        // Its holes are read, what is behind the pointers is not.
        far.read(0, &mut [1; 100]).unwrap();
        let error = far.read(12 * BLOCK, &mut [1; 100]).unwrap_err();
        assert!(
            error.to_string().contains("outside of the image"),
            "{error}"
        );
        // A name without an inode of its own.
        image.root(&[(".", 2, 4), ("none", 1 << 30, 8), ("zero", 0, 8)]);
        let fs = open(&image);
        assert!(fs.open("none").is_err());
        assert!(matches!(fs.open("zero"), Err(FsError::NotFound)));
        assert_eq!(fs.read_dir("").unwrap().len(), 1);
    }
}
