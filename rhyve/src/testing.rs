//! Fakes for unit tests: what stands in for KVM, the clock and the user.

use std::sync::{Arc, Mutex};

use crate::irq::IrqLine;
use crate::suspend::{SuspendHow, SuspendSink};

/// An interrupt line that remembers every change of its level.
#[derive(Default)]
pub struct FakeIrq {
    edges: Mutex<Vec<bool>>,
}

impl FakeIrq {
    /// A line that is not asserted.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The level now.
    pub fn level(&self) -> bool {
        self.edges.lock().unwrap().last().copied().unwrap_or(false)
    }

    /// Every level it changed to, in order.
    pub fn edges(&self) -> Vec<bool> {
        self.edges.lock().unwrap().clone()
    }

    /// How often it was raised.
    pub fn raised(&self) -> usize {
        self.edges().iter().filter(|level| **level).count()
    }
}

impl IrqLine for FakeIrq {
    fn set(&self, asserted: bool) {
        let mut edges = self.edges.lock().unwrap();
        if edges.last().copied().unwrap_or(false) != asserted {
            edges.push(asserted);
        }
    }
}

/// Remembers what the machine was asked to do.
#[derive(Default)]
pub struct FakeSuspend {
    requests: Mutex<Vec<SuspendHow>>,
}

impl FakeSuspend {
    /// Nothing asked for yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Every request so far.
    pub fn requests(&self) -> Vec<SuspendHow> {
        self.requests.lock().unwrap().clone()
    }
}

impl SuspendSink for FakeSuspend {
    fn suspend(&self, how: SuspendHow) {
        self.requests.lock().unwrap().push(how);
    }
}
