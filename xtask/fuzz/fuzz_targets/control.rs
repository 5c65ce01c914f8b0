//! The control protocol; `RHYVE_ROOT` says where the VM is made.

#![no_main]

use std::sync::{LazyLock, Mutex};

use fuzz::control::{Bench, seeds};
use fuzz::sow;
use vmm_api::root::Root;

static BENCH: LazyLock<Mutex<Bench>> =
    LazyLock::new(|| Mutex::new(Bench::new(&Root::open().expect("a place for a VM"))));

libfuzzer_sys::fuzz_target!(
    init: sow(&seeds()),
    |data: &[u8]| {
        // A check that failed ends the process: the lock is never poisoned.
        BENCH.lock().expect("no check has failed").check(data);
    }
);
