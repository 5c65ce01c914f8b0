//! The functions of bus 0, the only one.

use std::sync::{Arc, PoisonError, RwLock};

use crate::bus::IoSize;
use crate::config::PciAddress;

/// A function's configuration space, behind its own lock.
pub trait PciFunction: Send + Sync {
    /// Its name, for messages.
    fn name(&self) -> &str;

    /// Reads `size` at `register`; the access does not cross a multiple of 4.
    fn config_read(&self, register: u8, size: IoSize) -> u32;

    /// Writes `size` at `register`; the access does not cross a multiple of 4.
    fn config_write(&self, register: u8, size: IoSize, value: u32);
}

/// Two functions at one place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{new} cannot be at slot {slot}:{function}: {old} is there")]
pub struct SlotTaken {
    /// Who came second.
    pub new: String,
    /// Who is there.
    pub old: String,
    /// Device number.
    pub slot: u8,
    /// Function number.
    pub function: u8,
}

/// Bus 0.
#[derive(Default)]
pub struct PciBus {
    /// Indexed by device number * 8 + function number; as long as its last function needs.
    functions: RwLock<Vec<Option<Arc<dyn PciFunction>>>>,
}

impl PciBus {
    /// A bus on which nothing answers.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Plugs `function` in.
    ///
    /// # Errors
    /// [`SlotTaken`].
    pub fn plug(
        &self,
        address: PciAddress,
        function: Arc<dyn PciFunction>,
    ) -> Result<(), SlotTaken> {
        let at = index(address.slot, address.function);
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if functions.len() <= at {
            functions.resize(at + 1, None);
        }
        match functions.get_mut(at) {
            Some(Some(old)) => Err(SlotTaken {
                new: function.name().to_owned(),
                old: old.name().to_owned(),
                slot: address.slot,
                function: address.function,
            }),
            Some(free) => {
                *free = Some(function);
                Ok(())
            }
            // Not reached: the bus was made long enough.
            None => Ok(()),
        }
    }

    /// The function at `bus`:`slot`:`function`.
    pub fn find(&self, bus: u8, slot: u8, function: u8) -> Option<Arc<dyn PciFunction>> {
        if bus != 0 {
            return None;
        }
        let functions = self
            .functions
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        functions.get(index(slot, function))?.clone()
    }
}

fn index(slot: u8, function: u8) -> usize {
    usize::from(slot) << 3 | usize::from(function & 7)
}
