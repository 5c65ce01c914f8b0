//! virtio-9p's requests.

#![no_main]

use fuzz::{p9, sow};

libfuzzer_sys::fuzz_target!(
    init: sow(&p9::seeds()),
    |data: &[u8]| { p9::check(data); }
);
