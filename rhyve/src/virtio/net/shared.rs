//! What a card and its threads share: the link, what is received, what was counted.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::filter::{Filter, LOOKED_AT};
use crate::config::MacAddress;
use crate::net::Backend;
use crate::virtio::Interrupts;

/// What a card has done, for whoever looks from outside.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames the driver got.
    pub received: AtomicU64,
    /// Bytes of them.
    pub bytes_received: AtomicU64,
    /// Frames that were sent.
    pub transmitted: AtomicU64,
    /// Bytes of them.
    pub bytes_transmitted: AtomicU64,
    /// Frames the driver does not want.
    pub filtered: AtomicU64,
    /// Frames that did not fit into the driver's buffers, or came when the link was down.
    pub receive_dropped: AtomicU64,
    /// Frames that had nowhere to go.
    pub transmit_dropped: AtomicU64,
    /// Commands on the control queue.
    pub commands: AtomicU64,
    /// Buffers, frames and commands that were none.
    pub bad_requests: AtomicU64,
}

/// What the device and its threads share.
pub(super) struct Shared {
    pub backend: Arc<dyn Backend>,
    pub counters: Counters,
    /// How many pairs the driver uses.
    pub active_pairs: AtomicU16,
    /// Its cable, which is plugged in and out from outside.
    pub plugged: AtomicBool,
    pub generation: AtomicU8,
    /// For each pair, whether small frames are received one at a time.
    single: Vec<AtomicBool>,
    /// The backend has gone.
    lost: AtomicBool,
    receive: Mutex<(Filter, MacAddress)>,
    interrupts: Mutex<Option<Arc<dyn Interrupts>>>,
}

impl Shared {
    pub fn new(backend: Arc<dyn Backend>, mac: MacAddress, pairs: u16) -> Self {
        Self {
            backend,
            counters: Counters::default(),
            active_pairs: AtomicU16::new(1),
            plugged: AtomicBool::new(true),
            generation: AtomicU8::new(0),
            single: (0..pairs).map(|_| AtomicBool::new(false)).collect(),
            lost: AtomicBool::new(false),
            receive: Mutex::new((Filter::new(false), mac)),
            interrupts: Mutex::default(),
        }
    }

    pub fn label(&self) -> &str {
        &self.backend.info().label
    }

    pub fn is_lost(&self) -> bool {
        self.lost.load(Relaxed)
    }

    /// Whether frames pass.
    pub fn is_up(&self) -> bool {
        self.plugged.load(Relaxed) && !self.is_lost()
    }

    /// Whether small frames are received one at a time.
    pub fn receives_single(&self, pair: u16) -> bool {
        let known = self.single.get(usize::from(pair));
        known.is_some_and(|single| single.load(Relaxed))
    }

    /// Says so, or not.
    pub fn set_receives_single(&self, pair: u16, single: bool) {
        if let Some(known) = self.single.get(usize::from(pair)) {
            known.store(single, Relaxed);
        }
    }

    /// What the driver wants to receive, and its address.
    pub fn receive(&self) -> MutexGuard<'_, (Filter, MacAddress)> {
        self.receive.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a frame that begins so is for the driver.
    pub fn wants(&self, start: &[u8; LOOKED_AT]) -> bool {
        let receive = self.receive();
        receive.0.passes(start, receive.1)
    }

    /// Who hears of changes from here on.
    pub fn connect(&self, interrupts: Option<Arc<dyn Interrupts>>) {
        let place = self.interrupts.lock();
        *place.unwrap_or_else(PoisonError::into_inner) = interrupts;
    }

    /// The backend fails: unless it is a queue that is not used any more, the link is down for good.
    pub fn complain(&self, pair: u16, action: &str, error: &io::Error) {
        if pair < self.active_pairs.load(Relaxed) && !self.lost.swap(true, Relaxed) {
            let label = self.label();
            tracing::warn!(
                target: "rhyve::virtio::net",
                "{label}: cannot {action}: {error}; the link is down from here on"
            );
            self.config_changed();
        }
    }

    /// Tells the driver that the configuration has changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Relaxed);
        let interrupts = self
            .interrupts
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(interrupts) = &*interrupts {
            interrupts.signal_config();
        }
    }
}
