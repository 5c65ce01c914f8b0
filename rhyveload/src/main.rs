//! The `rhyveload` program.

fn main() {}
