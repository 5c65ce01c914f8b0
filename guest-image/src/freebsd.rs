//! The `freebsd` profile: a guest of FreeBSD's own distribution sets, in the layout of bhyve's guests
//! of 2012: `boot/` for the loader, and `diskdev`, a UFS2 root file system.
//!
//! ```text
//! kernel.txz, base.txz --unpack--> OUT/root --makefs, with the sets' owners and modes--> OUT/diskdev
//!                                      \--copy /boot--> OUT/boot
//! ```
//!
//! No root is needed: who owns what is told to makefs, not to the host's file system. Instead of
//! sets, there may be a directory `boot/`: the root file system has that and its configuration then,
//! and no programs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use crate::cli::GuestConsole;
use crate::file::{FileError, at};
use crate::image::{Artifact, Image, Role};

/// The sets, in the order in which they are unpacked.
const SETS: [&str; 2] = ["base.txz", "kernel.txz"];

/// Modules that a guest's devices need, each after what it needs. Those that the kernel has already
/// are not loaded.
const MODULES: [&str; 5] = [
    "virtio",
    "virtio_pci",
    "virtio_blk",
    "if_vtnet",
    "virtio_balloon",
];

/// Room on the root file system besides what is on it, as in 2012: 84 MB.
const FREE: &str = "84m";

/// A host name, an address by DHCP on the first card, and logins from outside.
const RC_CONF: &str = "\
hostname=\"bhyve-tap0\"
ifconfig_vtnet0=\"DHCP\"
sshd_enable=\"YES\"
";

/// A bare file system on the first disk.
const FSTAB: &str = "/dev/vtbd0\t/\tufs\trw\t1\t1\n";

/// The console of 2012, on which a login waits as it did then, and a serial one.
const TTYS_BVM: &str = "console\t\"/usr/libexec/getty std.9600\"\tvt100\ton\tsecure\n";
const TTYS_SERIAL: &str = "ttyu0\t\"/usr/libexec/getty std.9600\"\tvt100\ton\tsecure\n";

/// Why the image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to make it of.
    #[error(
        "{0} has neither base.txz and kernel.txz nor boot/kernel/kernel: name a directory with \
         FreeBSD's distribution sets, as --dist DIR"
    )]
    NoSets(PathBuf),
    /// The sets have no kernel.
    #[error("there is no boot/kernel/kernel in the sets in {0}")]
    NoKernel(PathBuf),
    /// No directory was named.
    #[error("say where FreeBSD's distribution sets are: --dist DIR")]
    NoDist,
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A set is no set, or a damaged one.
    #[error("{path} cannot be unpacked")]
    Set {
        /// The set.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// A name in a set that no set should have.
    #[error("{set}: {name:?} leads out of the guest's file system")]
    Name {
        /// The set.
        set: PathBuf,
        /// The name.
        name: PathBuf,
    },
    /// makefs reported a failure.
    #[error("makefs failed: {0}")]
    Makefs(String),
}

/// Whose a file is, and what may be done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    kind: &'static str,
    uid: u64,
    gid: u64,
    mode: u32,
}

impl Owner {
    /// Of root, as its files and directories usually are.
    fn root(kind: &'static str) -> Self {
        let mode = if kind == "dir" { 0o755 } else { 0o644 };
        Self {
            kind,
            uid: 0,
            gid: 0,
            mode,
        }
    }
}

/// Owners by the path below the root.
type Owners = BTreeMap<PathBuf, Owner>;

/// Makes the guest of what is in `dist`, with its console where `console` says. `makefs` is NetBSD's
/// program.
///
/// # Errors
///
/// See [`Error`].
pub fn make(dist: &Path, console: GuestConsole, out: &Path, makefs: &Path) -> Result<Image, Error> {
    let (root, boot, disk) = (out.join("root"), out.join("boot"), out.join("diskdev"));
    let sets = SETS.map(|set| dist.join(set));
    let is_sets = sets.iter().all(|set| set.is_file());
    if !is_sets && !dist.join("boot/kernel/kernel").is_file() {
        return Err(Error::NoSets(dist.to_owned()));
    }
    for old in [&root, &boot] {
        if old.exists() {
            fs::remove_dir_all(old).map_err(at(old))?;
        }
        fs::create_dir_all(old).map_err(at(old))?;
    }
    let mut owners = Owners::new();
    if is_sets {
        for set in &sets {
            unpack(set, &root, &mut owners)?;
        }
    } else {
        copy(&dist.join("boot"), &root.join("boot"))?;
    }
    if !root.join("boot/kernel/kernel").is_file() {
        return Err(Error::NoKernel(dist.to_owned()));
    }
    loader_conf(&root, console, &mut owners)?;
    configure(&root, console, &mut owners)?;
    copy(&root.join("boot"), &boot)?;
    file_system(makefs, &root, &owners, &disk)?;
    // It is on the disk.
    fs::remove_dir_all(&root).map_err(at(&root))?;
    let mut files = Vec::new();
    for (path, role) in [
        (boot.join("kernel/kernel"), Role::Kernel),
        (boot.join("loader.conf"), Role::Config),
        (disk, Role::Disk),
    ] {
        let bytes = path.metadata().map_err(at(&path))?.len();
        files.push(Artifact { role, path, bytes });
    }
    Ok(Image {
        profile: "freebsd",
        source: dist.display().to_string(),
        files,
    })
}

