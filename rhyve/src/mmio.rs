//! Who answers at which guest-physical address that is not RAM: what [`PortBus`] is for ports.
//!
//! [`PortBus`]: crate::bus::PortBus

use std::ops::RangeInclusive;
use std::sync::{Arc, PoisonError, RwLock};

use crate::bus::{AddressSpace, Overlap};

/// A device's handler of memory accesses. As with port handlers, it is called on virtual CPU
/// threads, several at a time, and never blocks on anything a guest or a peer controls.
pub trait Mmio: Send + Sync {
    /// Reads 1 to 8 bytes at `gpa`, all of them in the range this handler was registered for.
    fn read(&self, gpa: u64, data: &mut [u8]);

    /// Writes 1 to 8 bytes at `gpa`, likewise.
    fn write(&self, gpa: u64, data: &[u8]);

    /// Whether what is behind these addresses goes into a suspended machine's state, as
    /// [`InOut::saved`](crate::bus::InOut::saved).
    fn saved(&self) -> bool {
        false
    }
}

/// Nobody is at any byte of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NobodyThere;

/// Guest-physical addresses of devices.
#[derive(Default)]
pub struct MmioBus {
    map: RwLock<AddressSpace<Arc<dyn Mmio>>>,
}

impl MmioBus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Hands `range` to `mmio`.
    ///
    /// # Errors
    /// [`Overlap`], naming both claims.
    pub fn register(
        &self,
        range: RangeInclusive<u64>,
        name: &str,
        mmio: Arc<dyn Mmio>,
    ) -> Result<(), Overlap> {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        map.insert(range, name, mmio)
    }

    /// Takes back the claim that starts at `start`; whether there was one. A handler that runs on
    /// another thread at this moment finishes its access.
    pub fn unregister(&self, start: u64) -> bool {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        map.remove(start).is_some()
    }

    /// A device whose state cannot be saved, if there is one.
    pub fn unsaved(&self) -> Option<String> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let unsaved = map.iter().find(|claim| !claim.value.saved());
        unsaved.map(|claim| claim.name.clone())
    }

    /// Who answers at an address.
    pub fn name(&self, gpa: u64) -> Option<String> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.find(gpa).map(|claim| claim.name.clone())
    }

    /// Reads; bytes at which nobody is are all ones.
    ///
    /// # Errors
    /// [`NobodyThere`] if that is all of them.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), NobodyThere> {
        data.fill(0xff);
        if let Some(mmio) = self.whole(gpa, data.len()) {
            mmio.read(gpa, data);
            return Ok(());
        }
        let mut answer = Err(NobodyThere);
        for (gpa, byte) in (0..).map_while(|i| gpa.checked_add(i)).zip(data) {
            if let Some(mmio) = self.whole(gpa, 1) {
                mmio.read(gpa, std::slice::from_mut(byte));
                answer = Ok(());
            }
        }
        answer
    }

    /// Writes; bytes at which nobody is are lost.
    ///
    /// # Errors
    /// [`NobodyThere`] if that is all of them.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), NobodyThere> {
        if let Some(mmio) = self.whole(gpa, data.len()) {
            mmio.write(gpa, data);
            return Ok(());
        }
        let mut answer = Err(NobodyThere);
        for (gpa, byte) in (0..).map_while(|i| gpa.checked_add(i)).zip(data) {
            if let Some(mmio) = self.whole(gpa, 1) {
                mmio.write(gpa, std::slice::from_ref(byte));
                answer = Ok(());
            }
        }
        answer
    }

    /// Who has all `len` bytes at `gpa`. The lock is free again when a handler runs.
    fn whole(&self, gpa: u64, len: usize) -> Option<Arc<dyn Mmio>> {
        let last = gpa.checked_add(len.checked_sub(1)? as u64)?;
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let claim = map.find(gpa)?;
        claim.range.contains(&last).then(|| claim.value.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Probe(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Mmio for Probe {
        fn read(&self, gpa: u64, data: &mut [u8]) {
            for (byte, gpa) in data.iter_mut().zip(gpa..) {
                *byte = gpa as u8;
            }
        }
        fn write(&self, gpa: u64, data: &[u8]) {
            self.0.lock().unwrap().push((gpa, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_their_device_and_nobody_else() {
        let (bus, probe) = (MmioBus::new(), Arc::<Probe>::default());
        bus.register(0x1000..=0x1005, "probe", probe.clone())
            .unwrap();
        assert!(
            bus.register(0x1005..=0x1005, "late", probe.clone())
                .is_err()
        );
        let read = |gpa| {
            let mut data = [0; 4];
            bus.read(gpa, &mut data).map(|()| data)
        };
        assert_eq!(read(0x1002), Ok([2, 3, 4, 5]));
        assert_eq!(read(0x1004), Ok([4, 5, 0xff, 0xff]));
        assert_eq!(read(0xffe), Ok([0xff, 0xff, 0, 1]));
        assert_eq!(read(0x1006), Err(NobodyThere));
        assert_eq!(read(u64::MAX - 1), Err(NobodyThere));
        bus.write(0x1000, &[1, 2]).unwrap();
        bus.write(0x1005, &[3, 4]).unwrap();
        assert_eq!(bus.write(0x2000, &[1]), Err(NobodyThere));
        let writes = [(0x1000, vec![1, 2]), (0x1005, vec![3])];
        assert_eq!(*probe.0.lock().unwrap(), writes);
        assert!(bus.unregister(0x1000));
        assert_eq!(read(0x1002), Err(NobodyThere));
    }
}
