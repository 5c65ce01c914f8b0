//! Programs of Debian's that tests compare our own code with. They stay in the package cache, and
//! run there with the machine's own libraries.

use std::io;
use std::path::{Path, PathBuf};

use crate::debian::{self, Debian};
use crate::{Artifact, Image, Role};

/// Why a tool cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its package could not be had.
    #[error("debian packages")]
    Debian(#[from] debian::Error),
    /// It cannot be looked at.
    #[error("{path}")]
    Io {
        /// The program.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
}

/// Unpacks the tools in the cache directory.
///
/// # Errors
///
/// See [`Error`].
pub fn make(cache: &Path) -> Result<Image, Error> {
    let package = Debian::open(cache)?.package("makefs")?;
    let path = package.tree.join("usr/sbin/makefs");
    let file = path.metadata().map_err(|source| Error::Io {
        path: path.clone(),
        source,
    })?;
    Ok(Image {
        profile: "tools",
        source: format!("{} {}", package.name, package.version),
        files: vec![Artifact {
            role: Role::Makefs,
            path,
            bytes: file.len(),
        }],
    })
}
