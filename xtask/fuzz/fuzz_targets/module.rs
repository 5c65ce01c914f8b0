//! FreeBSD kernel modules.

#![no_main]

use fuzz::{module, sow};

libfuzzer_sys::fuzz_target!(
    init: sow(&module::seeds()),
    |data: &[u8]| { module::check(data); }
);
