//! What `cargo xtask bench` measures with.

pub mod boot;
pub mod copy;
pub mod host;
pub mod process;
pub mod sample;
