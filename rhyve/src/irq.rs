//! Interrupt lines: how a device model asks for an interrupt.
//!
//! A device holds an [`IrqLine`] and drives a level on it; what is behind the line (KVM's in-kernel
//! 8259 and I/O APIC, or a test's fake) is not its business. Whether the level or its rising edge
//! counts is the interrupt controller's programming, as on a real board.
//!
//! Where several devices share a pin (COM1 and COM3 on IRQ 4, PCI INTx) each gets a source of a
//! [`WiredOr`], so that one device's de-assertion does not take away another's request.

use std::sync::{Arc, Mutex, PoisonError};

/// One interrupt line, driven by exactly one device.
///
/// `set` may be called with a device's lock held, never blocks for long and never calls back into a
/// device. Callers should call it on changes only: each call may cost a system call.
pub trait IrqLine: Send + Sync {
    /// Drives the line: asserted or not. Repeating a level is harmless.
    fn set(&self, asserted: bool);
}

/// A line several sources share: it is asserted while any of them asserts.
pub struct WiredOr {
    line: Arc<dyn IrqLine>,
    /// Number of sources that assert now. The line is driven under this lock, so that levels reach
    /// it in the order in which the sources changed.
    asserted: Mutex<u32>,
}

impl WiredOr {
    /// Shares `line`, which must not be driven by anybody else from now on.
    pub fn new(line: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self {
            line,
            asserted: Mutex::new(0),
        })
    }

    /// One more source, not asserted. Dropping it withdraws its request.
    pub fn source(self: &Arc<Self>) -> Arc<dyn IrqLine> {
        Arc::new(Source {
            shared: Arc::clone(self),
            level: Mutex::new(false),
        })
    }

    fn change(&self, asserted: bool) {
        let mut count = self.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *count;
        *count = if asserted {
            before.saturating_add(1)
        } else {
            before.saturating_sub(1)
        };
        if (before == 0) != (*count == 0) {
            self.line.set(asserted);
        }
    }
}

struct Source {
    shared: Arc<WiredOr>,
    level: Mutex<bool>,
}

impl IrqLine for Source {
    fn set(&self, asserted: bool) {
        let mut level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        if *level != asserted {
            *level = asserted;
            self.shared.change(asserted);
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.set(false);
    }
}

/// One line to the inputs of two interrupt controllers.
pub struct Fork(pub [Arc<dyn IrqLine>; 2]);

impl IrqLine for Fork {
    fn set(&self, asserted: bool) {
        self.0.iter().for_each(|line| line.set(asserted));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeIrq;

    #[test]
    fn a_shared_line_falls_with_its_last_source() {
        let pin = FakeIrq::new();
        let shared = WiredOr::new(pin.clone());
        let (a, b) = (shared.source(), shared.source());
        a.set(true);
        a.set(true);
        b.set(true);
        a.set(false);
        assert_eq!(pin.edges(), [true]);
        drop(b);
        assert_eq!(pin.edges(), [true, false]);
    }
}
