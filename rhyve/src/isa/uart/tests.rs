//! A guest's view of the UART, register by register.

use super::*;
use crate::testing::FakeIrq;

const DATA: u16 = 0x3f8;
const IER: u16 = 0x3f9;
const IIR: u16 = 0x3fa;
const FCR: u16 = 0x3fa;
const LCR: u16 = 0x3fb;
const MCR: u16 = 0x3fc;
const LSR: u16 = 0x3fd;
const MSR: u16 = 0x3fe;
const SCR: u16 = 0x3ff;

struct Rig {
    uart: Arc<Uart>,
    irq: Arc<FakeIrq>,
    wire: Arc<Console>,
}

impl Rig {
    fn new() -> Self {
        let (irq, wire) = (FakeIrq::new(), Console::new());
        Self {
            uart: Uart::new(irq.clone(), wire.clone()),
            irq,
            wire,
        }
    }

    /// FIFOs on, trigger at 8, OUT2 on.
    fn with_fifo() -> Self {
        let rig = Self::new();
        rig.set(FCR, 0x81);
        rig.set(MCR, 0x0b);
        rig
    }

    fn get(&self, port: u16) -> u8 {
        self.uart.read(port, IoSize::Byte) as u8
    }

    fn set(&self, port: u16, value: u8) {
        self.uart.write(port, IoSize::Byte, u32::from(value));
    }

    fn output(&self) -> Vec<u8> {
        let mut bytes = vec![0; 8192];
        let count = self.wire.peek_output(&mut bytes);
        bytes.truncate(count);
        self.wire.consume_output(count);
        bytes
    }
}

#[test]
fn reset_values() {
    let rig = Rig::new();
    assert_eq!(rig.get(IER), 0);
    assert_eq!(rig.get(IIR), 0x01);
    assert_eq!(rig.get(LCR), 0);
    assert_eq!(rig.get(MCR), 0);
    assert_eq!(rig.get(LSR), 0x60);
    assert_eq!(rig.get(MSR), 0xb0);
    assert!(!rig.irq.level());
}

/// The steps by which Linux tells a 16550A (drivers/tty/serial/8250/8250_port.c, autoconfig).
#[test]
fn linux_finds_a_16550a() {
    let rig = Rig::new();
    rig.set(IER, 0);
    assert_eq!(rig.get(IER) & 0x0f, 0);
    rig.set(IER, 0x0f);
    assert_eq!(rig.get(IER), 0x0f);
    rig.set(IER, 0x40);
    assert_eq!(rig.get(IER), 0, "no Intel UUE bit");
    rig.set(MCR, 0x1a);
    assert_eq!(rig.get(MSR) & 0xf0, 0x90, "loopback test");
    rig.set(MCR, 0);
    rig.set(LCR, 0xbf);
    assert_ne!(rig.get(FCR), 0, "an EFR would read zero");
    rig.set(LCR, 0);
    rig.set(FCR, 0x01);
    assert_eq!(rig.get(IIR) >> 6, 3, "16550A");
    rig.set(FCR, 0x21);
    assert_eq!(rig.get(IIR) >> 5, 6, "no 64-byte FIFO of a 16750");
    rig.set(SCR, 0xa5);
    assert_eq!(rig.get(SCR), 0xa5);
    // serial8250_do_startup: the interrupt must come each time it is enabled.
    for _ in 0..2 {
        rig.set(IER, 0x02);
        assert_eq!(rig.get(IIR) & 0x0f, 0x02);
        rig.set(IER, 0);
    }
}

#[test]
fn divisor_latch() {
    let rig = Rig::new();
    rig.set(LCR, 0x83);
    rig.set(DATA, 0x0c);
    rig.set(IER, 0x01);
    assert_eq!((rig.get(DATA), rig.get(IER)), (0x0c, 0x01));
    rig.set(LCR, 0x03);
    assert_eq!(rig.get(IER), 0);
    assert!(rig.output().is_empty());
}

