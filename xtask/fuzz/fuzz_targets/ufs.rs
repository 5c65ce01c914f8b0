//! UFS.

#![no_main]

use fuzz::{sow, ufs};

libfuzzer_sys::fuzz_target!(
    init: sow(&ufs::seeds()),
    |data: &[u8]| { ufs::check(data); }
);
