//! The state of a VM in its object.

#![no_main]

use fuzz::{sow, vm_json};

libfuzzer_sys::fuzz_target!(
    init: sow(&vm_json::seeds()),
    |data: &[u8]| { vm_json::check(data); }
);
