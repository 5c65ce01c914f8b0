//! The kernel loaders.

#![no_main]

use fuzz::{kernel, sow};

libfuzzer_sys::fuzz_target!(
    init: sow(&kernel::seeds()),
    |data: &[u8]| { kernel::check(data); }
);
