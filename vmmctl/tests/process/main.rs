//! vmmctl as a process, on objects in a root of their own.

#![cfg(test)]

mod common;
mod conditions;
mod detail;
mod live;
mod look;
mod stored;
