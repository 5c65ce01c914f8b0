//! FAT.

#![no_main]

use fuzz::{fat, sow};

libfuzzer_sys::fuzz_target!(
    init: sow(&fat::seeds()),
    |data: &[u8]| { fat::check(data); }
);
