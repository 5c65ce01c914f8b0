//! The PC's legacy devices, as far as a guest without firmware meets them.
//!
//! The interrupt controllers, the interval timer and port 0x61 are KVM's own, in the kernel.

pub mod uart;
