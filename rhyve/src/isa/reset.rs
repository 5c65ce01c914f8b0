//! The reset control register at port 0xcf9, as in Intel's chip sets since the PIIX3
//! (82371SB data sheet, 2.1.4).
//!
//! It lies inside the range of PCI's configuration address, which decodes 32-bit accesses only, so
//! [`ConfigPorts`](crate::pci::ConfigPorts) owns the range and hands it the byte accesses.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use crate::suspend::{SuspendHow, SuspendSink};

/// Reset the whole system rather than the CPU.
const SYSTEM: u8 = 1 << 1;
/// Reset now, when it goes from 0 to 1.
const TRIGGER: u8 = 1 << 2;
/// Power-cycle as well.
const FULL: u8 = 1 << 3;

/// The register.
pub struct ResetControl {
    suspend: Arc<dyn SuspendSink>,
    value: AtomicU8,
}

impl ResetControl {
    /// The register after a reset. Whatever kind of reset is triggered through it, the whole machine
    /// is suspended with [`SuspendHow::Reset`]: there is no firmware a reset of the CPU alone could
    /// return to.
    pub fn new(suspend: Arc<dyn SuspendSink>) -> Arc<Self> {
        Arc::new(Self {
            suspend,
            value: AtomicU8::new(0),
        })
    }

    /// What a guest reads.
    pub fn read(&self) -> u8 {
        self.value.load(Relaxed)
    }

    /// Goes on from what a guest had written, without doing it again.
    pub fn restore(&self, value: u8) {
        self.value.store(value & (SYSTEM | TRIGGER | FULL), Relaxed);
    }

    /// What a guest writes.
    pub fn write(&self, value: u8) {
        let before = self.value.swap(value & (SYSTEM | TRIGGER | FULL), Relaxed);
        if value & !before & TRIGGER != 0 {
            self.suspend.suspend(SuspendHow::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeSuspend;

    #[test]
    fn the_trigger_must_rise() {
        let suspend = FakeSuspend::new();
        let reset = ResetControl::new(suspend.clone());
        reset.write(0x02);
        assert_eq!(reset.read(), 0x02);
        assert_eq!(suspend.requests(), []);
        reset.write(0x06);
        reset.write(0x0e);
        assert_eq!(suspend.requests(), [SuspendHow::Reset]);
        reset.write(0x00);
        reset.write(0xff);
        assert_eq!(suspend.requests().len(), 2);
        assert_eq!(reset.read(), 0x0e);
    }
}
