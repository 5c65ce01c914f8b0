//! The way from a device to its driver's interrupt handler, which takes no lock of the transport.

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use crate::pci::{Intx, Messages};
use crate::virtio::Interrupts;

/// No MSI-X vector (4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Bits of the ISR status (4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Interrupts as they are stored.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct SavedLink {
    isr: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    broken: bool,
}

/// Interrupts of one device on PCI.
pub(super) struct Link {
    messages: Messages,
    intx: Arc<Intx>,
    /// Held while the line changes, so that neither gets ahead of the other.
    isr: Mutex<u8>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    broken: AtomicBool,
}

impl Link {
    pub fn new(messages: Messages, intx: Arc<Intx>, queues: usize) -> Arc<Self> {
        Arc::new(Self {
            messages,
            intx,
            isr: Mutex::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            broken: AtomicBool::new(false),
        })
    }

    /// Whether interrupts have vectors.
    pub fn has_vectors(&self) -> bool {
        matches!(&self.messages, Messages::Msix(msix) if msix.is_enabled())
    }

    /// How it interrupts now.
    pub fn word(&self) -> &'static str {
        match &self.messages {
            messages if !messages.are_enabled() => "intx",
            Messages::Msix(_) => "msi-x",
            Messages::Msi(_) => "msi",
        }
    }

    /// Reads the ISR status, which clears it and takes INTx back.
    pub fn take_isr(&self) -> u8 {
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        self.intx.set(false);
        std::mem::take(&mut isr)
    }

    /// Whether the device wants to be reset.
    pub fn is_broken(&self) -> bool {
        self.broken.load(SeqCst)
    }

    pub fn config_vector(&self) -> u16 {
        self.config_vector.load(SeqCst)
    }

    /// Sets the vector for configuration changes; one that is not there is none (4.1.5.1.2.1).
    pub fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.valid(vector), SeqCst);
    }

    pub fn queue_vector(&self, queue: u16) -> u16 {
        let vector = self.queue_vectors.get(usize::from(queue));
        vector.map_or(NO_VECTOR, |vector| vector.load(SeqCst))
    }

    /// Sets the vector of a queue, likewise.
    pub fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(place) = self.queue_vectors.get(usize::from(queue)) {
            place.store(self.valid(vector), SeqCst);
        }
    }

    pub fn reset(&self) {
        self.take_isr();
        self.config_vector.store(NO_VECTOR, SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, SeqCst);
        }
        self.broken.store(false, SeqCst);
    }

    pub fn save(&self) -> SavedLink {
        let vectors = self.queue_vectors.iter();
        SavedLink {
            isr: *self.isr.lock().unwrap_or_else(PoisonError::into_inner),
            config_vector: self.config_vector(),
            queue_vectors: vectors.map(|vector| vector.load(SeqCst)).collect(),
            broken: self.is_broken(),
        }
    }

    /// Goes on from a stored state, and asserts INTx if that was asserted.
    pub fn restore(&self, saved: &SavedLink) {
        self.set_config_vector(saved.config_vector);
        for (queue, &vector) in (0..).zip(&saved.queue_vectors) {
            self.set_queue_vector(queue, vector);
        }
        self.broken.store(saved.broken, SeqCst);
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        *isr = saved.isr & (ISR_QUEUE | ISR_CONFIG);
        self.intx.set(*isr != 0);
    }

    fn valid(&self, vector: u16) -> u16 {
        match &self.messages {
            Messages::Msix(msix) if vector < msix.count() => vector,
            _ => NO_VECTOR,
        }
    }

    fn interrupt(&self, vector: u16, isr_bit: u8) {
        let msi = match &self.messages {
            // NO_VECTOR is no vector of the table.
            Messages::Msix(msix) if msix.is_enabled() => return msix.trigger(vector),
            Messages::Msix(_) => None,
            Messages::Msi(msi) => Some(msi),
        };
        // A single message says as little of why it came as the pin does.
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        *isr |= isr_bit;
        if !msi.is_some_and(|msi| msi.trigger()) {
            self.intx.set(true);
        }
    }
}

impl Interrupts for Link {
    fn signal_queue(&self, queue: u16) {
        self.interrupt(self.queue_vector(queue), ISR_QUEUE);
    }

    fn signal_config(&self) {
        self.interrupt(self.config_vector(), ISR_CONFIG);
    }

    fn needs_reset(&self) {
        if !self.broken.swap(true, SeqCst) {
            self.signal_config();
        }
    }
}
