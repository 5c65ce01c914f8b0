//! The console: BVM's if it answers (FreeBSD, sys/dev/bvm/bvm_console.c), else COM1.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::{cpu, serial};

const BVM: u16 = 0x220;
const SIGNATURE: u16 = 0x6276;
const NOTHING: u32 = u32::MAX;

static HAS_BVM: AtomicBool = AtomicBool::new(false);

/// Looks for the console.
pub fn init() {
    let found = cpu::inw(BVM) == SIGNATURE;
    HAS_BVM.store(found, Ordering::Relaxed);
    if !found {
        serial::init();
    }
}

/// Its name.
pub fn name() -> &'static str {
    if HAS_BVM.load(Ordering::Relaxed) {
        "bvmcons"
    } else {
        "ttyu0"
    }
}

/// Sends the bytes.
pub fn write(bytes: &[u8]) {
    if HAS_BVM.load(Ordering::Relaxed) {
        bytes.iter().for_each(|&byte| cpu::outl(BVM, byte.into()));
    } else {
        serial::write(bytes);
    }
}

/// The next character typed, if one has come.
pub fn read() -> Option<u8> {
    if HAS_BVM.load(Ordering::Relaxed) {
        let word = cpu::inl(BVM);
        return (word != NOTHING).then_some(word as u8);
    }
    serial::poll();
    serial::read()
}
