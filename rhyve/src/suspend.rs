//! (suspend)
