//! Makes the guests that rhyve boots.
//!
//! `guest-image PROFILE` turns a recipe into files below an output directory. Each profile is a
//! module with one function, `make`, that writes its files and returns an [`Image`]:
//!
//! - [`probe`]: our own freestanding kernel, which runs on any KVM.
//! - [`linux`]: Debian's kernels with an initramfs of ours, for guests and for the nested lane.
//!   Files come out of packages by [`debian`]; [`vmlinux`], [`modules`] and [`cpio`] make them fit.
//! - [`tools`]: programs of Debian's that tests compare our own code with.

#![forbid(unsafe_code)]

pub mod cli;
pub mod cpio;
pub mod debian;
pub mod image;
pub mod linux;
pub mod modules;
pub mod probe;
pub mod progress;
pub mod tools;
pub mod vmlinux;

pub use image::{Artifact, Image, Role};

use std::path::Path;

use cli::Profile;

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The probe kernel could not be written.
    #[error("probe")]
    Probe(#[from] probe::Error),
    /// A Linux image could not be made.
    #[error("linux")]
    Linux(#[from] linux::Error),
    /// A tool could not be had.
    #[error("tools")]
    Tools(#[from] tools::Error),
}

/// Makes the image of `profile` in the directory `out`, which is created if it is missing. `cache` is
/// where Debian's packages are kept.
///
/// # Errors
///
/// The profile's own error: what could not be read, fetched or written.
pub fn make(profile: Profile, out: &Path, cache: &Path) -> Result<Image, Error> {
    match profile {
        Profile::Probe => Ok(probe::make(out)?),
        Profile::Linux => Ok(linux::make(&linux::GUEST, out, cache)?),
        Profile::Lane => Ok(linux::make(&linux::LANE, out, cache)?),
        Profile::Tools => Ok(tools::make(cache)?),
    }
}
