//! Configuration mechanism 1: an address at 0xcf8, data at 0xcfc (3.2.2.3.2).
//!
//! The address decodes 32-bit accesses only; a byte at 0xcf9 is the reset control register.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use vmm_api::state::{DeviceState, StateError};

use super::PciBus;
use crate::bus::{InOut, IoSize, Overlap, PortBus};
use crate::config::PciAddress;
use crate::isa::reset::ResetControl;
use crate::lifecycle::{self, Lifecycle};

const ADDRESS: u16 = 0xcf8;
const RESET: u16 = 0xcf9;
const DATA: u16 = 0xcfc;
const LAST: u16 = 0xcff;

/// Turns accesses to the data ports into configuration cycles.
const ENABLE: u32 = 1 << 31;
/// Bus, device, function and register; the rest reads 0.
const IMPLEMENTED: u32 = 0x80ff_fffc;

/// The ports 0xcf8 to 0xcff.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    reset: Arc<ResetControl>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// The way to the functions of `bus`, with `reset` in its midst.
    pub fn new(bus: Arc<PciBus>, reset: Arc<ResetControl>) -> Arc<Self> {
        Arc::new(Self {
            bus,
            reset,
            address: AtomicU32::new(0),
        })
    }

    /// Puts it at its ports.
    ///
    /// # Errors
    /// [`Overlap`].
    pub fn register(self: &Arc<Self>, bus: &PortBus) -> Result<(), Overlap> {
        bus.register(ADDRESS..=LAST, "pciconf", self.clone())
    }

    /// Whom the address names now, and the register at data port `port`.
    fn target(&self, port: u16) -> Option<(PciAddress, u8)> {
        let address = self.address.load(Relaxed);
        if address & ENABLE == 0 {
            return None;
        }
        let [register, devfn, bus, _] = address.to_le_bytes();
        let target = PciAddress::on_wire(bus, devfn);
        Some((target, register | (port & 3) as u8))
    }
}

impl Lifecycle for ConfigPorts {
    fn save(&self) -> Result<DeviceState, String> {
        lifecycle::save(
            "pciconf",
            1,
            &(self.address.load(Relaxed), self.reset.read()),
        )
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let (address, reset): (u32, u8) = lifecycle::load("pciconf", 1, state)?;
        self.address.store(address & IMPLEMENTED, Relaxed);
        self.reset.restore(reset);
        Ok(())
    }
}

impl InOut for ConfigPorts {
    fn saved(&self) -> bool {
        true
    }

    fn width(&self) -> IoSize {
        IoSize::Dword
    }

    fn read(&self, port: u16, size: IoSize) -> u32 {
        match (port, size) {
            (ADDRESS, IoSize::Dword) => self.address.load(Relaxed),
            (RESET, IoSize::Byte) => u32::from(self.reset.read()),
            (DATA.., _) => self.target(port).map_or(size.ones(), |(target, register)| {
                self.bus.read(target, register, size)
            }),
            _ => size.ones(),
        }
    }

    fn write(&self, port: u16, size: IoSize, value: u32) {
        match (port, size) {
            (ADDRESS, IoSize::Dword) => self.address.store(value & IMPLEMENTED, Relaxed),
            (RESET, IoSize::Byte) => self.reset.write(value as u8),
            (DATA.., _) => {
                if let Some((target, register)) = self.target(port) {
                    self.bus.write(target, register, size, value);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Bridge;
    use crate::suspend::SuspendHow;
    use crate::testing::FakeSuspend;

    fn rig() -> (PortBus, Arc<PciBus>, Arc<FakeSuspend>) {
        let suspend = FakeSuspend::new();
        let pci = PciBus::new();
        pci.plug(PciAddress::HOST_BRIDGE, Bridge::host()).unwrap();
        let taken = pci
            .plug(PciAddress::HOST_BRIDGE, Bridge::amd_host())
            .unwrap_err();
        assert_eq!(
            taken.to_string(),
            "amd_hostbridge cannot be at 0:0:0: hostbridge is there"
        );
        let bus = PortBus::new();
        let reset = ResetControl::new(suspend.clone());
        ConfigPorts::new(pci.clone(), reset).register(&bus).unwrap();
        (bus, pci, suspend)
    }

    #[test]
    fn a_scan_finds_what_is_there_on_any_bus() {
        let (bus, pci, _) = rig();
        let place = PciAddress::new(200, 2, 0).unwrap();
        pci.plug(place, Bridge::amd_host()).unwrap();
        let mut found = Vec::new();
        for function in 0..0x1_0000_u32 {
            bus.write(0xcf8, IoSize::Dword, 0x8000_0000 | function << 8)
                .unwrap();
            let ident = bus.read(0xcfc, IoSize::Dword).unwrap();
            if ident != 0xffff_ffff {
                found.push((function, ident));
            }
        }
        assert_eq!(found, [(0, 0x1275_1275), (0xc810, 0x7432_1022)]);
    }

    /// Linux, arch/x86/pci/direct.c: pci_check_type1 and pci_sanity_check.
    #[test]
    fn linux_recognizes_mechanism_1() {
        let (bus, _, suspend) = rig();
        bus.write(0xcfb, IoSize::Byte, 0x01).unwrap();
        bus.write(0xcf8, IoSize::Dword, 0x8000_0000).unwrap();
        assert_eq!(bus.read(0xcf8, IoSize::Dword), Ok(0x8000_0000));
        bus.write(0xcf8, IoSize::Dword, 0x8000_0008).unwrap();
        assert_eq!(bus.read(0xcfe, IoSize::Word), Ok(0x0600));
        assert_eq!(bus.read(0xcff, IoSize::Byte), Ok(0x06));
        assert_eq!(suspend.requests(), []);
    }

    #[test]
    fn disabled_and_odd_accesses_float() {
        let (bus, ..) = rig();
        bus.write(0xcf8, IoSize::Dword, 0x0000_0000).unwrap();
        assert_eq!(bus.read(0xcfc, IoSize::Dword), Ok(0xffff_ffff));
        bus.write(0xcf8, IoSize::Dword, 0xffff_ffff).unwrap();
        assert_eq!(bus.read(0xcf8, IoSize::Dword), Ok(0x80ff_fffc));
        assert_eq!(bus.read(0xcf8, IoSize::Word), Ok(0xffff));
        bus.write(0xcf8, IoSize::Dword, 0x8000_0000).unwrap();
        assert_eq!(
            bus.read(0xcfd, IoSize::Word),
            Ok(0x7512),
            "inside the register"
        );
        assert_eq!(bus.read(0xcfe, IoSize::Dword), Ok(0xffff_1275), "beyond it");
    }

    #[test]
    fn the_byte_in_between_resets() {
        let (bus, _, suspend) = rig();
        bus.write(0xcf8, IoSize::Dword, 0x8000_0600).unwrap();
        assert_eq!(suspend.requests(), []);
        bus.write(0xcf9, IoSize::Byte, 0x06).unwrap();
        assert_eq!(suspend.requests(), [SuspendHow::Reset]);
        assert_eq!(bus.read(0xcf9, IoSize::Byte), Ok(0x06));
        assert_eq!(bus.read(0xcf8, IoSize::Dword), Ok(0x8000_0600));
    }
}
