//! (mevent)
