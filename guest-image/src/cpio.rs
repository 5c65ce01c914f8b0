//! A cpio archive in the "newc" format, which the kernel unpacks as its initramfs
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Deterministic: entries are sorted by path, owned by root, with times of zero and numbers counted
//! up, so that the same contents give the same bytes.

use std::collections::BTreeMap;

/// An archive in the making.
#[derive(Clone, Debug, Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

/// A file, directory, link or device.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Type and permissions, as stat(2) has them.
    pub mode: u32,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// What is in a file, or where a link leads.
    pub data: Vec<u8>,
}

// File types in the upper bits of the mode (stat(2)).
pub(crate) const S_IFMT: u32 = 0o170_000;
pub(crate) const S_IFLNK: u32 = 0o120_000;
pub(crate) const S_IFREG: u32 = 0o100_000;
pub(crate) const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;

impl Archive {
    /// Adds a directory.
    pub fn dir(&mut self, path: &str) {
        self.add(path, S_IFDIR | 0o755, (0, 0), Vec::new());
    }

    /// Adds a directory; `mode` holds the permission bits.
    pub fn dir_with_mode(&mut self, path: &str, mode: u32) {
        self.add(path, S_IFDIR | mode, (0, 0), Vec::new());
    }

    /// Adds a file; `mode` holds the permission bits.
    pub fn file(&mut self, path: &str, mode: u32, data: impl Into<Vec<u8>>) {
        self.add(path, S_IFREG | mode, (0, 0), data.into());
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.add(path, S_IFLNK | 0o777, (0, 0), target.into());
    }

    /// Adds a character device.
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.add(path, S_IFCHR | mode, (major, minor), Vec::new());
    }

    /// Adds an entry, and the directories above it that are missing: the kernel does not make them.
    fn add(&mut self, path: &str, mode: u32, device: (u32, u32), data: Vec<u8>) {
        if let Some((above, _)) = path.rsplit_once('/')
            && !self.entries.contains_key(above)
        {
            self.dir(above);
        }
        self.entries
            .insert(path.to_owned(), Entry { mode, device, data });
    }

    /// The paths, sorted.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The entries, sorted by path.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries
            .iter()
            .map(|(path, entry)| (path.as_str(), entry))
    }

    /// The archive's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (inode, (path, entry)) in (1..).zip(&self.entries) {
            append(&mut out, inode, path, entry);
        }
        let trailer = Entry {
            mode: 0,
            device: (0, 0),
            data: Vec::new(),
        };
        append(&mut out, 0, "TRAILER!!!", &trailer);
        out
    }
}

/// Appends a header of 13 fields of 8 hexadecimal digits, the name with its zero byte and the data,
/// each padded to 4 bytes.
fn append(out: &mut Vec<u8>, inode: u32, path: &str, entry: &Entry) {
    let links = if entry.mode & S_IFMT == S_IFDIR { 2 } else { 1 };
    // An archive member is at most 4 GiB - 1; what we pack are programs and modules.
    let size = u32::try_from(entry.data.len()).unwrap_or(u32::MAX);
    let name_size = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
    let (major, minor) = entry.device;
    let header = [
        inode, entry.mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0,
    ];
    out.extend_from_slice(b"070701");
    for field in header {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(&entry.data);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_independent_reader_finds_what_was_packed() {
        let mut archive = Archive::default();
        archive.file("init", 0o755, "#!/bin/sh\n");
        archive.file("bin/tool", 0o755, [7_u8; 5]);
        archive.symlink("bin/sh", "busybox");
        archive.char_device("dev/console", 0o600, 5, 1);
        let bytes = archive.to_bytes();
        assert_eq!(bytes, archive.clone().to_bytes());

        let mut found = Vec::new();
        let mut rest = bytes.as_slice();
        loop {
            let mut reader = cpio::newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let mut data = Vec::new();
            std::io::Read::read_to_end(&mut reader, &mut data).unwrap();
            let entry = reader.entry();
            found.push((
                entry.name().to_owned(),
                entry.mode(),
                data,
                entry.rdev_minor(),
            ));
            rest = reader.finish().unwrap();
        }
        let expected = [
            ("bin", 0o040_755, vec![], 0),
            ("bin/sh", 0o120_777, b"busybox".to_vec(), 0),
            ("bin/tool", 0o100_755, vec![7; 5], 0),
            ("dev", 0o040_755, vec![], 0),
            ("dev/console", 0o020_600, vec![], 1),
            ("init", 0o100_755, b"#!/bin/sh\n".to_vec(), 0),
        ];
        assert_eq!(
            found,
            expected.map(|(name, mode, data, minor)| (name.to_owned(), mode, data, minor))
        );
    }
}
