//! An ext4 file system out of a tree, without root: e2fsprogs' mke2fs makes it, debugfs fills it, and
//! e2fsck says whether it is whole.
//!
//! Deterministic: debugfs is told one entry after the other in the order of their paths, all belong
//! to root, times are fixed, and so are the identifiers. (mke2fs -d would take owners, times and the
//! order of entries from the machine.)

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::cpio::{Archive, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG};
use crate::file::{FileError, at};

/// Why a file system could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// e2fsprogs is not there.
    #[error("cannot run {program}: install Debian's package e2fsprogs")]
    NoProgram {
        /// Which of its programs.
        program: &'static str,
        /// What happened.
        source: io::Error,
    },
    /// One of its programs failed.
    #[error("{program}: {message}")]
    Failed {
        /// Which.
        program: &'static str,
        /// What it wrote.
        message: String,
    },
    /// A path or a link's target that debugfs cannot be told.
    #[error("{0:?} cannot be in a file system: it has a quote, a backslash or a line's end")]
    Name(String),
}

/// Every time in the file system, in seconds since 1970: not 0, which would mean the present.
const TIME: &str = "1";
/// The file system's identifier, and the seed of its directories' hashes.
const UUID: &str = "72687976-652d-726f-6f74-000000000001";

/// Writes `tree` into a file system of `size` bytes at `path`, which is replaced.
///
/// # Errors
///
/// See [`Error`].
pub fn write(tree: &Archive, path: &Path, size: u64) -> Result<(), Error> {
    let out = path.parent().unwrap_or(Path::new("."));
    let scratch = tempfile::tempdir_in(out).map_err(at(out))?;
    let image = scratch.path().join("image");
    let file = fs::File::create(&image).map_err(at(&image))?;
    file.set_len(size).map_err(at(&image))?;
    run("mke2fs", &[], |mke2fs| {
        mke2fs.args(["-q", "-F", "-t", "ext4", "-L", "rhyve-root", "-U", UUID]);
        mke2fs.args(["-E", &format!("hash_seed={UUID},nodiscard,root_owner=0:0")]);
        mke2fs.arg(&image);
    })?;
    let script = script(tree, scratch.path())?;
    run("debugfs", script.as_bytes(), |debugfs| {
        debugfs.args(["-w", "-f", "/dev/stdin"]).arg(&image);
    })?;
    run("e2fsck", &[], |e2fsck| {
        e2fsck.args(["-f", "-n"]).arg(&image);
    })?;
    Ok(fs::rename(&image, path).map_err(at(path))?)
}

/// debugfs' commands for all entries; the contents of files go below `scratch`.
fn script(tree: &Archive, scratch: &Path) -> Result<String, Error> {
    let mut script = String::new();
    for (number, (path, entry)) in tree.entries().enumerate() {
        let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
        script += &format!("cd \"/{}\"\n", word(above)?);
        let name = word(name)?;
        match entry.mode & S_IFMT {
            S_IFDIR => script += &format!("mkdir \"{name}\"\n"),
            S_IFLNK => {
                let target = String::from_utf8_lossy(&entry.data);
                script += &format!("symlink \"{name}\" \"{}\"\n", word(&target)?);
            }
            S_IFREG => {
                let content = scratch.join(number.to_string());
                fs::write(&content, &entry.data).map_err(at(&content))?;
                let mode = fs::Permissions::from_mode(entry.mode & 0o777);
                fs::set_permissions(&content, mode).map_err(at(&content))?;
                let content = content.to_string_lossy();
                script += &format!("write \"{}\" \"{name}\"\n", word(&content)?);
            }
            _ => {
                let (major, minor) = entry.device;
                script += &format!("mknod \"{name}\" c {major} {minor}\n");
            }
        }
        if entry.mode & S_IFMT != S_IFLNK {
            script += &format!("set_inode_field \"{name}\" mode 0{:o}\n", entry.mode);
        }
    }
    Ok(script)
}

fn word(text: &str) -> Result<&str, Error> {
    if text.contains(['"', '\\', '\n', '\r']) {
        Err(Error::Name(text.to_owned()))
    } else {
        Ok(text)
    }
}

/// Runs one of e2fsprogs' programs, which are not on everybody's path.
fn run(
    program: &'static str,
    input: &[u8],
    arguments: impl FnOnce(&mut Command),
) -> Result<(), Error> {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    // env finds it on the path that is set here.
    let mut command = Command::new("env");
    command.arg(program);
    arguments(&mut command);
    command
        .env("PATH", path)
        .env("LC_ALL", "C.UTF-8")
        .env("E2FSPROGS_FAKE_TIME", TIME)
        .env("DEBUGFS_PAGER", "cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let missing = |source| Error::NoProgram { program, source };
    let mut child = command.spawn().map_err(missing)?;
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        // Beside the reading of what it says, or both might wait for ever. A program that ends
        // early says why.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
        child.wait_with_output()
    })
    .map_err(missing)?;
    if output.status.code() == Some(127) {
        return Err(missing(io::ErrorKind::NotFound.into()));
    }
    // debugfs goes on after an error, and ends with 0. What it and the others always write to
    // standard error is their version.
    let errors = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<&str> = errors
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with(&format!("{program} 1.")))
        .collect();
    if output.status.success() && (program != "debugfs" || errors.is_empty()) {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let mut lines: Vec<&str> = said.lines().collect();
    lines.drain(..lines.len().saturating_sub(4));
    lines.extend(errors.iter().take(4));
    Err(Error::Failed {
        program,
        message: format!("{}: {}", output.status, lines.join("; ")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Archive {
        let mut tree = Archive::default();
        tree.dir_with_mode("tmp", 0o1777);
        tree.file("etc/secret", 0o600, "s");
        tree.file("bin/program", 0o755, vec![7; 300_000]);
        tree.symlink("sbin", "bin");
        tree.char_device("dev/console", 0o600, 5, 1);
        tree
    }

    fn debugfs(image: &Path, request: &str) -> String {
        let output = Command::new("/usr/sbin/debugfs")
            .args(["-R", request])
            .arg(image)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn the_same_tree_makes_the_same_bytes_which_hold_it() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        write(&tree(), &one, 16 << 20).unwrap();
        write(&tree(), &two, 16 << 20).unwrap();
        assert!(fs::read(&one).unwrap() == fs::read(&two).unwrap());
        let stat = |path: &str| debugfs(&one, &format!("stat {path}"));
        assert!(stat("/tmp").contains("Mode:  01777"), "{}", stat("/tmp"));
        for part in ["Mode:  0755", "Size: 300000", "User:     0"] {
            assert!(stat("/bin/program").contains(part), "{part}");
        }
        assert!(stat("/etc/secret").contains("Mode:  0600"));
        assert!(stat("/sbin").contains("\"bin\""));
        assert!(stat("/dev/console").contains("05:01"));
    }

    #[test]
    fn what_cannot_be_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let full = write(&tree(), &path, 256 << 10).unwrap_err();
        assert!(matches!(full, Error::Failed { .. }), "{full}");
        let mut tree = Archive::default();
        tree.file("a\"b", 0o644, "");
        let error = write(&tree, &path, 16 << 20).unwrap_err();
        assert!(matches!(error, Error::Name(name) if name == "a\"b"));
        assert!(!path.exists());
    }
}
