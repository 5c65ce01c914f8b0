//! FAT12, FAT16 and FAT32 with long names (Microsoft, FAT: General Overview of On-Disk Format, 1.03).
//!
//! The boot sector says where the table and the data are; a file is a chain of clusters through the
//! table, a directory such a file of 32-byte entries. The `fatfs` crate is not used: it trusts cluster
//! numbers, and walks a chain that bites its own tail for ever.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

use super::{BootFs, DirEntry, FileKind, FsError, Slice, Source, Stat};

/// Bytes of a directory entry.
const ENTRY: usize = 32;

/// A directory may have 65536 entries.
const DIR_MAX: u64 = 65536 * ENTRY as u64;

/// Bytes of the table that are read at once.
const WINDOW: u64 = 4096;

/// Attributes of an entry.
const VOLUME: u8 = 0x08;
const DIRECTORY: u8 = 0x10;
const LONG: u8 = 0x0f;

/// How many bits an entry of the table has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// Up to 4084 clusters.
    Fat12,
    /// Up to 65524 clusters.
    Fat16,
    /// More.
    Fat32,
}

/// A FAT file system.
#[derive(Clone, Debug)]
pub struct Fat(Rc<Volume>);

#[derive(Debug)]
struct Volume {
    part: Slice,
    width: Width,
    /// Bytes in a cluster.
    cluster: u64,
    /// Where the table begins.
    table: u64,
    /// Where cluster 2 begins.
    data: u64,
    /// Clusters, which are counted from 2.
    clusters: u32,
    root: Root,
    /// A piece of the table, and where it begins.
    window: RefCell<(u64, Vec<u8>)>,
}

#[derive(Clone, Copy, Debug)]
enum Root {
    /// Of fixed length, before the data: FAT12 and FAT16.
    Fixed { start: u64, len: u64 },
    /// A chain of clusters: FAT32.
    Chain(u32),
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let word = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
    word.copied().map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
    word.copied().map_or(0, u32::from_le_bytes)
}

fn damaged(what: &str) -> FsError {
    FsError::Damaged(what.to_owned())
}

impl Fat {
    /// Recognizes a file system by its boot sector, which has no magic number: every field must fit.
    ///
    /// # Errors
    ///
    /// Reading failed.
    pub fn probe(part: &Slice) -> Result<Option<Self>, FsError> {
        if part.size() < 512 {
            return Ok(None);
        }
        let mut boot = [0; 512];
        part.read(0, &mut boot)?;
        let volume = Volume::parse(part.clone(), &boot);
        Ok(volume.map(|volume| Self(Rc::new(volume))))
    }

    /// How wide its table is.
    pub fn width(&self) -> Width {
        self.0.width
    }

    fn root(&self) -> Node {
        Node {
            name: String::new(),
            directory: true,
            size: 0,
            first: match self.0.root {
                Root::Fixed { .. } => 0,
                Root::Chain(first) => first,
            },
        }
    }

    fn resolve(&self, path: &str) -> Result<Node, FsError> {
        let mut parents = Vec::new();
        let mut at = self.root();
        for name in path.split('/').filter(|name| !matches!(*name, "" | ".")) {
            if !at.directory {
                return Err(FsError::NotDirectory);
            }
            if name == ".." {
                at = parents.pop().unwrap_or_else(|| self.root());
                continue;
            }
            let wanted = name.to_lowercase();
            let mut nodes = self.0.entries(&at)?.into_iter();
            let found = nodes.find(|node| node.name.to_lowercase() == wanted);
            let found = found.ok_or(FsError::NotFound)?;
            parents.push(std::mem::replace(&mut at, found));
        }
        Ok(at)
    }
}

impl Volume {
    fn parse(part: Slice, boot: &[u8; 512]) -> Option<Self> {
        let sector = u64::from(u16_at(boot, 11));
        let per_cluster = u64::from(boot[13]);
        let reserved = u64::from(u16_at(boot, 14));
        let tables = u64::from(boot[16]);
        let root_entries = u64::from(u16_at(boot, 17));
        let sectors = match u16_at(boot, 19) {
            0 => u64::from(u32_at(boot, 32)),
            short => u64::from(short),
        };
        let per_table = match u16_at(boot, 22) {
            0 => u64::from(u32_at(boot, 36)),
            short => u64::from(short),
        };
        let fits = u16_at(boot, 510) == 0xaa55
            && matches!(boot[0], 0xeb | 0xe9)
            && matches!(sector, 512 | 1024 | 2048 | 4096)
            && per_cluster.is_power_of_two()
            && (1..=2).contains(&tables)
            && (boot[21] == 0xf0 || boot[21] >= 0xf8)
            && reserved != 0
            && per_table != 0;
        if !fits {
            return None;
        }
        // None of these has more than 45 bits.
        let root = reserved + tables * per_table;
        let data = root + (root_entries * ENTRY as u64).div_ceil(sector);
        let clusters = u32::try_from(sectors.checked_sub(data)? / per_cluster).ok()?;
        // The specification's own limits; nothing else tells the three apart.
        let width = match clusters {
            0 => return None,
            1..=4084 => Width::Fat12,
            4085..=65524 => Width::Fat16,
            65525..=0x0fff_fff5 => Width::Fat32,
            _ => return None,
        };
        let root = match width {
            Width::Fat32 if root_entries != 0 => return None,
            Width::Fat32 => Root::Chain(u32_at(boot, 44)),
            _ if root_entries == 0 => return None,
            _ => Root::Fixed {
                start: root * sector,
                len: root_entries * ENTRY as u64,
            },
        };
        Some(Self {
            part,
            width,
            cluster: per_cluster * sector,
            table: reserved * sector,
            data: data * sector,
            clusters,
            root,
            window: RefCell::default(),
        })
    }

