//! virtio-vsock and its driver.

#![no_main]

use fuzz::{sow, vsock};

libfuzzer_sys::fuzz_target!(
    init: sow(&vsock::seeds()),
    |data: &[u8]| { vsock::check(data); }
);
