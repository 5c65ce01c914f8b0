//! Linux images out of Debian's packages: an unmodified kernel and an initramfs of ours.
//!
//! One code, two recipes: [`GUEST`] is the guest that rhyve boots, [`LANE`] the host of the nested
//! lane, where real KVM runs inside QEMU's software CPU. The initramfs holds busybox, the recipe's
//! modules in the order in which they load, and its `/init`. A guest may have a [`disk`] as well.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cpio::Archive;
use crate::debian::{self, Debian, Package};
use crate::file::{FileError, at};
use crate::modules::{self, Modules};
use crate::{Artifact, Image, Role, vmlinux};
use crate::{disk, layer};

/// Why the image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package could not be had.
    #[error("debian packages")]
    Debian(#[from] debian::Error),
    /// A module is missing or damaged.
    #[error("kernel modules")]
    Modules(#[from] modules::Error),
    /// The kernel cannot be unpacked.
    #[error("{path}")]
    Kernel {
        /// The bzImage.
        path: PathBuf,
        /// What is wrong with it.
        source: vmlinux::Error,
    },
    /// The disk cannot be made.
    #[error("disk")]
    Disk(#[from] disk::Error),
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The finished initramfs does not read back as it was packed.
    #[error("initramfs: reads back with {found:?} where {packed:?} was packed")]
    ReadBack {
        /// The entry an independent reader found.
        found: Option<String>,
        /// The entry that should be there.
        packed: Option<String>,
    },
}

/// What goes into an image.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// The profile's name.
    pub profile: &'static str,
    /// Debian's metapackage of the kernel.
    pub kernel: &'static str,
    /// The modules that `/init` loads, without their dependencies.
    pub modules: &'static [&'static str],
    /// The text of `/init`, a busybox shell script.
    pub init: &'static str,
    /// Whether a QEMU is part of the image.
    pub qemu: bool,
}

/// A guest for rhyve: Debian's kernel for virtual machines, a shell on the console.
pub const GUEST: Recipe = Recipe {
    profile: "linux",
    kernel: "linux-image-cloud-amd64",
    modules: &[
        "button",
        "evdev",
        "crc32c-intel",
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
        "virtio_console",
        "virtio_rng",
        "virtio_balloon",
        "vmw_vsock_virtio_transport",
    ],
    init: include_str!("linux/guest-init.sh"),
    qemu: false,
};

/// A guest for rhyve with Debian's ordinary kernel, which has 9p.
pub const FULL: Recipe = Recipe {
    profile: "linux-full",
    kernel: "linux-image-amd64",
    modules: &[
        "button",
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
        "virtio_console",
        "virtio_rng",
        "virtio_balloon",
        "vmw_vsock_virtio_transport",
        "9pnet_virtio",
        "9p",
    ],
    init: include_str!("linux/guest-init.sh"),
    qemu: false,
};

/// Programs for guests that busybox lacks.
const PROGRAMS: [(&str, &[u8]); 2] = [
    (
        "vsock",
        include_bytes!(concat!(env!("OUT_DIR"), "/vsock.elf")),
    ),
    (
        "rings",
        include_bytes!(concat!(env!("OUT_DIR"), "/rings.elf")),
    ),
];

/// The host of the nested lane: Debian's ordinary kernel (the one for virtual machines has no 9p),
/// KVM, and the QEMU to run it in.
pub const LANE: Recipe = Recipe {
    profile: "lane",
    kernel: "linux-image-amd64",
    modules: &[
        "virtio_pci",
        "virtio_console",
        "9pnet_virtio",
        "9p",
        "overlay",
        "kvm-amd",
        "tun",
        "bridge",
        // What QEMU is at its best with, where the two are compared.
        "vhost_net",
        // Block devices for the tests.
        "null_blk",
    ],
    init: include_str!("linux/lane-init.sh"),
    qemu: true,
};

/// The guest's root disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// Only the initramfs.
    None,
    /// A raw image, disk.img.
    Raw,
    /// The same, and disk.qcow2 over it.
    Layered,
}

/// Debian 12's own QEMU, 7.2, dies when a nested guest resets; 10.0 does not.
const QEMU_MAJOR: u32 = 10;

