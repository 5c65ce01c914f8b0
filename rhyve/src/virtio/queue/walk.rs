//! From a descriptor to the whole chain, checked (2.7.5).

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory, VolatileSlice};

use super::ring::DESCRIPTOR;
use crate::virtio::chain::Segments;
use crate::virtio::{Chain, Segment};

/// The longest chain: as many segments as preadv(2) takes (IOV_MAX).
const MAX_SEGMENTS: usize = 1024;

/// Reads the chain that begins with descriptor `head` of `table`, each descriptor once.
///
/// # Errors
/// Why it makes no sense: it has no end, leads out of its table or out of RAM, into a table from within one,
/// mixes its directions, or is too long.
pub(super) fn chain(
    memory: &GuestMemoryMmap,
    table: VolatileSlice<'_>,
    head: u16,
) -> Result<Chain, String> {
    let mut segments = Segments::new();
    let mut readable = 0;
    let mut total = 0u32;
    let mut writing = false;
    let mut indirect = false;
    let mut table = table;
    let mut index = head;
    let mut left = table.len() / DESCRIPTOR;
    loop {
        let at = usize::from(index) * DESCRIPTOR;
        let descriptor = match table.get_ref::<Descriptor>(at) {
            Ok(descriptor) if left != 0 => descriptor.load(),
            Ok(_) => return Err("a chain of descriptors has no end".into()),
            Err(_) => return Err(format!("there is no descriptor {index}")),
        };
        left -= 1;
        if descriptor.refers_to_indirect_table() {
            if indirect {
                return Err("a table of descriptors leads into another".into());
            }
            indirect = true;
            table = indirect_table(memory, &descriptor)?;
            index = 0;
            left = table.len() / DESCRIPTOR;
            continue;
        }
        match (writing, descriptor.is_write_only()) {
            (true, false) => return Err("a readable descriptor follows a writable one".into()),
            (_, now) => writing = now,
        }
        // Nothing to read or write: Linux's vhost passes over it as well.
        if descriptor.len() != 0 {
            let sum = total.checked_add(descriptor.len());
            total = sum.ok_or("a chain is longer than 32 bits can say")?;
            if segments.len() == MAX_SEGMENTS {
                return Err(format!("a chain has more than {MAX_SEGMENTS} descriptors"));
            }
            segments.push(segment(memory, &descriptor)?);
            readable += usize::from(!writing);
        }
        if !descriptor.has_next() {
            return Ok(Chain::new(head, segments, readable));
        }
        index = descriptor.next();
    }
}

/// The table that `descriptor` leads to.
fn indirect_table<'m>(
    memory: &'m GuestMemoryMmap,
    descriptor: &Descriptor,
) -> Result<VolatileSlice<'m>, String> {
    let (address, len) = (descriptor.addr(), descriptor.len() as usize);
    let count = len / DESCRIPTOR;
    if len % DESCRIPTOR != 0 || count == 0 || count > u16::MAX.into() {
        return Err(format!("a table of descriptors has {len:#x} bytes"));
    }
    let table = memory.get_slice(address, len);
    table.map_err(|_| not_ram(address, descriptor.len()))
}

fn segment(memory: &GuestMemoryMmap, descriptor: &Descriptor) -> Result<Segment, String> {
    let (address, len) = (descriptor.addr(), descriptor.len());
    // In one region, as mostly, or from one into the next.
    let is_ram = memory.get_slice(address, len as usize).is_ok()
        || memory.check_range(address, len as usize);
    if is_ram {
        Ok(Segment { address, len })
    } else {
        Err(not_ram(address, len))
    }
}

fn not_ram(address: GuestAddress, len: u32) -> String {
    format!("{len:#x} bytes at {:#x} are not RAM", address.0)
}
