//! Inodes, and files read through their block pointers.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use super::superblock::{Superblock, Version};
use super::{FsError, Volume};
use crate::source::{FileKind, Source};

/// Pointers to data blocks in an inode (UFS_NDADDR).
const DIRECT: usize = 12;

/// Pointers to blocks of pointers: single, double and triple indirect (UFS_NIADDR).
const INDIRECT: usize = 3;

/// An inode's fields that readers need.
#[derive(Clone, Debug)]
pub struct Inode {
    mode: u16,
    /// Length in bytes.
    pub size: u64,
    direct: [u64; DIRECT],
    indirect: [u64; INDIRECT],
    /// The pointers as they are on the disk: a short symbolic link's target is there.
    inline: Vec<u8>,
}

impl Volume {
    /// Reads an inode.
    pub(super) fn inode(&self, number: u32) -> Result<Inode, FsError> {
        let damaged = || FsError::Damaged(format!("inode {number} is not in the image"));
        let offset = self.sb.inode_offset(number).ok_or_else(damaged)?;
        let mut bytes = [0; 256];
        let bytes = &mut bytes[..self.sb.inode_size() as usize];
        self.part.read(offset, bytes).map_err(|_| damaged())?;
        Ok(Inode::parse(bytes, self.sb.version))
    }
}

impl Inode {
    /// Every read of `bytes` is inside of the 128 or 256 bytes of a dinode.
    fn parse(bytes: &[u8], version: Version) -> Self {
        let (size, inline) = match version {
            Version::Ufs1 => (8, 40..100),
            Version::Ufs2 => (16, 112..232),
        };
        let inline = bytes[inline].to_vec();
        let pointers: Vec<u64> = match version {
            Version::Ufs1 => words(&inline, u32::from_le_bytes).map(u64::from).collect(),
            Version::Ufs2 => words(&inline, u64::from_le_bytes).collect(),
        };
        let mut direct = [0; DIRECT];
        let mut indirect = [0; INDIRECT];
        direct.copy_from_slice(&pointers[..DIRECT]);
        indirect.copy_from_slice(&pointers[DIRECT..]);
        Self {
            mode: u16::from_le_bytes([bytes[0], bytes[1]]),
            size: words(&bytes[size..size + 8], u64::from_le_bytes).sum(),
            direct,
            indirect,
            inline,
        }
    }

    /// What it is: IFMT of the mode.
    pub fn kind(&self) -> FileKind {
        match self.mode & 0o170000 {
            0o040000 => FileKind::Directory,
            0o100000 => FileKind::File,
            0o120000 => FileKind::Symlink,
            _ => FileKind::Other,
        }
    }

    /// The target of a symbolic link that is short enough to be in the inode.
    pub(super) fn short_link(&self, sb: &Superblock) -> Option<&[u8]> {
        if self.size >= sb.maxsymlinklen {
            return None;
        }
        self.inline.get(..usize::try_from(self.size).ok()?)
    }
}

fn words<const N: usize, T>(bytes: &[u8], read: fn([u8; N]) -> T) -> impl Iterator<Item = T> {
    bytes.as_chunks::<N>().0.iter().map(move |word| read(*word))
}

/// A block of pointers.
#[derive(Debug)]
struct Pointers {
    /// Where it is, in fragments.
    address: u64,
    bytes: Vec<u8>,
}

/// An open file.
#[derive(Debug)]
pub struct UfsFile {
    volume: Rc<Volume>,
    inode: Inode,
    /// The block of pointers last read at each depth.
    pointers: RefCell<[Option<Pointers>; INDIRECT]>,
}

impl UfsFile {
    pub(super) fn new(volume: Rc<Volume>, inode: Inode) -> Self {
        Self {
            volume,
            inode,
            pointers: RefCell::default(),
        }
    }

    /// The address of a file's block, in fragments; 0 is a hole.
    fn block(&self, number: u64) -> io::Result<u64> {
        if let Some(direct) = usize::try_from(number).ok().filter(|&n| n < DIRECT) {
            return Ok(self.inode.direct[direct]);
        }
        let sb = &self.volume.sb;
        // At most 16384: three levels of them fit in 42 bits.
        let per_block = sb.bsize / sb.pointer_size();
        let mut left = number - DIRECT as u64;
        let mut span = 1;
        for level in 0..INDIRECT {
            span *= per_block;
            if left >= span {
                left -= span;
                continue;
            }
            let mut address = self.inode.indirect[level];
            for depth in (0..=level).rev() {
                if address == 0 {
                    break;
                }
                span /= per_block;
                address = self.pointer(depth, address, left / span)?;
                left %= span;
            }
            return Ok(address);
        }
        Err(damaged("a file larger than its block pointers reach"))
    }

    /// The pointer at `index` in the block of pointers at `address`.
    fn pointer(&self, depth: usize, address: u64, index: u64) -> io::Result<u64> {
        let sb = &self.volume.sb;
        let mut cache = self.pointers.borrow_mut();
        let cached = &mut cache[depth];
        if cached.as_ref().is_none_or(|of| of.address != address) {
            let mut bytes = vec![0; sb.bsize as usize];
            self.read_at(address, 0, &mut bytes)?;
            *cached = Some(Pointers { address, bytes });
        }
        let bytes = cached.as_ref().map_or(&[][..], |of| &of.bytes);
        let at = index * sb.pointer_size();
        let found = bytes.get(at as usize..(at + sb.pointer_size()) as usize);
        found
            .map(|bytes| match *bytes {
                [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).into(),
                ref long => words(long, u64::from_le_bytes).sum(),
            })
            .ok_or_else(|| damaged("a block pointer outside of its block"))
    }

    /// Reads from `offset` bytes into what begins at a fragment.
    fn read_at(&self, address: u64, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let start = address.checked_mul(self.volume.sb.fsize);
        let start = start.and_then(|start| start.checked_add(offset));
        let part = &self.volume.part;
        let end = start.and_then(|start| start.checked_add(bytes.len() as u64));
        match start.filter(|_| end.is_some_and(|end| end <= part.size())) {
            Some(start) => part.read(start, bytes),
            None => Err(damaged("a block pointer outside of the image")),
        }
    }

    /// Reads as much as lies in one piece at `offset`, and says how much that was.
    fn read_run(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        let sb = &self.volume.sb;
        let first = self.block(offset / sb.bsize)?;
        let within = offset % sb.bsize;
        let mut run = sb.bsize - within;
        let mut next = offset / sb.bsize;
        let mut address = first;
        while run < bytes.len() as u64 {
            next += 1;
            address = match address {
                0 => 0,
                before => before.saturating_add(sb.frag),
            };
            if self.block(next)? != address {
                break;
            }
            run += sb.bsize;
        }
        let len = usize::try_from(run).map_or(bytes.len(), |run| run.min(bytes.len()));
        match first {
            0 => bytes[..len].fill(0),
            _ => self.read_at(first, within, &mut bytes[..len])?,
        }
        Ok(len)
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl Source for UfsFile {
    fn size(&self) -> u64 {
        self.inode.size
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.inode.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        while done < bytes.len() {
            done += self.read_run(offset + done as u64, &mut bytes[done..])?;
        }
        Ok(())
    }
}
