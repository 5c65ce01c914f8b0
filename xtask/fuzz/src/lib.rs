//! Properties of everything that reads bytes of others, for libFuzzer and for unit tests.
//!
//! Each module is one fuzz target: `check` feeds bytes to a reader, asserts what must hold of the
//! result and says whether the reader took them; `seeds` are inputs that it takes, from which the
//! fuzzer starts. The targets in `fuzz_targets/` only pass bytes on. `cargo xtask fuzz` builds and
//! runs them.

#![forbid(unsafe_code)]

use std::path::Path;

pub mod balloon;
pub mod console;
pub mod control;
pub mod fat;
pub mod gdb;
pub mod guest;
pub mod kernel;
pub mod loader_conf;
pub mod module;
pub mod net;
pub mod options;
pub mod p9;
pub mod partitions;
pub mod queues;
pub mod stats;
pub mod ufs;
pub mod virtio;
pub mod vm_json;
pub mod vsock;

#[path = "../../../rhyveload/tests/it/freebsd_files.rs"]
#[allow(dead_code, missing_docs, clippy::unwrap_used)]
mod freebsd_files;
#[path = "../../../rhyveload/tests/it/kernels.rs"]
#[allow(dead_code, missing_docs, clippy::unwrap_used)]
mod kernels;
#[path = "../../../rhyveload/tests/it/ufs_files.rs"]
#[allow(dead_code, missing_docs, clippy::unwrap_used)]
mod ufs_files;

/// Names the directory that [`sow`] fills.
pub const SEEDS_VARIABLE: &str = "FUZZ_SEEDS";

/// Writes a target's seeds as files `00`, `01`, ... to the directory that `FUZZ_SEEDS` names, if it
/// names one. libFuzzer reads its corpora after a target's initialization.
pub fn sow(seeds: &[Vec<u8>]) {
    let Some(dir) = std::env::var_os(SEEDS_VARIABLE) else {
        return;
    };
    for (number, seed) in seeds.iter().enumerate() {
        let path = Path::new(&dir).join(format!("{number:02}"));
        if let Err(error) = std::fs::write(&path, seed) {
            eprintln!("{}: {error}", path.display());
        }
    }
}
