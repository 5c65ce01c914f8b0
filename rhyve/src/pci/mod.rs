//! PCI: buses of functions.
//!
//! A guest finds them through configuration mechanism 1 ([`ConfigPorts`]) or in memory
//! ([`EcamWindow`]); both ask the [`PciBus`], and that the addressed function, which answers out of
//! its [`ConfigSpace`]: a register map with a mask of what is writable, which has no behaviour of
//! its own. An [`Endpoint`] adds what a device needs: BARs that follow the guest's will from place
//! to place on the buses, [`Messages`] and [`Intx`]; the device itself is a [`PciDevice`].
//!
//! Section numbers are of PCI Local Bus 3.0.

mod bar;
mod bridge;
mod bus;
mod config;
mod ecam;
mod endpoint;
mod msi;
mod msix;
mod ports;

pub use bar::{Bar, BarKind, NoRoom, Placement};
pub use bridge::Bridge;
pub use bus::{PciBus, PciFunction, SlotTaken};
pub use config::{ConfigSpace, Ident};
pub use ecam::EcamWindow;
pub use endpoint::{Buses, Endpoint, Intx, IntxPin, Messages, Parts, PciDevice};
pub use msi::Msi;
pub use msix::{MAX_VECTORS, MsiSink, MsiVector, Msix};
pub use ports::ConfigPorts;
