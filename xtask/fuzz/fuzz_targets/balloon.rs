//! virtio-balloon and its driver.

#![no_main]

use fuzz::{balloon, sow};

libfuzzer_sys::fuzz_target!(
    init: sow(&balloon::seeds()),
    |data: &[u8]| { balloon::check(data); }
);
