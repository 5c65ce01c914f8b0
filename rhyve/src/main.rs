//! The `rhyve` program.

fn main() {}
