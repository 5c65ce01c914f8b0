//! A serial port: the NS16550A, with its FIFOs, behind one of the PC's four COM ports.
//!
//! Facts are from the PC16550D data sheet (National Semiconductor, June 1995); section numbers below
//! are its. Bytes go out through a [`Console`] and come in from it.
//!
//! **Time.** The line is infinitely fast, but never faster than the guest looks: the transmitter
//! empties, the receiver refills from the wire and a character time-out falls due when the guest next
//! reads a register that shows it (`State::settle`), or after [`COALESCE`](crate::console::COALESCE)
//! if it does not look. A driver that loops in its interrupt handler sees the events of a fast line in
//! the right order, yet costs no interrupt, and no call to the interrupt controller, for each byte; one
//! that waits for the next edge gets it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use vmm_api::state::{DeviceState, StateError};

use crate::bus::{InOut, IoSize};
use crate::console::{Console, GuestEnd, Wake};
use crate::irq::IrqLine;
use crate::lifecycle::{self, Lifecycle};

/// One of the PC's serial ports: where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComPort {
    /// Its name on the command line, and on the bus.
    pub name: &'static str,
    /// First of its 8 ports; a multiple of 8.
    pub base: u16,
    /// Its ISA interrupt.
    pub irq: u8,
}

/// COM1 to COM4, where bhyve has them (usr.sbin/bhyve/uart_emul.c).
pub const COM_PORTS: [ComPort; 4] = [
    ComPort {
        name: "com1",
        base: 0x3f8,
        irq: 4,
    },
    ComPort {
        name: "com2",
        base: 0x2f8,
        irq: 3,
    },
    ComPort {
        name: "com3",
        base: 0x3e8,
        irq: 4,
    },
    ComPort {
        name: "com4",
        base: 0x2e8,
        irq: 3,
    },
];

/// Ports of one UART.
pub const PORTS: u16 = 8;

/// Depth of each FIFO (8.4).
const FIFO: usize = 16;

bitflags! {
    /// Interrupt enable register (8.6).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    struct Ier: u8 {
        const RECEIVED = 1 << 0;
        const TRANSMITTER = 1 << 1;
        const LINE_STATUS = 1 << 2;
        const MODEM_STATUS = 1 << 3;
    }

    /// FIFO control register (8.4), but for the trigger level in bits 6 and 7.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    struct Fcr: u8 {
        const ENABLE = 1 << 0;
        const RESET_RECEIVER = 1 << 1;
    }

    /// Line control register (8.1), as far as it matters without a line.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    struct Lcr: u8 {
        const BREAK = 1 << 6;
        const DIVISOR_LATCH = 1 << 7;
        const _ = !0;
    }

    /// Modem control register (8.7).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    struct Mcr: u8 {
        const DTR = 1 << 0;
        const RTS = 1 << 1;
        const OUT1 = 1 << 2;
        /// On a PC it gates the interrupt onto the bus.
        const OUT2 = 1 << 3;
        const LOOP = 1 << 4;
    }

    /// Line status register (8.3).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    struct Lsr: u8 {
        const DATA_READY = 1 << 0;
        const OVERRUN = 1 << 1;
        const BREAK = 1 << 4;
        const THR_EMPTY = 1 << 5;
        const TRANSMITTER_EMPTY = 1 << 6;
        const FIFO_ERROR = 1 << 7;
    }

    /// Modem status register (8.8).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    struct Msr: u8 {
        const DELTA_CTS = 1 << 0;
        const DELTA_DSR = 1 << 1;
        const TRAILING_RI = 1 << 2;
        const DELTA_DCD = 1 << 3;
        const CTS = 1 << 4;
        const DSR = 1 << 5;
        const RI = 1 << 6;
        const DCD = 1 << 7;
    }
}

/// A received character with its errors.
#[derive(Clone, Copy, Debug)]
struct Received {
    byte: u8,
    is_break: bool,
}

/// Interrupt identification (table III), by falling priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interrupt {
    LineStatus = 0x6,
    DataAvailable = 0x4,
    CharacterTimeout = 0xc,
    TransmitterEmpty = 0x2,
    ModemStatus = 0x0,
}

#[derive(Debug, Default)]
struct State {
    ier: Ier,
    lcr: Lcr,
    mcr: Mcr,
    scratch: u8,
    divisor: [u8; 2],
    fifo_enabled: bool,
    /// Received characters that raise the interrupt: 1, 4, 8 or 14.
    trigger: usize,
    receiver: VecDeque<Received>,
    overrun: bool,
    /// The break of the character at the top has not been read from LSR yet.
    break_pending: bool,
    /// Characters are in the FIFO, below the trigger, and no more are coming.
    timeout: bool,
    /// Sent, and not yet settled.
    transmitting: bool,
    /// THR empty, not yet acknowledged by a read of IIR or a write of THR.
    thr_interrupt: bool,
    modem: Msr,
    /// The level on the interrupt line.
    asserted: bool,
}

