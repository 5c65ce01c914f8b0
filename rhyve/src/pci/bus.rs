//! The functions of bus 0, the only one.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use super::config::{BAR0, COMMAND, HEADER_TYPE};
use crate::bus::IoSize;
use crate::config::PciAddress;
use crate::lifecycle::Lifecycle;

/// Header type: the device has more than one function.
const MULTI_FUNCTION: u32 = 0x80;
/// The register behind the BARs.
const END_OF_BARS: u8 = BAR0 + 6 * 4;

/// Whom a guest addresses, whether anybody is there or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub slot: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl Target {
    /// From a bus number, and a device and function number as they are everywhere on the wire.
    pub fn new(bus: u8, devfn: u8) -> Self {
        Self {
            bus,
            slot: devfn >> 3,
            function: devfn & 7,
        }
    }
}

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

    /// All functions, and where each is.
    pub fn functions(&self) -> Vec<(Target, Arc<dyn PciFunction>)> {
        let functions = (0..).zip(self.lock().clone());
        let there = |(devfn, function): (u8, Option<_>)| Some((Target::new(0, devfn), function?));
        functions.filter_map(there).collect()
    }

    /// Lets every BAR that was in the way of another find its place.
    pub fn claim_bars(&self) {
        let functions = self.lock().clone();
        functions.iter().flatten().for_each(|f| f.claim_bars());
    }

    /// A configuration read, which does not cross a multiple of 4; all ones if nobody is there.
    pub fn read(&self, target: Target, register: u8, size: IoSize) -> u32 {
        let Some(function) = self.find(target) else {
            return size.ones();
        };
        let value = function.config_read(register, size);
        // Function 0 says whether there are others, in the third byte from 0x0c on (6.2.1).
        let shift = match HEADER_TYPE.checked_sub(register) {
            Some(before) if u16::from(before) < size.bytes() => 8 * before,
            _ => return value,
        };
        if target.function == 0 && self.has_others(target.slot) {
            value | MULTI_FUNCTION << shift
        } else {
            value
        }
    }

    /// A configuration write, which does not cross a multiple of 4.
    pub fn write(&self, target: Target, register: u8, size: IoSize, value: u32) {
        let Some(function) = self.find(target) else {
            return;
        };
        function.config_write(register, size, value);
        // A BAR may have moved.
        if (COMMAND..END_OF_BARS).contains(&register) {
            self.claim_bars();
        }
    }

    fn find(&self, target: Target) -> Option<Arc<dyn PciFunction>> {
        if target.bus != 0 {
            return None;
        }
        self.lock()
            .get(index(target.slot, target.function))?
            .clone()
    }

    fn has_others(&self, slot: u8) -> bool {
        let functions = self.lock();
        (1..8).any(|f| matches!(functions.get(index(slot, f)), Some(Some(_))))
    }

    fn lock(&self) -> RwLockReadGuard<'_, Vec<Option<Arc<dyn PciFunction>>>> {
        self.functions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn index(slot: u8, function: u8) -> usize {
    usize::from(slot) << 3 | usize::from(function & 7)
}
