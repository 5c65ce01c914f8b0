//! The named VM object and the only crate that knows KVM: libvmmapi's place in rhyve.
//!
//! A virtual machine is a directory on tmpfs ([`vm::Vm`]) that outlives the programs which work on
//! it: `rhyveload` fills its memory and its first vCPU, `rhyve` runs it, `vmmctl` looks into it.
//! Data flows one way: [`name`] and [`root`] say where an object is, [`vm`] opens it, [`state`] and
//! [`memory`] are what it holds, [`regs`] names what a vCPU is made of, and [`kvm`] turns all of
//! that into a machine that runs. [`control`] is how another process reaches a running one.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod blockdev;
pub mod boot;
pub mod capability;
#[cfg(feature = "cli")]
pub mod cli;
pub mod control;
pub mod exit;
pub mod guest;
pub mod inspect;
pub mod kvm;
mod mapping;
pub mod memory;
pub mod name;
pub mod pagewalk;
pub mod profile;
pub mod regs;
pub mod resident;
pub mod root;
pub mod scatter;
pub mod state;
pub mod stats;
pub mod topology;
pub mod uring;
pub mod vm;

mod encoding;
mod lock;
