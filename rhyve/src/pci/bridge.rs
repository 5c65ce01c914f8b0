//! Bridges, which are nothing but configuration space: the host's, which a guest finds at slot 0 and
//! takes for proof that PCI works, and the one to ISA.

use std::sync::{Arc, Mutex, PoisonError};

use vmm_api::state::{DeviceState, StateError};

use super::{ConfigSpace, Ident, PciFunction};
use crate::bus::IoSize;
use crate::lifecycle::{self, Lifecycle};

/// PCI Express's capability, as a root port of one lane at 2.5 GT/s has it (PCI Express 5.0, 7.5.3),
/// version 2. It is why FreeBSD lets devices interrupt by messages: only a chipset of PCI Express or
/// PCI-X is trusted with them (sys/dev/pci/pci.c), and bhyve's bridge has it for that (usr.sbin/bhyve/
/// pci_hostbridge.c).
const EXPRESS: (u8, [u8; 58]) = (0x10, {
    let mut body = [0; 58];
    // Version 2, type 4: root port.
    body[0] = 0x42;
    // Link capabilities: 2.5 GT/s, one lane, L0s.
    body[10] = 0x11;
    body[11] = 0x04;
    // Link status: so it is.
    body[16] = 0x11;
    body
});

/// The ISA bridge's registers of PCI's interrupt lines: A to D, and E to H.
const PIRQ_A: usize = 0x60;
const PIRQ_E: usize = 0x68;

/// A bridge.
pub struct Bridge {
    name: &'static str,
    config: Mutex<ConfigSpace>,
}

impl Bridge {
    /// bhyve's `hostbridge`, 1275:1275 (usr.sbin/bhyve/pci_hostbridge.c).
    pub fn host() -> Arc<Self> {
        Self::host_with_ident("hostbridge", 0x1275, 0x1275)
    }

    /// bhyve's `amd_hostbridge`, 1022:7432: some guests trust MSI behind a bridge they know only.
    pub fn amd_host() -> Arc<Self> {
        Self::host_with_ident("amd_hostbridge", 0x1022, 0x7432)
    }

    fn host_with_ident(name: &'static str, vendor: u16, device: u16) -> Arc<Self> {
        let mut space = ConfigSpace::new(Ident {
            vendor,
            device,
            class: 0x06_00_00,
            ..Ident::default()
        });
        let (id, body) = EXPRESS;
        space.add_capability(id, &body);
        Self::of(name, space)
    }

    /// bhyve's `lpc`, 8086:7000 (usr.sbin/bhyve/pci_lpc.c). `inputs` are those of the 8259s that PCI's
    /// eight interrupt lines go to: the registers PIRQA to PIRQH show them, as in that chip, but they
    /// are wired and cannot be set.
    pub fn isa(inputs: [u8; 8]) -> Arc<Self> {
        let mut space = ConfigSpace::new(Ident {
            vendor: 0x8086,
            device: 0x7000,
            class: 0x06_01_00,
            ..Ident::default()
        });
        let (low, high) = inputs.split_at(4);
        space.set(PIRQ_A, low);
        space.set(PIRQ_E, high);
        Self::of("lpc", space)
    }

    fn of(name: &'static str, space: ConfigSpace) -> Arc<Self> {
        Arc::new(Self {
            name,
            config: Mutex::new(space),
        })
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Saved(#[serde(with = "lifecycle::bytes")] Vec<u8>);

impl Lifecycle for Bridge {
    fn save(&self) -> Result<DeviceState, String> {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        lifecycle::save(self.name, 1, &Saved(config.bytes().to_vec()))
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let Saved(bytes) = lifecycle::load(self.name, 1, state)?;
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        config.restore(&bytes)
    }
}

impl PciFunction for Bridge {
    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        Some(self)
    }

    fn name(&self) -> &str {
        self.name
    }

    fn config_read(&self, register: u8, size: IoSize) -> u32 {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        config.read(register, size)
    }

    fn config_write(&self, register: u8, size: IoSize, value: u32) {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        config.write(register, size, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_is_of_pci_express() {
        let bridge = Bridge::host();
        let word = |at: u32| bridge.config_read(u8::try_from(at).unwrap(), IoSize::Word);
        assert_eq!(word(0x06) & 1 << 4, 1 << 4, "it has capabilities");
        let at = word(0x34) & 0xff;
        assert_eq!(word(at), 0x10, "PCI Express, and nothing behind it");
        let kind = word(at + 2);
        assert_eq!((kind & 0xf, kind >> 4 & 0xf), (2, 4));
        // Nothing of it is a guest's to change.
        bridge.config_write(at as u8, IoSize::Dword, 0xffff_ffff);
        assert_eq!(word(at + 2), kind);
        assert_eq!(word(at + 12), 0x411);
    }

    #[test]
    fn the_one_to_isa_shows_where_interrupts_go() {
        let bridge = Bridge::isa([10, 11, 5, 10, 11, 5, 10, 11]);
        let read = |at| bridge.config_read(at, IoSize::Dword);
        assert_eq!((read(0), read(8) >> 8), (0x7000_8086, 0x06_01_00));
        assert_eq!(read(0x0c), 0, "one function, no bridge to another bus");
        for at in [0x60, 0x68] {
            bridge.config_write(at, IoSize::Dword, 0);
        }
        assert_eq!((read(0x60), read(0x68)), (0x0a05_0b0a, 0x0b0a_050b));
    }
}
