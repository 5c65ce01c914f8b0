//! Partition tables.

#![no_main]

use fuzz::{partitions, sow};

libfuzzer_sys::fuzz_target!(
    init: sow(&partitions::seeds()),
    |data: &[u8]| { partitions::check(data); }
);