impl State {
    fn capacity(&self) -> usize {
        if self.fifo_enabled { FIFO } else { 1 }
    }

    fn looped(&self) -> bool {
        self.mcr.contains(Mcr::LOOP)
    }

    /// Puts a character into the receiver. One too many is lost in FIFO mode and overwrites
    /// the last one without a FIFO (8.3, bit 1).
    fn push(&mut self, received: Received) {
        if self.receiver.len() >= self.capacity() {
            self.overrun = true;
            if self.fifo_enabled {
                return;
            }
            self.receiver.clear();
        }
        self.receiver.push_back(received);
        self.timeout = false;
        if self.receiver.len() == 1 {
            self.break_pending = received.is_break;
        }
    }

    fn clear_receiver(&mut self) {
        self.receiver.clear();
        self.timeout = false;
        self.break_pending = false;
    }

    /// Fills the receiver from the wire, which is disconnected in loopback.
    fn refill(&mut self, console: &Console) {
        while !self.looped() && self.receiver.len() < self.capacity() {
            let Some(byte) = console.receive() else { break };
            self.push(Received {
                byte,
                is_break: false,
            });
        }
    }

    /// Lets the transmitter empty, if the wire has room for a whole FIFO.
    fn settle_transmitter(&mut self, console: &Console) {
        if self.transmitting && (self.looped() || console.send_room() >= FIFO) {
            self.transmitting = false;
            self.thr_interrupt = true;
        }
    }

    /// Lets everything happen that the passing of time brings.
    fn settle(&mut self, console: &Console) {
        self.settle_transmitter(console);
        self.refill(console);
        self.timeout = self.fifo_enabled && !self.receiver.is_empty();
    }

    /// The highest pending interrupt.
    fn pending(&self) -> Option<Interrupt> {
        let trigger = if self.fifo_enabled { self.trigger } else { 1 };
        if self.ier.contains(Ier::LINE_STATUS) && (self.overrun || self.break_pending) {
            Some(Interrupt::LineStatus)
        } else if self.ier.contains(Ier::RECEIVED) && self.receiver.len() >= trigger {
            Some(Interrupt::DataAvailable)
        } else if self.ier.contains(Ier::RECEIVED) && self.timeout {
            Some(Interrupt::CharacterTimeout)
        } else if self.ier.contains(Ier::TRANSMITTER) && self.thr_interrupt {
            Some(Interrupt::TransmitterEmpty)
        } else if self.ier.contains(Ier::MODEM_STATUS) && self.modem.bits() & 0xf != 0 {
            Some(Interrupt::ModemStatus)
        } else {
            None
        }
    }

    /// Recomputes the modem inputs and notes which of them changed (8.8). Nothing is ever seen of
    /// the host's side but a modem that is ready and has a carrier.
    fn update_modem(&mut self) {
        let wires = if self.looped() {
            // 8.7, bit 4: the outputs are connected to the inputs.
            let mut wires = Msr::empty();
            wires.set(Msr::CTS, self.mcr.contains(Mcr::RTS));
            wires.set(Msr::DSR, self.mcr.contains(Mcr::DTR));
            wires.set(Msr::RI, self.mcr.contains(Mcr::OUT1));
            wires.set(Msr::DCD, self.mcr.contains(Mcr::OUT2));
            wires
        } else {
            Msr::CTS | Msr::DSR | Msr::DCD
        };
        let changed = self.modem ^ wires;
        let mut deltas = Msr::from_bits_truncate(self.modem.bits() & 0xf);
        deltas.set(
            Msr::DELTA_CTS,
            deltas.contains(Msr::DELTA_CTS) || changed.contains(Msr::CTS),
        );
        deltas.set(
            Msr::DELTA_DSR,
            deltas.contains(Msr::DELTA_DSR) || changed.contains(Msr::DSR),
        );
        deltas.set(
            Msr::DELTA_DCD,
            deltas.contains(Msr::DELTA_DCD) || changed.contains(Msr::DCD),
        );
        if changed.contains(Msr::RI) && !wires.contains(Msr::RI) {
            deltas |= Msr::TRAILING_RI;
        }
        self.modem = wires | deltas;
    }

