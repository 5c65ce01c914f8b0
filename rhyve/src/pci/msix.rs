//! MSI-X: a table of messages in a BAR, one an interrupt, each of which can be masked (6.8.2).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_api::kvm::MsiMessage;
use vmm_api::state::StateError;

use super::ConfigSpace;
use super::bar::{Bar, BarKind};
use crate::bus::IoSize;

/// Capability id.
const ID: u8 = 0x11;
/// Message control, in its upper byte: enable and function mask.
const CONTROL: u8 = 3;
const ENABLE: u32 = 1 << 7;
const FUNCTION_MASK: u32 = 1 << 6;

/// Bytes of a table entry: address, data, vector control.
const ENTRY: u64 = 16;
const MASKED: u32 = 1;

/// Where the pending bits are in the BAR: behind the table's 256 entries at most.
const PBA: u64 = 0x1000;
/// The most vectors the table has room for.
pub const MAX_VECTORS: u16 = 256;

/// Where messages go: KVM, or a test.
pub trait MsiSink: Send + Sync {
    /// One more message, which is not sent yet.
    fn vector(&self) -> Box<dyn MsiVector>;
}

/// One message. Methods may be called with a device's lock held, from any thread.
pub trait MsiVector: Send + Sync {
    /// This is the message from now on.
    fn set(&mut self, message: MsiMessage);

    /// Sends it. Not called before it was set.
    fn trigger(&self);
}

struct Vector {
    message: MsiMessage,
    masked: bool,
    pending: bool,
    /// The message that `sink` has.
    sent: Option<MsiMessage>,
    sink: Box<dyn MsiVector>,
}

/// The vectors as they are stored: address, data, masked, pending.
#[derive(Serialize, Deserialize)]
pub(super) struct SavedMsix(Vec<(u64, u32, bool, bool)>);

struct State {
    enabled: bool,
    function_mask: bool,
    vectors: Vec<Vector>,
}

/// The table and the pending bits of one function.
pub struct Msix {
    bar: u8,
    count: u16,
    state: Mutex<State>,
}

impl Msix {
    /// `count` vectors, at most [`MAX_VECTORS`], in BAR `bar`.
    pub fn new(bar: u8, count: u16, sink: &dyn MsiSink) -> Arc<Self> {
        let count = count.min(MAX_VECTORS);
        let vectors = (0..count).map(|_| Vector {
            message: MsiMessage::default(),
            masked: true,
            pending: false,
            sent: None,
            sink: sink.vector(),
        });
        let state = State {
            enabled: false,
            function_mask: false,
            vectors: vectors.collect(),
        };
        Arc::new(Self {
            bar,
            count,
            state: Mutex::new(state),
        })
    }

