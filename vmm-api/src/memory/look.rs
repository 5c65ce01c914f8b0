//! Guest RAM that is only looked at, without a mapping.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::unistd::Whence;

use super::{MemoryError, MemoryLayout, check_length, read_at};

/// Most bytes that are copied at once.
const PIECE: u64 = 1 << 20;

/// Guest RAM that is only looked at, without a mapping.
#[derive(Debug)]
pub struct MemFile {
    file: File,
    /// What shows where `file` has holes.
    base: Option<File>,
    layout: MemoryLayout,
}

impl MemFile {
    /// Takes a memory file whose length agrees with `layout`.
    ///
    /// # Errors
    ///
    /// The file has another length.
    pub fn new(file: File, layout: MemoryLayout) -> Result<Self, MemoryError> {
        check_length(&file, layout)?;
        let base = None;
        Ok(Self { file, base, layout })
    }

    /// Takes a clone's two files: `base` shows where `own` has holes.
    ///
    /// # Errors
    ///
    /// One of them has another length.
    pub fn of_clone(own: File, base: File, layout: MemoryLayout) -> Result<Self, MemoryError> {
        check_length(&base, layout)?;
        let own = Self::new(own, layout)?;
        Ok(Self {
            base: Some(base),
            ..own
        })
    }

    /// Where the RAM lies.
    pub fn layout(&self) -> MemoryLayout {
        self.layout
    }

    /// Reads bytes; memory that was never written reads as zeros and stays unallocated.
    ///
    /// # Errors
    ///
    /// The range is not RAM.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let Some(base) = &self.base else {
            return read_at(&self.file, self.layout, gpa, bytes);
        };
        read_at(base, self.layout, gpa, bytes)?;
        // What is its own, over it.
        let len = bytes.len() as u64;
        let offset = self.layout.offset_of(gpa, len);
        let offset = offset.ok_or(MemoryError::NotRam { gpa, len })?;
        let io = |source| MemoryError::Io { gpa, source };
        let mut at = offset;
        while let Some(data) = next_data(&self.file, at, offset + len).map_err(|e| io(e.into()))? {
            let place = (data.start - offset) as usize..(data.end - offset) as usize;
            if let Some(place) = bytes.get_mut(place) {
                self.file.read_exact_at(place, data.start).map_err(io)?;
            }
            at = data.end;
        }
        Ok(())
    }

    /// The next range of its segment, at `gpa` or behind it, that was ever written; none if there is
    /// no more. A file system that knows no holes tells the whole segment.
    ///
    /// # Errors
    ///
    /// `gpa` is not RAM, or the file cannot be looked at.
    pub fn next_data(&self, gpa: u64) -> Result<Option<Range<u64>>, MemoryError> {
        let mut segments = self.layout.segments();
        let segment = segments.find(|&(base, len, _)| gpa >= base && gpa - base < len);
        let segment = segment.ok_or(MemoryError::NotRam { gpa, len: 1 })?;
        next_in(&self.files(), segment, gpa)
    }

    /// The same with the segments behind; none also if the file cannot be looked at.
    pub(crate) fn next_written(&self, gpa: u64) -> Option<Range<u64>> {
        next_written(&self.files(), self.layout, gpa).ok()?
    }

    fn files(&self) -> Vec<&File> {
        let files = [Some(&self.file), self.base.as_ref()];
        files.into_iter().flatten().collect()
    }

    /// Hands out all that was ever written, piece by piece with its place in a file of the whole
    /// memory, and returns how many bytes that was.
    ///
    /// # Errors
    ///
    /// Memory cannot be read, or what `take` says.
    pub fn pieces<E: From<MemoryError>>(
        &self,
        mut take: impl FnMut(&[u8], u64) -> Result<(), E>,
    ) -> Result<u64, E> {
        let (mut given, mut buffer) = (0, vec![0; PIECE as usize]);
        for (base, len, offset) in self.layout.segments() {
            let mut at = base;
            while at - base < len
                && let Some(data) = self.next_data(at)?
            {
                at = data.start;
                while at < data.end {
                    let size = PIECE.min(data.end - at);
                    let piece = buffer.get_mut(..size as usize).unwrap_or_default();
                    self.read(at, piece)?;
                    take(piece, offset + (at - base))?;
                    at += size;
                    given += size;
                }
            }
        }
        Ok(given)
    }

    /// Bytes that are really allocated; of a clone, those that it shares with nobody.
    ///
    /// # Errors
    ///
    /// The file cannot be looked at.
    pub fn resident(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }
}

/// The next range, at `gpa` or behind it, that is no hole in all of the files.
pub(super) fn next_written(
    files: &[&File],
    layout: MemoryLayout,
    gpa: u64,
) -> Result<Option<Range<u64>>, MemoryError> {
    for segment in layout.segments() {
        let (base, len, _) = segment;
        if gpa < base + len
            && let Some(range) = next_in(files, segment, gpa.max(base))?
        {
            return Ok(Some(range));
        }
    }
    Ok(None)
}

/// The same in one segment: guest-physical base, length, offset in the files.
fn next_in(
    files: &[&File],
    (base, len, offset): (u64, u64, u64),
    gpa: u64,
) -> Result<Option<Range<u64>>, MemoryError> {
    let mut first: Option<Range<u64>> = None;
    for file in files {
        let next = next_data(file, offset + (gpa - base), offset + len);
        let next = next.map_err(|e| MemoryError::Io {
            gpa,
            source: e.into(),
        })?;
        first = match (first, next) {
            (Some(one), Some(other)) if other.start < one.start => Some(other),
            (Some(one), _) => Some(one),
            (None, next) => next,
        };
    }
    Ok(first.map(|range| base + (range.start - offset)..base + (range.end - offset)))
}

/// The next range between two offsets of a file that is not a hole.
pub(crate) fn next_data(file: &File, from: u64, to: u64) -> Result<Option<Range<u64>>, Errno> {
    let seek = |from: u64, whence| {
        let from = i64::try_from(from).unwrap_or(i64::MAX);
        nix::unistd::lseek(file, from, whence).map(|at| at as u64)
    };
    if from >= to {
        return Ok(None);
    }
    let start = match seek(from, Whence::SeekData) {
        Ok(start) if start < to => start,
        Ok(_) | Err(Errno::ENXIO) => return Ok(None),
        Err(Errno::EINVAL) => return Ok(Some(from..to)),
        Err(e) => return Err(e),
    };
    let until = seek(start, Whence::SeekHole)?.min(to);
    Ok(Some(start..until))
}
