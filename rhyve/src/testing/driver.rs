//! A driver without a guest: puts requests into a virtqueue as a guest's driver would, or as none
//! should.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::virtio::{Activation, Interrupts, Position, Rings, Virtqueue};

const PAGE: u64 = 4096;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One buffer of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// Bytes the device reads.
    Readable(Vec<u8>),
    /// Room for as many bytes the device writes; 0xaa before it does.
    Writable(u32),
}

/// A request in the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// What names it in the used ring.
    pub head: u16,
    /// Addresses and lengths of its writable buffers.
    pub writable: Vec<(u64, u32)>,
}

/// A descriptor as it lies in memory (2.7.5), whatever it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawDescriptor {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// NEXT 1, WRITE 2, INDIRECT 4.
    pub flags: u16,
    /// The next descriptor.
    pub next: u16,
}

/// Counts what a device tells its driver.
#[derive(Default)]
pub struct FakeInterrupts {
    queues: Mutex<Vec<u16>>,
    config: AtomicUsize,
    broken: AtomicUsize,
}

impl FakeInterrupts {
    /// Nothing told yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The queues that were signalled, in order.
    pub fn queues(&self) -> Vec<u16> {
        self.queues.lock().unwrap().clone()
    }

    /// How often the configuration changed.
    pub fn config_changes(&self) -> usize {
        self.config.load(Ordering::SeqCst)
    }

    /// Whether the device wants to be reset.
    pub fn needs_reset_is_set(&self) -> bool {
        self.broken.load(Ordering::SeqCst) != 0
    }
}

impl Interrupts for FakeInterrupts {
    fn signal_queue(&self, queue: u16) {
        self.queues.lock().unwrap().push(queue);
    }

    fn signal_config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self) {
        self.broken.fetch_add(1, Ordering::SeqCst);
    }
}

/// A driver of one queue, which finds that its requests are answered in their order (2.7.9) unless
/// it is told that they are not. Its rings lie as a legacy driver has them: the descriptor table on a page,
/// the available ring behind it, the used ring on the next page (2.7.2).
pub struct GuestDriver {
    memory: GuestMemoryMmap,
    rings: Rings,
    kick: Arc<EventFd>,
    /// Where the next buffer goes.
    heap: AtomicU32,
    heap_start: u32,
    free: BTreeSet<u16>,
    /// Requests under way, in the order in which they were sent.
    chains: Vec<(u16, Vec<u16>)>,
    /// The device may answer them in another one.
    any_order: bool,
    next_avail: u16,
    next_used: u16,
}

impl GuestDriver {
    /// A driver with a queue of `size` descriptors at `base` (a multiple of 4096) in `memory`,
    /// and buffers behind it.
    pub fn at(memory: GuestMemoryMmap, base: u64, size: u16) -> Self {
        let available = base + 16 * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(PAGE);
        let heap = (used + 6 + 8 * u64::from(size)).next_multiple_of(PAGE);
        let rings = Rings {
            size,
            descriptors: base,
            available,
            used,
            event_index: false,
        };
        let zeros = vec![0; (heap - base) as usize];
        memory.write_slice(&zeros, GuestAddress(base)).unwrap();
        let kick = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap();
        Self {
            memory,
            rings,
            kick: Arc::new(kick),
            heap: AtomicU32::new(heap as u32),
            heap_start: heap as u32,
            free: (0..size).collect(),
            chains: Vec::new(),
            any_order: false,
            next_avail: 0,
            next_used: 0,
        }
    }

