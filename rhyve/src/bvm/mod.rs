//! The "BSD virtual machine" devices of the first bhyve: a console and a debug port that cost a
//! guest kernel one 32-bit port each (FreeBSD, sys/dev/bvm and usr.sbin/bhyve/{consport,dbgport}.c).
//!
//! Both are a pipe of bytes: a 32-bit write sends one, a 32-bit read takes one or says that there is
//! none, and a 16-bit read is a signature by which a kernel finds the device. [`BytePort`] is what
//! they have in common; the host's end is a [`Console`](crate::console::Console), as a serial port's.
//!
//! Neither has a register that would say "busy". bhyve lets the guest wait in write(2) for as long
//! as its reader takes; a virtual CPU here must stay answerable, so it waits for a second, once, and
//! while the reader stays away what is sent is lost.

mod byteport;
mod consport;
mod dbgport;

pub use byteport::BytePort;
pub use consport::{CONSPORT, consport};
pub use dbgport::{DBGPORT, DbgPort, DebugPort};