    /// Where a cluster begins, if there is such a one.
    fn offset(&self, cluster: u32) -> io::Result<u64> {
        let index = cluster.checked_sub(2).filter(|&n| n < self.clusters);
        let index = index.ok_or_else(|| bad("a cluster outside of the file system"))?;
        Ok(self.data + u64::from(index) * self.cluster)
    }

    /// The cluster that follows in a chain.
    fn next(&self, cluster: u32) -> io::Result<Option<u32>> {
        let number = u64::from(cluster);
        let value = match self.width {
            Width::Fat12 => {
                let pair = self.entry(number + number / 2, 2)?;
                (pair >> (4 * (number % 2))) & 0xfff
            }
            Width::Fat16 => self.entry(number * 2, 2)?,
            Width::Fat32 => self.entry(number * 4, 4)? & 0x0fff_ffff,
        };
        let end = match self.width {
            Width::Fat12 => 0xff8,
            Width::Fat16 => 0xfff8,
            Width::Fat32 => 0x0fff_fff8,
        };
        Ok((value < end).then_some(value))
    }

    /// `len` bytes of the table, as a number.
    fn entry(&self, at: u64, len: usize) -> io::Result<u32> {
        let mut window = self.window.borrow_mut();
        let within = |window: &(u64, Vec<u8>)| {
            let from = usize::try_from(at.checked_sub(window.0)?).ok()?;
            let bytes = window.1.get(from..from.checked_add(len)?)?;
            let number = bytes.iter().rev();
            Some(number.fold(0, |number, &byte| number << 8 | u32::from(byte)))
        };
        if let Some(number) = within(&window) {
            return Ok(number);
        }
        // An entry of 12 bits may lie across two windows: one begins where the entry does.
        let start = self.table + at;
        let room = self.part.size().saturating_sub(start).min(WINDOW);
        let mut bytes = vec![0; room as usize];
        self.part.read(start, &mut bytes)?;
        *window = (at, bytes);
        within(&window).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// The bytes of a directory.
    fn directory(&self, node: &Node) -> Result<Vec<u8>, FsError> {
        let mut bytes = Vec::new();
        if let (Root::Fixed { start, len }, 0) = (self.root, node.first) {
            bytes.resize(len as usize, 0);
            self.part.read(start, &mut bytes)?;
            return Ok(bytes);
        }
        let mut next = Some(node.first);
        while let Some(cluster) = next {
            let from = bytes.len();
            if from as u64 + self.cluster > DIR_MAX.max(self.cluster) {
                return Err(damaged("a directory without end"));
            }
            bytes.resize(from + self.cluster as usize, 0);
            self.part.read(self.offset(cluster)?, &mut bytes[from..])?;
            next = self.next(cluster)?;
        }
        Ok(bytes)
    }

    fn entries(&self, node: &Node) -> Result<Vec<Node>, FsError> {
        let bytes = self.directory(node)?;
        let mut nodes = Vec::new();
        let mut long = LongName::default();
        for entry in bytes.as_chunks::<ENTRY>().0 {
            match (entry[0], entry[11]) {
                (0, _) => break,
                (0xe5, _) => long = LongName::default(),
                (_, attributes) if attributes & 0x3f == LONG => long.add(entry),
                (_, attributes) if attributes & VOLUME != 0 => long = LongName::default(),
                _ => nodes.push(Node::new(entry, std::mem::take(&mut long), self.width)),
            }
        }
        nodes.retain(|node| !matches!(node.name.as_str(), "." | ".."));
        Ok(nodes)
    }
}

/// What an entry of a directory describes.
#[derive(Debug)]
struct Node {
    name: String,
    directory: bool,
    size: u64,
    /// First cluster; 0 for an empty file and for the root directory.
    first: u32,
}

impl Node {
    fn new(entry: &[u8; ENTRY], long: LongName, width: Width) -> Self {
        let high = match width {
            Width::Fat32 => u32::from(u16_at(entry, 20)) << 16,
            _ => 0,
        };
        Self {
            name: long.of(entry).unwrap_or_else(|| short_name(entry)),
            directory: entry[11] & DIRECTORY != 0,
            size: u32_at(entry, 28).into(),
            first: high | u32::from(u16_at(entry, 26)),
        }
    }
}

/// `NAME.EXT` of an entry, small where Windows NT's flags say so. Other letters than ASCII's depend
/// on a code page that nothing names.
fn short_name(entry: &[u8; ENTRY]) -> String {
    let part = |bytes: &[u8], small: bool| {
        let text = bytes.trim_ascii_end().iter();
        let text = text.map(|&byte| match byte {
            0x05 => '\u{fffd}',
            byte if byte.is_ascii() && small => char::from(byte.to_ascii_lowercase()),
            byte if byte.is_ascii() => char::from(byte),
            _ => '\u{fffd}',
        });
        text.collect::<String>()
    };
    let name = part(&entry[..8], entry[12] & 0x08 != 0);
    match part(&entry[8..11], entry[12] & 0x10 != 0) {
        extension if extension.is_empty() => name,
        extension => format!("{name}.{extension}"),
    }
}

/// A long name while its entries are read: they come before the short one, the last part first.
#[derive(Debug, Default)]
struct LongName {
    /// Number of the part that was read last, from 1.
    number: u8,
    sum: u8,
    units: Vec<u16>,
}

impl LongName {
    fn add(&mut self, entry: &[u8; ENTRY]) {
        let number = entry[0] & 0x1f;
        if entry[0] & 0x40 != 0 {
            *self = Self {
                number: number + 1,
                sum: entry[13],
                units: Vec::new(),
            };
        }
        if number + 1 != self.number || entry[13] != self.sum {
            *self = Self::default();
            return;
        }
        self.number = number;
        let places = [1..11, 14..26, 28..32];
        let bytes = places.into_iter().flat_map(|range| &entry[range]);
        let bytes: Vec<u8> = bytes.copied().collect();
        let units = bytes.as_chunks::<2>().0.iter();
        let units = units.map(|unit| u16::from_le_bytes(*unit));
        let units = units.take_while(|&unit| unit != 0);
        self.units.splice(0..0, units);
    }

