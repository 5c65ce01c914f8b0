//! Configuration space in memory: PCI Express' enhanced access mechanism (PCI Express Base 4.0,
//! 7.2.2), 4 KiB a function, of which conventional functions have the first 256 bytes.

use std::sync::Arc;

use super::PciBus;
use crate::bus::{IoSize, Overlap};
use crate::config::PciAddress;
use crate::mmio::{Mmio, MmioBus};

/// The configuration space of all functions.
pub struct EcamWindow {
    bus: Arc<PciBus>,
    base: u64,
}

impl EcamWindow {
    /// Bytes a bus.
    pub const BUS_SIZE: u64 = 1 << 20;

    /// Puts that of the buses up to `last` at `base`, a multiple of 1 MiB.
    ///
    /// # Errors
    /// [`Overlap`].
    pub fn register(bus: Arc<PciBus>, base: u64, last: u8, mmio: &MmioBus) -> Result<(), Overlap> {
        let size = (u64::from(last) + 1) * Self::BUS_SIZE;
        let range = base..=base + (size - 1);
        mmio.register(range, "pciecam", Arc::new(Self { bus, base }))
    }

    /// Whom an address names, and which register; none beyond the first 256 bytes.
    fn target(&self, gpa: u64) -> Option<(PciAddress, u8)> {
        let offset = gpa.wrapping_sub(self.base);
        let target = PciAddress::on_wire((offset >> 20) as u8, (offset >> 12) as u8);
        u8::try_from(offset & 0xfff)
            .ok()
            .map(|register| (target, register))
    }
}

/// The parts of an access that are 1, 2 or 4 bytes and cross no multiple of 4, as (offset, size).
fn parts(gpa: u64, len: usize) -> impl Iterator<Item = (usize, IoSize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let aligned = |size: IoSize| {
            let bytes = usize::from(size.bytes());
            len - at >= bytes && (gpa.wrapping_add(at as u64)).is_multiple_of(bytes as u64)
        };
        let sizes = [IoSize::Dword, IoSize::Word, IoSize::Byte];
        let size = sizes.into_iter().find(|size| aligned(*size))?;
        let part = (at, size);
        at += usize::from(size.bytes());
        Some(part)
    })
}

impl Mmio for EcamWindow {
    fn saved(&self) -> bool {
        true
    }

    fn read(&self, gpa: u64, data: &mut [u8]) {
        for (at, size) in parts(gpa, data.len()) {
            let target = self.target(gpa.wrapping_add(at as u64));
            let value = target.map_or(u32::MAX, |(target, register)| {
                self.bus.read(target, register, size)
            });
            for (to, from) in data.iter_mut().skip(at).zip(value.to_le_bytes()) {
                *to = from;
            }
        }
    }

    fn write(&self, gpa: u64, data: &[u8]) {
        for (at, size) in parts(gpa, data.len()) {
            let Some((target, register)) = self.target(gpa.wrapping_add(at as u64)) else {
                continue;
            };
            let mut value = [0; 4];
            let bytes = data.iter().skip(at).take(size.bytes().into());
            for (to, from) in value.iter_mut().zip(bytes) {
                *to = *from;
            }
            self.bus
                .write(target, register, size, u32::from_le_bytes(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Bridge;

    #[test]
    fn it_shows_what_the_ports_show() {
        let (bus, mmio) = (PciBus::new(), MmioBus::new());
        for (at, slot, function) in [(0, 0, 0), (0, 3, 0), (0, 3, 1), (17, 3, 0)] {
            let address = PciAddress::new(at, slot, function).unwrap();
            bus.plug(address, Bridge::host()).unwrap();
        }
        EcamWindow::register(bus, 0xe000_0000, 17, &mmio).unwrap();
        let read = |gpa: u64, len: usize| {
            let mut data = [0; 8];
            mmio.read(gpa, &mut data[..len]).unwrap();
            u64::from_le_bytes(data)
        };
        assert_eq!(read(0xe000_0000, 4), 0x1275_1275);
        assert_eq!(read(0xe000_0001, 4), 0x0012_7512);
        assert_eq!(read(0xe000_0008, 8), 0x0000_0000_0600_0000);
        assert_eq!(read(0xe000_0100, 4), 0xffff_ffff);
        assert_eq!(read(0xe000_1000, 4), 0xffff_ffff);
        assert_eq!(read(0xe101_8000, 4), 0xffff_ffff);
        assert_eq!(read(0xe111_8000, 4), 0x1275_1275);
        assert!(mmio.read(0xe120_0000, &mut [0]).is_err());
        for (gpa, header) in [
            (0xe000_000c, 0),
            (0xe001_800c, 0x80),
            (0xe001_900c, 0),
            (0xe111_800c, 0),
        ] {
            assert_eq!(read(gpa, 4), header << 16);
            assert_eq!(read(gpa + 2, 1), header);
            assert_eq!(read(gpa, 2), 0);
        }
        mmio.write(0xe001_8004, &[7, 1, 0, 0]).unwrap();
        assert_eq!(read(0xe001_8004, 2), 0x0107);
        mmio.write(0xe001_8104, &[0xff; 8]).unwrap();
    }

    proptest::proptest! {
        #[test]
        fn any_access_is_cut_into_parts_that_fit(gpa: u64, len in 1usize..9) {
            let mut next = 0;
            for (at, size) in parts(gpa, len) {
                let first = gpa.wrapping_add(at as u64) & 3;
                assert!(at == next && first + u64::from(size.bytes()) <= 4);
                next += usize::from(size.bytes());
            }
            assert_eq!(next, len);
        }
    }
}
