//! The rings of a queue in guest memory (2.7.5, 2.7.6, 2.7.8).
//!
//! Where they lie is looked up once, when the driver sets the queue up: a request needs a dozen loads and
//! stores, and a search for the region of each would cost more than all else that is done for it.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress, VolatileSlice,
};

use super::{Position, Rings};

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR: usize = 16;
/// Where both rings have their index, a u16; before it are flags.
const INDEX: usize = 2;
/// Where both have their elements.
const ELEMENTS: usize = 4;
/// Bytes of an element of the available ring: a descriptor's number.
const AVAILABLE: usize = 2;
/// Bytes of an element of the used ring: a descriptor's number and a length, of 32 bits each.
const USED: usize = 8;
/// Behind the elements: up to where the other side wants to hear nothing, with event index.
const EVENT: usize = 2;

type Result<T> = std::result::Result<T, GuestMemoryError>;

/// Rings that are in RAM, and how far both sides got.
pub(super) struct Ring {
    memory: GuestMemoryMmap,
    size: u16,
    event_index: bool,
    descriptors: Place,
    available: Place,
    used: Place,
    position: Position,
}

/// A piece of guest memory, all of it in one region.
#[derive(Clone, Copy)]
struct Place {
    /// The region's number.
    region: usize,
    start: MemoryRegionAddress,
    len: usize,
}

impl Place {
    fn find(memory: &GuestMemoryMmap, address: u64, len: usize) -> Option<Self> {
        let mut regions = memory.iter().enumerate();
        regions.find_map(|(region, found)| {
            let start = found.to_region_addr(GuestAddress(address))?;
            found.get_slice(start, len).ok()?;
            Some(Self { region, start, len })
        })
    }
}

impl Ring {
    /// # Errors
    /// What is wrong: the size is none, the rings are not aligned or are not RAM.
    pub fn new(rings: &Rings, memory: GuestMemoryMmap) -> std::result::Result<Self, String> {
        let set_up = || {
            let mut queue = Queue::new(rings.size)?;
            queue.try_set_desc_table_address(GuestAddress(rings.descriptors))?;
            queue.try_set_avail_ring_address(GuestAddress(rings.available))?;
            queue.try_set_used_ring_address(GuestAddress(rings.used))
        };
        set_up().map_err(|error: virtio_queue::Error| error.to_string())?;
        let find = |address, element, head| {
            let len = usize::from(rings.size) * element + head;
            Place::find(&memory, address, len)
        };
        // At 0 there is no driver's ring but a forgotten one.
        let available = (rings.available != 0).then_some(rings.available);
        let places = (
            find(rings.descriptors, DESCRIPTOR, 0),
            available.and_then(|address| find(address, AVAILABLE, ELEMENTS + EVENT)),
            find(rings.used, USED, ELEMENTS + EVENT),
        );
        let (Some(descriptors), Some(available), Some(used)) = places else {
            return Err("not in RAM".into());
        };
        Ok(Self {
            memory,
            size: rings.size,
            event_index: rings.event_index,
            descriptors,
            available,
            used,
            position: Position::default(),
        })
    }

    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    pub fn event_index(&self) -> bool {
        self.event_index
    }

    pub fn position(&self) -> Position {
        self.position
    }

    pub fn set_position(&mut self, position: Position) {
        self.position = position;
    }

    /// The descriptor table.
    pub fn descriptors(&self) -> Result<VolatileSlice<'_>> {
        self.at(self.descriptors)
    }

    /// How many requests are there to be taken. A driver that says more than there is room for is wrong.
    pub fn waiting(&self) -> Result<u16> {
        let index = u16::from_le(self.at(self.available)?.load(INDEX, Acquire)?);
        Ok(index.wrapping_sub(self.position.next_avail))
    }

    /// Takes a request that is waiting: the number of its first descriptor.
    pub fn take(&mut self) -> Result<u16> {
        let at = ELEMENTS + AVAILABLE * self.slot(self.position.next_avail);
        let head = u16::from_le(self.at(self.available)?.load(at, Relaxed)?);
        self.position.next_avail = self.position.next_avail.wrapping_add(1);
        Ok(head)
    }

    /// Answers requests, each with the number of its first descriptor and the bytes that were written. The
    /// driver sees all of them at once.
    pub fn answer(&mut self, answers: &[(u16, u32)]) -> Result<()> {
        let used = self.at(self.used)?;
        let mut next = self.position.next_used;
        for &(head, written) in answers {
            let at = ELEMENTS + USED * self.slot(next);
            used.store(u32::from(head).to_le(), at, Relaxed)?;
            used.store(written.to_le(), at + 4, Relaxed)?;
            next = next.wrapping_add(1);
        }
        used.store(next.to_le(), INDEX, Release)?;
        self.position.next_used = next;
        Ok(())
    }

    /// The answer of which the driver wants to hear, by its place in the used ring, with event index
    /// (`used_event`, 2.7.7).
    pub fn used_event(&self) -> Result<u16> {
        let at = ELEMENTS + AVAILABLE * usize::from(self.size);
        Ok(u16::from_le(self.at(self.available)?.load(at, Relaxed)?))
    }

    /// Whether the driver wants to hear of answers, without event index.
    pub fn wants_interrupts(&self) -> Result<bool> {
        let flags: u16 = self.at(self.available)?.load(0, Relaxed)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Says whether requests from the next one on are to be told. With event index nothing needs to be said
    /// if not: no later one is.
    pub fn want_kicks(&self, wanted: bool) -> Result<()> {
        let used = self.at(self.used)?;
        if !self.event_index {
            let flags = if wanted { 0 } else { VRING_USED_F_NO_NOTIFY };
            used.store((flags as u16).to_le(), 0, Relaxed)?;
        } else if wanted {
            let at = ELEMENTS + USED * usize::from(self.size);
            used.store(self.position.next_avail.to_le(), at, Relaxed)?;
        }
        Ok(())
    }

    fn slot(&self, index: u16) -> usize {
        // The size is a power of two.
        usize::from(index & (self.size - 1))
    }

    fn at(&self, place: Place) -> Result<VolatileSlice<'_>> {
        let region = self.memory.iter().nth(place.region);
        let region = region.ok_or(GuestMemoryError::HostAddressNotAvailable)?;
        region.get_slice(place.start, place.len)
    }
}
