//! The `vmmctl` program.

fn main() {}
