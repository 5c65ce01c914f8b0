//! Loads a guest kernel into a named virtual machine, without /dev/kvm.
//!
//! bhyveload's place in rhyve. Data flows one way: [`cli`] makes a [`load::Job`], [`plan`] reads the
//! kernel's headers and says what goes where, [`load`] carries that out on the VM object. The boot
//! protocols ([`linux`], [`pvh`], [`freebsd`]) are pure functions from headers to plans. [`boot`] finds
//! a FreeBSD kernel and its modules as their own loader does, in a directory or on a disk
//! ([`source`]).

#![forbid(unsafe_code)]

pub mod boot;
pub mod bulk;
pub mod cli;
pub mod copy;
pub mod elf;
pub mod freebsd;
pub mod image;
pub mod linux;
pub mod load;
pub mod plan;
pub mod progress;
pub mod pty;
pub mod pvh;
pub mod source;
pub mod space;
pub mod terminal;

pub use plan::plan_kernel;
