//! POST codes: port 0x80, and what else of the DMA page registers guests touch for a delay.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use vmm_api::state::{DeviceState, StateError};

use crate::bus::{InOut, IoSize, Overlap, PortBus};
use crate::lifecycle::{self, Lifecycle};

/// Where power-on self-tests write their progress, and Linux its delays.
const POST: u16 = 0x80;
/// Where FreeBSD reads for a delay.
const DELAY: u16 = 0x84;

/// Keeps the last code.
#[derive(Default)]
pub struct Post {
    last: AtomicU8,
}

impl Post {
    /// Nothing written yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The code written last; 0 before the first.
    pub fn last(&self) -> u8 {
        self.last.load(Relaxed)
    }

    /// Puts it at 0x80 and 0x84.
    ///
    /// # Errors
    /// [`Overlap`].
    pub fn register(self: &Arc<Self>, bus: &PortBus) -> Result<(), Overlap> {
        bus.register(POST..=POST, "post", self.clone())?;
        bus.register(DELAY..=DELAY, "post-delay", self.clone())
    }
}

impl Lifecycle for Post {
    fn save(&self) -> Result<DeviceState, String> {
        lifecycle::save("post", 1, &self.last())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        self.last.store(lifecycle::load("post", 1, state)?, Relaxed);
        Ok(())
    }
}

impl InOut for Post {
    fn saved(&self) -> bool {
        true
    }

    fn read(&self, port: u16, _size: IoSize) -> u32 {
        if port == POST {
            u32::from(self.last())
        } else {
            0xff
        }
    }

    fn write(&self, port: u16, _size: IoSize, value: u32) {
        if port == POST {
            // Lossless: the bus hands over bytes.
            self.last.store(value as u8, Relaxed);
            tracing::trace!(target: "rhyve::isa::post", code = value, "POST");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_code_is_kept() {
        let (bus, post) = (PortBus::new(), Post::new());
        post.register(&bus).unwrap();
        bus.write(0x80, IoSize::Byte, 0x55).unwrap();
        bus.write(0x84, IoSize::Byte, 0xaa).unwrap();
        assert_eq!(post.last(), 0x55);
        assert_eq!(bus.read(0x80, IoSize::Byte), Ok(0x55));
        assert_eq!(bus.read(0x84, IoSize::Byte), Ok(0xff));
    }
}
