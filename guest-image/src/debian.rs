//! Files out of Debian's packages, without root and without touching the machine's own apt.
//!
//! apt runs with a private state: its own source list, index files and cache, all below one
//! directory of ours. Packages are downloaded and unpacked there (`dpkg-deb -x`), never installed.
//! That needs no root, takes no lock of the machine's dpkg, changes nothing that another program
//! sees, and the same directory serves again on the next run. The machine's sources say which mirror
//! to ask; its dpkg status says which libraries it has already.
//!
//! ```text
//! DIR/apt/sources.list, lists/, cache/     apt's private state
//! DIR/NAME_VERSION/                        an unpacked package; a version's colon is %3a, as apt does it
//! DIR/NAME -> NAME_VERSION                 the one in use; remove the link to look for a newer one
//! ```

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::file::{FileError, at};
use crate::progress::Progress;

/// Why a package could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory of the package cache failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// A program of Debian's could not be started.
    #[error("cannot run {program}: the packages of a Debian system are made with it")]
    NotDebian {
        /// The program.
        program: &'static str,
        /// What happened.
        source: io::Error,
    },
    /// A program of Debian's reported a failure.
    #[error("{command} failed: {message}")]
    Failed {
        /// The command line.
        command: String,
        /// The last lines it wrote.
        message: String,
    },
    /// The machine's apt sources do not offer the release the machine runs.
    #[error(
        "no apt source of this machine offers Debian's {codename} (main): add one, for example by \
         /etc/apt/sources.list.d/debian.sources"
    )]
    NoSource {
        /// The release's code name, from os-release.
        codename: String,
    },
    /// A package lacks something it should have.
    #[error("package {package} {version} has no {what}")]
    Missing {
        /// The package.
        package: String,
        /// Its version.
        version: String,
        /// What was looked for.
        what: String,
    },
}

/// An unpacked package, or a set of packages unpacked into one tree.
#[derive(Clone, Debug)]
pub struct Package {
    /// The package's name.
    pub name: String,
    /// Its version, as Debian writes it.
    pub version: String,
    /// The directory that stands for `/`.
    pub tree: PathBuf,
}

impl Package {
    /// The error for something this package does not have.
    #[must_use]
    pub fn missing(&self, what: impl Into<String>) -> Error {
        Error::Missing {
            package: self.name.clone(),
            version: self.version.clone(),
            what: what.into(),
        }
    }
}

/// Debian's archive, seen through a private package cache.
#[derive(Debug)]
pub struct Debian {
    dir: PathBuf,
    codename: String,
    /// Held while this exists, so that two runs do not unpack the same package at once.
    _lock: File,
    updated: bool,
    progress: Progress,
}