/// Unpacks a set below `root`; what the host may not have (owners, other modes) goes to `owners`.
fn unpack(set: &Path, root: &Path, owners: &mut Owners) -> Result<(), Error> {
    let damaged = |source| Error::Set {
        path: set.to_owned(),
        source,
    };
    let file = File::open(set).map_err(at(set))?;
    let plain = liblzma::read::XzDecoder::new_multi_decoder(BufReader::new(file));
    let mut archive = tar::Archive::new(plain);
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let kind = match entry.header().entry_type() {
            tar::EntryType::Directory => "dir",
            tar::EntryType::Symlink => "link",
            tar::EntryType::Regular | tar::EntryType::Link => "file",
            // No set has devices: the kernel makes them.
            _ => continue,
        };
        let name = entry.path().map_err(damaged)?.into_owned();
        let outside = || Error::Name {
            set: set.to_owned(),
            name: name.clone(),
        };
        let mut path = PathBuf::new();
        for part in name.components() {
            match part {
                Component::Normal(part) => path.push(part),
                Component::CurDir | Component::RootDir => {}
                _ => return Err(outside()),
            }
        }
        if path.as_os_str().is_empty() {
            continue;
        }
        let header = entry.header();
        let owner = Owner {
            kind,
            uid: header.uid().map_err(damaged)?,
            gid: header.gid().map_err(damaged)?,
            mode: header.mode().map_err(damaged)? & 0o7777,
        };
        // Refuses what a link leads out of the root.
        if !entry.unpack_in(root).map_err(damaged)? {
            return Err(outside());
        }
        // Whoever may not write what the guest's root may still has to write, read and remove it here.
        if kind != "link" {
            let needed = if kind == "dir" { 0o700 } else { 0o600 };
            let mode = fs::Permissions::from_mode(owner.mode & 0o777 | needed);
            let path = root.join(&path);
            fs::set_permissions(&path, mode).map_err(at(&path))?;
        }
        owners.insert(path, owner);
    }
    Ok(())
}

/// Writes what makes the guest one: its disk, its network, its console, logins by ssh.
fn configure(root: &Path, console: GuestConsole, owners: &mut Owners) -> Result<(), Error> {
    let terminal = match console {
        GuestConsole::Bvm => TTYS_BVM,
        GuestConsole::Serial => TTYS_SERIAL,
    };
    append(root, "etc/rc.conf", RC_CONF, owners)?;
    append(root, "etc/fstab", FSTAB, owners)?;
    // As the bhyve guests of 2012 had it, being there to be tried out.
    append(root, "etc/ssh/sshd_config", "PermitRootLogin yes\n", owners)?;
    // One line a terminal.
    let ttys = root.join("etc/ttys");
    let before = read(&ttys)?;
    let name = terminal.split('\t').next();
    let others = before
        .lines()
        .filter(|line| line.split_whitespace().next() != name);
    let others: String = others.map(|line| format!("{line}\n")).collect();
    fs::write(&ttys, others).map_err(at(&ttys))?;
    append(root, "etc/ttys", terminal, owners)
}

/// Tells the loader of the root file system, the console, and the modules that there are.
fn loader_conf(root: &Path, console: GuestConsole, owners: &mut Owners) -> Result<(), Error> {
    let mut text = "vfs.root.mountfrom=\"ufs:/dev/vtbd0\"\n".to_owned();
    if console == GuestConsole::Serial {
        text += "console=\"comconsole\"\n";
    }
    for module in MODULES {
        if root.join(format!("boot/kernel/{module}.ko")).is_file() {
            text += &format!("{module}_load=\"YES\"\n");
        }
    }
    append(root, "boot/loader.conf", &text, owners)
}

