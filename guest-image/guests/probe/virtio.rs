//! virtio over PCI as a driver sees it: legacy registers or modern ones, and queues.
//!
//! One request is under way at a time, and its end is waited for: what is tested is the device. It
//! is told of requests through each doorbell it has, in turns, and its interrupt status is read
//! after every answer, once its message has come, if it has MSI. Sections are of virtio 1.3.

use core::sync::atomic::{AtomicU32, Ordering, fence};

use crate::cpu::{self, Deadline};
use crate::interrupts;
use crate::memory;
use crate::pci::{self, Function, Place};

/// Descriptors of the largest queue that there is room for.
const MAX_SIZE: u16 = 1024;
/// 32-bit words of a page.
const PAGE: usize = 1024;

/// Feature bit: not a legacy device.
pub const VERSION_1: u64 = 1 << 32;

/// Device status bits (2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// Memory that a device reads and writes.
#[repr(align(4096))]
pub struct Shared<const WORDS: usize>([AtomicU32; WORDS]);

impl<const WORDS: usize> Shared<WORDS> {
    pub const fn new() -> Self {
        Self([const { AtomicU32::new(0) }; WORDS])
    }

    pub fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    pub fn get(&self, word: usize) -> u32 {
        self.0
            .get(word)
            .map_or(0, |word| word.load(Ordering::Relaxed))
    }

    pub fn set(&self, word: usize, value: u32) {
        if let Some(word) = self.0.get(word) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

/// Pages of the largest queue as legacy drivers have it: descriptors and what is available, then what
/// is used (2.7.2).
const PAGES: usize = 8;

/// Where a queue lies.
pub type Rings = Shared<{ PAGES * PAGE }>;

/// The registers a driver uses.
#[derive(Clone, Copy)]
enum Registers {
    /// Ports from here on.
    Legacy(u16),
    /// Structures in memory, and the doorbells: a port and memory, if there are both.
    Modern {
        common: u64,
        isr: u64,
        config: u64,
        port: Option<u16>,
        doorbell: Option<(u64, u32)>,
    },
}

/// A device.
#[derive(Clone, Copy)]
pub struct Device {
    registers: Registers,
    /// Counts kicks.
    kicks: u32,
    /// It interrupts by MSI.
    msi: bool,
}

/// One buffer of a request: address, bytes, whether the device writes it.
pub type Buffer = (u64, u32, bool);

/// A queue of a device.
#[derive(Clone, Copy)]
pub struct Queue {
    index: u16,
    size: u16,
    rings: &'static Rings,
    /// Words of the rings where the used ring begins.
    used: usize,
    available: u16,
    seen: u16,
}

impl Device {
    /// The `number`th device of this kind on the bus, with its modern registers or the legacy ones.
    pub fn find(kind: u8, modern: bool, number: u64) -> Result<Self, &'static str> {
        // Transitional ids are 0x1000 and up in another order than device ids (4.1.2.1).
        let transitional = [0, 0x1000, 0x1001, 0x1003, 0x1005, 0x1002];
        let old = transitional.get(usize::from(kind)).copied().unwrap_or(0);
        let new = 0x1040 + u32::from(kind);
        let mut left = number;
        for function in pci::functions() {
            let ident = function.ident();
            if ident as u16 != 0x1af4 || (ident >> 16 != old && ident >> 16 != new) {
                continue;
            }
            if left > 0 {
                left -= 1;
                continue;
            }
            function.enable();
            let registers = if modern {
                modern_registers(function).ok_or("no modern registers")?
            } else {
                match function.bar(0) {
                    Some(Place::Port(port)) if ident >> 16 == old => Registers::Legacy(port),
                    _ => return Err("no legacy registers"),
                }
            };
            let msi = function.enable_msi(interrupts::MESSAGE);
            interrupts::take_messages();
            return Ok(Self {
                registers,
                kicks: 0,
                msi,
            });
        }
        Err("no such device")
    }

    /// Resets the device and agrees on those of `wanted` that it offers; returns them.
    pub fn negotiate(&mut self, wanted: u64) -> Result<u64, &'static str> {
        self.set_status(0);
        if self.status() != 0 {
            return Err("a reset leaves a status");
        }
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        match self.registers {
            Registers::Legacy(port) => {
                let agreed = u64::from(cpu::inl(port)) & wanted;
                cpu::outl(port + 4, agreed as u32);
                Ok(agreed)
            }
            Registers::Modern { common, .. } => {
                let mut agreed = 0;
                for half in 0..2 {
                    write32(common, half);
                    let bits = u64::from(read32(common + 4)) << (32 * half);
                    agreed |= bits & (wanted | VERSION_1);
                }
                for half in 0..2 {
                    write32(common + 8, half);
                    write32(common + 12, (agreed >> (32 * half)) as u32);
                }
                self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
                if self.status() & FEATURES_OK == 0 {
                    return Err("features are refused");
                }
                Ok(agreed)
            }
        }
    }

