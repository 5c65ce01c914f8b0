//! A debugger's packets.

#![no_main]

use fuzz::{gdb, sow};

libfuzzer_sys::fuzz_target!(
    init: sow(&gdb::seeds()),
    |data: &[u8]| { gdb::check(data); }
);
