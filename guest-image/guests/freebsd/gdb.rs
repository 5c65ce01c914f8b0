//! A small stub for gdb on the BVM debug port: registers, memory, single steps, go on. Packets are
//! `$data#checksum`, each acknowledged (GDB manual, appendix E).
//!
//! The port has neither interrupts nor a line that would say whether somebody listens, so the stub
//! polls for as long as it takes.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::access::poke8;
use crate::console::say;
use crate::cpu;
use crate::memory::peek8;
use crate::traps::Frame;

const PORT: u16 = 0x224;
const SIGNATURE: u16 = 0x4256;
const NOTHING: u32 = u32::MAX;

/// The longest packet, and the most memory in an answer.
const PACKET: usize = 512;
const MEMORY: u64 = 200;

/// RFLAGS.TF.
const TRAP_FLAG: u64 = 1 << 8;

/// The debugger was told of a stop and waits for the next one.
static WAITED_FOR: AtomicBool = AtomicBool::new(false);

/// Whether there is a debug port.
pub fn present() -> bool {
    cpu::inw(PORT) == SIGNATURE
}

/// Enters the debugger, as a breakpoint would. Not by INT3, which a hypervisor that emulates ring 0
/// may not know: by what the processor pushes for it.
pub fn enter() {
    // SAFETY: the handler restores every register that the debugger does not change, RSP included.
    unsafe {
        core::arch::asm!(
            "mov {stack}, rsp",
            "and rsp, -16",
            "push 0x10",
            "push {stack}",
            "pushfq",
            "push 8",
            "lea {stack}, [rip + 2f]",
            "push {stack}",
            "push 0",
            "push 3",
            "jmp interrupt_common",
            "2:",
            stack = out(reg) _,
        );
    }
}

/// A breakpoint or a single step.
pub fn trap(frame: &mut Frame) {
    if !present() {
        say!("KDB: no debugger");
        return;
    }
    frame.rflags &= !TRAP_FLAG;
    if WAITED_FOR.swap(false, Ordering::Relaxed) {
        let mut answer = Packet::new();
        answer.text(b"S05");
        answer.send();
    }
    loop {
        let mut packet = Packet::new();
        packet.receive();
        if serve(&packet, frame) {
            return;
        }
    }
}

fn get() -> u8 {
    loop {
        let word = cpu::inl(PORT);
        if word != NOTHING {
            return word as u8;
        }
        core::hint::spin_loop();
    }
}

fn put(byte: u8) {
    cpu::outl(PORT, byte.into());
}

/// Answers one packet; whether the kernel goes on.
fn serve(packet: &Packet, frame: &mut Frame) -> bool {
    let mut words = Words { packet, at: 1 };
    let mut answer = Packet::new();
    match packet.byte(0) {
        b'?' => answer.text(b"S05"),
        b'g' => {
            for register in 0..24 {
                let (value, bytes) = register_value(frame, register);
                answer.little(value, bytes);
            }
        }
        b'P' => {
            let (register, value) = (words.number(), words.little());
            match register_slot(frame, register) {
                Some(slot) => {
                    *slot = value;
                    answer.text(b"OK");
                }
                None => answer.text(b"E01"),
            }
        }
        b'm' => {
            let (address, length) = (words.number(), words.number());
            for at in 0..length.min(MEMORY) {
                match peek8(address.wrapping_add(at)) {
                    Some(byte) => answer.little(byte.into(), 1),
                    None if at == 0 => answer.text(b"E14"),
                    None => break,
                }
            }
        }
        b'M' => {
            let (address, length) = (words.number(), words.number());
            let written =
                (0..length.min(MEMORY)).all(|at| poke8(address.wrapping_add(at), words.octet()));
            answer.text(if written { b"OK" } else { b"E14" });
        }
        b'H' => answer.text(b"OK"),
        b'c' | b's' => {
            if packet.byte(0) == b's' {
                frame.rflags |= TRAP_FLAG;
            }
            WAITED_FOR.store(true, Ordering::Relaxed);
            return true;
        }
        b'D' => {
            answer.text(b"OK");
            answer.send();
            return true;
        }
        b'k' => return true,
        // An empty answer: not known.
        _ => {}
    }
    answer.send();
    false
}

