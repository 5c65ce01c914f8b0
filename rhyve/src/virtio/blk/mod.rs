//! virtio-blk: a disk (virtio 1.3, 5.2).
//!
//! ```text
//!  kick --> Worker (a thread a queue) --> BlkRequest::parse --> block::Channel --> image
//!  interrupt <-- Virtqueue <-- status byte <-- Worker <-- completion
//! ```
//!
//! What a request says is read once and checked ([`BlkRequest`]); a chain that is no request gets an
//! error if it has a byte for its status and is dropped otherwise, and is counted. An error of the
//! host is an I/O error of the guest, and a line in the log.

mod config;
mod device;
mod inspect;
mod request;
#[cfg(test)]
mod tests;
mod worker;

pub use config::{
    MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_ZERO_SECTORS, MAX_ZERO_SEGMENTS, QUEUE_SIZE,
};
pub use device::{Blk, Counters};
pub use request::{Action, BlkRequest, Rules, Status};
