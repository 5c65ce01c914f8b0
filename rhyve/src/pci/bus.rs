//! The functions, by bus, device and function number.
//!
//! There are no bridges between buses: each that has a function is a root of its own, as in bhyve.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use super::config::{BAR0, COMMAND, HEADER_TYPE};
use crate::bus::IoSize;
use crate::config::PciAddress;
use crate::lifecycle::Lifecycle;

/// Header type: the device has more than one function.
const MULTI_FUNCTION: u32 = 0x80;
/// The register behind the BARs.
const END_OF_BARS: u8 = BAR0 + 6 * 4;

/// A function's configuration space, behind its own lock.
pub trait PciFunction: Send + Sync {
    /// Its name, for messages.
    fn name(&self) -> &str;

    /// Reads `size` at `register`; the access does not cross a multiple of 4.
    fn config_read(&self, register: u8, size: IoSize) -> u32;

    /// Writes `size` at `register`; the access does not cross a multiple of 4.
    fn config_write(&self, register: u8, size: IoSize, value: u32);

    /// How its state is saved; a machine with a function that has none cannot be suspended.
    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        None
    }

    /// Addresses have become free: a BAR that was in the way of another may now have its own.
    fn claim_bars(&self) {}
}

/// Two functions at one place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{new} cannot be at {place}: {old} is there")]
pub struct SlotTaken {
    /// Who came second.
    pub new: String,
    /// Who is there.
    pub old: String,
    /// Where.
    pub place: PciAddress,
}

/// Who is where.
type Functions = BTreeMap<PciAddress, Arc<dyn PciFunction>>;

/// All functions.
#[derive(Default)]
pub struct PciBus {
    functions: RwLock<Functions>,
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
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        match functions.entry(address) {
            Entry::Occupied(old) => Err(SlotTaken {
                new: function.name().to_owned(),
                old: old.get().name().to_owned(),
                place: address,
            }),
            Entry::Vacant(free) => {
                free.insert(function);
                Ok(())
            }
        }
    }

    /// All functions, and where each is.
    pub fn functions(&self) -> Vec<(PciAddress, Arc<dyn PciFunction>)> {
        let functions = self.lock();
        let all = functions.iter();
        all.map(|(at, function)| (*at, function.clone())).collect()
    }

    /// Lets every BAR that was in the way of another find its place.
    pub fn claim_bars(&self) {
        let functions = self.lock().clone();
        functions.values().for_each(|f| f.claim_bars());
    }

    /// A configuration read, which does not cross a multiple of 4; all ones if nobody is there.
    pub fn read(&self, target: PciAddress, register: u8, size: IoSize) -> u32 {
        let Some(function) = self.find(target) else {
            return size.ones();
        };
        let value = function.config_read(register, size);
        // Function 0 says whether there are others, in the third byte from 0x0c on (6.2.1).
        let shift = match HEADER_TYPE.checked_sub(register) {
            Some(before) if u16::from(before) < size.bytes() => 8 * before,
            _ => return value,
        };
        if target.function == 0 && self.has_others(target) {
            value | MULTI_FUNCTION << shift
        } else {
            value
        }
    }

    /// A configuration write, which does not cross a multiple of 4.
    pub fn write(&self, target: PciAddress, register: u8, size: IoSize, value: u32) {
        let Some(function) = self.find(target) else {
            return;
        };
        function.config_write(register, size, value);
        // A BAR may have moved.
        if (COMMAND..END_OF_BARS).contains(&register) {
            self.claim_bars();
        }
    }

    fn find(&self, target: PciAddress) -> Option<Arc<dyn PciFunction>> {
        self.lock().get(&target).cloned()
    }

    fn has_others(&self, first: PciAddress) -> bool {
        let functions = self.lock();
        (1..8).any(|function| functions.contains_key(&PciAddress { function, ..first }))
    }

    fn lock(&self) -> RwLockReadGuard<'_, Functions> {
        self.functions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