impl Debian {
    /// Opens the package cache `dir`, which is created if it is missing.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if the directory cannot be made or locked.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(at(dir))?;
        // apt resolves relative paths against its own Dir, not against the working directory.
        let dir = dir.canonicalize().map_err(at(dir))?;
        let lock_path = dir.join("lock");
        let lock = File::create(&lock_path).map_err(at(&lock_path))?;
        lock.lock().map_err(at(&lock_path))?;
        let os_release = Path::new("/etc/os-release");
        let text = fs::read_to_string(os_release).map_err(at(os_release))?;
        let codename = text
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .unwrap_or("stable")
            .trim_matches('"')
            .to_owned();
        Ok(Self {
            dir,
            codename,
            _lock: lock,
            updated: false,
            progress: Progress::stderr(),
        })
    }

    /// The package `name`, unpacked.
    ///
    /// # Errors
    ///
    /// Any [`Error`], when it is not unpacked yet and cannot be downloaded.
    pub fn package(&mut self, name: &str) -> Result<Package, Error> {
        if let Some(package) = self.unpacked(name) {
            return Ok(package);
        }
        let version = self.candidate(name, &self.codename.clone())?;
        self.progress.say(&format!("downloading {name} {version}"));
        let download = self.scratch()?;
        let mut apt = self.apt("apt-get");
        apt.current_dir(download.path())
            .arg("download")
            .arg(format!("{name}={version}"));
        capture(apt, "apt-get")?;
        self.unpack(name, &version, download.path())
    }

    /// The newest package that the metapackage `name` depends on and whose name starts with
    /// `prefix`, unpacked. `linux-image-amd64` stands for one kernel version in this way.
    ///
    /// # Errors
    ///
    /// Any [`Error`]; [`Error::Missing`] if there is no such dependency.
    pub fn dependency(&mut self, name: &str, prefix: &str) -> Result<Package, Error> {
        let link = self.dir.join(format!("{name}.dependency"));
        if let Ok(target) = fs::read_link(&link)
            && let Some(package) = self.unpacked(&target.to_string_lossy())
        {
            return Ok(package);
        }
        self.update()?;
        let mut apt = self.apt("apt-cache");
        apt.args(["show", "--no-all-versions", name]);
        let record = capture(apt, "apt-cache")?;
        let version = field(&record, "Version").unwrap_or("?").to_owned();
        let dependency = field(&record, "Depends")
            .into_iter()
            .flat_map(|depends| depends.split(','))
            .filter_map(|entry| entry.split_whitespace().next())
            .find(|entry| entry.starts_with(prefix))
            .ok_or_else(|| Error::Missing {
                package: name.to_owned(),
                version,
                what: format!("dependency {prefix}*"),
            })?
            .to_owned();
        let package = self.package(&dependency)?;
        relink(Path::new(&dependency), &link)?;
        Ok(package)
    }

    /// The package `name` of at least the upstream version `major`, with every package it depends on
    /// that this machine does not have, all unpacked into one tree. Where the machine's own release
    /// is older, the release's backports suite is asked.
    ///
    /// # Errors
    ///
    /// Any [`Error`].
    pub fn closure(&mut self, name: &str, major: u32) -> Result<Package, Error> {
        if let Some(package) = self.unpacked(name) {
            return Ok(package);
        }
        let mut suite = self.codename.clone();
        let mut version = self.candidate(name, &suite)?;
        if upstream_major(&version) < major {
            suite = format!("{suite}-backports");
            version = self.candidate(name, &suite)?;
        }
        if upstream_major(&version) < major {
            return Err(Error::Missing {
                package: name.to_owned(),
                version,
                what: format!("version {major} or later in {suite}"),
            });
        }
        let mut apt = self.apt("apt-get");
        apt.arg("-o").arg(format!("APT::Default-Release={suite}"));
        self.install(apt, name, &version, &[name])
    }

    /// The packages `names` with every package they depend on, down to the C library: what a system
    /// of their own needs. All are unpacked into one tree.
    ///
    /// # Errors
    ///
    /// Any [`Error`].
    pub fn system(&mut self, names: &[&str]) -> Result<Package, Error> {
        let set = names.join("+");
        if let Some(package) = self.unpacked(&set) {
            return Ok(package);
        }
        let mut versions = Vec::new();
        for name in names {
            versions.push(self.candidate(name, &self.codename.clone())?);
        }
        let nothing = self.dir.join("apt/nothing");
        fs::write(&nothing, "").map_err(at(&nothing))?;
        let mut apt = self.apt("apt-get");
        apt.arg("-o")
            .arg(format!("Dir::State::status={}", nothing.display()));
        self.install(apt, &set, &versions.join("+"), names)
    }

    /// Downloads what `apt` would install for `names`, and unpacks it into the tree of `name`.
    fn install(
        &self,
        mut apt: Command,
        name: &str,
        version: &str,
        names: &[&str],
    ) -> Result<Package, Error> {
        self.progress
            .say(&format!("downloading {name} {version} and what it needs"));
        let download = self.scratch()?;
        apt.arg("-o").arg(format!(
            "Dir::Cache::archives={}",
            download.path().display()
        ));
        apt.args([
            "--yes",
            "--no-install-recommends",
            "--download-only",
            "install",
        ]);
        apt.args(names);
        fs::create_dir(download.path().join("partial")).map_err(at(download.path()))?;
        capture(apt, "apt-get")?;
        self.unpack(name, version, download.path())
    }

    /// The package `name` if it is unpacked already.
    fn unpacked(&self, name: &str) -> Option<Package> {
        let target = fs::read_link(self.dir.join(name)).ok()?;
        let version = target
            .to_str()?
            .strip_prefix(name)?
            .strip_prefix('_')?
            .replace("%3a", ":");
        let tree = self.dir.join(&target);
        tree.is_dir().then(|| Package {
            name: name.to_owned(),
            version,
            tree,
        })
    }

    /// Unpacks every `.deb` of `download` into the tree of `name`.
    fn unpack(&self, name: &str, version: &str, download: &Path) -> Result<Package, Error> {
        self.progress.say(&format!("unpacking {name} {version}"));
        let scratch = self.scratch()?;
        let tree = scratch.path().join("tree");
        let mut found = false;
        for entry in fs::read_dir(download).map_err(at(download))? {
            let deb = entry.map_err(at(download))?.path();
            if deb.extension().is_some_and(|extension| extension == "deb") {
                let mut dpkg = Command::new("dpkg-deb");
                dpkg.arg("-x").arg(&deb).arg(&tree);
                capture(dpkg, "dpkg-deb")?;
                found = true;
            }
        }
        // A colon would end an entry of LD_LIBRARY_PATH.
        let directory = format!("{name}_{}", version.replace(':', "%3a"));
        let package = Package {
            name: name.to_owned(),
            version: version.to_owned(),
            tree: self.dir.join(&directory),
        };
        if !found {
            return Err(package.missing("file to download"));
        }
        if package.tree.exists() {
            fs::remove_dir_all(&package.tree).map_err(at(&package.tree))?;
        }
        // Renamed when whole, so that an interrupted run leaves nothing half unpacked.
        fs::rename(&tree, &package.tree).map_err(at(&package.tree))?;
        relink(Path::new(&directory), &self.dir.join(name))?;
        self.progress.clear();
        Ok(package)
    }

    /// The version of `name` that the suite offers.
    fn candidate(&mut self, name: &str, suite: &str) -> Result<String, Error> {
        self.update()?;
        let mut apt = self.apt("apt-cache");
        apt.arg("-o").arg(format!("APT::Default-Release={suite}"));
        apt.args(["show", "--no-all-versions", name]);
        let record = capture(apt, "apt-cache")?;
        field(&record, "Version")
            .map(str::to_owned)
            .ok_or_else(|| Error::Missing {
                package: name.to_owned(),
                version: "?".to_owned(),
                what: format!("candidate in {suite}"),
            })
    }

    /// Writes the private source list and fetches its index files, once.
    fn update(&mut self) -> Result<(), Error> {
        if self.updated {
            return Ok(());
        }
        self.progress.say("reading the package lists");
        let state = self.dir.join("apt");
        for sub in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(state.join(sub)).map_err(at(&state))?;
        }
        // What `update` would fetch names every mirror and suite, also on a machine whose lists have
        // been deleted, where `apt-get indextargets` is empty.
        let mut apt = Command::new("apt-get");
        apt.arg("-o").arg(format!(
            "Dir::State::lists={}",
            state.join("lists").display()
        ));
        apt.args(["update", "--print-uris"]);
        let sources = source_list(&capture(apt, "apt-get")?, &self.codename);
        let Some(sources) = sources else {
            return Err(Error::NoSource {
                codename: self.codename.clone(),
            });
        };
        let path = state.join("sources.list");
        fs::write(&path, sources).map_err(at(&path))?;
        let mut apt = self.apt("apt-get");
        apt.args(["update", "--error-on=any"]);
        capture(apt, "apt-get")?;
        self.updated = true;
        Ok(())
    }

    /// A temporary directory in the cache: on the file system where its contents will stay.
    fn scratch(&self) -> Result<tempfile::TempDir, Error> {
        Ok(tempfile::tempdir_in(&self.dir).map_err(at(&self.dir))?)
    }

    /// An apt program with the private state.
    fn apt(&self, program: &str) -> Command {
        let state = self.dir.join("apt");
        let mut command = Command::new(program);
        let mut option = |name: &str, value: &str| {
            command.arg("-o").arg(format!("{name}={value}"));
        };
        option(
            "Dir::Etc::sourcelist",
            &state.join("sources.list").to_string_lossy(),
        );
        option("Dir::Etc::sourceparts", "/dev/null");
        option("Dir::State", &state.to_string_lossy());
        option("Dir::State::lists", &state.join("lists").to_string_lossy());
        option("Dir::State::status", "/var/lib/dpkg/status");
        option("Dir::Cache", &state.join("cache").to_string_lossy());
        // As root apt would download as the user _apt, who may not enter this directory.
        option("APT::Sandbox::User", "root");
        option("Debug::NoLocking", "true");
        option("Acquire::Languages", "none");
        option(
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled",
            "false",
        );
        command.arg("-q");
        command
    }
}

