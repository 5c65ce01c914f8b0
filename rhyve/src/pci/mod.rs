//! PCI: one bus of functions, found through configuration mechanism 1.
//!
//! A guest's access to 0xcf8 and 0xcfc goes to [`ConfigPorts`], from there to the addressed function
//! of the [`PciBus`], which answers out of its [`ConfigSpace`]: a register map with a mask of what is
//! writable, which has no behaviour of its own. Section numbers are of PCI Local Bus 3.0.

mod bus;
mod config;
mod hostbridge;
mod ports;

pub use bus::{PciBus, PciFunction, SlotTaken};
pub use config::{ConfigSpace, Ident};
pub use hostbridge::HostBridge;
pub use ports::ConfigPorts;
