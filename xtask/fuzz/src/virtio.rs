//! A PCI bus with a virtio disk of each kind, and a driver out of its mind: configuration space, both
//! transports' registers, rings and requests.
//!
//! An input is a list of steps of eight bytes. Most do one access; some put a request together, so
//! that the search gets behind the registers soon.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::EventFd;
use rhyve::block::{Backend, Extent, Info, total_len};
use rhyve::bus::{IoSize, PortBus};
use rhyve::config::{BlockSpec, PciAddress};
use rhyve::irq::IrqLine;
use rhyve::isa::reset::ResetControl;
use rhyve::mmio::MmioBus;
use rhyve::pci::{
    Bridge, Buses, ConfigPorts, EcamWindow, Intx, IntxPin, MsiSink, MsiVector, PciBus, Placement,
};
use rhyve::suspend::{SuspendHow, SuspendSink};
use rhyve::virtio::blk::Blk;
use rhyve::virtio::transport::{Board, BoundDoorbell, Doorbells, Transport, VirtioPci};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, VolatileSlice};
use vmm_api::kvm::{Doorbell, MsiMessage};

const RAM: u64 = 1 << 20;
const DISK: usize = 64 << 10;
const STEP: usize = 8;
/// More would only be slow.
const MAX_STEPS: usize = 256;
const ECAM: u64 = 0xe000_0000;
const MEMORY: std::ops::Range<u64> = 0xc000_0000..ECAM;

/// Nobody listens.
struct Deaf;

impl IrqLine for Deaf {
    fn set(&self, _: bool) {}
}

impl SuspendSink for Deaf {
    fn suspend(&self, _: SuspendHow) {}
}

impl MsiSink for Deaf {
    fn vector(&self) -> Box<dyn MsiVector> {
        Box::new(Self)
    }
}

impl MsiVector for Deaf {
    fn set(&mut self, _: MsiMessage) {}
    fn trigger(&self) {}
}

impl Doorbells for Deaf {
    fn bind(&self, _: Doorbell, _: &EventFd) -> Option<BoundDoorbell> {
        None
    }
}

/// A disk that holds its device to what a backend is promised.
struct Strict(Mutex<Vec<u8>>);

impl Strict {
    fn sectors(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn range(&self, offset: u64, len: u64) -> std::ops::Range<usize> {
        let end = offset.checked_add(len).expect("no overflow");
        assert!(end <= DISK as u64 && offset.is_multiple_of(512) && len.is_multiple_of(512));
        offset as usize..end as usize
    }
}

impl Backend for Strict {
    fn info(&self) -> Info {
        Info {
            capacity: DISK as u64,
            logical: 512,
            physical: 4096,
            read_only: false,
            discard: true,
        }
    }

    fn read(&self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        let range = self.range(offset, total_len(to));
        let disk = self.sectors();
        let mut rest = &disk[range];
        for slice in to {
            let (now, later) = rest.split_at(slice.len());
            slice.copy_from(now);
            rest = later;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[VolatileSlice<'_>], _: bool) -> io::Result<()> {
        let range = self.range(offset, total_len(from));
        let mut disk = self.sectors();
        let mut rest = &mut disk[range];
        for slice in from {
            let (now, later) = rest.split_at_mut(slice.len());
            slice.copy_to(now);
            rest = later;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, extent: Extent) -> io::Result<()> {
        self.range(extent.offset, extent.len);
        Ok(())
    }

    fn write_zeroes(&self, extent: Extent, _: bool) -> io::Result<()> {
        let range = self.range(extent.offset, extent.len);
        self.sectors()[range].fill(0);
        Ok(())
    }
}

/// The machine.
struct Rig {
    ports: Arc<PortBus>,
    mmio: Arc<MmioBus>,
    memory: GuestMemoryMmap,
    disks: Vec<(Arc<VirtioPci>, Arc<Blk>)>,
    /// Where firmware has put the modern registers of those that have them.
    modern: [u64; 2],
}

impl Rig {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]);
        let memory: GuestMemoryMmap = memory.expect("memory");
        let (ports, mmio) = (Arc::<PortBus>::default(), Arc::<MmioBus>::default());
        let board = Board {
            memory: memory.clone(),
            buses: Buses {
                ports: ports.clone(),
                mmio: mmio.clone(),
            },
            msi: Arc::new(Deaf),
            msix: true,
            doorbells: Arc::new(Deaf),
        };
        let bus = PciBus::new();
        let plugged = bus.plug(PciAddress::HOST_BRIDGE, Bridge::host());
        plugged.expect("an empty bus");
        let mut placement = Placement::new(0x2000..0x1_0000, MEMORY);
        let kinds = [
            Transport::Legacy,
            Transport::Modern,
            Transport::Transitional,
        ];
        let mut disks = Vec::new();
        for (slot, transport) in (1..).zip(kinds) {
            let backend = Arc::new(Strict(Mutex::new(vec![0; DISK])));
            let blk = Blk::new(&BlockSpec::default(), backend, 2).expect("a disk");
            let pin = IntxPin {
                pin: 1,
                line: 10,
                intx: Intx::new(Arc::new(Deaf)),
            };
            let board = Board {
                msix: transport != Transport::Modern,
                ..board.clone()
            };
            let made = VirtioPci::new(blk.clone(), transport, &board, pin, &mut placement);
            let (virtio, function) = made.expect("room for its BARs");
            // The last is on a bus of its own.
            let address = PciAddress::new(u32::from(slot == 3), slot, 0).expect("a slot");
            bus.plug(address, function).expect("a free slot");
            disks.push((virtio, blk));
        }
        EcamWindow::register(bus.clone(), ECAM, 1, &mmio).expect("free addresses");
        let reset = ResetControl::new(Arc::new(Deaf));
        let config = ConfigPorts::new(bus, reset);
        config.register(&ports).expect("free ports");
        // BAR 4 of slot 2, and of slot 3 on bus 1.
        let modern = [0x8000_1020, 0x8001_1820].map(|register| {
            let _ = ports.write(0xcf8, IoSize::Dword, register);
            let bar = ports.read(0xcfc, IoSize::Dword).expect("ports");
            u64::from(bar & !0xf)
        });
        Self {
            ports,
            mmio,
            memory,
            disks,
            modern,
        }
    }

