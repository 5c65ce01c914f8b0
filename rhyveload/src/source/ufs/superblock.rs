//! The superblock: where inodes and blocks are.

use std::io;

use crate::source::{Slice, Source};

/// Where a superblock may be, in the order in which FreeBSD looks (SBLOCKSEARCH: UFS2, UFS1, a disk
/// that is nothing else, piggybacked).
const PLACES: [u64; 4] = [65536, 8192, 0, 262144];

/// sizeof(struct fs).
const SIZE: usize = 1376;

const UFS1_MAGIC: u32 = 0x0001_1954;
const UFS2_MAGIC: u32 = 0x1954_0119;

/// Which of the two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 32-bit block pointers, inodes of 128 bytes.
    Ufs1,
    /// 64-bit block pointers, inodes of 256 bytes.
    Ufs2,
}

/// What readers need of a superblock. All sizes are powers of two and fit each other; addresses are
/// counted in fragments.
#[derive(Clone, Debug)]
pub struct Superblock {
    /// The format.
    pub version: Version,
    /// Bytes in a block: 4096 to 65536.
    pub bsize: u64,
    /// Bytes in a fragment.
    pub fsize: u64,
    /// Fragments in a block.
    pub frag: u64,
    /// Inodes in a cylinder group, not 0.
    pub ipg: u64,
    /// Fragments in a cylinder group, not 0.
    pub fpg: u64,
    /// Cylinder groups.
    pub ncg: u64,
    /// First inode block in a cylinder group.
    pub iblkno: u64,
    /// UFS1 shifts each group's data by this much, ...
    pub cgoffset: u64,
    /// ... times the bits of its number that are not in here.
    pub cgmask: u64,
    /// Symbolic links shorter than this are in the inode.
    pub maxsymlinklen: u64,
    /// Where it was found.
    pub place: u64,
}

impl Superblock {
    /// Looks for a superblock wherever one may be.
    ///
    /// # Errors
    ///
    /// Reading failed.
    pub fn find(part: &Slice) -> io::Result<Option<Self>> {
        for place in PLACES {
            if place + SIZE as u64 > part.size() {
                continue;
            }
            let mut bytes = [0; SIZE];
            part.read(place, &mut bytes)?;
            if let Some(sb) = Self::parse(&bytes, place) {
                return Ok(Some(sb));
            }
        }
        Ok(None)
    }

    fn parse(bytes: &[u8; SIZE], place: u64) -> Option<Self> {
        let word = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        // All of these are signed in struct fs, and none may be negative.
        let count = |at: usize| Some(u64::from(word(at).filter(|&n| n <= i32::MAX as u32)?));
        let long = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let version = match word(1372)? {
            // A UFS2 superblock knows where it is: a copy at a UFS1 place is not it.
            UFS2_MAGIC if long(1000)? == place => Version::Ufs2,
            UFS1_MAGIC => Version::Ufs1,
            _ => return None,
        };
        let sb = Self {
            version,
            bsize: count(48)?,
            fsize: count(52)?,
            frag: count(56)?,
            ipg: count(184)?,
            fpg: count(188)?,
            ncg: count(44)?,
            iblkno: count(16)?,
            cgoffset: count(24)?,
            cgmask: word(28)?.into(),
            maxsymlinklen: count(1320)?,
            place,
        };
        let fits = sb.bsize.is_power_of_two()
            && (4096..=65536).contains(&sb.bsize)
            && sb.fsize.is_power_of_two()
            && (512..=sb.bsize).contains(&sb.fsize)
            && sb.frag == sb.bsize / sb.fsize
            && sb.ipg != 0
            && sb.fpg != 0
            && sb.ncg != 0;
        fits.then_some(sb)
    }

    /// Bytes in an inode.
    pub fn inode_size(&self) -> u64 {
        match self.version {
            Version::Ufs1 => 128,
            Version::Ufs2 => 256,
        }
    }

    /// Bytes in a block pointer.
    pub fn pointer_size(&self) -> u64 {
        match self.version {
            Version::Ufs1 => 4,
            Version::Ufs2 => 8,
        }
    }

    /// Where an inode is, in bytes, unless there is no such inode.
    pub fn inode_offset(&self, number: u32) -> Option<u64> {
        let number = u64::from(number);
        let group = number / self.ipg;
        if group >= self.ncg {
            return None;
        }
        let mut start = self.fpg.checked_mul(group)?;
        if self.version == Version::Ufs1 {
            // ~cgmask as a 32-bit word (cgstart).
            let shift = group & (!self.cgmask & 0xffff_ffff);
            start = start.checked_add(self.cgoffset.checked_mul(shift)?)?;
        }
        let index = number % self.ipg;
        let block = start.checked_add(self.iblkno)?.checked_mul(self.fsize)?;
        // Blocks hold a whole number of inodes, one block of them behind the other.
        block.checked_add(index.checked_mul(self.inode_size())?)
    }
}
