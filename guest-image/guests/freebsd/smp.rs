//! The other CPUs: started, and then asleep.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::cpu;

/// How many CPUs arrived.
static LAUNCHED: AtomicU32 = AtomicU32::new(0);

/// How many CPUs arrived.
pub fn launched() -> u32 {
    LAUNCHED.load(Ordering::SeqCst)
}

/// What a started CPU does.
pub fn main(_id: u32) -> ! {
    LAUNCHED.fetch_add(1, Ordering::SeqCst);
    cpu::halt()
}
