//! A virtio disk and its driver.

#![no_main]

use fuzz::{sow, virtio};

libfuzzer_sys::fuzz_target!(
    init: sow(&virtio::seeds()),
    |data: &[u8]| { virtio::check(data); }
);
