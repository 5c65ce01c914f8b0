//! What a FreeBSD module tells of itself (sys/sys/module.h): entries of `set_modmetadata_set`.

use core::ffi::CStr;

/// Kinds of entries.
pub const DEPEND: i32 = 1;
pub const MODULE: i32 = 2;
pub const VERSION: i32 = 3;

/// The event of being loaded.
pub const LOAD: i32 = 0;
/// EOPNOTSUPP.
pub const NOT_SUPPORTED: i32 = 45;

/// modeventhand_t.
pub type Event = extern "C" fn(*const (), i32, *const ()) -> i32;

/// struct mod_metadata.
#[repr(C)]
pub struct Metadata {
    version: i32,
    kind: i32,
    data: *const (),
    name: *const u8,
}

impl Metadata {
    pub const fn new<T>(kind: i32, data: &'static T, name: &'static CStr) -> Self {
        Self {
            version: 1,
            kind,
            data: (&raw const *data).cast(),
            name: name.as_ptr().cast(),
        }
    }
}

// SAFETY: it points at constants.
unsafe impl Sync for Metadata {}

/// moduledata_t.
#[repr(C)]
pub struct Module {
    name: *const u8,
    handler: Event,
    argument: *const (),
}

impl Module {
    pub const fn new(name: &'static CStr, handler: Event) -> Self {
        Self {
            name: name.as_ptr().cast(),
            handler,
            argument: core::ptr::null(),
        }
    }
}

// SAFETY: as above.
unsafe impl Sync for Module {}

macro_rules! entry {
    ($set:ident, $kind:expr, $data:expr, $name:expr) => {
        #[used]
        #[unsafe(link_section = "set_modmetadata_set")]
        static $set: &module::Metadata = &const { module::Metadata::new($kind, $data, $name) };
    };
}

macro_rules! version {
    ($set:ident, $version:expr, $name:expr) => {
        entry!($set, module::VERSION, &const { $version as i32 }, $name);
    };
}

macro_rules! depends {
    ($set:ident, $range:expr, $name:expr) => {
        entry!($set, module::DEPEND, &const { $range as [i32; 3] }, $name);
    };
}

pub(crate) use {depends, entry, version};