    fn line_status(&mut self, console: &Console) -> u8 {
        self.settle_transmitter(console);
        if self.receiver.is_empty() {
            self.refill(console);
        }
        let mut status = Lsr::empty();
        status.set(Lsr::DATA_READY, !self.receiver.is_empty());
        status.set(Lsr::OVERRUN, std::mem::take(&mut self.overrun));
        status.set(Lsr::THR_EMPTY | Lsr::TRANSMITTER_EMPTY, !self.transmitting);
        let errors = self.break_pending || self.receiver.iter().skip(1).any(|next| next.is_break);
        status.set(Lsr::FIFO_ERROR, self.fifo_enabled && errors);
        status.set(Lsr::BREAK, std::mem::take(&mut self.break_pending));
        status.bits()
    }

    fn receive(&mut self) -> u8 {
        let byte = self
            .receiver
            .pop_front()
            .map_or(0, |received| received.byte);
        self.timeout = false;
        self.break_pending = self.receiver.front().is_some_and(|next| next.is_break);
        byte
    }

    fn transmit(&mut self, byte: u8, console: &Console) {
        self.thr_interrupt = false;
        self.transmitting = true;
        if self.looped() {
            self.push(Received {
                byte,
                is_break: false,
            });
        } else if !console.send(byte) {
            // A guest that ignores THRE overruns the transmitter, as it would on a board.
            tracing::trace!(target: "rhyve::isa::uart", byte, "transmitter overrun");
        }
    }

    fn identify(&mut self, console: &Console) -> u8 {
        self.settle(console);
        let fifos = if self.fifo_enabled { 0xc0 } else { 0 };
        let pending = self.pending();
        if pending == Some(Interrupt::TransmitterEmpty) {
            self.thr_interrupt = false;
        }
        fifos | pending.map_or(1, |interrupt| interrupt as u8)
    }

    fn set_interrupt_enable(&mut self, value: u8, console: &Console) {
        self.settle_transmitter(console);
        let enabled = Ier::from_bits_truncate(value);
        // Enabling the interrupt while the register is empty raises it at once.
        if (enabled - self.ier).contains(Ier::TRANSMITTER) && !self.transmitting {
            self.thr_interrupt = true;
        }
        self.ier = enabled;
    }

    fn set_fifo_control(&mut self, value: u8) {
        let control = Fcr::from_bits_truncate(value);
        let enabled = control.contains(Fcr::ENABLE);
        // 8.4, bit 0: changing the mode clears the FIFOs, and the other bits count only with it set.
        if enabled != self.fifo_enabled || enabled && control.contains(Fcr::RESET_RECEIVER) {
            self.clear_receiver();
        }
        self.fifo_enabled = enabled;
        if enabled {
            self.trigger = match value >> 6 {
                0 => 1,
                1 => 4,
                2 => 8,
                _ => 14,
            };
        }
    }

    fn set_line_control(&mut self, value: u8) {
        let control = Lcr::from_bits_retain(value);
        // In loopback the receiver sees the break: one zero character, flagged (8.3, bit 4).
        if self.looped() && (control - self.lcr).contains(Lcr::BREAK) {
            self.push(Received {
                byte: 0,
                is_break: true,
            });
        }
        self.lcr = control;
    }

    fn read(&mut self, register: u16, console: &Console) -> u8 {
        match (register, self.lcr.contains(Lcr::DIVISOR_LATCH)) {
            (0, true) => self.divisor[0],
            (1, true) => self.divisor[1],
            (0, false) => {
                if self.receiver.is_empty() {
                    self.refill(console);
                }
                self.receive()
            }
            (1, false) => self.ier.bits(),
            (2, _) => self.identify(console),
            (3, _) => self.lcr.bits(),
            (4, _) => self.mcr.bits(),
            (5, _) => self.line_status(console),
            (6, _) => {
                let status = self.modem.bits();
                self.modem = Msr::from_bits_truncate(status & 0xf0);
                status
            }
            _ => self.scratch,
        }
    }

    fn write(&mut self, register: u16, value: u8, console: &Console) {
        match (register, self.lcr.contains(Lcr::DIVISOR_LATCH)) {
            (0, true) => self.divisor[0] = value,
            (1, true) => self.divisor[1] = value,
            (0, false) => self.transmit(value, console),
            (1, false) => self.set_interrupt_enable(value, console),
            (2, _) => self.set_fifo_control(value),
            (3, _) => self.set_line_control(value),
            (4, _) => {
                self.mcr = Mcr::from_bits_truncate(value);
                self.update_modem();
            }
            (7, _) => self.scratch = value,
            // LSR and MSR are not to be written.
            _ => {}
        }
    }

    /// Whether something is left that only the passing of time will show the guest.
    fn unsettled(&self, console: &Console) -> bool {
        let timeout = self.fifo_enabled && !self.timeout && !self.receiver.is_empty();
        self.ier.contains(Ier::TRANSMITTER) && self.transmitting
            || self.ier.contains(Ier::RECEIVED)
                && (timeout || !self.looped() && console.has_input())
    }
}

