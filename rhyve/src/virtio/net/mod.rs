//! virtio-net: a network card (virtio 1.3, 5.1).
//!
//! ```text
//!  Port --readv--> receive queue (a thread each) --> used ring --> interrupt
//!  Port <-writev-- transmit queue (a thread each) <-- kick
//!  control queue (event thread) --> Filter, offloads, number of queues
//! ```
//!
//! A frame is moved by one system call, straight between guest memory and the backend. A receive
//! thread offers the backend as many buffers as the largest frame needs (while small ones come one at
//! a time, one and a buffer of its own) and gives the driver those that were filled, all at once. What
//! makes no sense (a buffer without room for a header, a command that is none) is answered and counted;
//! an error of the host is a line in the log and a link that is down.

mod bell;
mod config;
mod control;
mod device;
mod filter;
mod inspect;
mod pace;
mod receive;
mod shared;
#[cfg(test)]
mod tests;
mod transmit;
mod waiter;
mod worker;

pub use config::{CONTROL_SIZE, QUEUE_SIZE};
pub use control::Command;
pub use device::Net;
pub use filter::Filter;
pub use shared::Counters;
