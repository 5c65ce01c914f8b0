//! The command line of `guest-image`.

use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};

/// Makes a guest image and prints the path of every file made.
#[derive(Debug, Parser)]
#[command(name = "guest-image", version)]
pub struct Cli {
    /// Directory for the files, created if missing [default: target/guest/PROFILE]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Directory for Debian's packages, created if missing
    #[arg(long, value_name = "DIR", default_value = "target/guest-image/debian")]
    pub cache: PathBuf,
    /// What the profile may be told
    #[command(flatten)]
    pub options: Options,
    /// Print what was made as one JSON object
    #[arg(long)]
    pub json: bool,
    /// What to make
    pub profile: Profile,
}

/// Options that only some profiles have.
#[derive(Clone, Debug, Default, Args)]
pub struct Options {
    /// Make a root disk as well (linux): busybox, ssh, fio, iperf3; boot it with root=/dev/vda
    #[arg(long)]
    pub disk: bool,
    /// The same, and a qcow2 image over it, which takes what the guest writes (linux)
    #[arg(long)]
    pub qcow2: bool,
    /// Directory with FreeBSD's base.txz and kernel.txz, or with a boot/ (freebsd)
    #[arg(long, value_name = "DIR")]
    pub dist: Option<PathBuf>,
    /// Where the guest's console is (freebsd) [default: serial]
    #[arg(long, value_enum)]
    pub console: Option<GuestConsole>,
}

/// Where a FreeBSD guest's console is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum GuestConsole {
    /// The first serial port: rhyve -l com1,stdio
    #[default]
    Serial,
    /// bhyve's own of 2012: rhyve --era=2012, or -l bvmcons,stdio
    Bvm,
}

impl Cli {
    /// The output directory: `--out`, or `target/guest/PROFILE` below the current one.
    #[must_use]
    pub fn out_dir(&self) -> PathBuf {
        self.out
            .clone()
            .unwrap_or_else(|| PathBuf::from("target/guest").join(self.profile.name()))
    }
}

/// The images that can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// Our own freestanding kernel: runs on any KVM
    Probe,
    /// A kernel of ours that is loaded as FreeBSD's, with modules and a disk
    FreebsdProbe,
    /// FreeBSD, of the distribution sets that --dist names, with a UFS2 root disk
    Freebsd,
    /// Debian's unmodified cloud kernel with a busybox initramfs
    Linux,
    /// Debian's unmodified ordinary kernel, which has 9p, likewise
    LinuxFull,
    /// The nested lane's host: QEMU, Debian's ordinary kernel, KVM
    Lane,
    /// Programs of Debian's that tests compare with: makefs, GRUB
    Tools,
}

impl Profile {
    /// The name typed on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Profile::Probe => "probe",
            Profile::FreebsdProbe => "freebsd-probe",
            Profile::Freebsd => "freebsd",
            Profile::Linux => "linux",
            Profile::LinuxFull => "linux-full",
            Profile::Lane => "lane",
            Profile::Tools => "tools",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_made_below_target_guest() {
        let cli = |words: &[&str]| Cli::try_parse_from(words).unwrap();
        let probe = cli(&["guest-image", "freebsd-probe"]);
        assert_eq!(probe.out_dir(), PathBuf::from("target/guest/freebsd-probe"));
        let elsewhere = cli(&["guest-image", "--out", "here", "linux"]);
        assert_eq!(elsewhere.out_dir(), PathBuf::from("here"));
    }
}
