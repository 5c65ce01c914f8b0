//! probe_user.ko: a module that needs the other one.

#![no_std]

#[path = "module.rs"]
mod module;

use module::{Event, Module, depends, entry, version};

unsafe extern "C" {
    static probe_base_word: u64;
    static probe_base_count: [u64; 40];
    fn probe_base_triple(value: u64) -> u64;
    fn probe_kernel_double(value: u64) -> u64;
}

extern "C" fn event(_module: *const (), what: i32, _argument: *const ()) -> i32 {
    if what != module::LOAD {
        return module::NOT_SUPPORTED;
    }
    // SAFETY: the other module is linked before; what is called only calculates.
    let right = unsafe {
        let count = &raw const probe_base_count[0];
        let before = count.read_volatile();
        let sum = probe_base_triple(probe_base_word & 0xff) + probe_kernel_double(20);
        let after = count.read_volatile();
        sum == 43 && after == before + 1
    };
    if right { 0 } else { 1 }
}

static HANDLER: Module = Module::new(c"probe_user", event as Event);

entry!(SET_MODULE, module::MODULE, &HANDLER, c"probe_user");
version!(SET_VERSION, 1, c"probe_user");
depends!(SET_BASE, [1, 1, 1], c"probe_base");
