//! A guest's memory, as its kernel left it.

#![no_main]

use fuzz::{guest, sow};

libfuzzer_sys::fuzz_target!(
    init: sow(&guest::seeds()),
    |data: &[u8]| { guest::check(data); }
);
