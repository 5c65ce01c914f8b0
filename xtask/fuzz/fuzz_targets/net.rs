//! A network card's queues and their driver.

#![no_main]

use fuzz::{net, sow};

libfuzzer_sys::fuzz_target!(
    init: sow(&net::seeds()),
    |data: &[u8]| { net::check(data); }
);
