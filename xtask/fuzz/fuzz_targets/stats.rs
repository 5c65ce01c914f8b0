//! KVM's binary statistics.

#![no_main]

use fuzz::{sow, stats};

libfuzzer_sys::fuzz_target!(
    init: sow(&stats::seeds()),
    |data: &[u8]| { stats::check(data); }
);