    /// The name, if it is whole and belongs to this entry.
    fn of(self, entry: &[u8; ENTRY]) -> Option<String> {
        let sum = entry[..11].iter();
        let sum = sum.fold(0u8, |sum, &byte| sum.rotate_right(1).wrapping_add(byte));
        let whole = self.number == 1 && self.sum == sum && !self.units.is_empty();
        whole.then(|| String::from_utf16_lossy(&self.units))
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// An open file.
#[derive(Debug)]
struct FatFile {
    volume: Rc<Volume>,
    first: u32,
    size: u64,
    /// A cluster of the chain, and its place there: chains are not walked from the start each time.
    at: Cell<(u64, u32)>,
}

impl FatFile {
    /// The cluster at a place of the chain, not behind the file's end.
    fn cluster(&self, index: u64) -> io::Result<u32> {
        let (mut at, mut cluster) = self.at.get();
        if at > index {
            (at, cluster) = (0, self.first);
        }
        while at < index {
            let next = self.volume.next(cluster)?;
            cluster = next.ok_or_else(|| bad("a file longer than its clusters"))?;
            at += 1;
        }
        self.at.set((at, cluster));
        Ok(cluster)
    }
}

impl Source for FatFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let size = self.volume.cluster;
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let first = self.cluster(at / size)?;
            let start = self.volume.offset(first)? + at % size;
            // As many clusters as lie one behind the other.
            let mut len = size - at % size;
            let mut last = first;
            while done as u64 + len < bytes.len() as u64 {
                let next = self.cluster((at + len) / size)?;
                if Some(next) != last.checked_add(1) {
                    break;
                }
                last = next;
                len += size;
            }
            self.volume.offset(last)?;
            let len = usize::try_from(len).map_or(bytes.len(), |len| len.min(bytes.len() - done));
            self.volume.part.read(start, &mut bytes[done..done + len])?;
            done += len;
        }
        Ok(())
    }
}

impl BootFs for Fat {
    fn open(&self, path: &str) -> Result<Box<dyn Source>, FsError> {
        let node = self.resolve(path)?;
        if node.directory {
            return Err(FsError::NotFile);
        }
        Ok(Box::new(FatFile {
            volume: self.0.clone(),
            first: node.first,
            size: node.size,
            at: Cell::new((0, node.first)),
        }))
    }

    fn read_dir(&self, path: &str) -> Result<Vec<DirEntry>, FsError> {
        let dir = self.resolve(path)?;
        if !dir.directory {
            return Err(FsError::NotDirectory);
        }
        let nodes = self.0.entries(&dir)?.into_iter();
        let mut entries: Vec<_> = nodes.map(DirEntry::from).collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn stat(&self, path: &str) -> Result<Stat, FsError> {
        let node = self.resolve(path)?;
        Ok(Stat {
            kind: kind(&node),
            size: node.size,
        })
    }
}

fn kind(node: &Node) -> FileKind {
    match node.directory {
        true => FileKind::Directory,
        false => FileKind::File,
    }
}

impl From<Node> for DirEntry {
    fn from(node: Node) -> Self {
        Self {
            kind: kind(&node),
            name: node.name,
        }
    }
}
