//! The disk of the Linux guest: an ext4 root with busybox, a network, ssh, and the programs that
//! measure disks and networks.
//!
//! Programs come out of Debian's packages with the libraries they name (`NEEDED`), and theirs; what
//! makes them a system is a handful of files of ours, below `disk/`. `root=/dev/vda` on the kernel's
//! command line lets the guest's initramfs go on there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use object::read::elf::{Dyn, FileHeader};
use object::{Endianness, elf};

use crate::cpio::Archive;
use crate::debian::{self, Debian, Package};
use crate::file::{FileError, at};
use crate::{Role, ext4};

/// Why the disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Packages could not be had.
    #[error("debian packages")]
    Debian(#[from] debian::Error),
    /// The file system could not be written.
    #[error("ext4")]
    Ext4(#[from] ext4::Error),
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A program is no ELF file.
    #[error("{path}: {source}")]
    Elf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: object::Error,
    },
}

/// Bytes of the file system, of which few are used: the file is sparse.
const SIZE: u64 = 1 << 30;

/// The packages of the programs.
const PACKAGES: [&str; 3] = ["dropbear-bin", "fio", "iperf3"];

/// The programs, all of which are found in /bin.
const PROGRAMS: [&str; 5] = [
    "usr/sbin/dropbear",
    "usr/bin/dropbearkey",
    "usr/bin/dbclient",
    "usr/bin/fio",
    "usr/bin/iperf3",
];

/// Those of them that talk with a guest from this machine, and what they are called here.
pub const PEERS: [(&str, Role); 2] = [
    ("usr/bin/dbclient", Role::Ssh),
    ("usr/bin/iperf3", Role::Iperf3),
];

/// Where Debian's programs look for their dynamic linker, and this for their libraries.
const LINKER: &str = "ld-linux-x86-64.so.2";
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// Makes the disk at `path`, with `base` (busybox and its names) in it. Returns the packages it was
/// made of, which stay unpacked.
///
/// # Errors
///
/// See [`Error`].
pub fn make(path: &Path, base: &Archive, debian: &mut Debian) -> Result<Package, Error> {
    let system = debian.system(&PACKAGES)?;
    let mut tree = base.clone();
    let libraries = libraries(&system.tree)?;
    let mut wanted = vec![LINKER.to_owned()];
    for program in PROGRAMS {
        let data = read(&system.tree.join(program))?;
        wanted.extend(needed(&system.tree.join(program), &data)?);
        let name = program.rsplit('/').next().unwrap_or(program);
        tree.file(&format!("bin/{name}"), 0o755, data);
    }
    let mut taken = BTreeSet::new();
    while let Some(name) = wanted.pop() {
        if !taken.insert(name.clone()) {
            continue;
        }
        let (place, file) = libraries
            .get(&name)
            .ok_or_else(|| system.missing(format!("library {name}")))?;
        let data = read(file)?;
        wanted.extend(needed(file, &data)?);
        tree.file(&format!("{place}/{name}"), 0o755, data);
    }
    tree.dir("lib64");
    tree.symlink(
        &format!("lib64/{LINKER}"),
        &format!("../{}/{LINKER}", LIBRARIES[0]),
    );
    tree.dir("usr");
    for (link, target) in [
        ("usr/bin", "../bin"),
        ("usr/sbin", "../bin"),
        ("usr/lib", "../lib"),
    ] {
        tree.symlink(link, target);
    }
    files(&mut tree);
    ext4::write(&tree, path, SIZE)?;
    Ok(system)
}

/// A shell script that runs a program of `system` on this machine, with the libraries it has there:
/// this machine may have others, or none.
pub fn peer(system: &Package, program: &str) -> String {
    let tree = system.tree.to_string_lossy().replace('\'', r"'\''");
    let [lib, usr] = LIBRARIES;
    format!(
        "#!/bin/sh\n\
         # {} {}\n\
         T='{tree}'\n\
         exec \"$T/{lib}/{LINKER}\" --library-path \"$T/{lib}:$T/{usr}\" \"$T/{program}\" \"$@\"\n",
        system.name, system.version
    )
}

/// What makes programs a system.
fn files(tree: &mut Archive) {
    for (path, mode, text) in [
        ("etc/inittab", 0o644, include_str!("disk/inittab")),
        ("etc/start", 0o755, include_str!("disk/start.sh")),
        ("etc/login", 0o755, include_str!("disk/login.sh")),
        ("etc/profile", 0o644, "export PATH=/bin HOME=/root\n"),
        ("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n"),
        // The password is "rhyve": `openssl passwd -6 -salt rhyve rhyve`.
        (
            "etc/shadow",
            0o600,
            "root:$6$rhyve$hrmg23/N7bklvcNes32KUHfPKn5iZIO3jj2BiZ9ob4GycaH773nBoQhc1HnkDi4iS40fa1r2thbo\
             .NaGQ3qr21:19000:0:99999:7:::\n",
        ),
        ("etc/group", 0o644, "root:x:0:\n"),
        ("etc/shells", 0o644, "/bin/sh\n"),
        ("etc/hosts", 0o644, "127.0.0.1 localhost rhyve\n"),
        ("etc/hostname", 0o644, "rhyve\n"),
        ("etc/issue", 0o644, "rhyve guest \\n \\l\n"),
        (
            "etc/nsswitch.conf",
            0o644,
            "passwd: files\ngroup: files\nhosts: files dns\n",
        ),
    ] {
        tree.file(path, mode, text);
    }
    tree.dir("etc/dropbear");
    tree.dir_with_mode("root", 0o700);
    tree.dir_with_mode("tmp", 0o1777);
    for dir in ["mnt", "var/log", "var/run", "dev/pts", "dev/shm"] {
        tree.dir(dir);
    }
}

/// All libraries of a tree: where each belongs in the image, and its file.
fn libraries(tree: &Path) -> Result<BTreeMap<String, (String, PathBuf)>, Error> {
    let mut found = BTreeMap::new();
    for place in LIBRARIES {
        let mut pending = vec![tree.join(place)];
        while let Some(dir) = pending.pop() {
            let Ok(entries) = fs::read_dir(&dir) else {
                continue;
            };
            for entry in entries {
                let path = entry.map_err(at(&dir))?.path();
                if path.is_dir() {
                    pending.push(path);
                } else if let (Some(name), Ok(below)) = (path.file_name(), dir.strip_prefix(tree)) {
                    let below = below.to_string_lossy();
                    let below = below.strip_prefix("usr/").unwrap_or(&below).to_owned();
                    found.insert(name.to_string_lossy().into_owned(), (below, path));
                }
            }
        }
    }
    Ok(found)
}

/// The libraries that a program or library names.
fn needed(path: &Path, data: &[u8]) -> Result<Vec<String>, Error> {
    let names = || -> object::Result<Vec<String>> {
        let header = elf::FileHeader64::<Endianness>::parse(data)?;
        let endian = header.endian()?;
        let sections = header.sections(endian, data)?;
        let Some((entries, strings)) = sections.dynamic(endian, data)? else {
            return Ok(Vec::new());
        };
        let strings = sections.strings(endian, data, strings)?;
        let needed = entries
            .iter()
            .filter(|entry| entry.d_tag(endian) == elf::DT_NEEDED);
        needed
            .map(|entry| {
                let name = entry.string(endian, strings)?;
                Ok(String::from_utf8_lossy(name).into_owned())
            })
            .collect()
    };
    names().map_err(|source| Error::Elf {
        path: path.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    Ok(fs::read(path).map_err(at(path))?)
}