#[test]
fn the_transmitter_interrupt() {
    let rig = Rig::with_fifo();
    rig.set(IER, 0x02);
    assert!(rig.irq.level());
    assert_eq!(rig.get(IIR), 0xc2);
    assert!(!rig.irq.level(), "reading IIR acknowledges it");
    assert_eq!(rig.get(IIR), 0xc1);
    for byte in *b"sixteen bytes!!!" {
        rig.set(DATA, byte);
    }
    assert!(!rig.irq.level());
    rig.uart.console_event();
    assert!(rig.irq.level(), "raised when the FIFO has emptied");
    rig.set(DATA, b'x');
    assert!(!rig.irq.level(), "a write acknowledges it as well");
    assert_eq!(rig.get(LSR) & 0x60, 0x60);
    assert!(rig.irq.level(), "an edge without a read of IIR");
    assert_eq!(rig.output(), b"sixteen bytes!!!x");
    assert_eq!(rig.irq.edges(), [true, false, true, false, true]);
}

#[test]
fn a_handler_that_loops_costs_one_interrupt() {
    let rig = Rig::with_fifo();
    rig.set(IER, 0x02);
    for _ in 0..10 {
        assert_eq!(rig.get(IIR), 0xc2);
        (0..16).for_each(|_| rig.set(DATA, b'.'));
    }
    rig.set(IER, 0);
    assert_eq!(rig.output().len(), 160);
    assert_eq!(rig.irq.raised(), 1);
}

#[test]
fn a_full_wire_holds_the_guest_back() {
    let rig = Rig::with_fifo();
    rig.set(IER, 0x02);
    let mut sent = 0;
    while rig.get(LSR) & 0x20 != 0 {
        (0..16).for_each(|_| rig.set(DATA, b'.'));
        sent += 16;
        assert!(sent < 100_000);
    }
    assert_eq!(rig.get(IIR), 0xc1);
    assert_eq!(rig.output().len(), sent, "nothing was lost");
    rig.uart.console_event();
    assert!(rig.irq.level());
    assert_eq!(rig.get(LSR) & 0x60, 0x60);
}

#[test]
fn received_data_trigger_and_timeout() {
    let rig = Rig::with_fifo();
    rig.set(IER, 0x01);
    rig.wire.push_input(b"0123456789");
    assert!(rig.irq.level());
    assert_eq!(rig.get(IIR), 0xc4);
    let read: Vec<u8> = (0..3).map(|_| rig.get(DATA)).collect();
    assert_eq!(read, b"012");
    assert!(!rig.irq.level(), "below the trigger");
    assert_eq!(rig.get(IIR), 0xcc, "character time-out");
    let mut rest = Vec::new();
    while rig.get(LSR) & 1 != 0 {
        rest.push(rig.get(DATA));
    }
    assert_eq!(rest, b"3456789");
    assert_eq!(rig.get(IIR), 0xc1);
    assert!(!rig.irq.level());
}

#[test]
fn input_waits_on_the_wire() {
    for fifo in [0x00, 0xc1] {
        let rig = Rig::new();
        rig.set(FCR, fifo);
        rig.set(MCR, 0x08);
        rig.set(IER, 0x05);
        let sent: Vec<u8> = (0..100).collect();
        assert_eq!(rig.wire.push_input(&sent), 100);
        let mut read = Vec::new();
        // One character an interrupt, as the dullest handler would.
        while rig.irq.level() {
            assert!(matches!(rig.get(IIR) & 0x0f, 0x04 | 0x0c));
            read.push(rig.get(DATA));
            assert!(!rig.irq.level() || fifo != 0);
            rig.uart.console_event();
        }
        assert_eq!(read, sent);
    }
}

#[test]
fn out2_gates_the_interrupt() {
    let rig = Rig::new();
    rig.set(IER, 0x02);
    assert!(!rig.irq.level());
    rig.set(MCR, 0x08);
    assert!(rig.irq.level());
    rig.set(MCR, 0x00);
    assert!(!rig.irq.level());
}