/// gdb's order: RAX RBX RCX RDX RSI RDI RBP RSP R8-R15 RIP, then EFLAGS and six selectors of 32 bits.
fn register_slot(frame: &mut Frame, register: u64) -> Option<&mut u64> {
    // Where the frame has RAX RBX RCX RDX RSI RDI RBP.
    match register {
        0..=5 => frame.registers.get_mut(14 - register as usize),
        6 => frame.registers.get_mut(8),
        7 => Some(&mut frame.rsp),
        8..=15 => frame.registers.get_mut(15 - register as usize),
        16 => Some(&mut frame.rip),
        17 => Some(&mut frame.rflags),
        18 => Some(&mut frame.cs),
        19 => Some(&mut frame.ss),
        _ => None,
    }
}

fn register_value(frame: &mut Frame, register: u64) -> (u64, u32) {
    let value = register_slot(frame, register).map_or(0x10, |slot| *slot);
    (value, if register <= 16 { 8 } else { 4 })
}

/// A packet's data.
struct Packet {
    bytes: [u8; PACKET],
    length: usize,
}

impl Packet {
    const fn new() -> Self {
        Self {
            bytes: [0; PACKET],
            length: 0,
        }
    }

    fn byte(&self, at: usize) -> u8 {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        bytes.get(at).copied().unwrap_or(0)
    }

    fn push(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.length) {
            *slot = byte;
            self.length += 1;
        }
    }

    fn text(&mut self, text: &[u8]) {
        text.iter().for_each(|&byte| self.push(byte));
    }

    /// A number's lowest bytes in memory's order, each as two digits.
    fn little(&mut self, mut value: u64, bytes: u32) {
        for _ in 0..bytes {
            self.push(digit(value as u8 >> 4));
            self.push(digit(value as u8 & 15));
            value >>= 8;
        }
    }

    fn send(&self) {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        loop {
            let mut sum = 0u8;
            put(b'$');
            for &byte in bytes {
                put(byte);
                sum = sum.wrapping_add(byte);
            }
            put(b'#');
            put(digit(sum >> 4));
            put(digit(sum & 15));
            // A debugger that begins anew interrupts the wait.
            match wait_for_any() {
                b'-' => {}
                _ => return,
            }
        }
    }

    /// Waits for a packet that arrives whole.
    fn receive(&mut self) {
        loop {
            while get() != b'$' {}
            self.length = 0;
            let mut sum = 0u8;
            loop {
                match get() {
                    b'#' => break,
                    b'$' => {
                        self.length = 0;
                        sum = 0;
                    }
                    byte => {
                        sum = sum.wrapping_add(byte);
                        self.push(byte);
                    }
                }
            }
            let told = value(get()) << 4 | value(get());
            if told == sum {
                put(b'+');
                return;
            }
            put(b'-');
        }
    }
}

/// An acknowledgement.
fn wait_for_any() -> u8 {
    loop {
        let byte = get();
        if matches!(byte, b'+' | b'-') {
            return byte;
        }
    }
}

/// The numbers of a packet.
struct Words<'a> {
    packet: &'a Packet,
    at: usize,
}

impl Words<'_> {
    fn next(&mut self) -> u8 {
        self.at += 1;
        self.packet.byte(self.at - 1)
    }

    /// A number, and what separates it from the next.
    fn number(&mut self) -> u64 {
        let mut number = 0;
        while is_digit(self.packet.byte(self.at)) {
            number = number << 4 | u64::from(value(self.next()));
        }
        self.at += 1;
        number
    }

    fn octet(&mut self) -> u8 {
        value(self.next()) << 4 | value(self.next())
    }

    /// Eight bytes in memory's order.
    fn little(&mut self) -> u64 {
        (0..8).fold(0, |number, byte| {
            number | u64::from(self.octet()) << (8 * byte)
        })
    }
}

fn is_digit(letter: u8) -> bool {
    matches!(letter, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F')
}

fn value(letter: u8) -> u8 {
    match letter {
        b'0'..=b'9' => letter - b'0',
        b'a'..=b'f' => letter - b'a' + 10,
        b'A'..=b'F' => letter - b'A' + 10,
        _ => 0,
    }
}

fn digit(value: u8) -> u8 {
    if value < 10 {
        b'0' + value
    } else {
        b'a' - 10 + value
    }
}
