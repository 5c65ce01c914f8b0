//! The programs' command lines.

#![no_main]

use fuzz::{options, sow};

libfuzzer_sys::fuzz_target!(
    init: sow(&options::seeds()),
    |data: &[u8]| { options::check(data); }
);
