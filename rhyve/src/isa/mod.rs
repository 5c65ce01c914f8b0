//! The PC's legacy devices, as far as a guest without firmware meets them.
//!
//! The interrupt controllers, the interval timer and port 0x61 are KVM's own, in the kernel. Every
//! device here has a `register` that puts it on the port bus under its usual ports.

pub mod clock;
pub mod debugexit;
pub mod i8042;
pub mod pm;
pub mod post;
pub mod reset;
pub mod uart;