    /// Descriptor `head` is the only request of the queue whose rings begin at page 4.
    fn make_available(&self, index: u16, head: u8) {
        let available = 0x4000 + 16 * 256;
        let ring: [u16; 3] = [0, index, head.into()];
        for (number, word) in (0..).zip(ring) {
            let gpa = GuestAddress(available + 2 * number);
            self.memory.write_obj(word, gpa).expect("RAM");
        }
    }

    /// A modern driver: agrees on some features, sets up a queue, which it may have reset before, and
    /// kicks for a request from descriptor `head` on.
    fn modern_driver(&self, registers: u64, head: u8, how: u8, index: u16, size: u16) {
        let write = |at: u64, len: usize, value: u64| {
            let bytes = value.to_le_bytes();
            let _ = self.mmio.write(registers + at, &bytes[..len]);
        };
        let queue = u64::from(how >> 3 & 1);
        write(20, 1, 3);
        for (half, features) in [(0, u64::from(how & 0x30) << 24), (1, 1 | 1 << 8)] {
            write(8, 4, half);
            write(12, 4, features);
        }
        write(20, 1, 11);
        write(22, 2, queue);
        if how & 4 != 0 {
            write(58, 2, 1);
        }
        write(24, 2, size.into());
        for (at, address) in [(32, 0x4000), (40, 0x4000 + 16 * 256), (48, 0x6000)] {
            write(at, 8, address);
        }
        write(28, 2, 1);
        write(20, 1, 15);
        self.make_available(index, head);
        write(0x3000 + 4 * queue, 2, queue);
    }

