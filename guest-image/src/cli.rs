//! The command line of `guest-image`.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Makes a guest image and prints the path of every file made.
#[derive(Debug, Parser)]
#[command(name = "guest-image", version)]
pub struct Cli {
    /// Directory for the files, created if missing [default: target/guest-image/PROFILE]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Directory for Debian's packages, created if missing
    #[arg(long, value_name = "DIR", default_value = "target/guest-image/debian")]
    pub cache: PathBuf,
    /// Print what was made as one JSON object
    #[arg(long)]
    pub json: bool,
    /// What to make
    pub profile: Profile,
}

impl Cli {
    /// The output directory: `--out`, or `target/guest-image/PROFILE` below the current one.
    #[must_use]
    pub fn out_dir(&self) -> PathBuf {
        self.out
            .clone()
            .unwrap_or_else(|| PathBuf::from("target/guest-image").join(self.profile.name()))
    }
}

/// The images that can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// Our own freestanding kernel: runs on any KVM
    Probe,
    /// Debian's unmodified cloud kernel with a busybox initramfs
    Linux,
    /// The nested lane's host: QEMU, Debian's ordinary kernel, KVM
    Lane,
    /// Programs of Debian's that tests compare with: makefs
    Tools,
}

impl Profile {
    /// The name typed on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Profile::Probe => "probe",
            Profile::Linux => "linux",
            Profile::Lane => "lane",
            Profile::Tools => "tools",
        }
    }
}
