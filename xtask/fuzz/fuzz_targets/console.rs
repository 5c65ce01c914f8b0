//! virtio-console and its driver.

#![no_main]

use fuzz::{console, sow};

libfuzzer_sys::fuzz_target!(
    init: sow(&console::seeds()),
    |data: &[u8]| { console::check(data); }
);