/// Makes the image of `recipe` in `out`, with packages from the cache directory `cache`; with a root
/// disk, if that is wanted.
///
/// # Errors
///
/// See [`Error`].
pub fn make(recipe: &Recipe, root: Root, out: &Path, cache: &Path) -> Result<Image, Error> {
    fs::create_dir_all(out).map_err(at(out))?;
    let mut debian = Debian::open(cache)?;
    let kernel = debian.dependency(recipe.kernel, "linux-image-")?;
    let busybox = debian.package("busybox-static")?;
    let mut source = format!(
        "{} {}, {} {}",
        kernel.name, kernel.version, busybox.name, busybox.version
    );
    let mut files = Vec::new();
    if recipe.qemu {
        files.push(qemu(&mut debian, out)?);
    }
    let release = kernel.name.trim_start_matches("linux-image-");

    let bzimage_path = kernel.tree.join("boot").join(format!("vmlinuz-{release}"));
    let bzimage = fs::read(&bzimage_path).map_err(at(&bzimage_path))?;
    // The kernel is written before the bzImage it came from, so an equal bzImage vouches for it.
    let vmlinux_path = out.join("vmlinux");
    let unpacked = fs::metadata(&vmlinux_path)
        .ok()
        .filter(|_| fs::read(out.join("vmlinuz")).is_ok_and(|old| old == bzimage));
    files.push(match unpacked {
        Some(file) => Artifact {
            role: Role::Kernel,
            path: vmlinux_path,
            bytes: file.len(),
        },
        None => {
            let kernel = vmlinux::extract(&bzimage).map_err(|source| Error::Kernel {
                path: bzimage_path.clone(),
                source,
            })?;
            write(out, "vmlinux", Role::Kernel, &kernel)?
        }
    });
    files.push(write(out, "vmlinuz", Role::BzImage, &bzimage)?);

    let module_dir = kernel.tree.join("lib/modules").join(release);
    let modules = Modules::list(&module_dir)?.closure(recipe.modules)?;
    let mut archive = Archive::default();
    base(&mut archive, &busybox)?;
    if root != Root::None {
        let path = out.join("disk.img");
        let system = disk::make(&path, &archive, &mut debian)?;
        source += &format!(", {} {}", system.name, system.version);
        files.push(Artifact {
            role: Role::Disk,
            bytes: fs::metadata(&path).map_err(at(&path))?.len(),
            path,
        });
        for (program, role) in disk::PEERS {
            let text = disk::peer(&system, program);
            files.push(script(out, role.name(), role, &text)?);
        }
    }
    if root == Root::Layered {
        let path = out.join("disk.qcow2");
        layer::make(&path, &out.join("disk.img"))?;
        files.push(Artifact {
            role: Role::Layer,
            bytes: fs::metadata(&path).map_err(at(&path))?.len(),
            path,
        });
    }
    archive.file("init", 0o755, recipe.init);
    if !recipe.qemu {
        for (name, program) in PROGRAMS {
            archive.file(&format!("bin/{name}"), 0o755, program);
        }
    }
    let mut order = String::new();
    for module in modules {
        order += &format!("{}\n", module.name);
        archive.file(&format!("modules/{}.ko", module.name), 0o644, module.data);
    }
    archive.file("modules/order", 0o644, order);
    let bytes = archive.to_bytes();
    read_back(&archive, &bytes)?;
    // Uncompressed: the guest's CPU is the slow part, not the copy of 4 MB.
    files.push(write(out, "initramfs.cpio", Role::Initrd, &bytes)?);
    Ok(Image {
        profile: recipe.profile,
        source,
        files,
    })
}

/// busybox with its names, and what the kernel and programs expect to be there.
fn base(archive: &mut Archive, busybox: &Package) -> Result<(), Error> {
    let path = busybox.tree.join("bin/busybox");
    let program = fs::read(&path).map_err(at(&path))?;
    archive.file("bin/busybox", 0o755, program);
    // The program itself knows what it can do.
    let list = Command::new(&path)
        .arg("--list")
        .output()
        .map_err(at(&path))?;
    for applet in String::from_utf8_lossy(&list.stdout).lines() {
        if applet != "busybox" {
            archive.symlink(&format!("bin/{applet}"), "busybox");
        }
    }
    if !archive.paths().any(|path| path == "bin/sh") {
        return Err(busybox.missing("shell").into());
    }
    archive.file("bin/network", 0o755, include_str!("linux/network.sh"));
    let event = include_str!("linux/dhcp-event.sh");
    archive.file("bin/dhcp-event", 0o755, event);
    archive.symlink("sbin", "bin");
    for dir in ["dev", "proc", "root", "run", "sys", "tmp"] {
        archive.dir(dir);
    }
    // The kernel opens it for /init before /init can mount anything.
    archive.char_device("dev/console", 0o600, 5, 1);
    Ok(())
}