/// The private source list: the release `codename` and its updates wherever the machine gets them,
/// and the backports suite from the mirror of the release itself. `uris` is what `apt-get update
/// --print-uris` writes: `'URI/dists/SUITE/InRelease' FILE SIZE` among others.
fn source_list(uris: &str, codename: &str) -> Option<String> {
    // The keys of the archive, where Debian's keyring package puts them; apt's own trusted keys
    // serve where that is absent.
    let keyring = ["pgp", "gpg"]
        .map(|suffix| format!("/usr/share/keyrings/debian-archive-keyring.{suffix}"))
        .into_iter()
        .find(|path| Path::new(path).exists());
    let options = keyring.map_or_else(String::new, |path| format!(" [signed-by={path}]"));
    let mut mirror = None;
    let mut list = String::new();
    for line in uris.lines() {
        let Some((base, suite)) = line
            .strip_prefix('\'')
            .and_then(|line| line.split_once("/InRelease'"))
            .and_then(|(uri, _)| uri.split_once("/dists/"))
        else {
            continue;
        };
        if suite == codename {
            mirror.get_or_insert(base);
        }
        let ours = suite.strip_prefix(codename);
        if ours.is_some_and(|rest| ["", "-updates", "-security"].contains(&rest)) {
            list += &format!("deb{options} {base} {suite} main\n");
        }
    }
    list += &format!("deb{options} {} {codename}-backports main\n", mirror?);
    Some(list)
}