    /// The BAR that holds the table.
    pub fn bar(&self) -> Bar {
        Bar {
            index: self.bar,
            kind: BarKind::Memory32,
            size: 2 * PBA,
        }
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// Puts the capability into `space`, and says where.
    pub fn install(&self, space: &mut ConfigSpace) -> u8 {
        let [low, high] = self.count.saturating_sub(1).to_le_bytes();
        let table = u32::from(self.bar).to_le_bytes();
        let pending = (PBA as u32 | u32::from(self.bar)).to_le_bytes();
        let at = space.add_capability(ID, &[&[low, high][..], &table, &pending].concat());
        space.allow(usize::from(at + CONTROL), &[(ENABLE | FUNCTION_MASK) as u8]);
        at
    }

    /// The capability at `at` may have changed.
    pub fn configure(&self, space: &ConfigSpace, at: u8) {
        let control = space.read(at + CONTROL, IoSize::Byte);
        let mut state = self.lock();
        state.enabled = control & ENABLE != 0;
        state.function_mask = control & FUNCTION_MASK != 0;
        for index in 0..state.vectors.len() {
            state.settle(index);
        }
    }

    /// Whether the guest uses MSI-X, so that there is no INTx.
    pub fn is_enabled(&self) -> bool {
        self.lock().enabled
    }

    /// Interrupts by vector `index`, now or when it is unmasked.
    pub fn trigger(&self, index: u16) {
        let mut state = self.lock();
        let index = usize::from(index);
        if let Some(vector) = state.vectors.get_mut(index) {
            vector.pending = true;
            state.settle(index);
        }
    }

    /// What the guest reads in the BAR.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (byte, at) in data.iter_mut().zip(offset..self.bar().size) {
            *byte = state.byte(at);
        }
    }

    /// What the guest writes in the BAR. Drivers write whole 32 or 64 bits; of anything less, the
    /// rest of the 32 bits stays.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        for (byte, at) in data.iter().zip(offset..PBA) {
            state.set_byte(at, *byte);
        }
        // An access of 8 bytes may lie in two entries.
        let first = usize::try_from(offset / ENTRY).unwrap_or(usize::MAX);
        state.settle(first);
        state.settle(first.saturating_add(1));
    }

    /// The table and what is pending; enable and function mask are configuration space's.
    pub(super) fn save(&self) -> SavedMsix {
        let state = self.lock();
        let vector = |v: &Vector| (v.message.address, v.message.data, v.masked, v.pending);
        SavedMsix(state.vectors.iter().map(vector).collect())
    }

    /// Takes that back; it counts from the next [`Msix::configure`] on.
    pub(super) fn restore(&self, saved: &SavedMsix) -> Result<(), StateError> {
        let mut state = self.lock();
        if saved.0.len() != state.vectors.len() {
            let text = format!("{} MSI-X vectors, not {}", saved.0.len(), self.count);
            return Err(StateError::Value(text));
        }
        for (vector, &(address, data, masked, pending)) in state.vectors.iter_mut().zip(&saved.0) {
            // The low two bits of the address are always 0 (6.8.2.7).
            let address = address & !3;
            vector.message = MsiMessage { address, data };
            (vector.masked, vector.pending) = (masked, pending);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Sends what is pending if nothing masks it.
    fn settle(&mut self, index: usize) {
        let open = self.enabled && !self.function_mask;
        let Some(vector) = self.vectors.get_mut(index) else {
            return;
        };
        if !open || vector.masked {
            return;
        }
        // Masking does not take the message back, so that unmasking with the same one is cheap.
        if vector.sent != Some(vector.message) {
            vector.sink.set(vector.message);
            vector.sent = Some(vector.message);
        }
        if std::mem::take(&mut vector.pending) {
            vector.sink.trigger();
        }
    }

    fn byte(&self, at: u64) -> u8 {
        if at >= PBA {
            let first = (at - PBA) * 8;
            let pending = |bit: u64| {
                let index = usize::try_from(first + bit).unwrap_or(usize::MAX);
                self.vectors.get(index).is_some_and(|v| v.pending)
            };
            return (0..8).fold(0, |byte, bit| byte | u8::from(pending(bit)) << bit);
        }
        let index = usize::try_from(at / ENTRY).unwrap_or(usize::MAX);
        let entry = self.vectors.get(index).map(Vector::bytes);
        let byte = entry.and_then(|e| e.get((at % ENTRY) as usize).copied());
        byte.unwrap_or(0)
    }

    fn set_byte(&mut self, at: u64, value: u8) {
        let index = usize::try_from(at / ENTRY).unwrap_or(usize::MAX);
        if let Some(vector) = self.vectors.get_mut(index) {
            let mut bytes = vector.bytes();
            if let Some(byte) = bytes.get_mut((at % ENTRY) as usize) {
                *byte = value;
            }
            vector.set_bytes(bytes);
        }
    }
}

impl Vector {
    fn bytes(&self) -> [u8; ENTRY as usize] {
        let control = if self.masked { MASKED } else { 0 };
        let value = u128::from(self.message.address)
            | u128::from(self.message.data) << 64
            | u128::from(control) << 96;
        value.to_le_bytes()
    }

    fn set_bytes(&mut self, bytes: [u8; ENTRY as usize]) {
        let value = u128::from_le_bytes(bytes);
        self.message = MsiMessage {
            // The low two bits of the address are always 0 (6.8.2.7).
            address: value as u64 & !3,
            data: (value >> 64) as u32,
        };
        self.masked = (value >> 96) as u32 & MASKED != 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Ident;
    use crate::testing::FakeMsi;

    fn rig(count: u16) -> (Arc<Msix>, ConfigSpace, u8, FakeMsi) {
        let sink = FakeMsi::default();
        let msix = Msix::new(1, count, &sink);
        let mut space = ConfigSpace::new(Ident::default());
        let at = msix.install(&mut space);
        (msix, space, at, sink)
    }

    fn control(msix: &Msix, space: &mut ConfigSpace, at: u8, value: u32) {
        space.write(at + 2, IoSize::Word, value << 8);
        msix.configure(space, at);
    }

    #[test]
    fn masks_hold_back_what_is_pending() {
        let (msix, mut space, at, sink) = rig(3);
        assert_eq!(space.read(at, IoSize::Dword), 0x0002_0011);
        msix.write(16, &0xfee0_1003u64.to_le_bytes());
        msix.write(24, &[0x41, 0, 0, 0, 0, 0, 0, 0]);
        let mut entry = [0; 8];
        msix.read(16, &mut entry);
        assert_eq!(u64::from_le_bytes(entry), 0xfee0_1000);

        msix.trigger(1);
        assert!(sink.sent().is_empty(), "not enabled");
        control(&msix, &mut space, at, ENABLE | FUNCTION_MASK);
        assert!(msix.is_enabled() && sink.sent().is_empty());
        let mut pending = [0; 8];
        msix.read(PBA, &mut pending);
        assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
        control(&msix, &mut space, at, ENABLE);
        assert_eq!(sink.sent(), [(0xfee0_1000, 0x41)]);
        msix.read(PBA, &mut pending);
        assert_eq!(pending, [0; 8]);

        msix.write(28, &[1, 0, 0, 0]);
        msix.trigger(1);
        msix.trigger(1);
        msix.write(24, &[0x42]);
        assert_eq!(sink.sent().len(), 1, "masked");
        msix.write(28, &[0, 0, 0, 0]);
        assert_eq!(sink.sent().last(), Some(&(0xfee0_1000, 0x42)));
        assert_eq!(sink.sent().len(), 2, "once, however often it was pending");
        msix.trigger(0);
        msix.trigger(3);
        msix.trigger(u16::MAX);
        assert_eq!(
            sink.sent().len(),
            2,
            "vector 0 is masked, the others are not there"
        );
    }

    proptest::proptest! {
        #[test]
        fn any_access_is_answered(offset: u64, data: [u8; 8], len in 1usize..9, count in 0u16..300) {
            let (msix, mut space, at, _) = rig(count);
            control(&msix, &mut space, at, ENABLE);
            for offset in [offset, offset % 0x2000] {
                msix.write(offset, &data[..len]);
                msix.read(offset, &mut [0; 8][..len]);
            }
        }
    }
}
