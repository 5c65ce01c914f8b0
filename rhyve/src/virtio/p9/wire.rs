//! Messages of 9P2000.L as bytes (Linux, include/net/9p/9p.h and net/9p/protocol.c): little endian,
//! strings with their length of 16 bits in front.

/// The host's error numbers are the protocol's.
pub use nix::errno::Errno;

/// Size, type, tag.
pub const HEADER: u32 = 7;

/// Types of requests; an answer's is one more.
pub mod kind {
    pub const LERROR: u8 = 6;
    pub const STATFS: u8 = 8;
    pub const LOPEN: u8 = 12;
    pub const LCREATE: u8 = 14;
    pub const SYMLINK: u8 = 16;
    pub const MKNOD: u8 = 18;
    pub const READLINK: u8 = 22;
    pub const GETATTR: u8 = 24;
    pub const SETATTR: u8 = 26;
    pub const READDIR: u8 = 40;
    pub const FSYNC: u8 = 50;
    pub const LOCK: u8 = 52;
    pub const GETLOCK: u8 = 54;
    pub const LINK: u8 = 70;
    pub const MKDIR: u8 = 72;
    pub const RENAMEAT: u8 = 74;
    pub const UNLINKAT: u8 = 76;
    pub const VERSION: u8 = 100;
    pub const ATTACH: u8 = 104;
    pub const FLUSH: u8 = 108;
    pub const WALK: u8 = 110;
    pub const READ: u8 = 116;
    pub const WRITE: u8 = 118;
    pub const CLUNK: u8 = 120;
}

/// Whether an answer says that a request failed.
pub fn is_error(answer: &[u8]) -> bool {
    answer.get(4) == Some(&(kind::LERROR + 1))
}

/// Reads a request. What is not there is an error of the request.
#[derive(Clone)]
pub struct Parser<'a>(&'a [u8]);

impl<'a> Parser<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        self.0.split_off(..count).ok_or(Errno::EBADMSG)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        self.bytes(N)?.try_into().map_err(|_| Errno::EBADMSG)
    }

    pub fn u8(&mut self) -> Result<u8, Errno> {
        self.array().map(u8::from_le_bytes)
    }

    pub fn u16(&mut self) -> Result<u16, Errno> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_le_bytes)
    }

    /// Bytes with their length in front.
    pub fn string(&mut self) -> Result<&'a [u8], Errno> {
        let len = self.u16()?;
        self.bytes(len.into())
    }

    /// A name in a directory: of one part, and not one that leads elsewhere.
    pub fn name(&mut self) -> Result<&'a [u8], Errno> {
        let name = self.string()?;
        match name {
            b"" | b"." | b".." => Err(Errno::EINVAL),
            _ if name.len() > 255 => Err(Errno::ENAMETOOLONG),
            _ if name.iter().any(|byte| matches!(byte, b'/' | 0)) => Err(Errno::EINVAL),
            _ => Ok(name),
        }
    }
}

/// What identifies a file: kind, version and a number (9P's qid).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qid {
    /// 0x80 directory, 0x02 symbolic link, 0 anything else.
    pub kind: u8,
    /// Changes with the file.
    pub version: u32,
    /// Another for each file.
    pub path: u64,
}

/// Writes an answer.
#[derive(Default)]
pub struct Answer(Vec<u8>);

impl Answer {
    pub fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn append(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    pub fn string(self, text: &[u8]) -> Self {
        let text = text.get(..usize::from(u16::MAX)).unwrap_or(text);
        self.u16(text.len() as u16).bytes(text)
    }

    pub fn qid(self, qid: Qid) -> Self {
        self.u8(qid.kind).u32(qid.version).u64(qid.path)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The whole message.
    pub fn message(self, kind: u8, tag: u16) -> Vec<u8> {
        let size = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        let header = Self::default()
            .u32(size.saturating_add(HEADER))
            .u8(kind)
            .u16(tag);
        [header.0, self.0].concat()
    }
}
