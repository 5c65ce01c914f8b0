//! Programs of Debian's that tests compare our own code with. They stay in the package cache, and
//! run there with the machine's own libraries.

use std::path::{Path, PathBuf};

use crate::debian::{self, Debian};
use crate::file::{FileError, at};
use crate::{Artifact, Image, Role};

/// Why a tool cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its package could not be had.
    #[error("debian packages")]
    Debian(#[from] debian::Error),
    /// It cannot be looked at.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Where makefs is in its package.
const MAKEFS: &str = "usr/sbin/makefs";

/// The path of makefs, which is unpacked in the cache directory.
///
/// # Errors
///
/// See [`Error`].
pub fn makefs(cache: &Path) -> Result<PathBuf, Error> {
    Ok(Debian::open(cache)?.package("makefs")?.tree.join(MAKEFS))
}

/// Unpacks the tools in the cache directory.
///
/// # Errors
///
/// See [`Error`].
pub fn make(cache: &Path) -> Result<Image, Error> {
    let mut debian = Debian::open(cache)?;
    let (mut sources, mut files) = (Vec::new(), Vec::new());
    for (name, role, file) in [
        ("makefs", Role::Makefs, MAKEFS),
        ("grub-common", Role::GrubMkimage, "usr/bin/grub-mkimage"),
        // Its modules are next to it.
        ("grub-pc-bin", Role::Grub, "usr/lib/grub/i386-pc/boot.img"),
    ] {
        let package = debian.package(name)?;
        let path = package.tree.join(file);
        let metadata = path.metadata().map_err(at(&path))?;
        sources.push(format!("{} {}", package.name, package.version));
        files.push(Artifact {
            role,
            path,
            bytes: metadata.len(),
        });
    }
    Ok(Image {
        profile: "tools",
        source: sources.join(", "),
        files,
    })
}
