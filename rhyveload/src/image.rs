//! A kernel file that is open: as it is, or decompressed into memory.
//!
//! Only as much is decompressed as the headers say is loaded: debug sections are left out, and a
//! file that would expand without end is cut short by its own headers or refused by them.

use std::fs::File;
use std::io::{self, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use liblzma::bufread::XzDecoder;
use liblzma::stream::Stream as XzStream;
use lz4_flex::frame::FrameDecoder;
use zstd::stream::read::Decoder as ZstdDecoder;

use crate::elf::{self, Elf, ElfError};
use crate::linux::bzimage::{self, BzImage, BzImageError};
use crate::progress::Progress;
use crate::source::{Source, Stream};

/// Dictionaries of xz files reach 128 MiB in kernels; this leaves room and is no danger.
const XZ_MEMORY: u64 = 512 << 20;

const CHUNK: usize = 256 << 10;

/// Why a compressed kernel cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// Damaged, truncated, or with options that are not supported.
    #[error("cannot decompress it ({kind}): is it damaged?")]
    Decompress {
        /// How it is compressed.
        kind: Compression,
        /// What the decompressor says.
        source: io::Error,
    },
    /// Something else inside.
    #[error("compressed with {0}, but there is no kernel inside")]
    NoKernel(Compression),
    /// Larger than any kernel for this VM.
    #[error(
        "the kernel inside has 0x{size:x} bytes to load, far more than the VM's memory \
        (0x{limit:x} bytes): give the VM more memory (-m)"
    )]
    TooLarge {
        /// What the headers inside say.
        size: u64,
        /// What is allowed.
        limit: u64,
    },
    /// Longer than there is room for, with an end that is not in sight.
    #[error("it expands to more than 0x{0:x} bytes: give the VM more memory (-m)")]
    Endless(u64),
    /// ELF headers inside.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// A bzImage's header inside.
    #[error(transparent)]
    BzImage(#[from] BzImageError),
}

/// How a file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
    /// The .xz format, with any filters.
    Xz,
    /// LZ4 frames, current or legacy; Linux's build makes legacy ones.
    Lz4,
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Lz4 => "lz4",
        })
    }
}

impl Compression {
    /// Recognizes a compressed file by its first bytes.
    pub fn of(head: &[u8]) -> Option<Self> {
        let kinds: [(&[u8], Self); 5] = [
            (b"\x1f\x8b\x08", Self::Gzip),
            (b"\x28\xb5\x2f\xfd", Self::Zstd),
            (b"\xfd7zXZ\0", Self::Xz),
            (b"\x04\x22\x4d\x18", Self::Lz4),
            (b"\x02\x21\x4c\x18", Self::Lz4),
        ];
        let kind = kinds.iter().find(|(magic, _)| head.starts_with(magic));
        kind.map(|&(_, kind)| kind)
    }

    fn decoder<'a>(self, from: impl io::BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(MultiGzDecoder::new(from)),
            Self::Zstd => Box::new(ZstdDecoder::with_buffer(from)?),
            Self::Xz => {
                let stream = XzStream::new_stream_decoder(XZ_MEMORY, 0)?;
                Box::new(XzDecoder::new_stream(from, stream))
            }
            Self::Lz4 => Box::new(FrameDecoder::new(from)),
        })
    }
}

/// A kernel file.
#[derive(Debug)]
pub enum Image {
    /// Read from the file itself.
    File(Box<dyn Source>),
    /// Decompressed, up to the last byte that is loaded.
    Expanded(Vec<u8>),
}

impl Image {
    /// Looks at a file, and decompresses it if it is compressed. A kernel inside may have `limit`
    /// bytes to load.
    ///
    /// # Errors
    ///
    /// It cannot be read or decompressed, or there is no kernel inside.
    pub fn new(
        file: Box<dyn Source>,
        limit: u64,
        progress: &mut Progress,
    ) -> Result<Self, ImageError> {
        let head = file.head(6).map_err(ImageError::Read)?;
        match Compression::of(&head) {
            None => Ok(Self::File(file)),
            Some(kind) => {
                let from = BufReader::with_capacity(CHUNK, Stream::new(&*file));
                expand(kind, from, limit, progress).map(Self::Expanded)
            }
        }
    }

