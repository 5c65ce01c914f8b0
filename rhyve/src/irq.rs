//! (irq)