    /// A driver with 4 MiB of memory of its own, of which the first 64 KiB are not used.
    pub fn new(size: u16) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        Self::at(memory, 0x1_0000, size)
    }

    /// Takes answers as they come, as from a device without IN_ORDER.
    pub fn in_any_order(mut self) -> Self {
        self.any_order = true;
        self
    }

    /// Wants interrupts and kicks by event index.
    pub fn with_event_index(mut self) -> Self {
        self.rings.event_index = true;
        self
    }

    /// The memory it shares with the device.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Where its rings are.
    pub fn rings(&self) -> Rings {
        self.rings
    }

    /// What it kicks.
    pub fn kick_fd(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// Kicks this instead, as when a transport made it.
    pub fn set_kick_fd(&mut self, kick: Arc<EventFd>) {
        self.kick = kick;
    }

    /// The device's side of the queue.
    pub fn virtqueue(&self, index: u16, interrupts: Arc<dyn Interrupts>) -> Virtqueue {
        let (memory, kick) = (self.memory.clone(), self.kick.clone());
        Virtqueue::new(index, self.rings, memory, kick, interrupts).unwrap()
    }

    /// The device's side of the queue in another process: all that was taken is answered, and what
    /// is not comes again.
    pub fn resumed(&self, index: u16, interrupts: Arc<dyn Interrupts>) -> Virtqueue {
        let mut queue = self.virtqueue(index, interrupts);
        let answered = self.read_u16(self.rings.used + 2);
        queue.resume_at(Position {
            next_avail: answered,
            next_used: answered,
        });
        queue
    }

    /// All that a device with this one queue, its queue 0, is activated with.
    pub fn activation(&self, features: u64, interrupts: Arc<dyn Interrupts>) -> Activation {
        Activation {
            memory: self.memory.clone(),
            features,
            queues: vec![self.virtqueue(0, interrupts.clone())],
            interrupts,
        }
    }

    /// Room for `len` bytes, on a 16-byte boundary. Room comes free when no request is in the ring.
    pub fn allocate(&self, len: u32) -> u64 {
        let step = len.next_multiple_of(16).max(16);
        u64::from(self.heap.fetch_add(step, Ordering::SeqCst))
    }

    /// Puts a request into the ring, without a kick.
    pub fn send(&mut self, buffers: &[Buffer]) -> Sent {
        let (descriptors, writable) = self.place(buffers);
        let slots: Vec<u16> = self.free.iter().copied().take(buffers.len()).collect();
        assert_eq!(slots.len(), buffers.len(), "the ring is full");
        self.link(descriptors, slots, writable)
    }

    /// The same through a table of descriptors.
    pub fn send_indirect(&mut self, buffers: &[Buffer]) -> Sent {
        let (mut descriptors, writable) = self.place(buffers);
        let count = descriptors.len();
        let table = self.allocate(16 * count as u32);
        for (i, descriptor) in (0..).zip(&mut descriptors) {
            if usize::from(i) + 1 < count {
                descriptor.flags |= NEXT;
                descriptor.next = i + 1;
            }
            self.write_descriptor(table, i, *descriptor);
        }
        let indirect = RawDescriptor {
            address: table,
            len: 16 * count as u32,
            flags: INDIRECT,
            next: 0,
        };
        let slot = *self.free.first().expect("the ring is full");
        self.link(vec![indirect], vec![slot], writable)
    }

    fn place(&self, buffers: &[Buffer]) -> (Vec<RawDescriptor>, Vec<(u64, u32)>) {
        let mut writable = Vec::new();
        let descriptors = buffers.iter().map(|buffer| {
            let (bytes, flags) = match buffer {
                Buffer::Readable(bytes) => (bytes.clone(), 0),
                Buffer::Writable(len) => (vec![0xaa; *len as usize], WRITE),
            };
            let len = bytes.len() as u32;
            let address = self.allocate(len);
            self.memory
                .write_slice(&bytes, GuestAddress(address))
                .unwrap();
            if flags == WRITE {
                writable.push((address, len));
            }
            RawDescriptor {
                address,
                len,
                flags,
                next: 0,
            }
        });
        (descriptors.collect(), writable)
    }

    fn link(
        &mut self,
        descriptors: Vec<RawDescriptor>,
        slots: Vec<u16>,
        writable: Vec<(u64, u32)>,
    ) -> Sent {
        for (i, mut descriptor) in descriptors.into_iter().enumerate() {
            if let Some(next) = slots.get(i + 1) {
                descriptor.flags |= NEXT;
                descriptor.next = *next;
            }
            self.write_descriptor(self.rings.descriptors, slots[i], descriptor);
        }
        let head = slots[0];
        for slot in &slots {
            self.free.remove(slot);
        }
        self.chains.push((head, slots));
        self.make_available(head);
        Sent { head, writable }
    }

    /// Writes descriptor `index` of the ring's table, for requests that make no sense.
    pub fn set_descriptor(&self, index: u16, descriptor: RawDescriptor) {
        self.write_descriptor(self.rings.descriptors, index, descriptor);
    }

    /// Writes descriptor `index` of any table.
    pub fn write_descriptor(&self, table: u64, index: u16, descriptor: RawDescriptor) {
        let at = table + 16 * u64::from(index);
        let bytes = [
            &descriptor.address.to_le_bytes()[..],
            &descriptor.len.to_le_bytes(),
            &descriptor.flags.to_le_bytes(),
            &descriptor.next.to_le_bytes(),
        ];
        self.memory
            .write_slice(&bytes.concat(), GuestAddress(at))
            .unwrap();
    }

    /// Makes the chain that begins at descriptor `head` available.
    pub fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.rings.size);
        self.write_u16(self.rings.available + 4 + 2 * slot, head);
        self.set_available_index(self.next_avail.wrapping_add(1));
    }

    /// Sets the available ring's index, sensible or not.
    pub fn set_available_index(&mut self, index: u16) {
        self.next_avail = index;
        let at = GuestAddress(self.rings.available + 2);
        self.memory.store(index, at, Ordering::Release).unwrap();
    }

    /// Asks for no interrupts, by the flag that counts without event index.
    pub fn set_no_interrupt(&self, no: bool) {
        self.write_u16(self.rings.available, no.into());
    }

    /// Asks for an interrupt when the used ring's index passes `index`.
    pub fn set_used_event(&self, index: u16) {
        let size = u64::from(self.rings.size);
        self.write_u16(self.rings.available + 4 + 2 * size, index);
    }

    /// Whether the device asks not to be kicked, by the flag.
    pub fn no_notify(&self) -> bool {
        self.read_u16(self.rings.used) & 1 != 0
    }

    /// At which available index the device wants a kick.
    pub fn available_event(&self) -> u16 {
        let size = u64::from(self.rings.size);
        self.read_u16(self.rings.used + 4 + 8 * size)
    }

    /// Tells the device that there are requests.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next answer: the request's head and how many bytes were written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let at = GuestAddress(self.rings.used + 2);
        let index: u16 = self.memory.load(at, Ordering::Acquire).unwrap();
        if index == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.rings.size);
        let at = self.rings.used + 4 + 8 * slot;
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let written: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        if let Some(at) = self.chains.iter().position(|(first, _)| *first == head) {
            assert!(
                at == 0 || self.any_order,
                "{head} is answered before others"
            );
            self.free.extend(self.chains.remove(at).1);
        }
        if self.chains.is_empty() {
            self.heap.store(self.heap_start, Ordering::SeqCst);
        }
        Some((head, written))
    }

    /// Waits up to ten seconds for the next answer of a device that works by itself.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            if let Some(used) = self.used() {
                return used;
            }
            assert!(std::time::Instant::now() < end, "no answer in ten seconds");
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
    }

    /// What is in the writable buffers of a request, one behind the other.
    pub fn received(&self, sent: &Sent) -> Vec<u8> {
        let mut all = Vec::new();
        for (address, len) in &sent.writable {
            let mut bytes = vec![0; *len as usize];
            self.memory
                .read_slice(&mut bytes, GuestAddress(*address))
                .unwrap();
            all.extend(bytes);
        }
        all
    }

    fn write_u16(&self, at: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn read_u16(&self, at: u64) -> u16 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }
}