    /// Sets up a queue in `rings`.
    pub fn queue(&mut self, index: u16, rings: &'static Rings) -> Result<Queue, &'static str> {
        for word in 0..PAGES * PAGE {
            rings.set(word, 0);
        }
        let base = rings.address();
        let size = match self.registers {
            Registers::Legacy(port) => {
                cpu::outw(port + 14, index);
                cpu::inw(port + 12)
            }
            Registers::Modern { common, .. } => {
                write16(common + 22, index);
                read16(common + 24)
            }
        };
        if size == 0 || size > MAX_SIZE || !size.is_power_of_two() {
            return Err("no such queue, or one that is too large");
        }
        let words = usize::from(size);
        // Descriptors of four words, then flags, index, entries and the event word (2.7.2).
        let used = (4 * words + (6 + 2 * words).div_ceil(4)).next_multiple_of(PAGE);
        match self.registers {
            Registers::Legacy(port) => cpu::outl(port + 8, (base >> 12) as u32),
            Registers::Modern { common, .. } => {
                let parts = [base, base + 16 * words as u64, base + 4 * used as u64];
                for (at, part) in (32..).step_by(8).zip(parts) {
                    write32(common + at, part as u32);
                    write32(common + at + 4, (part >> 32) as u32);
                }
                write16(common + 28, 1);
            }
        }
        Ok(Queue {
            index,
            size,
            rings,
            used,
            available: 0,
            seen: 0,
        })
    }

    /// Tells the device that the driver is ready.
    pub fn start(&mut self) {
        let status = self.status();
        self.set_status(status | DRIVER_OK);
    }

    /// Four bytes of the device's configuration.
    pub fn config(&self, offset: u16) -> u32 {
        match self.registers {
            // No MSI-X here, so it begins at 20 (4.1.4.10).
            Registers::Legacy(port) => cpu::inl(port + 20 + offset),
            Registers::Modern { config, .. } => read32(config + u64::from(offset)),
        }
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        match self.registers {
            Registers::Legacy(port) => cpu::inb(port + 18),
            Registers::Modern { common, .. } => read8(common + 20),
        }
    }

    fn set_status(&mut self, status: u8) {
        match self.registers {
            Registers::Legacy(port) => cpu::outb(port + 18, status),
            Registers::Modern { common, .. } => write8(common + 20, status),
        }
    }

    /// Reads the interrupt status, which clears it.
    fn interrupt(&self) -> u8 {
        match self.registers {
            Registers::Legacy(port) => cpu::inb(port + 19),
            Registers::Modern { isr, .. } => read8(isr),
        }
    }

    fn kick(&mut self, queue: u16) {
        self.kicks = self.kicks.wrapping_add(1);
        match self.registers {
            Registers::Legacy(port) => cpu::outw(port + 16, queue),
            Registers::Modern { port, doorbell, .. } => match (port, doorbell) {
                (Some(port), None) => cpu::outw(port, queue),
                (Some(port), _) if self.kicks % 2 == 0 => cpu::outw(port, queue),
                (_, Some((base, step))) => {
                    write16(base + u64::from(step) * u64::from(queue), queue)
                }
                (None, None) => {}
            },
        }
    }

    /// Puts the buffers into the queue and kicks, without waiting.
    pub fn post(&mut self, queue: &mut Queue, first: u16, buffers: &[Buffer]) {
        let rings = queue.rings;
        let last = buffers.len().saturating_sub(1);
        for (number, &(address, bytes, writable)) in buffers.iter().enumerate() {
            let descriptor = usize::from(first) + number;
            let next = if number < last { 1 } else { 0 };
            let flags = next | if writable { 2 } else { 0 };
            let words = [
                address as u32,
                (address >> 32) as u32,
                bytes,
                flags | (descriptor as u32 + 1) << 16,
            ];
            for (at, word) in words.into_iter().enumerate() {
                rings.set(4 * descriptor + at, word);
            }
        }
        let ring = 4 * usize::from(queue.size);
        let slot = usize::from(queue.available & (queue.size - 1));
        // Two entries a word, behind flags and index.
        let (word, shift) = (ring + 1 + slot / 2, 16 * (slot as u32 % 2));
        let kept = rings.get(word) & !(0xffff << shift);
        rings.set(word, kept | u32::from(first) << shift);
        queue.available = queue.available.wrapping_add(1);
        fence(Ordering::SeqCst);
        rings.set(ring, u32::from(queue.available) << 16);
        fence(Ordering::SeqCst);
        self.kick(queue.index);
    }

    /// Waits for the next answer: the chain's first descriptor, and bytes written.
    pub fn answer(&mut self, queue: &mut Queue) -> Result<(u32, u32), &'static str> {
        let answer = self.used(queue)?;
        self.interrupted()?;
        Ok(answer)
    }