/// A QEMU of at least [`QEMU_MAJOR`]: the machine's own, or Debian's in a wrapper that finds its
/// libraries and firmware where they are unpacked.
fn qemu(debian: &mut Debian, out: &Path) -> Result<Artifact, Error> {
    let version = Command::new("qemu-system-x86_64").arg("--version").output();
    let text = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let wrapper = match text.ok().as_deref().and_then(qemu_major) {
        Some(major) if major >= QEMU_MAJOR => {
            "#!/bin/sh\nexec qemu-system-x86_64 \"$@\"\n".to_owned()
        }
        _ => {
            let package = debian.closure("qemu-system-x86", QEMU_MAJOR)?;
            let program = package.tree.join("usr/bin/qemu-system-x86_64");
            if !program.exists() {
                return Err(package.missing("usr/bin/qemu-system-x86_64").into());
            }
            let tree = package.tree.to_string_lossy().replace('\'', r"'\''");
            format!(
                "#!/bin/sh\n\
                 # {} {}\n\
                 T='{tree}'\n\
                 L=x86_64-linux-gnu\n\
                 LD_LIBRARY_PATH=\"$T/usr/lib/$L:$T/lib/$L\" QEMU_MODULE_DIR=\"$T/usr/lib/$L/qemu\" \
                 exec \"$T/usr/bin/qemu-system-x86_64\" -L \"$T/usr/share/qemu\" \
                 -L \"$T/usr/share/seabios\" -L \"$T/usr/lib/ipxe/qemu\" \"$@\"\n",
                package.name, package.version
            )
        }
    };
    script(out, "qemu-system-x86_64", Role::Qemu, &wrapper)
}

/// Writes a shell script that can be run.
fn script(out: &Path, name: &str, role: Role, text: &str) -> Result<Artifact, Error> {
    let artifact = write(out, name, role, text.as_bytes())?;
    fs::set_permissions(&artifact.path, fs::Permissions::from_mode(0o755))
        .map_err(at(&artifact.path))?;
    Ok(artifact)
}

/// The major version in "QEMU emulator version 10.0.2 (Debian ...)".
fn qemu_major(text: &str) -> Option<u32> {
    text.strip_prefix("QEMU emulator version ")?
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// Compares a finished archive with what a reader that is not ours finds in it.
fn read_back(archive: &Archive, bytes: &[u8]) -> Result<(), Error> {
    let mut packed = archive.paths();
    let mut rest = bytes;
    loop {
        let mut reader = cpio::newc::Reader::new(rest).map_err(at(Path::new("initramfs")))?;
        let entry = reader.entry();
        let found = (!entry.is_trailer()).then(|| entry.name().to_owned());
        let expected = packed.next();
        if found.as_deref() != expected {
            return Err(Error::ReadBack {
                found,
                packed: expected.map(str::to_owned),
            });
        }
        if found.is_none() {
            return Ok(());
        }
        io::copy(&mut reader.by_ref(), &mut io::sink()).map_err(at(Path::new("initramfs")))?;
        rest = reader.finish().map_err(at(Path::new("initramfs")))?;
    }
}

/// Writes `out/name`, by way of a temporary file: another process may be booting the old one.
fn write(out: &Path, name: &str, role: Role, data: &[u8]) -> Result<Artifact, Error> {
    let path = out.join(name);
    if fs::read(&path).is_ok_and(|old| old == data) {
        return Ok(Artifact {
            role,
            path,
            bytes: data.len() as u64,
        });
    }
    let mut file = tempfile::NamedTempFile::new_in(out).map_err(at(out))?;
    io::Write::write_all(&mut file, data).map_err(at(&path))?;
    file.as_file()
        .set_permissions(fs::Permissions::from_mode(0o644))
        .map_err(at(&path))?;
    file.persist(&path)
        .map_err(|error| at(&path)(error.error))?;
    Ok(Artifact {
        role,
        path,
        bytes: data.len() as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_back_notices_a_missing_entry() {
        let mut archive = Archive::default();
        archive.file("init", 0o755, "x");
        let bytes = archive.to_bytes();
        read_back(&archive, &bytes).unwrap();
        archive.file("later", 0o644, "y");
        let error = read_back(&archive, &bytes).unwrap_err();
        assert!(
            matches!(error, Error::ReadBack { found: None, packed: Some(path) } if path == "later")
        );
    }

    #[test]
    fn qemus_version_is_read() {
        assert_eq!(
            qemu_major("QEMU emulator version 10.0.2 (Debian 1:10.0.2)\n"),
            Some(10)
        );
        assert_eq!(qemu_major("QEMU emulator version 7.2.22\n"), Some(7));
        assert_eq!(qemu_major(""), None);
    }
}
