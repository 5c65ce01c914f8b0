//! FreeBSD's UFS1 and UFS2, read from the on-disk structures (sys/ufs/ffs/fs.h, sys/ufs/ufs/dinode.h,
//! sys/ufs/ufs/dir.h).
//!
//! [`superblock`] says where things are, [`inode`] reads files through their block pointers, this
//! module walks directories and symbolic links. Journals and soft updates only matter to writers.
//! Nothing of an image is trusted: every pointer is checked against the image, every walk ends.

pub mod inode;
pub mod superblock;

use std::rc::Rc;

use super::{BootFs, DirEntry, FileKind, FsError, Slice, Source, Stat};
use inode::{Inode, UfsFile};
use superblock::Superblock;

/// The root directory's inode (UFS_ROOTINO).
const ROOT: u32 = 2;

/// Directories are made of blocks of this size, which no entry crosses (DIRBLKSIZ).
const DIR_BLOCK: usize = 512;

/// A directory larger than this (more than half a million names) is taken for damaged.
const DIR_MAX: u64 = 16 << 20;

/// As many symbolic links are followed (MAXSYMLINKS).
const LINKS_MAX: usize = 32;

/// The longest target of a symbolic link (MAXPATHLEN).
const LINK_MAX: u64 = 1024;

/// A UFS file system.
#[derive(Clone, Debug)]
pub struct Ufs(Rc<Volume>);

/// What every open file needs.
#[derive(Debug)]
pub struct Volume {
    part: Slice,
    sb: Superblock,
}

impl Ufs {
    /// Recognizes a file system by its superblock.
    ///
    /// # Errors
    ///
    /// Reading failed. A superblock that contradicts itself is as good as none.
    pub fn probe(part: &Slice) -> Result<Option<Self>, FsError> {
        let sb = Superblock::find(part)?;
        let part = part.clone();
        Ok(sb.map(|sb| Self(Rc::new(Volume { part, sb }))))
    }

    /// Its superblock.
    pub fn superblock(&self) -> &Superblock {
        &self.0.sb
    }

    fn inode(&self, number: u32) -> Result<Inode, FsError> {
        self.0.inode(number)
    }

    /// Follows a path from the root, through symbolic links.
    fn resolve(&self, path: &str) -> Result<Inode, FsError> {
        let mut parents = Vec::new();
        let mut at = self.inode(ROOT)?;
        // What is left of the path, the next component last.
        let mut left: Vec<Vec<u8>> = components(path.as_bytes());
        let mut links = 0;
        while let Some(name) = left.pop() {
            if at.kind() != FileKind::Directory {
                return Err(FsError::NotDirectory);
            }
            if name == b".." {
                at = parents.pop().unwrap_or(at);
                continue;
            }
            let number = self.look_up(&at, &name)?.ok_or(FsError::NotFound)?;
            let next = self.inode(number)?;
            if next.kind() != FileKind::Symlink {
                parents.push(std::mem::replace(&mut at, next));
                continue;
            }
            links += 1;
            if links > LINKS_MAX {
                return Err(FsError::Loop);
            }
            let target = self.link(next)?;
            if target.first() == Some(&b'/') {
                parents.clear();
                at = self.inode(ROOT)?;
            }
            left.extend(components(&target));
        }
        Ok(at)
    }

    /// The target of a symbolic link: in the inode if it is short.
    fn link(&self, inode: Inode) -> Result<Vec<u8>, FsError> {
        if inode.size > LINK_MAX {
            let text = format!("a symbolic link of {} bytes", inode.size);
            return Err(FsError::Damaged(text));
        }
        if let Some(target) = inode.short_link(&self.0.sb) {
            return Ok(target.to_vec());
        }
        let mut target = vec![0; inode.size as usize];
        self.file(inode).read(0, &mut target)?;
        Ok(target)
    }

    fn file(&self, inode: Inode) -> UfsFile {
        UfsFile::new(self.0.clone(), inode)
    }

    fn look_up(&self, dir: &Inode, name: &[u8]) -> Result<Option<u32>, FsError> {
        let mut found = None;
        self.entries(dir, |entry| {
            if entry.name == name {
                found = Some(entry.inode);
            }
        })?;
        Ok(found)
    }

    /// Calls `each` for the names in a directory.
    fn entries(&self, dir: &Inode, mut each: impl FnMut(Entry<'_>)) -> Result<(), FsError> {
        if dir.size > DIR_MAX {
            let text = format!("a directory of {} bytes", dir.size);
            return Err(FsError::Damaged(text));
        }
        let mut bytes = vec![0; dir.size as usize];
        self.file(dir.clone()).read(0, &mut bytes)?;
        for block in bytes.chunks(DIR_BLOCK) {
            let mut rest = block;
            while !rest.is_empty() {
                let (entry, len) = Entry::parse(rest).ok_or_else(|| {
                    let at = block.len() - rest.len();
                    FsError::Damaged(format!("a bad directory entry at byte {at} of a block"))
                })?;
                if entry.inode != 0 {
                    each(entry);
                }
                rest = &rest[len..];
            }
        }
        Ok(())
    }
}

/// The components of a path, the last one first.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|&byte| byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .map(<[u8]>::to_vec)
        .rev()
        .collect()
}

/// A directory entry (struct direct).
struct Entry<'a> {
    inode: u32,
    kind: u8,
    name: &'a [u8],
}

impl<'a> Entry<'a> {
    /// The entry at the start of `bytes`, and how long it is.
    fn parse(bytes: &'a [u8]) -> Option<(Self, usize)> {
        let (head, names) = bytes.split_first_chunk::<8>()?;
        let [a, b, c, d, low, high, kind, namlen] = *head;
        let len = usize::from(u16::from_le_bytes([low, high]));
        if !len.is_multiple_of(4) || len < head.len() || len > bytes.len() {
            return None;
        }
        let entry = Self {
            inode: u32::from_le_bytes([a, b, c, d]),
            kind,
            name: names[..len - head.len()].get(..usize::from(namlen))?,
        };
        Some((entry, len))
    }

    fn kind(&self) -> FileKind {
        // DT_DIR, DT_REG, DT_LNK.
        match self.kind {
            4 => FileKind::Directory,
            8 => FileKind::File,
            10 => FileKind::Symlink,
            _ => FileKind::Other,
        }
    }
}

impl BootFs for Ufs {
    fn open(&self, path: &str) -> Result<Box<dyn Source>, FsError> {
        let inode = self.resolve(path)?;
        match inode.kind() {
            FileKind::File => Ok(Box::new(self.file(inode))),
            _ => Err(FsError::NotFile),
        }
    }

    fn read_dir(&self, path: &str) -> Result<Vec<DirEntry>, FsError> {
        let dir = self.resolve(path)?;
        if dir.kind() != FileKind::Directory {
            return Err(FsError::NotDirectory);
        }
        let mut entries = Vec::new();
        self.entries(&dir, |entry| {
            if entry.name != b"." && entry.name != b".." {
                entries.push(DirEntry {
                    name: String::from_utf8_lossy(entry.name).into_owned(),
                    kind: entry.kind(),
                });
            }
        })?;
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn stat(&self, path: &str) -> Result<Stat, FsError> {
        let inode = self.resolve(path)?;
        Ok(Stat {
            kind: inode.kind(),
            size: inode.size,
        })
    }
}