    /// Waits for the interrupt status, which comes after an answer: this driver never asks for
    /// silence.
    pub fn interrupted(&self) -> Result<(), &'static str> {
        if self.msi {
            cpu::enable_interrupts();
            let came = Deadline::after(Deadline::LONG).wait(interrupts::take_messages);
            cpu::disable_interrupts();
            if !came {
                return Err("no message");
            }
        }
        if Deadline::after(Deadline::LONG).wait(|| self.interrupt() & 1 != 0) {
            Ok(())
        } else {
            Err("no interrupt status")
        }
    }

    /// Waits for the next answer only.
    pub fn used(&mut self, queue: &mut Queue) -> Result<(u32, u32), &'static str> {
        let rings = queue.rings;
        let index = || (rings.get(queue.used) >> 16) as u16;
        if !Deadline::after(Deadline::LONG).wait(|| index() != queue.seen) {
            return Err("no answer");
        }
        fence(Ordering::SeqCst);
        let slot = usize::from(queue.seen & (queue.size - 1));
        queue.seen = queue.seen.wrapping_add(1);
        let entry = queue.used + 1 + 2 * slot;
        Ok((rings.get(entry), rings.get(entry + 1)))
    }

    /// Puts the buffers into the queue and waits for the answer; returns the bytes written.
    pub fn ask(&mut self, queue: &mut Queue, buffers: &[Buffer]) -> Result<u32, &'static str> {
        self.post(queue, 0, buffers);
        match self.answer(queue)? {
            (0, written) => Ok(written),
            _ => Err("an answer to another request"),
        }
    }
}

/// Finds the structures by their capabilities (4.1.4).
fn modern_registers(function: Function) -> Option<Registers> {
    let (mut common, mut isr, mut config) = (None, None, None);
    let (mut port, mut doorbell) = (None, None);
    for at in function.capabilities(9) {
        let kind = (function.read(at) >> 24) as u8;
        let place = function.bar(function.read(at + 4) as u8);
        let offset = u64::from(function.read(at + 8));
        match (kind, place) {
            (1, Some(Place::Memory(base))) => common = Some(base + offset),
            (3, Some(Place::Memory(base))) => isr = Some(base + offset),
            (4, Some(Place::Memory(base))) => config = Some(base + offset),
            (2, Some(Place::Memory(base))) => {
                doorbell = Some((base + offset, function.read(at + 16)));
            }
            (2, Some(Place::Port(base))) => port = Some(base + offset as u16),
            _ => {}
        }
    }
    Some(Registers::Modern {
        common: common?,
        isr: isr?,
        config: config?,
        port,
        doorbell,
    })
}

fn read8(address: u64) -> u8 {
    // SAFETY: `modern_registers` found it in a BAR of the device.
    unsafe { memory::mmio_read8(address) }
}

fn read16(address: u64) -> u16 {
    // SAFETY: as for `read8`.
    unsafe { memory::mmio_read16(address) }
}

fn read32(address: u64) -> u32 {
    // SAFETY: as for `read8`.
    unsafe { memory::mmio_read(address) }
}

fn write8(address: u64, value: u8) {
    // SAFETY: as for `read8`; what the device writes is memory that was given to it.
    unsafe { memory::mmio_write8(address, value) };
}

fn write16(address: u64, value: u16) {
    // SAFETY: as for `write8`.
    unsafe { memory::mmio_write16(address, value) };
}

fn write32(address: u64, value: u32) {
    // SAFETY: as for `write8`.
    unsafe { memory::mmio_write(address, value) };
}
