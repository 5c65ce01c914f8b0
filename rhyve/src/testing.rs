//! Fakes for unit tests: what stands in for KVM, the clock and the user.

use std::sync::{Arc, Mutex};
use std::time::Duration;

mod driver;

pub use driver::{Buffer, FakeInterrupts, GuestDriver, RawDescriptor, Sent};

use vmm_api::kvm::MsiMessage;

use crate::irq::IrqLine;
use crate::isa::clock::Clock;
use crate::pci::{MsiSink, MsiVector};
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

/// Takes message signalled interrupts and remembers them.
#[derive(Clone, Default)]
pub struct FakeMsi {
    sent: Arc<Mutex<Vec<(u64, u32)>>>,
}

impl FakeMsi {
    /// Address and data of every message so far.
    pub fn sent(&self) -> Vec<(u64, u32)> {
        self.sent.lock().unwrap().clone()
    }
}

impl MsiSink for FakeMsi {
    fn vector(&self) -> Box<dyn MsiVector> {
        Box::new(FakeVector(self.clone(), MsiMessage::default()))
    }
}

struct FakeVector(FakeMsi, MsiMessage);

impl MsiVector for FakeVector {
    fn set(&mut self, message: MsiMessage) {
        self.1 = message;
    }

    fn trigger(&self) {
        let mut sent = self.0.sent.lock().unwrap();
        sent.push((self.1.address, self.1.data));
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

/// Both clocks, moved by hand.
#[derive(Default)]
pub struct FakeClock {
    now: Mutex<(Duration, Duration)>,
}

impl FakeClock {
    /// At the epoch.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Lets time pass on both clocks.
    pub fn advance(&self, by: Duration) {
        let mut now = self.now.lock().unwrap();
        now.0 += by;
        now.1 += by;
    }

    /// Sets the time of day.
    pub fn set_realtime(&self, since_epoch: Duration) {
        self.now.lock().unwrap().1 = since_epoch;
    }
}

impl Clock for FakeClock {
    fn monotonic(&self) -> Duration {
        self.now.lock().unwrap().0
    }

    fn realtime(&self) -> Duration {
        self.now.lock().unwrap().1
    }
}
