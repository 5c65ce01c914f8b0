//! virtio: what devices and their transports have in common.
//!
//! A driver in the guest negotiates with a transport; once it is ready, the transport hands the
//! [`VirtioDevice`] its [`Virtqueue`]s and stays out of the way:
//!
//! ```text
//!  registers --> transport --activate, reset--> VirtioDevice
//!  notify ----> (ioeventfd) ----> kick --> worker or mevent --> Virtqueue::pop --> Chain
//!  interrupt <-- (irqfd) <-- Interrupts <-- Virtqueue::signal <-- Virtqueue::add_used
//! ```
//!
//! Section numbers are of "Virtual I/O Device (VIRTIO) Version 1.3" (OASIS).

pub mod balloon;
pub mod blk;
mod chain;
pub mod console;
mod device;
mod kicks;
pub mod net;
pub mod p9;
mod queue;
mod rnd;
pub mod transport;
mod vintage;
pub mod vsock;

pub use chain::{Chain, Reader, Segment, Writer};
pub use device::{
    Activation, DeviceError, Inspection, Interrupts, QueueReset, VirtioDevice, device_id, feature,
};
pub use queue::{Position, QueueCounters, Rings, RingsError, Virtqueue};
pub use rnd::Rnd;
pub use vintage::Vintage;
