//! Where things are, and how our own programs are built.

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The repository's root directory.
pub fn root() -> PathBuf {
    // The workspace directory is the parent of this crate's, known when xtask was built; `cargo
    // xtask` builds it in place each time.
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map_or_else(PathBuf::new, Path::to_path_buf)
}

/// The build directory: `$CARGO_TARGET_DIR` as Cargo reads it, else `target`.
pub fn target_dir() -> PathBuf {
    root().join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// Builds `packages` (all their targets that a plain `cargo build` makes) and returns the directory
/// that holds the programs.
pub fn build(packages: &[&str], release: bool) -> io::Result<PathBuf> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).args(["build", "--quiet"]);
    for package in packages {
        cargo.args(["--package", package]);
    }
    if release {
        cargo.arg("--release");
    }
    let status = cargo.status()?;
    if !status.success() {
        return Err(io::Error::other(format!(
            "cargo build of {} failed",
            packages.join(", ")
        )));
    }
    Ok(target_dir().join(if release { "release" } else { "debug" }))
}
