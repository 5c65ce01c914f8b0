//! Requests (5.2.6): what a driver put into a chain, read once and checked.

use vm_memory::{GuestMemoryMmap, VolatileSlice};
use vmm_api::scatter::Slices;

use super::config::{
    MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_ZERO_SECTORS, MAX_ZERO_SEGMENTS,
};
use crate::block::{Extent, Info, Operation, Request, SECTOR};
use crate::virtio::{Chain, Reader};

/// Request types.
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    /// The other of two words a legacy driver has for a flush.
    pub const FLUSH_OUT: u32 = 5;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    /// On top of a legacy driver's type: what came before is to be done first.
    pub const BARRIER: u32 = 1 << 31;
}

/// The one flag a segment of a discard or write-zeroes knows.
const UNMAP: u32 = 1;

/// How a request ended, as the driver reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Not done.
    IoErr = 1,
    /// Not known.
    Unsupp = 2,
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// What the disk is.
    pub info: Info,
    /// The driver is a legacy one, to which the barrier flag is known.
    pub legacy: bool,
    /// A change is to be stable when it completes: the driver sends no flushes.
    pub durable: bool,
}

/// What is to be done.
#[derive(Debug)]
pub enum Action<'m> {
    /// The image's part.
    Image(Request<'m>),
    /// Write the disk's serial number here.
    Identify(Slices<'m>),
}

/// A request that can be answered.
#[derive(Debug)]
pub struct BlkRequest<'m> {
    /// The chain's head.
    pub head: u16,
    /// Bytes the driver gave for answers, the status among them.
    pub writable: u32,
    /// Where the status goes: one byte.
    pub status: VolatileSlice<'m>,
    /// What is to be done, or why it is not.
    pub action: Result<Action<'m>, Status>,
}

impl<'m> BlkRequest<'m> {
    /// Reads and checks a chain; none if there is no place for its status.
    ///
    /// Parts are told by their lengths, not by the descriptors they are in (2.7.4.2): 16 bytes of
    /// header, then data; the last writable byte is the status.
    pub fn parse(memory: &'m GuestMemoryMmap, chain: &Chain, rules: &Rules) -> Option<Self> {
        let writable = chain.writable_len();
        let room = writable.checked_sub(1)?;
        let mut answer = chain.writer(memory);
        let into = answer.slices(room);
        let status = answer.slices(1).pop()?;
        Some(Self {
            head: chain.head(),
            writable,
            status,
            action: action(chain.reader(memory), into, room, rules),
        })
    }
}

fn action<'m>(
    mut reader: Reader<'_, 'm>,
    into: Slices<'m>,
    room: u32,
    rules: &Rules,
) -> Result<Action<'m>, Status> {
    // The whole header at once: what is checked here is what is used.
    let mut header = [0; 16];
    if reader.read(&mut header) != header.len() {
        return Err(Status::IoErr);
    }
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let mut kind = u32::from_le_bytes([k0, k1, k2, k3]);
    let sector = u64::from_le_bytes(sector);
    let barrier = rules.legacy && kind & kind::BARRIER != 0;
    if barrier {
        kind &= !kind::BARRIER;
    }
    let len = reader.remaining();
    let operation = match kind {
        kind::IN => Operation::Read(offset(sector, room, rules)?, into),
        kind::OUT => {
            let offset = offset(sector, len, rules)?;
            changes(rules)?;
            Operation::Write(offset, reader.slices(len))
        }
        kind::FLUSH | kind::FLUSH_OUT => Operation::Flush,
        kind::GET_ID => return Ok(Action::Identify(into)),
        kind::DISCARD if rules.info.discard => {
            changes(rules)?;
            let segments = segments(reader, MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS, rules)?;
            if segments.iter().any(|(_, unmap)| *unmap) {
                return Err(Status::Unsupp);
            }
            Operation::Discard(segments.into_iter().map(|(extent, _)| extent).collect())
        }
        kind::WRITE_ZEROES => {
            changes(rules)?;
            let segments = segments(reader, MAX_ZERO_SEGMENTS, MAX_ZERO_SECTORS, rules)?;
            Operation::WriteZeroes(segments)
        }
        _ => return Err(Status::Unsupp),
    };
    Ok(Action::Image(Request {
        operation,
        durable: rules.durable,
        barrier,
    }))
}

/// Where `len` bytes from `sector` on begin, if they are whole sectors of the disk.
fn offset(sector: u64, len: u32, rules: &Rules) -> Result<u64, Status> {
    let len = u64::from(len);
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoErr)?;
    let end = offset.checked_add(len).ok_or(Status::IoErr)?;
    if len.is_multiple_of(SECTOR) && end <= rules.info.capacity {
        Ok(offset)
    } else {
        Err(Status::IoErr)
    }
}

fn changes(rules: &Rules) -> Result<(), Status> {
    if rules.info.read_only {
        Err(Status::IoErr)
    } else {
        Ok(())
    }
}

/// Reads the segments of a discard or write-zeroes, each with its unmap flag.
fn segments(
    mut reader: Reader<'_, '_>,
    max_segments: u32,
    max_sectors: u32,
    rules: &Rules,
) -> Result<Vec<(Extent, bool)>, Status> {
    let len = reader.remaining();
    if len == 0 || !len.is_multiple_of(16) || len / 16 > max_segments {
        return Err(Status::IoErr);
    }
    let mut segments = Vec::new();
    while reader.remaining() > 0 {
        let sector: u64 = reader.read_obj().ok_or(Status::IoErr)?;
        let count: u32 = reader.read_obj().ok_or(Status::IoErr)?;
        let flags: u32 = reader.read_obj().ok_or(Status::IoErr)?;
        let (sector, count, flags) = (
            u64::from_le(sector),
            u32::from_le(count),
            u32::from_le(flags),
        );
        if flags & !UNMAP != 0 {
            return Err(Status::Unsupp);
        }
        if count > max_sectors {
            return Err(Status::IoErr);
        }
        // Within 32 bits: the greatest maximum is 2^22 sectors.
        let len = count.checked_mul(SECTOR as u32).ok_or(Status::IoErr)?;
        let extent = Extent {
            offset: offset(sector, len, rules)?,
            len: len.into(),
        };
        segments.push((extent, flags & UNMAP != 0));
    }
    Ok(segments)
}