    /// The same for a file that is no kernel: all of it is decompressed.
    ///
    /// # Errors
    ///
    /// It cannot be read or decompressed, or it is longer than `limit`.
    pub fn whole(
        file: Box<dyn Source>,
        limit: u64,
        progress: &mut Progress,
    ) -> Result<Self, ImageError> {
        let head = file.head(6).map_err(ImageError::Read)?;
        let Some(kind) = Compression::of(&head) else {
            return Ok(Self::File(file));
        };
        let failed = |source| ImageError::Decompress { kind, source };
        let from = BufReader::with_capacity(CHUNK, Stream::new(&*file));
        let mut decoder = kind.decoder(from).map_err(failed)?;
        rest(&mut decoder, Vec::new(), limit, progress)
            .map_err(failed)?
            .map(Self::Expanded)
            .ok_or(ImageError::Endless(limit))
    }
}

impl Source for Image {
    fn size(&self) -> u64 {
        match self {
            Self::File(file) => file.size(),
            Self::Expanded(bytes) => bytes.size(),
        }
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.read(offset, bytes),
            Self::Expanded(from) => from.read(offset, bytes),
        }
    }

    fn file(&self) -> Option<&File> {
        match self {
            Self::File(file) => file.file(),
            Self::Expanded(_) => None,
        }
    }
}

/// Decompresses a kernel as far as it is loaded.
///
/// # Errors
///
/// As [`Image::new`].
pub fn expand(
    kind: Compression,
    from: impl io::BufRead,
    limit: u64,
    progress: &mut Progress,
) -> Result<Vec<u8>, ImageError> {
    let failed = |source| ImageError::Decompress { kind, source };
    let mut decoder = kind.decoder(from).map_err(failed)?;
    let mut bytes = Vec::new();
    let head = (&mut decoder).take(elf::HEAD as u64);
    read(head, &mut bytes).map_err(failed)?;
    let size = extent(&bytes, kind)?;
    if size > limit {
        return Err(ImageError::TooLarge { size, limit });
    }
    // The symbols of a FreeBSD kernel are behind everything else.
    if bytes.starts_with(elf::MAGIC) && bytes.get(7) == Some(&elf::OSABI_FREEBSD) {
        let whole = rest(&mut decoder, bytes, limit, progress).map_err(failed)?;
        return whole.ok_or(ImageError::Endless(limit));
    }
    while (bytes.len() as u64) < size {
        let left = size - bytes.len() as u64;
        let chunk = (&mut decoder).take(left.min(CHUNK as u64));
        if read(chunk, &mut bytes).map_err(failed)? == 0 {
            let source = io::ErrorKind::UnexpectedEof.into();
            return Err(failed(source));
        }
        progress.step("decompressing", bytes.len() as u64, size);
    }
    Ok(bytes)
}

/// Reads to the end, unless that is more than `limit` bytes away.
fn rest(
    decoder: &mut dyn Read,
    mut bytes: Vec<u8>,
    limit: u64,
    progress: &mut Progress,
) -> io::Result<Option<Vec<u8>>> {
    loop {
        if read(decoder.take(CHUNK as u64), &mut bytes)? == 0 {
            return Ok(Some(bytes));
        }
        if bytes.len() as u64 > limit {
            return Ok(None);
        }
        progress.step("decompressing", bytes.len() as u64, limit);
    }
}

fn read(mut from: impl Read, bytes: &mut Vec<u8>) -> io::Result<usize> {
    from.read_to_end(bytes)
}

/// How many of the decompressed bytes are loaded, by the headers.
fn extent(head: &[u8], kind: Compression) -> Result<u64, ImageError> {
    /// The bytes behind the headers, not yet known.
    #[derive(Debug)]
    struct Unread;
    impl Source for Unread {
        fn size(&self) -> u64 {
            u64::MAX
        }
        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
    if head.starts_with(elf::MAGIC) {
        Ok(Elf::parse(head, &Unread)?.extent)
    } else if bzimage::is_bzimage(head) {
        let image = BzImage::parse(head, u64::MAX)?;
        Ok(image.offset + image.len)
    } else {
        Err(ImageError::NoKernel(kind))
    }
}
