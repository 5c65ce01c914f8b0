//! What a profile hands back: the files it made and what each is for.

use std::path::PathBuf;

use serde::Serialize;

/// A finished image.
#[derive(Clone, Debug, Serialize)]
pub struct Image {
    /// The profile's name.
    pub profile: &'static str,
    /// Where its contents come from, such as a package and its version.
    pub source: String,
    /// The files, in the order in which they are printed.
    pub files: Vec<Artifact>,
}

/// One file of an image.
#[derive(Clone, Debug, Serialize)]
pub struct Artifact {
    /// What the file is for.
    pub role: Role,
    /// Where it is.
    pub path: PathBuf,
    /// Its length in bytes.
    pub bytes: u64,
}

/// What a file of an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// An ELF kernel (`rhyveload --kernel`).
    Kernel,
    /// A bzImage of the same kernel.
    BzImage,
    /// An initramfs (`rhyveload --initrd`).
    Initrd,
    /// A module that the loader loads with its kernel.
    Module,
    /// A disk's image.
    Disk,
    /// An image over the disk's.
    Layer,
    /// An ssh client, for guests with a disk: dropbear's.
    Ssh,
    /// The iperf3 that such guests have, for this machine.
    Iperf3,
    /// What the loader is told.
    Config,
    /// A QEMU that can run the image.
    Qemu,
    /// NetBSD's makefs, which writes FreeBSD's UFS.
    Makefs,
    /// The program that puts GRUB together.
    GrubMkimage,
    /// GRUB's boot sector, with its modules in the same directory.
    Grub,
}

impl Role {
    /// The name in text and JSON output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Kernel => "kernel",
            Role::BzImage => "bzimage",
            Role::Initrd => "initrd",
            Role::Module => "module",
            Role::Disk => "disk",
            Role::Layer => "layer",
            Role::Ssh => "ssh",
            Role::Iperf3 => "iperf3",
            Role::Config => "config",
            Role::Qemu => "qemu",
            Role::Makefs => "makefs",
            Role::GrubMkimage => "grubmkimage",
            Role::Grub => "grub",
        }
    }
}
