//! Makes small UFS images, with the superblock in any of its places.

use std::collections::BTreeMap;

/// Bytes in a block, and in a fragment.
pub const BLOCK: u64 = 4096;
pub const FRAGMENT: u64 = 512;

/// Blocks of an image that are not all zeros, by their first byte.
#[derive(Clone, Debug, Default)]
pub struct Image {
    pub ufs1: bool,
    blocks: BTreeMap<u64, Vec<u8>>,
    /// The next free block.
    next: u64,
    superblock: u64,
    /// The block where the inodes begin; there are two of them.
    inodes: u64,
}

/// What the inode of a file points to.
pub struct Pointers {
    pub direct: [u64; 12],
    pub indirect: [u64; 3],
}

impl Image {
    /// An image with a superblock at `place`, inodes behind it, and nothing else.
    pub fn new(ufs1: bool, place: u64) -> Self {
        let inodes = place / BLOCK + 1;
        let mut image = Self {
            ufs1,
            blocks: BTreeMap::new(),
            next: inodes + 2,
            superblock: place,
            inodes,
        };
        let mut sb = vec![0; 1376];
        let mut put = |at: usize, value: u32| {
            sb[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        for (at, value) in [
            (16, inodes * BLOCK / FRAGMENT),
            (28, 0xffff_ffff),
            (44, 1),
            (48, BLOCK),
            (52, FRAGMENT),
            (56, BLOCK / FRAGMENT),
            (184, 32),
            (188, 1 << 30),
            (1000, place),
            (1320, if ufs1 { 60 } else { 120 }),
            (1372, if ufs1 { 0x01_1954 } else { 0x1954_0119 }),
        ] {
            put(at, value as u32);
        }
        image.put(place, &sb);
        image
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            let at = at + index as u64;
            let block = self.blocks.entry(at / BLOCK).or_default();
            block.resize(BLOCK as usize, 0);
            block[(at % BLOCK) as usize] = *byte;
        }
    }

    /// A new block with these bytes; its address in fragments.
    pub fn block(&mut self, bytes: &[u8]) -> u64 {
        let number = self.next;
        self.next += 1;
        self.put(number * BLOCK, bytes);
        number * (BLOCK / FRAGMENT)
    }

    /// A new block of pointers, one of them set.
    pub fn pointers(&mut self, index: u64, to: u64) -> u64 {
        let len = if self.ufs1 { 4 } else { 8 };
        let mut bytes = vec![0; BLOCK as usize];
        let at = (index * len) as usize;
        bytes[at..at + len as usize].copy_from_slice(&to.to_le_bytes()[..len as usize]);
        self.block(&bytes)
    }

    /// Sets an inode.
    pub fn inode(&mut self, number: u64, mode: u16, size: u64, pointers: &Pointers) {
        let (len, size_at, at) = if self.ufs1 {
            (128, 8, 40)
        } else {
            (256, 16, 112)
        };
        let mut bytes = vec![0; len];
        bytes[..2].copy_from_slice(&mode.to_le_bytes());
        bytes[size_at..size_at + 8].copy_from_slice(&size.to_le_bytes());
        let word = if self.ufs1 { 4 } else { 8 };
        let all = pointers.direct.iter().chain(&pointers.indirect);
        for (index, pointer) in all.enumerate() {
            let at = at + word * index;
            bytes[at..at + word].copy_from_slice(&pointer.to_le_bytes()[..word]);
        }
        self.put(self.inodes * BLOCK + number * len as u64, &bytes);
    }

    /// Makes the root directory of these names.
    pub fn root(&mut self, names: &[(&str, u32, u8)]) {
        let mut bytes = Vec::new();
        for (name, inode, kind) in names {
            let len = (8 + name.len() + 1).next_multiple_of(4);
            bytes.extend_from_slice(&inode.to_le_bytes());
            bytes.extend_from_slice(&(len as u16).to_le_bytes());
            bytes.extend_from_slice(&[*kind, name.len() as u8]);
            bytes.extend_from_slice(name.as_bytes());
            bytes.resize(bytes.len() + len - 8 - name.len(), 0);
        }
        // The last entry reaches to the end of the directory's block.
        let last = names
            .last()
            .map_or(0, |(name, ..)| (8 + name.len() + 1).next_multiple_of(4));
        let at = bytes.len() - last;
        let room = (FRAGMENT as usize - at) as u16;
        bytes[at + 4..at + 6].copy_from_slice(&room.to_le_bytes());
        let address = self.block(&bytes);
        self.inode(2, 0o040755, FRAGMENT, &Pointers::first(address));
    }

    /// A file or symbolic link in one block.
    pub fn file(&mut self, inode: u64, mode: u16, bytes: &[u8]) {
        let address = self.block(bytes);
        self.inode(inode, mode, bytes.len() as u64, &Pointers::first(address));
    }

    /// The block that holds this byte, if it is not all zeros.
    pub fn at(&self, at: u64) -> Option<&[u8]> {
        self.blocks.get(&(at / BLOCK)).map(Vec::as_slice)
    }

    /// Bytes of the image.
    pub fn len(&self) -> u64 {
        self.next.max(self.superblock / BLOCK + 1) * BLOCK
    }

    /// The whole image.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len() as usize];
        for (number, block) in &self.blocks {
            let at = (number * BLOCK) as usize;
            bytes[at..at + block.len()].copy_from_slice(block);
        }
        bytes
    }
}

impl Pointers {
    /// Only the first block.
    pub fn first(address: u64) -> Self {
        let mut direct = [0; 12];
        direct[0] = address;
        Self {
            direct,
            indirect: [0; 3],
        }
    }
}

/// An image with a root directory, a file, a link to it, and a file of several blocks.
pub fn small(ufs1: bool, place: u64) -> Image {
    let mut image = Image::new(ufs1, place);
    image.root(&[
        (".", 2, 4),
        ("..", 2, 4),
        ("hello", 4, 8),
        ("link", 5, 10),
        ("far", 6, 8),
        ("long", 7, 10),
    ]);
    image.file(4, 0o100644, b"hello");
    let target = |text: &[u8]| {
        let mut bytes = [0; 120];
        bytes[..text.len()].copy_from_slice(text);
        let word = if ufs1 { 4 } else { 8 };
        let pointer = |index: usize| {
            let mut value = [0; 8];
            value[..word].copy_from_slice(&bytes[word * index..word * (index + 1)]);
            u64::from_le_bytes(value)
        };
        Pointers {
            direct: std::array::from_fn(pointer),
            indirect: std::array::from_fn(|index| pointer(12 + index)),
        }
    };
    image.inode(5, 0o120755, 6, &target(b"/hello"));
    image.file(7, 0o120755, &[b"/".repeat(200), b"hello".to_vec()].concat());
    let data = image.block(&[7; BLOCK as usize]);
    let single = image.pointers(3, data);
    let indirect = [single, 0, 0];
    let pointers = Pointers {
        direct: [0; 12],
        indirect,
    };
    image.inode(6, 0o100644, 16 * BLOCK - 1, &pointers);
    image
}
