//! probe_base.ko: a module that others need.

#![no_std]

#[path = "module.rs"]
mod module;

use module::{Event, Module, depends, entry, version};

/// A word of data, and one that is nothing but its address.
#[unsafe(no_mangle)]
pub static probe_base_word: u64 = 0x7268_7976_6500_0001;
#[unsafe(no_mangle)]
pub static probe_base_pointer: &u64 = &probe_base_word;
/// Memory that no file has, and that has to be clear.
#[unsafe(no_mangle)]
pub static mut probe_base_count: [u64; 40] = [0; 40];

unsafe extern "C" {
    fn probe_kernel_double(value: u64) -> u64;
}

/// What the other module calls.
#[unsafe(no_mangle)]
pub extern "C" fn probe_base_triple(value: u64) -> u64 {
    // SAFETY: the kernel's function only calculates; modules are started one after the other.
    unsafe {
        probe_base_count[0] += 1;
        probe_kernel_double(value).wrapping_add(value)
    }
}

extern "C" fn event(_module: *const (), what: i32, _argument: *const ()) -> i32 {
    if what != module::LOAD {
        return module::NOT_SUPPORTED;
    }
    // SAFETY: as above.
    let count = unsafe { (&raw const probe_base_count).read_volatile() };
    let clear = count.iter().all(|&word| word == 0);
    let data = *probe_base_pointer == probe_base_word;
    if clear && data && probe_base_triple(7) == 21 {
        0
    } else {
        1
    }
}

static HANDLER: Module = Module::new(c"probe_base", event as Event);

entry!(SET_MODULE, module::MODULE, &HANDLER, c"probe_base");
version!(SET_VERSION, 1, c"probe_base");
depends!(SET_KERNEL, [1, 1, 1], c"probe_kernel");
