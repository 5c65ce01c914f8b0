//! MSI: one message, in configuration space (6.8.1). It is 64 bits wide and cannot be masked, as
//! bhyve's.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_api::kvm::MsiMessage;

use super::{ConfigSpace, MsiSink, MsiVector};
use crate::bus::IoSize;

/// Capability id.
const ID: u8 = 0x05;
/// Message control: enable, and that the address has 64 bits. The number of messages is 0, for one.
const ENABLE: u32 = 1 << 0;
const WIDE: u8 = 1 << 7;
/// Offsets in the capability.
const CONTROL: u8 = 2;
const ADDRESS: u8 = 4;
const UPPER_ADDRESS: u8 = 8;
const DATA: u8 = 12;

struct State {
    /// What the guest has set, while it uses MSI.
    message: Option<MsiMessage>,
    sink: Box<dyn MsiVector>,
}

/// The message of one function.
pub struct Msi(Mutex<State>);

impl Msi {
    /// A message that nobody has set.
    pub fn new(sink: &dyn MsiSink) -> Arc<Self> {
        let sink = sink.vector();
        Arc::new(Self(Mutex::new(State {
            message: None,
            sink,
        })))
    }

    /// Puts the capability into `space`, and says where.
    pub fn install(&self, space: &mut ConfigSpace) -> u8 {
        let at = space.add_capability(ID, &[WIDE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for (offset, mask) in [
            (CONTROL, &[ENABLE as u8][..]),
            // The low two bits of the address are always 0 (6.8.1.4).
            (ADDRESS, &[0xfc, 0xff, 0xff, 0xff]),
            (UPPER_ADDRESS, &[0xff; 4]),
            (DATA, &[0xff; 2]),
        ] {
            space.allow((at + offset).into(), mask);
        }
        at
    }

    /// The capability at `at` may have changed.
    pub fn configure(&self, space: &ConfigSpace, at: u8) {
        let read = |offset, size| space.read(at + offset, size);
        let enabled = read(CONTROL, IoSize::Word) & ENABLE != 0;
        let address = |offset| u64::from(read(offset, IoSize::Dword));
        let message = enabled.then(|| MsiMessage {
            address: address(UPPER_ADDRESS) << 32 | address(ADDRESS),
            data: read(DATA, IoSize::Word),
        });
        let mut state = self.lock();
        if let Some(message) = message.filter(|_| state.message != message) {
            state.sink.set(message);
        }
        state.message = message;
    }

    /// Whether the guest uses MSI, so that there is no INTx.
    pub fn is_enabled(&self) -> bool {
        self.lock().message.is_some()
    }

    /// Interrupts; false if the guest does not use MSI.
    pub fn trigger(&self) -> bool {
        let state = self.lock();
        let enabled = state.message.is_some();
        if enabled {
            state.sink.trigger();
        }
        enabled
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Ident;
    use crate::testing::FakeMsi;

    #[test]
    fn the_message_is_what_the_guest_sets_and_is_sent_while_it_is_enabled() {
        let sink = FakeMsi::default();
        let msi = Msi::new(&sink);
        let mut space = ConfigSpace::new(Ident::default());
        let at = msi.install(&mut space);
        assert_eq!(space.read(at, IoSize::Dword), 0x0080_0005);
        let mut set = |offset, size, value| {
            space.write(at + offset, size, value);
            msi.configure(&space, at);
            space.read(at + offset, size)
        };
        assert_eq!(set(ADDRESS, IoSize::Dword, 0xfee0_1003), 0xfee0_1000);
        assert_eq!(set(UPPER_ADDRESS, IoSize::Dword, 1), 1);
        assert_eq!(set(DATA, IoSize::Word, 0x4041), 0x4041);
        assert!(!msi.trigger() && !msi.is_enabled());
        // It is one message, however many are asked for.
        assert_eq!(set(CONTROL, IoSize::Word, 0xffff), 0x0081);
        assert!(msi.trigger() && msi.is_enabled());
        set(DATA, IoSize::Word, 0x42);
        assert!(msi.trigger());
        set(CONTROL, IoSize::Word, 0);
        assert!(!msi.trigger());
        assert_eq!(
            sink.sent(),
            [(0x1_fee0_1000, 0x4041), (0x1_fee0_1000, 0x42)]
        );
    }
}
