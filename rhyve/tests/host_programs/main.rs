//! Host lane: the programs as processes, with guests that run on any KVM.

#![cfg(test)]

#[path = "../support/mod.rs"]
mod support;

mod abuse;
mod cards;
mod clones;
mod consoles;
mod disks;
mod ends;
mod freebsd;
mod gdb;
mod guests;
mod hosts;
mod kills;
mod looks;
mod memory;
mod pci;
mod refusals;
mod reports;
mod steps;
mod suspends;
mod terminal;