    fn step(&self, step: [u8; STEP]) {
        let [op, a, b, c, value @ ..] = step;
        let value = u32::from_le_bytes(value);
        let at = u32::from_le_bytes([a, b, c, 0]);
        let size = [IoSize::Byte, IoSize::Word, IoSize::Dword][usize::from(op >> 4) % 3];
        let bytes = value.to_le_bytes();
        let len = usize::from(size.bytes());
        match op & 0xf {
            // Configuration space, by ports and in memory; the last bits say which bytes.
            0 | 1 => {
                let address = 0x8000_0000 | at & 0x3f_fffc;
                let port = 0xcfc + (a & 3) as u16;
                let _ = self.ports.write(0xcf8, IoSize::Dword, address);
                let _ = self.ports.write(port, size, value);
                let _ = self.ports.read(port, size);
            }
            2 => {
                let gpa = ECAM + u64::from(at & 0x1f_ffff);
                let _ = self.mmio.write(gpa, &bytes[..len]);
                let _ = self.mmio.read(gpa, &mut [0; 8]);
            }
            // Ports from 0x2000 on, where firmware puts BARs.
            3..=5 => {
                let port = 0x2000 | at as u16 & 0x1ff;
                let _ = self.ports.write(port, size, value);
                let _ = self.ports.read(port, size);
            }
            6..=8 => {
                let gpa = MEMORY.start + u64::from(at & 0x3_ffff);
                let _ = self.mmio.write(gpa, &bytes[..len]);
                let _ = self.mmio.read(gpa, &mut [0; 4]);
            }
            9 | 10 => {
                let gpa = GuestAddress(u64::from(at) % (RAM - 4));
                self.memory.write_slice(&bytes, gpa).expect("RAM");
            }
            // A descriptor: which one, what kind, and how long; its buffer lies in the second half.
            11 | 12 => {
                let gpa = u64::from(a) * 16 + u64::from(op >> 4 & 1) * 0x4000;
                let words = [
                    0x8_0000 + u32::from(b) * 0x800,
                    0,
                    value & 0xffff,
                    u32::from(c & 7) | (value >> 16) << 16,
                ];
                for (number, word) in (0..).zip(words) {
                    let gpa = GuestAddress(gpa + 4 * number);
                    self.memory.write_obj(word, gpa).expect("RAM");
                }
            }
            // A request's header: kind and sector.
            13 => {
                let gpa = 0x8_0000 + u64::from(b) * 0x800;
                let words = [u32::from(c), 0, value, 0];
                for (number, word) in (0..).zip(words) {
                    let gpa = GuestAddress(gpa + 4 * number);
                    self.memory.write_obj(word, gpa).expect("RAM");
                }
            }
            // A modern driver of one of the two disks.
            14 if b & 2 != 0 => {
                let registers = self.modern[usize::from(b & 1)];
                let size = if c == 0 { 256 } else { (value >> 16) as u16 };
                self.modern_driver(registers, a, b, value as u16, size);
            }
            // A legacy driver: queue 0 at page 4, a request from its descriptor `a` on, a kick.
            14 => {
                let base = 0x2000 + u16::from(b & 1) * 0x100;
                let _ = self.ports.write(base + 18, IoSize::Byte, 3);
                let _ = self.ports.write(base + 14, IoSize::Word, 0);
                let _ = self.ports.write(base + 8, IoSize::Dword, 4);
                let _ = self.ports.write(base + 18, IoSize::Byte, 7);
                self.make_available(value as u16, a);
                let _ = self.ports.write(base + 16, IoSize::Word, 0);
            }
            _ => {
                for (virtio, blk) in &self.disks {
                    let _ = blk.info();
                    if a == 0 {
                        virtio.stop();
                    }
                }
            }
        }
    }
}

impl Drop for Rig {
    /// The buses hold the ways to configuration space, which hold the functions, which hold the
    /// buses.
    fn drop(&mut self) {
        for (virtio, _) in &self.disks {
            // Waits for the disk's threads, whatever is under way.
            virtio.stop();
        }
        self.ports.unregister(0xcf8);
        self.mmio.unregister(ECAM);
    }
}

/// Takes the steps; true if there was one.
///
/// # Panics
///
/// A disk was asked for what it does not have, or the device was broken by its driver.
pub fn check(input: &[u8]) -> bool {
    let rig = Rig::new();
    for step in input.chunks_exact(STEP).take(MAX_STEPS) {
        if let Ok(step) = step.try_into() {
            rig.step(step);
        }
    }
    input.len() >= STEP
}

/// A read by each kind of driver, by the modern one twice with a reset of its queue in between, and a
/// walk through configuration space.
pub fn seeds() -> Vec<Vec<u8>> {
    // Header in descriptor 0, data in 1, status in 2, in the table at page 4.
    let request: [[u8; STEP]; 4] = [
        [13, 0, 0, 0, 1, 0, 0, 0],
        [11 | 0x10, 0, 0, 1, 16, 0, 1, 0],
        [11 | 0x10, 1, 1, 3, 0, 2, 2, 0],
        [11 | 0x10, 2, 2, 2, 1, 0, 0, 0],
    ];
    let by = |drivers: &[u8]| {
        let driver = |how: &u8| [14, 0, *how, 0, 1, 0, 0, 0];
        let drivers: Vec<_> = drivers.iter().map(driver).collect();
        [request.concat(), drivers.concat()].concat()
    };
    let walk: Vec<u8> = (0..64u8)
        .flat_map(|register| [0x20, register * 4, 0x08, 0, 0xff, 0xff, 0xff, 0xff])
        .collect();
    vec![by(&[0]), by(&[2, 6, 3]), walk]
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_seeds_are_taken() {
        assert!(seeds().iter().all(|seed| check(seed)));
        assert!(!check(&[]));
        // Nothing stays: there are not this many descriptors.
        let many = (0..2000).filter(|_| check(&seeds()[0])).count();
        assert_eq!(many, 2000);
    }

    /// Takes the steps, and waits until each disk has read this often.
    fn reads(seed: &[u8], wanted: [u64; 3]) {
        let rig = Rig::new();
        let status = GuestAddress(0x8_0000 + 2 * 0x800);
        let deadline = Instant::now() + Duration::from_secs(20);
        let read = |rig: &Rig| {
            let disks = rig.disks.iter();
            let reads = disks.map(|(_, blk)| blk.counters().reads.load(SeqCst));
            reads.collect::<Vec<_>>()
        };
        for step in seed.chunks_exact(STEP) {
            let before = read(&rig);
            rig.memory.write_obj(0xffu8, status).unwrap();
            rig.step(step.try_into().unwrap());
            // A queue that is reset forgets its request: that is to be answered before.
            let answered = || rig.memory.read_obj::<u8>(status).ok() == Some(0);
            while step[0] == 14 && (read(&rig) == before || !answered()) {
                assert!(Instant::now() < deadline, "no read by {step:?}");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert_eq!(read(&rig), wanted);
    }

    #[test]
    fn the_requests_reach_the_disks() {
        reads(&seeds()[0], [1, 0, 0]);
        reads(&seeds()[1], [0, 2, 1]);
    }
}
