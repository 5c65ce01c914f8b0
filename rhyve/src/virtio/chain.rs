//! A request: the buffers of one descriptor chain, checked, and copies into and out of them.

use smallvec::SmallVec;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_api::scatter::Slices;

/// The segments of most requests, without an allocation.
pub(super) type Segments = SmallVec<[Segment; 4]>;

/// A piece of a request's buffers. All of it is RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Bytes, at least 1.
    pub len: u32,
}

/// One request of the driver: what the device may read, then what it may write (2.7.4.2).
///
/// It was read from the ring once and is checked: all segments are RAM, and their lengths do not
/// add up to more than 32 bits hold. What is in the segments remains the driver's to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    segments: Segments,
    /// How many of the segments are readable; the rest is writable.
    readable: usize,
}

impl Chain {
    pub(super) fn new(head: u16, segments: Segments, readable: usize) -> Self {
        Self {
            head,
            segments,
            readable,
        }
    }

    /// What names the request in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may read.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// What the device may write.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> u32 {
        total(self.readable())
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> u32 {
        total(self.writable())
    }

    /// Reads what the driver has written, from its beginning.
    pub fn reader<'c, 'm>(&'c self, memory: &'m GuestMemoryMmap) -> Reader<'c, 'm> {
        Reader(Cursor::new(memory, self.readable()))
    }

    /// Writes what the driver is to read, from its beginning.
    pub fn writer<'c, 'm>(&'c self, memory: &'m GuestMemoryMmap) -> Writer<'c, 'm> {
        Writer(Cursor::new(memory, self.writable()))
    }
}

fn total(segments: &[Segment]) -> u32 {
    segments.iter().fold(0, |sum, s| sum.saturating_add(s.len))
}

/// A place in segments.
#[derive(Clone)]
struct Cursor<'c, 'm> {
    memory: &'m GuestMemoryMmap,
    segments: &'c [Segment],
    /// Bytes of the first segment that are done with.
    offset: u32,
    done: u32,
}

impl<'c, 'm> Cursor<'c, 'm> {
    fn new(memory: &'m GuestMemoryMmap, segments: &'c [Segment]) -> Self {
        Self {
            memory,
            segments,
            offset: 0,
            done: 0,
        }
    }

    fn remaining(&self) -> u32 {
        total(self.segments).saturating_sub(self.offset)
    }

    /// The next `max` bytes, or as many of them as lie in one segment; none at the end.
    fn step(&mut self, max: u32) -> Option<Segment> {
        let first = self.segments.first()?;
        let len = first.len.saturating_sub(self.offset).min(max);
        let address = GuestAddress(first.address.0.wrapping_add(self.offset.into()));
        self.offset += len;
        self.done = self.done.saturating_add(len);
        if self.offset >= first.len {
            self.segments = self.segments.get(1..).unwrap_or_default();
            self.offset = 0;
        }
        (len != 0).then_some(Segment { address, len })
    }

    fn skip(&mut self, count: u32) -> u32 {
        let before = self.done;
        let mut left = count;
        while let Some(piece) = self.step(left) {
            left -= piece.len;
        }
        self.done - before
    }

    fn slices(&mut self, count: u32) -> Slices<'m> {
        let mut slices = Slices::with_capacity(self.segments.len());
        let mut left = count;
        while let Some(piece) = self.step(left) {
            left -= piece.len;
            let len = piece.len as usize;
            match self.memory.get_slice(piece.address, len) {
                Ok(slice) => slices.push(slice),
                // It runs from one region of memory into the next. It is RAM: no errors.
                Err(_) => slices.extend(self.memory.get_slices(piece.address, len).flatten()),
            }
        }
        slices
    }
}

/// Reads a request. Running out of bytes is an end, not an error.
#[derive(Clone)]
pub struct Reader<'c, 'm>(Cursor<'c, 'm>);

impl<'m> Reader<'_, 'm> {
    /// Bytes that are left.
    pub fn remaining(&self) -> u32 {
        self.0.remaining()
    }

    /// Bytes passed so far.
    pub fn done(&self) -> u32 {
        self.0.done
    }

    /// Copies as many bytes as there are, and says how many.
    pub fn read(&mut self, mut to: &mut [u8]) -> usize {
        let wanted = to.len();
        while let Some(piece) = self.0.step(u32::try_from(to.len()).unwrap_or(u32::MAX)) {
            let Some(now) = to.split_off_mut(..piece.len as usize) else {
                break;
            };
            if self.0.memory.read_slice(now, piece.address).is_err() {
                break;
            }
        }
        wanted - to.len()
    }

    /// Copies a whole value; none if there are too few bytes left.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Option<T> {
        let mut value = T::default();
        let bytes = value.as_mut_slice();
        (self.read(bytes) == bytes.len()).then_some(value)
    }

    /// Passes over `count` bytes, or as many as there are, and says how many.
    pub fn skip(&mut self, count: u32) -> u32 {
        self.0.skip(count)
    }

    /// The memory of the next `count` bytes, or of as many as there are: for writev(2) and the
    /// like. Passes over them.
    pub fn slices(&mut self, count: u32) -> Slices<'m> {
        self.0.slices(count)
    }
}

/// Writes an answer. Running out of room is an end, not an error.
#[derive(Clone)]
pub struct Writer<'c, 'm>(Cursor<'c, 'm>);

impl<'m> Writer<'_, 'm> {
    /// Bytes of room that are left.
    pub fn remaining(&self) -> u32 {
        self.0.remaining()
    }

    /// Bytes written and passed over so far: what [`Virtqueue::add_used`] wants to know.
    ///
    /// [`Virtqueue::add_used`]: super::Virtqueue::add_used
    pub fn done(&self) -> u32 {
        self.0.done
    }

    /// Copies as many bytes as there is room for, and says how many.
    pub fn write(&mut self, mut from: &[u8]) -> usize {
        let wanted = from.len();
        while let Some(piece) = self.0.step(u32::try_from(from.len()).unwrap_or(u32::MAX)) {
            let Some(now) = from.split_off(..piece.len as usize) else {
                break;
            };
            if self.0.memory.write_slice(now, piece.address).is_err() {
                break;
            }
        }
        wanted - from.len()
    }

    /// Copies a whole value; false if there is too little room, with part of it written.
    pub fn write_obj<T: ByteValued>(&mut self, value: T) -> bool {
        let bytes = value.as_slice();
        self.write(bytes) == bytes.len()
    }

    /// Passes over `count` bytes, or as many as there are, and says how many.
    pub fn skip(&mut self, count: u32) -> u32 {
        self.0.skip(count)
    }

    /// The memory of the next `count` bytes, or of as many as there are: for readv(2) and the like.
    /// Passes over them.
    pub fn slices(&mut self, count: u32) -> Slices<'m> {
        self.0.slices(count)
    }
}
