//! (firmware)
