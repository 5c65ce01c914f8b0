//! What is left of the keyboard controller: the reset line.
//!
//! There is no keyboard and no controller, and guests should notice that fast. Reads float, but for
//! one bit: *input buffer full* reads 0, since everything waits for that before it writes the command
//! that resets the machine (Linux's `kb_wait` would poll 65536 times). *Output buffer full*, as it
//! floats high, is how Linux's `i8042_flush` concludes after 16 reads that nobody is there; with it 0
//! Linux would wait half a second for each of several commands.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use vmm_api::state::{DeviceState, StateError};

use crate::bus::{InOut, IoSize, Overlap, PortBus};
use crate::lifecycle::{self, Lifecycle};
use crate::suspend::{SuspendHow, SuspendSink};

/// Data.
const DATA: u16 = 0x60;
/// Status when read, command when written.
const COMMAND: u16 = 0x64;

/// A floating status, but ready for a command.
const STATUS: u32 = 0xfd;

/// The next byte of data goes to the output port.
const WRITE_OUTPUT_PORT: u8 = 0xd1;
/// Pulses those lines of the output port low whose bits are 0 in the command's low four.
const PULSE_OUTPUT_PORT: u8 = 0xf0;
/// The output port's line to the CPU's reset, active low.
const RESET_LINE: u8 = 1 << 0;

/// The ports where a keyboard controller would be.
pub struct I8042 {
    suspend: Arc<dyn SuspendSink>,
    writes_output_port: AtomicBool,
}

impl I8042 {
    /// A reset through it suspends the machine with [`SuspendHow::Reset`].
    pub fn new(suspend: Arc<dyn SuspendSink>) -> Arc<Self> {
        Arc::new(Self {
            suspend,
            writes_output_port: AtomicBool::new(false),
        })
    }

    /// Puts it at 0x60 and 0x64.
    ///
    /// # Errors
    /// [`Overlap`].
    pub fn register(self: &Arc<Self>, bus: &PortBus) -> Result<(), Overlap> {
        bus.register(DATA..=DATA, "i8042-data", self.clone())?;
        bus.register(COMMAND..=COMMAND, "i8042", self.clone())
    }
}

impl Lifecycle for I8042 {
    fn save(&self) -> Result<DeviceState, String> {
        lifecycle::save("i8042", 1, &self.writes_output_port.load(Relaxed))
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let writes = lifecycle::load("i8042", 1, state)?;
        self.writes_output_port.store(writes, Relaxed);
        Ok(())
    }
}

impl InOut for I8042 {
    fn saved(&self) -> bool {
        true
    }

    fn read(&self, port: u16, _size: IoSize) -> u32 {
        if port == COMMAND { STATUS } else { 0xff }
    }

    fn write(&self, port: u16, _size: IoSize, value: u32) {
        // Lossless: the bus hands over bytes.
        let value = value as u8;
        let resets = if port == COMMAND {
            self.writes_output_port
                .store(value == WRITE_OUTPUT_PORT, Relaxed);
            value >= PULSE_OUTPUT_PORT && value & RESET_LINE == 0
        } else {
            self.writes_output_port.swap(false, Relaxed) && value & RESET_LINE == 0
        };
        if resets {
            self.suspend.suspend(SuspendHow::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeSuspend;

    #[test]
    fn resets_and_nothing_else() {
        let (bus, suspend) = (PortBus::new(), FakeSuspend::new());
        I8042::new(suspend.clone()).register(&bus).unwrap();
        let out = |port, value| bus.write(port, IoSize::Byte, value).unwrap();
        for command in [0x20, 0xaa, 0xff, 0xf1, 0xd0] {
            out(0x64, command);
            out(0x60, 0x00);
        }
        out(0x64, 0xd1);
        out(0x60, 0xdf);
        assert_eq!(suspend.requests(), []);
        out(0x64, 0xfe);
        out(0x64, 0xd1);
        out(0x60, 0x02);
        assert_eq!(suspend.requests(), [SuspendHow::Reset; 2]);
    }

    #[test]
    fn linux_neither_finds_nor_awaits_it() {
        let bus = PortBus::new();
        I8042::new(FakeSuspend::new()).register(&bus).unwrap();
        let status = bus.read(0x64, IoSize::Byte).unwrap();
        assert_eq!(
            status & 0x03,
            0x01,
            "nothing to wait for, and nothing to talk to"
        );
    }
}
