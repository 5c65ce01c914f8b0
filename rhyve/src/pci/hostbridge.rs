//! The host bridge: what a guest finds at slot 0 and takes for proof that PCI works.

use std::sync::{Arc, Mutex, PoisonError};

use super::{ConfigSpace, Ident, PciFunction};
use crate::bus::IoSize;

/// A host bridge without functions of its own.
pub struct HostBridge {
    name: &'static str,
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    /// bhyve's `hostbridge`, 1275:1275 (usr.sbin/bhyve/pci_hostbridge.c).
    pub fn new() -> Arc<Self> {
        Self::with_ident("hostbridge", 0x1275, 0x1275)
    }

    /// bhyve's `amd_hostbridge`, 1022:7432: some guests trust MSI behind a bridge they know only.
    pub fn amd() -> Arc<Self> {
        Self::with_ident("amd_hostbridge", 0x1022, 0x7432)
    }

    fn with_ident(name: &'static str, vendor: u16, device: u16) -> Arc<Self> {
        let ident = Ident {
            vendor,
            device,
            class: 0x06_00_00,
            ..Ident::default()
        };
        Arc::new(Self {
            name,
            config: Mutex::new(ConfigSpace::new(ident)),
        })
    }
}

impl PciFunction for HostBridge {
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
