//! What `cargo xtask bench` measures with.

pub mod boot;
pub mod control;
pub mod copy;
pub mod host;
pub mod io;
pub mod load;
pub mod net;
pub mod process;
pub mod sample;