/// A 16550A.
pub struct Uart {
    irq: Arc<dyn IrqLine>,
    console: Arc<Console>,
    state: Mutex<State>,
}

impl Uart {
    /// A UART after its reset, interrupting through `irq`, its line at `console`.
    pub fn new(irq: Arc<dyn IrqLine>, console: Arc<Console>) -> Arc<Self> {
        let mut state = State {
            trigger: 1,
            ..State::default()
        };
        state.update_modem();
        state.modem = Msr::from_bits_truncate(state.modem.bits() & 0xf0);
        let uart = Arc::new(Self {
            irq,
            console,
            state: Mutex::new(state),
        });
        let guest: Weak<dyn GuestEnd> = Arc::<Self>::downgrade(&uart);
        uart.console.connect_guest(guest);
        uart
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update_line(&self, state: &mut State) {
        let asserted = state.pending().is_some() && state.mcr.contains(Mcr::OUT2);
        if asserted != state.asserted {
            state.asserted = asserted;
            self.irq.set(asserted);
        }
        if !asserted && state.unsettled(&self.console) {
            self.console.wake(Wake::Soon);
        }
    }
}

/// A UART as it is stored, and what of its input is still on the wire.
#[derive(Serialize, Deserialize)]
struct Saved {
    ier: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: [u8; 2],
    fifo_enabled: bool,
    trigger: u8,
    /// Characters, and whether each is a break.
    receiver: Vec<(u8, bool)>,
    overrun: bool,
    break_pending: bool,
    timeout: bool,
    transmitting: bool,
    thr_interrupt: bool,
    modem: u8,
    #[serde(with = "lifecycle::bytes")]
    input: Vec<u8>,
}

const KIND: &str = "uart";

impl Lifecycle for Uart {
    fn save(&self) -> Result<DeviceState, String> {
        let state = self.state();
        let saved = Saved {
            ier: state.ier.bits(),
            lcr: state.lcr.bits(),
            mcr: state.mcr.bits(),
            scratch: state.scratch,
            divisor: state.divisor,
            fifo_enabled: state.fifo_enabled,
            trigger: u8::try_from(state.trigger).unwrap_or(1),
            receiver: state
                .receiver
                .iter()
                .map(|r| (r.byte, r.is_break))
                .collect(),
            overrun: state.overrun,
            break_pending: state.break_pending,
            timeout: state.timeout,
            transmitting: state.transmitting,
            thr_interrupt: state.thr_interrupt,
            modem: state.modem.bits(),
            input: self.console.pending_input(),
        };
        lifecycle::save(KIND, 1, &saved)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Saved = lifecycle::load(KIND, 1, state)?;
        let received = |(byte, is_break): &(u8, bool)| Received {
            byte: *byte,
            is_break: *is_break,
        };
        {
            let mut state = self.state();
            // What came since this process began comes after what was there.
            let early = state.receiver.drain(..).map(|received| received.byte);
            let input: Vec<u8> = saved.input.iter().copied().chain(early).collect();
            self.console.put_back(&input);
            *state = State {
                ier: Ier::from_bits_truncate(saved.ier),
                lcr: Lcr::from_bits_retain(saved.lcr),
                mcr: Mcr::from_bits_truncate(saved.mcr),
                scratch: saved.scratch,
                divisor: saved.divisor,
                fifo_enabled: saved.fifo_enabled,
                trigger: usize::from(saved.trigger.clamp(1, 14)),
                receiver: saved.receiver.iter().take(FIFO).map(received).collect(),
                overrun: saved.overrun,
                break_pending: saved.break_pending,
                timeout: saved.timeout,
                transmitting: saved.transmitting,
                thr_interrupt: saved.thr_interrupt,
                modem: Msr::from_bits_truncate(saved.modem),
                asserted: false,
            };
            self.update_line(&mut state);
        }
        self.console_event();
        Ok(())
    }
}

impl InOut for Uart {
    fn saved(&self) -> bool {
        true
    }

    fn read(&self, port: u16, _size: IoSize) -> u32 {
        let mut state = self.state();
        let value = state.read(port % PORTS, &self.console);
        self.update_line(&mut state);
        u32::from(value)
    }

    fn write(&self, port: u16, _size: IoSize, value: u32) {
        let mut state = self.state();
        // Lossless: the bus hands over bytes.
        state.write(port % PORTS, value as u8, &self.console);
        self.update_line(&mut state);
    }
}

impl GuestEnd for Uart {
    fn console_event(&self) {
        let mut state = self.state();
        state.settle(&self.console);
        self.update_line(&mut state);
    }
}

#[cfg(test)]
mod tests;
