//! Host lane: the programs as processes, with guests that run on any KVM.

#![cfg(test)]

#[path = "../support/mod.rs"]
mod support;

mod abuse;
mod consoles;
mod ends;
mod guests;
mod hosts;
mod kills;
mod looks;
mod memory;
mod refusals;
mod reports;
mod terminal;
