//! A 16550A at COM1's port (National Semiconductor, PC16550D data sheet).
//!
//! Output waits for an empty transmitter and then fills the FIFO with one string instruction. Input
//! arrives by interrupt: the handler moves it into a ring, from which the prompt takes it. The
//! transmitter's interrupt is only used once, to show that it comes.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use crate::cpu;

/// COM1, and its interrupt on the ISA bus.
pub const PORT: u16 = 0x3f8;
pub const IRQ: u8 = 4;

const DATA: u16 = PORT;
const IER: u16 = PORT + 1;
const IIR_FCR: u16 = PORT + 2;
const LCR: u16 = PORT + 3;
const MCR: u16 = PORT + 4;
const LSR: u16 = PORT + 5;
const MSR: u16 = PORT + 6;
const SCRATCH: u16 = PORT + 7;

const IER_RECEIVE: u8 = 0x01;
const IER_TRANSMIT: u8 = 0x02;
const IIR_NONE: u8 = 0x01;
const IIR_FIFO: u8 = 0xc0;
const FCR_ENABLE_AND_CLEAR: u8 = 0x07;
const LCR_8N1: u8 = 0x03;
const LCR_DIVISOR: u8 = 0x80;
/// DTR, RTS and OUT2, which lets the interrupt through on a PC.
const MCR_NORMAL: u8 = 0x0b;
/// Loopback with RTS and OUT2, which come back as CTS and DCD.
const MCR_LOOPBACK: u8 = 0x1a;
const LSR_DATA: u8 = 0x01;
const LSR_TRANSMIT_EMPTY: u8 = 0x20;

/// A register that holds 0xff when nobody answers.
const ABSENT: u8 = 0xff;
/// How often LSR is read for room, at about a microsecond or more: 16 characters take 1.4 ms at
/// 115200.
const POLLS: u32 = 200_000;

static HAS_FIFO: AtomicBool = AtomicBool::new(false);
static TRANSMIT_INTERRUPTS: AtomicU32 = AtomicU32::new(0);

/// Sets 115200 8N1 and empties the FIFOs. Interrupts stay off.
pub fn init() {
    cpu::outb(IER, 0);
    cpu::outb(LCR, LCR_DIVISOR);
    cpu::outb(DATA, 1);
    cpu::outb(IER, 0);
    cpu::outb(LCR, LCR_8N1);
    cpu::outb(IIR_FCR, FCR_ENABLE_AND_CLEAR);
    cpu::outb(MCR, MCR_NORMAL);
    HAS_FIFO.store(cpu::inb(IIR_FCR) & IIR_FIFO == IIR_FIFO, Ordering::Relaxed);
}

/// Whether the FIFO works: a 16550A.
pub fn has_fifo() -> bool {
    HAS_FIFO.load(Ordering::Relaxed)
}

/// Sends the bytes. What a stuck transmitter does not take is dropped.
pub fn write(mut bytes: &[u8]) {
    let room = if has_fifo() { 16 } else { 1 };
    while !bytes.is_empty() {
        let mut polls = POLLS;
        while cpu::inb(LSR) & LSR_TRANSMIT_EMPTY == 0 {
            polls -= 1;
            if polls == 0 {
                return;
            }
        }
        let (now, later) = match bytes.split_at_checked(room) {
            Some(parts) => parts,
            None => (bytes, &[][..]),
        };
        cpu::outsb(DATA, now);
        bytes = later;
    }
}

/// Checks that the scratch register keeps what is written.
pub fn scratch_works() -> bool {
    [0x5a, 0xa5].iter().all(|&value| {
        cpu::outb(SCRATCH, value);
        cpu::inb(SCRATCH) == value
    })
}

/// Checks that in loopback the modem lines and a character come back.
pub fn loopback_works() -> bool {
    cpu::outb(MCR, MCR_LOOPBACK);
    // What somebody has typed already would come back instead.
    cpu::outb(IIR_FCR, FCR_ENABLE_AND_CLEAR);
    let lines = cpu::inb(MSR) & 0xf0 == 0x90;
    cpu::outb(DATA, 0x3c);
    let arrived = cpu::Deadline::after(cpu::Deadline::SHORT * 10)
        .wait(|| cpu::inb(LSR) & (LSR_DATA | LSR_TRANSMIT_EMPTY) == LSR_DATA | LSR_TRANSMIT_EMPTY);
    let same = arrived && cpu::inb(DATA) == 0x3c;
    cpu::outb(MCR, MCR_NORMAL);
    lines && same
}

/// Asks for the transmitter-empty interrupt. It is due at once, since the transmitter is idle.
pub fn provoke_interrupt() {
    cpu::outb(IER, IER_TRANSMIT);
}

/// How many transmitter-empty interrupts came.
pub fn transmit_interrupts() -> u32 {
    TRANSMIT_INTERRUPTS.load(Ordering::Relaxed)
}

/// From now on only input interrupts.
pub fn listen() {
    cpu::outb(IER, IER_RECEIVE);
}

/// The interrupt handler: serves every cause until none is left, since the line is edge-triggered.
/// Bounded, in case the device never stops asking.
pub fn interrupt() {
    for _ in 0..64 {
        let cause = cpu::inb(IIR_FCR);
        if cause == ABSENT || cause & IIR_NONE != 0 {
            return;
        }
        match cause & 0x0e {
            // Reading IIR has cleared this one.
            0x02 => {
                TRANSMIT_INTERRUPTS.fetch_add(1, Ordering::Relaxed);
            }
            0x04 | 0x0c => poll(),
            0x06 => {
                cpu::inb(LSR);
            }
            _ => {
                cpu::inb(MSR);
            }
        }
    }
}

/// Moves what has arrived into the ring, where the interrupt does not.
pub fn poll() {
    for _ in 0..64 {
        if cpu::inb(LSR) & LSR_DATA == 0 {
            return;
        }
        INPUT.push(cpu::inb(DATA));
    }
}

/// The next character typed, if one has come.
pub fn read() -> Option<u8> {
    INPUT.pop()
}

static INPUT: Ring = Ring {
    bytes: UnsafeCell::new([0; RING]),
    head: AtomicUsize::new(0),
    tail: AtomicUsize::new(0),
};

const RING: usize = 256;

/// One writer (the handler), one reader (the prompt), both on the boot CPU. Full: what comes is
/// lost.
struct Ring {
    bytes: UnsafeCell<[u8; RING]>,
    head: AtomicUsize,
    tail: AtomicUsize,
}

// SAFETY: the indices keep the writer's cells and the reader's apart.
unsafe impl Sync for Ring {}

impl Ring {
    fn cell(&self, index: usize) -> *mut u8 {
        self.bytes.get().cast::<u8>().wrapping_add(index % RING)
    }

    fn push(&self, byte: u8) {
        let head = self.head.load(Ordering::Relaxed);
        if head.wrapping_sub(self.tail.load(Ordering::Acquire)) < RING {
            // SAFETY: in bounds, and the reader does not touch the cell at `head`.
            unsafe { self.cell(head).write(byte) };
            self.head.store(head.wrapping_add(1), Ordering::Release);
        }
    }

    fn pop(&self) -> Option<u8> {
        let tail = self.tail.load(Ordering::Relaxed);
        if tail == self.head.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: in bounds, and written before `head` passed it.
        let byte = unsafe { self.cell(tail).read() };
        self.tail.store(tail.wrapping_add(1), Ordering::Release);
        Some(byte)
    }
}
