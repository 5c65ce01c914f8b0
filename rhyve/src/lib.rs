//! Runs a virtual machine: vCPU threads, exits and device models.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod bus;
pub mod cli;
pub mod config;
pub mod console;
pub mod firmware;
pub mod irq;
pub mod isa;
pub mod mevent;
pub mod pci;
pub mod suspend;
#[cfg(test)]
pub mod testing;
