//! One byte at a time, either way, through a 32-bit port.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::bus::IoSize;
use crate::console::Console;

/// Ports a device takes: those of one 32-bit access.
pub(super) const PORTS: u16 = 4;
/// What a read finds where nothing is, in any width.
pub(super) const NOTHING: u32 = u32::MAX;
/// How long a guest waits for a reader that does not read.
const PATIENCE: Duration = Duration::from_secs(1);

/// The registers of a BVM device.
pub struct BytePort {
    base: u16,
    signature: u16,
    wire: Arc<Console>,
    /// The reader was waited for in vain, and has taken nothing since.
    stalled: AtomicBool,
}

impl BytePort {
    /// A device at `base` which a kernel knows by `signature`.
    pub(super) fn new(base: u16, signature: u16, wire: Arc<Console>) -> Self {
        Self {
            base,
            signature,
            wire,
            stalled: AtomicBool::new(false),
        }
    }

    /// Whether an access moves a byte of data.
    pub(super) fn is_data(&self, port: u16, size: IoSize) -> bool {
        port == self.base && size == IoSize::Dword
    }

    /// A 32-bit read takes the next byte, 0 to 255, and a 16-bit one is the signature.
    pub(super) fn read(&self, port: u16, size: IoSize) -> u32 {
        match size {
            IoSize::Dword if port == self.base => self.wire.receive().map_or(NOTHING, u32::from),
            IoSize::Word if port == self.base => self.signature.into(),
            _ => NOTHING,
        }
    }

    /// A 32-bit write sends its low byte.
    pub(super) fn write(&self, port: u16, size: IoSize, value: u32) {
        if !self.is_data(port, size) {
            return;
        }
        let byte = value as u8;
        let sent = if self.stalled.load(Ordering::Relaxed) {
            self.wire.send(byte)
        } else {
            self.wire.send_within(byte, PATIENCE)
        };
        self.stalled.store(!sent, Ordering::Relaxed);
    }
}