/// Adds `text` to a file of the guest's, or makes it of that.
fn append(root: &Path, name: &str, text: &str, owners: &mut Owners) -> Result<(), Error> {
    let path = root.join(name);
    let mut all = read(&path)?;
    if !all.is_empty() && !all.ends_with('\n') {
        all.push('\n');
    }
    all += text;
    let parent = path.parent().unwrap_or(root);
    fs::create_dir_all(parent).map_err(at(parent))?;
    fs::write(&path, all).map_err(at(&path))?;
    owners.entry(name.into()).or_insert(Owner::root("file"));
    Ok(())
}

/// A text file; nothing if there is none.
fn read(path: &Path) -> Result<String, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(at(path)(error).into()),
    }
}

/// Makes a UFS2 file system of `root`.
fn file_system(makefs: &Path, root: &Path, owners: &Owners, disk: &Path) -> Result<(), Error> {
    let spec = disk.with_file_name("diskdev.mtree");
    fs::write(&spec, mtree(owners)).map_err(at(&spec))?;
    let mut command = Command::new(makefs);
    command.args(["-t", "ffs", "-B", "little", "-o", "version=2", "-b", FREE]);
    command.arg("-F").arg(&spec).arg(disk).arg(root);
    let output = command.output().map_err(at(makefs))?;
    fs::remove_file(&spec).map_err(at(&spec))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Makefs(text));
    }
    Ok(())
}

/// Owners and modes as mtree(5) has them: a file behind its directories.
fn mtree(owners: &Owners) -> String {
    let mut all = owners.clone();
    for path in owners.keys() {
        for directory in path.ancestors().skip(1) {
            let entry = all.entry(directory.to_owned());
            entry.or_insert(Owner::root("dir"));
        }
    }
    let mut text = String::new();
    for (path, owner) in &all {
        let Owner {
            kind,
            uid,
            gid,
            mode,
        } = owner;
        let name = match path.as_os_str().is_empty() {
            true => ".".to_owned(),
            false => format!("./{}", escape(path)),
        };
        text += &format!("{name} type={kind} uid={uid} gid={gid} mode={mode:04o}\n");
    }
    text
}

/// A name as mtree(5) has it: what would end it is written in octal.
fn escape(path: &Path) -> String {
    let bytes = path.as_os_str().as_encoded_bytes();
    let mut text = String::new();
    for &byte in bytes {
        match byte {
            b'\\' | b'#' | b'*' | b'?' | b'[' | b'=' => text += &format!("\\{byte:03o}"),
            b'!'..=b'~' => text.push(byte.into()),
            _ => text += &format!("\\{byte:03o}"),
        }
    }
    text
}

/// Copies a directory with everything in it; links stay links.
fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    fs::create_dir_all(to).map_err(at(to))?;
    for entry in fs::read_dir(from).map_err(at(from))? {
        let entry = entry.map_err(at(from))?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().map_err(at(&from))?;
        if kind.is_dir() {
            copy(&from, &to)?;
        } else if kind.is_symlink() {
            let target = fs::read_link(&from).map_err(at(&from))?;
            symlink(target, &to).map_err(at(&to))?;
        } else {
            fs::copy(&from, &to).map_err(at(&from))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_mtree() {
        assert_eq!(escape(Path::new("etc/rc.conf")), "etc/rc.conf");
        assert_eq!(escape(Path::new("a b#[\u{e9}")), r"a\040b\043\133\303\251");
    }

    #[test]
    fn a_file_is_behind_its_directories() {
        let mut owners = Owners::new();
        let mut owner = Owner::root("file");
        (owner.gid, owner.mode) = (5, 0o4555);
        owners.insert("usr/bin/su".into(), owner);
        owners.insert("usr/bin".into(), Owner::root("dir"));
        assert_eq!(
            mtree(&owners),
            ". type=dir uid=0 gid=0 mode=0755\n\
             ./usr type=dir uid=0 gid=0 mode=0755\n\
             ./usr/bin type=dir uid=0 gid=0 mode=0755\n\
             ./usr/bin/su type=file uid=0 gid=5 mode=4555\n"
        );
    }

    #[test]
    fn a_directory_without_sets_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (dist, out) = (dir.path().join("dist"), dir.path().join("out"));
        fs::create_dir(&dist).unwrap();
        let make = || make(&dist, GuestConsole::Serial, &out, Path::new("/bin/false"));
        assert!(matches!(make(), Err(Error::NoSets(_))));
        for set in SETS {
            fs::write(dist.join(set), "no archive").unwrap();
        }
        let error = make().unwrap_err();
        assert!(
            matches!(&error, Error::Set { path, .. } if path.ends_with("base.txz")),
            "{error}"
        );
    }
}