/// The value of a field in a package record.
fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// The first number of the upstream part of a version: 10 of `1:10.0.2+ds-2`.
fn upstream_major(version: &str) -> u32 {
    let upstream = version
        .split_once(':')
        .map_or(version, |(_, upstream)| upstream);
    let digits = upstream.split(|c: char| !c.is_ascii_digit()).next();
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// Runs `command` and returns what it wrote.
fn capture(mut command: Command, program: &'static str) -> Result<String, Error> {
    command
        .env("LC_ALL", "C.UTF-8")
        .env("DEBIAN_FRONTEND", "noninteractive");
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::NotDebian { program, source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    let arguments = command.get_args().map(|arg| arg.to_string_lossy());
    let plain: Vec<_> = arguments
        .skip_while(|arg| arg.starts_with('-') || arg.contains('='))
        .collect();
    Err(Error::Failed {
        command: format!("{program} {}", plain.join(" ")),
        message: lines[lines.len().saturating_sub(4)..].join("; "),
    })
}

/// Makes `link` point to `target`, replacing an older link.
fn relink(target: &Path, link: &Path) -> Result<(), Error> {
    let new = link.with_extension("new");
    let _ = fs::remove_file(&new);
    symlink(target, &new).map_err(at(&new))?;
    Ok(fs::rename(&new, link).map_err(at(link))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_list_follows_the_machine_and_adds_backports() {
        let uris = "'http://m.test/debian/dists/bookworm/InRelease' a 0 \n\
                    'http://m.test/debian/dists/bookworm-updates/InRelease' b 0 \n\
                    'http://s.test/sec/dists/bookworm-security/InRelease' c 0 \n\
                    'http://m.test/debian/dists/bookworm/main/binary-amd64/Packages.xz' d 0 \n\
                    'http://other.test/dists/nodistro/InRelease' e 0 \n";
        let list = source_list(uris, "bookworm").unwrap();
        let places: Vec<String> = list
            .lines()
            .map(|line| {
                line.split_whitespace()
                    .rev()
                    .take(3)
                    .collect::<Vec<_>>()
                    .join(" ")
            })
            .collect();
        assert_eq!(
            places,
            [
                "main bookworm http://m.test/debian",
                "main bookworm-updates http://m.test/debian",
                "main bookworm-security http://s.test/sec",
                "main bookworm-backports http://m.test/debian",
            ]
        );
        assert_eq!(source_list(uris, "trixie"), None);
    }

    #[test]
    fn versions_are_compared_by_their_upstream_part() {
        assert_eq!(upstream_major("1:10.0.2+ds-2+deb13u1~bpo12+1"), 10);
        assert_eq!(upstream_major("1:7.2+dfsg-7"), 7);
        assert_eq!(upstream_major("6.1.176-1"), 6);
        assert_eq!(upstream_major("x"), 0);
    }

    #[test]
    fn an_unpacked_package_is_found_again_without_apt() {
        let dir = tempfile::tempdir().unwrap();
        let content = dir.path().join("content");
        fs::create_dir_all(content.join("DEBIAN")).unwrap();
        fs::write(
            content.join("DEBIAN/control"),
            "Package: tool\nVersion: 1:2.0-1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n",
        )
        .unwrap();
        fs::write(content.join("data"), "x").unwrap();
        let debs = dir.path().join("debs");
        fs::create_dir(&debs).unwrap();
        let mut dpkg = Command::new("dpkg-deb");
        dpkg.arg("--build").arg(&content).arg(debs.join("tool.deb"));
        capture(dpkg, "dpkg-deb").unwrap();

        let mut debian = Debian::open(&dir.path().join("cache")).unwrap();
        debian.unpack("tool", "1:2.0-1", &debs).unwrap();
        let package = debian.package("tool").unwrap();
        assert_eq!(
            (package.name.as_str(), package.version.as_str()),
            ("tool", "1:2.0-1")
        );
        assert_eq!(fs::read_to_string(package.tree.join("data")).unwrap(), "x");
        assert!(!package.tree.to_string_lossy().contains(':'));
    }
}
