//! Makes the guests that rhyve boots.
//!
//! `guest-image PROFILE` turns a recipe into files below an output directory. Each profile is a
//! module with one function, `make`, that writes its files and returns an [`Image`]:
//!
//! - [`probe`]: our own freestanding kernel, which runs on any KVM.
//! - [`freebsd_probe`]: another, which is loaded as FreeBSD's kernel is, with modules.
//! - [`freebsd`]: FreeBSD itself, of its distribution sets, with a UFS2 root disk.
//! - [`linux`]: Debian's kernels with an initramfs of ours, for guests and for the nested lane.
//!   Files come out of packages by [`debian`]; [`vmlinux`], [`modules`] and [`cpio`] make them fit.
//!   The guest's [`disk`] is an [`ext4`] file system.
//! - [`tools`]: programs of Debian's that tests compare our own code with.
//!
//! Whatever goes wrong with a file is a [`file::FileError`] below each module's own error.

#![forbid(unsafe_code)]

pub mod cli;
pub mod cpio;
pub mod debian;
pub mod disk;
pub mod ext4;
pub mod file;
pub mod freebsd;
pub mod freebsd_probe;
pub mod image;
pub mod layer;
pub mod linux;
pub mod modules;
pub mod probe;
pub mod progress;
pub mod tools;
pub mod vmlinux;

pub use image::{Artifact, Image, Role};

use std::path::Path;

use cli::{Options, Profile};
use linux::Root;

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The probe kernel could not be written.
    #[error("probe")]
    Probe(#[from] probe::Error),
    /// The FreeBSD probe could not be written.
    #[error("freebsd-probe")]
    FreebsdProbe(#[from] freebsd_probe::Error),
    /// FreeBSD could not be put together.
    #[error("freebsd")]
    Freebsd(#[from] freebsd::Error),
    /// A Linux image could not be made.
    #[error("linux")]
    Linux(#[from] linux::Error),
    /// There is no disk in this profile.
    #[error("--disk and --qcow2 are for the profile linux")]
    NoDisk,
    /// FreeBSD is made of sets, and nothing else is.
    #[error("--dist and --console are for the profile freebsd")]
    NoSets,
    /// A tool could not be had.
    #[error("tools")]
    Tools(#[from] tools::Error),
}

/// Makes the image of `profile` in the directory `out`, which is created if it is missing, as `options`
/// say. `cache` is where Debian's packages are kept.
///
/// # Errors
///
/// The profile's own error: what could not be read, fetched or written; an option that is another
/// profile's.
pub fn make(profile: Profile, options: &Options, out: &Path, cache: &Path) -> Result<Image, Error> {
    let disk = match (options.disk, options.qcow2) {
        (_, true) => Root::Layered,
        (true, false) => Root::Raw,
        (false, false) => Root::None,
    };
    if disk != Root::None && profile != Profile::Linux {
        return Err(Error::NoDisk);
    }
    if profile != Profile::Freebsd && (options.dist.is_some() || options.console.is_some()) {
        return Err(Error::NoSets);
    }
    match profile {
        Profile::Probe => Ok(probe::make(out)?),
        Profile::FreebsdProbe => Ok(freebsd_probe::make(out)?),
        Profile::Freebsd => {
            let dist = options.dist.as_deref().ok_or(freebsd::Error::NoDist)?;
            let makefs = tools::makefs(cache)?;
            let console = options.console.unwrap_or_default();
            Ok(freebsd::make(dist, console, out, &makefs)?)
        }
        Profile::Linux => Ok(linux::make(&linux::GUEST, disk, out, cache)?),
        Profile::Lane => Ok(linux::make(&linux::LANE, Root::None, out, cache)?),
        Profile::LinuxFull => Ok(linux::make(&linux::FULL, Root::None, out, cache)?),
        Profile::Tools => Ok(tools::make(cache)?),
    }
}
