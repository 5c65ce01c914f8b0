//! (isa)
