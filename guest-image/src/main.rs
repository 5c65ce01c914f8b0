//! The `guest-image` program.

fn main() {}
