//! loader.conf and its neighbours.

#![no_main]

use fuzz::{loader_conf, sow};

libfuzzer_sys::fuzz_target!(
    init: sow(&loader_conf::seeds()),
    |data: &[u8]| { loader_conf::check(data); }
);