#[test]
fn loopback_data_overrun_and_priorities() {
    let rig = Rig::with_fifo();
    rig.set(MCR, 0x18);
    rig.get(MSR);
    rig.set(IER, 0x0f);
    for byte in 0..17 {
        rig.set(DATA, byte);
    }
    rig.set(MCR, 0x1a);
    assert_eq!(rig.get(IIR), 0xc6);
    assert_eq!(rig.get(LSR) & 0x03, 0x03, "overrun, and data ready");
    assert_eq!(rig.get(LSR) & 0x02, 0, "cleared by the read");
    assert_eq!(rig.get(IIR), 0xc4);
    let read: Vec<u8> = (0..16).map(|_| rig.get(DATA)).collect();
    assert_eq!(read, (0..16).collect::<Vec<u8>>(), "the 17th was lost");
    assert_eq!(rig.get(IIR), 0xc2);
    assert_eq!(rig.get(IIR), 0xc0, "modem status last");
    assert_eq!(rig.get(MSR), 0x91, "CTS rose");
    assert_eq!(rig.get(IIR), 0xc1);
    assert!(rig.output().is_empty(), "nothing reaches the line");
}

#[test]
fn overrun_without_fifo_keeps_the_last() {
    let rig = Rig::new();
    rig.set(MCR, 0x10);
    rig.set(DATA, b'a');
    rig.set(DATA, b'b');
    assert_eq!(rig.get(LSR) & 0x03, 0x03);
    assert_eq!(rig.get(DATA), b'b');
    assert_eq!(rig.get(LSR) & 0x03, 0);
}

#[test]
fn break_in_loopback() {
    let rig = Rig::with_fifo();
    rig.set(MCR, 0x18);
    rig.set(IER, 0x04);
    rig.set(DATA, b'a');
    rig.set(LCR, 0x43);
    rig.set(LCR, 0x03);
    assert_eq!(rig.get(LSR) & 0x91, 0x81, "an error, but not at the top");
    assert_eq!(rig.get(DATA), b'a');
    assert_eq!(rig.get(IIR), 0xc6);
    assert_eq!(rig.get(LSR) & 0x91, 0x91);
    assert_eq!(rig.get(LSR) & 0x91, 0x01);
    assert_eq!(rig.get(DATA), 0);
    assert_eq!(rig.get(IIR), 0xc1);
}

#[test]
fn modem_deltas() {
    let rig = Rig::new();
    rig.set(MCR, 0x10);
    assert_eq!(rig.get(MSR), 0x0b, "all three inputs fell");
    rig.set(MCR, 0x14);
    assert_eq!(rig.get(MSR), 0x40, "RI rises without a delta");
    rig.set(MCR, 0x10);
    assert_eq!(rig.get(MSR), 0x04, "its trailing edge");
    rig.set(MCR, 0x1f);
    assert_eq!(rig.get(MSR), 0xfb);
    assert_eq!(rig.get(MSR), 0xf0);
}

#[test]
fn fifo_control() {
    let rig = Rig::with_fifo();
    rig.wire.push_input(b"abc");
    rig.set(FCR, 0x02);
    assert_eq!(rig.get(IIR) >> 6, 0, "disabled");
    assert_eq!(rig.get(LSR) & 1, 0, "and emptied");
    rig.set(FCR, 0x01);
    rig.wire.push_input(b"def");
    rig.set(FCR, 0x03);
    assert_eq!(rig.get(LSR) & 1, 0, "reset");
    for (level, trigger) in [(0x01, 1), (0x41, 4), (0x81, 8), (0xc1, 14)] {
        rig.set(FCR, level | 2);
        rig.set(IER, 0x01);
        for count in 1..=trigger {
            rig.wire.push_input(b"x");
            let expected = if count < trigger { 0xcc } else { 0xc4 };
            assert_eq!(rig.get(IIR), expected, "{count} of {trigger}");
        }
    }
}

#[test]
fn a_restored_uart_has_all_its_input_in_order() {
    let rig = Rig::with_fifo();
    rig.set(IER, 0x01);
    rig.wire.push_input(b"first and more than a FIFO holds");
    let state = rig.uart.save().unwrap();
    let again = Rig::new();
    again.wire.push_input(b", then late");
    again.uart.restore(&state).unwrap();
    assert!(again.irq.edges().last().is_some_and(|&level| level));
    let mut read = String::new();
    while again.get(LSR) & 1 != 0 {
        read.push(char::from(again.get(DATA)));
    }
    assert_eq!(read, "first and more than a FIFO holds, then late");
    assert_eq!(again.get(MCR), rig.get(MCR));
    let mut other = state.clone();
    other.data["input"] = "0g".into();
    assert!(again.uart.restore(&other).is_err());
}
