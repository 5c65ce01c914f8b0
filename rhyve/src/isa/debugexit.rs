//! isa-debug-exit: a port by which a test guest ends its machine with a value.
//!
//! QEMU's device of that name (hw/misc/debugexit.c), where test kernels expect it. It is there only
//! when asked for.

use std::sync::Arc;

use crate::bus::{InOut, IoSize, Overlap, PortBus};
use crate::suspend::{SuspendHow, SuspendSink};

/// Ports it takes.
const PORTS: u16 = 4;

/// The device.
pub struct DebugExit {
    suspend: Arc<dyn SuspendSink>,
}

impl DebugExit {
    /// A write of value v to it suspends the machine with [`SuspendHow::DebugExit`] of v's low byte.
    pub fn new(suspend: Arc<dyn SuspendSink>) -> Arc<Self> {
        Arc::new(Self { suspend })
    }

    /// Puts it at `port` and the three ports that follow.
    ///
    /// # Errors
    /// [`Overlap`].
    pub fn register(self: &Arc<Self>, bus: &PortBus, port: u16) -> Result<(), Overlap> {
        bus.register(
            port..=port.saturating_add(PORTS - 1),
            "debugexit",
            self.clone(),
        )
    }
}

impl InOut for DebugExit {
    fn saved(&self) -> bool {
        true
    }

    fn width(&self) -> IoSize {
        IoSize::Dword
    }

    fn read(&self, _port: u16, _size: IoSize) -> u32 {
        0
    }

    fn write(&self, _port: u16, _size: IoSize, value: u32) {
        self.suspend.suspend(SuspendHow::DebugExit(value as u8));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeSuspend;

    #[test]
    fn the_value_gets_out() {
        let (bus, suspend) = (PortBus::new(), FakeSuspend::new());
        DebugExit::new(suspend.clone())
            .register(&bus, 0xf4)
            .unwrap();
        bus.write(0xf4, IoSize::Dword, 0x1_0021).unwrap();
        bus.write(0xf5, IoSize::Byte, 3).unwrap();
        let expected = [SuspendHow::DebugExit(0x21), SuspendHow::DebugExit(3)];
        assert_eq!(suspend.requests(), expected);
    }
}
