//! Where a kernel and its modules are found (sys/boot/common/module.c, sys/boot/forth/support.4th).

use crate::freebsd::env::Environment;
use crate::source::{BootFs, FileKind, FsError, Source};

/// The directories that are searched when `module_path` is not set.
const DEFAULT_PATH: &str = "/boot/kernel;/boot/modules";

/// What may follow the name of a module's file.
const MODULE_SUFFIXES: [&str; 3] = [".ko", "", ".debug"];

/// The map of module names to files that kldxref(8) makes, and its version.
const HINTS: (&str, i32) = ("linker.hints", 1);

/// Longer maps than any release's are not read.
const HINTS_MAX: u64 = 4 << 20;

/// Which versions of a module are wanted (struct mod_depend).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The lowest that will do.
    pub minimum: i32,
    /// The one that is best.
    pub preferred: i32,
    /// The highest that will do.
    pub maximum: i32,
}

impl Versions {
    /// Whether a version will do.
    pub fn allow(&self, version: i32) -> bool {
        version == self.preferred || (self.minimum..=self.maximum).contains(&version)
    }
}

/// A name that says where the file is.
pub fn has_path(name: &str) -> bool {
    name.contains('/')
}

/// Opens a file, or the gzip'd one of the same name and `.gz`.
///
/// # Errors
///
/// Neither is there.
pub fn open(fs: &dyn BootFs, path: &str) -> Result<(Box<dyn Source>, bool), FsError> {
    match fs.open(path) {
        Ok(file) => Ok((file, false)),
        Err(error) => match fs.open(&format!("{path}.gz")) {
            Ok(file) => Ok((file, true)),
            Err(_) => Err(error),
        },
    }
}

fn exists(fs: &dyn BootFs, path: &str) -> bool {
    let is_file = |path: &str| fs.stat(path).is_ok_and(|stat| stat.kind == FileKind::File);
    is_file(path) || is_file(&format!("{path}.gz"))
}

/// `directory/name`, as the loader joins them: a slash more than needed stays.
fn join(directory: &str, name: &str) -> String {
    match directory {
        "" => name.to_owned(),
        _ if directory.ends_with('/') => format!("{directory}{name}"),
        _ => format!("{directory}/{name}"),
    }
}

/// The directories of `module_path`, each once.
fn directories(env: &Environment) -> Vec<String> {
    let path = env.get("module_path").unwrap_or(DEFAULT_PATH);
    let mut found: Vec<String> = Vec::new();
    for directory in path.split([';', ',']) {
        let directory = match directory.trim_end_matches('/') {
            "" => directory,
            trimmed => trimmed,
        };
        if !directory.is_empty() && found.iter().all(|seen| seen != directory) {
            found.push(directory.to_owned());
        }
    }
    found
}

/// Finds a file by the name that a configuration gives: itself if it has a path, else in the
/// directories of `module_path`.
pub fn find_file(
    fs: &dyn BootFs,
    env: &Environment,
    name: &str,
    suffixes: &[&str],
) -> Option<String> {
    if has_path(name) {
        return exists(fs, name).then(|| name.to_owned());
    }
    directories(env)
        .iter()
        .find_map(|directory| in_directory(fs, directory, name, suffixes))
}

/// Finds the file of a kernel module by its file's name.
pub fn find_kld(fs: &dyn BootFs, env: &Environment, name: &str) -> Option<String> {
    find_file(fs, env, name, &MODULE_SUFFIXES)
}

fn in_directory(fs: &dyn BootFs, directory: &str, name: &str, suffixes: &[&str]) -> Option<String> {
    let paths = suffixes
        .iter()
        .map(|suffix| format!("{}{suffix}", join(directory, name)));
    paths.into_iter().find(|path| exists(fs, path))
}

/// Finds the file that a module is in, by the directories' maps or by its name.
pub fn find_module(
    fs: &dyn BootFs,
    env: &Environment,
    name: &str,
    versions: Option<Versions>,
) -> Option<String> {
    directories(env).iter().find_map(|directory| {
        let hints = fs.read_file(&join(directory, HINTS.0), HINTS_MAX);
        let file = hints.ok().and_then(|map| hinted(&map, name, versions));
        match file {
            Some(file) => in_directory(fs, directory, &file, &[""]),
            None => in_directory(fs, directory, name, &MODULE_SUFFIXES),
        }
    })
}

/// The file that a map names for a module: of the version that is preferred, or the highest of
/// those that will do.
fn hinted(map: &[u8], name: &str, versions: Option<Versions>) -> Option<String> {
    /// A record for a version of a module.
    const MDT_VERSION: i32 = 3;
    let (head, mut rest) = map.split_first_chunk::<4>()?;
    if i32::from_le_bytes(*head) != HINTS.1 {
        return None;
    }
    let mut best: Option<(i32, String)> = None;
    while let Some((len, after)) = rest.split_first_chunk::<4>() {
        // The length counts what follows it.
        let len = usize::try_from(i32::from_le_bytes(*len)).ok()?;
        let record = after.get(..len)?;
        rest = &after[len..];
        let Some((kind, body)) = record.split_first_chunk::<4>() else {
            continue;
        };
        if i32::from_le_bytes(*kind) != MDT_VERSION {
            continue;
        }
        let Some((module, version, file)) = hint(body) else {
            continue;
        };
        if module != name.as_bytes() {
            continue;
        }
        let file = String::from_utf8_lossy(file).into_owned();
        let Some(wanted) = versions.filter(|wanted| wanted.preferred != version) else {
            return Some(file);
        };
        if wanted.allow(version) && best.as_ref().is_none_or(|(than, _)| version > *than) {
            best = Some((version, file));
        }
    }
    best.map(|(_, file)| file)
}

/// A counted name, a version on a 4-byte boundary of the map, a counted file name. Records begin
/// on such a boundary, and so does `body`.
fn hint(body: &[u8]) -> Option<(&[u8], i32, &[u8])> {
    let (&len, rest) = body.split_first()?;
    let module = rest.get(..usize::from(len))?;
    let at = (1 + module.len()).next_multiple_of(4);
    let version = i32::from_le_bytes(*body.get(at..)?.first_chunk()?);
    let (&len, rest) = body.get(at + 4..)?.split_first()?;
    Some((module, version, rest.get(..usize::from(len))?))
}

/// A kernel that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelPath {
    /// Its file.
    pub path: String,
    /// What `module_path` is with it.
    pub module_path: String,
}

/// Finds the kernel: `$bootfile` in the directory `/boot/$kernel`, then in `$kernel` as a directory,
/// then `$kernel` as a file.
pub fn find_kernel(fs: &dyn BootFs, env: &Environment) -> Option<KernelPath> {
    let old = env.get("module_path").unwrap_or_default();
    let kernel = env.get("kernel").unwrap_or("kernel");
    let names = env.get("bootfile").unwrap_or_default().split([';', ',']);
    let names = names.chain([kernel].into_iter().filter(|name| !has_path(name)));
    let names: Vec<_> = names.filter(|name| !name.is_empty()).collect();
    for directory in [format!("/boot/{kernel}"), kernel.to_owned()] {
        let module_path = match old {
            "" => directory,
            old => format!("{directory};{old}"),
        };
        let mut with = env.clone();
        with.force("module_path", &module_path);
        let mut found = names.iter().map(|name| find_file(fs, &with, name, &[""]));
        if let Some(path) = found.find_map(|path| path) {
            return Some(KernelPath { path, module_path });
        }
    }
    exists(fs, kernel).then(|| KernelPath {
        path: kernel.to_owned(),
        module_path: old.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str, version: i32, file: &str) -> Vec<u8> {
        let mut body = 3i32.to_le_bytes().to_vec();
        body.push(name.len() as u8);
        body.extend_from_slice(name.as_bytes());
        body.resize(body.len().next_multiple_of(4), 0);
        body.extend_from_slice(&version.to_le_bytes());
        body.push(file.len() as u8);
        body.extend_from_slice(file.as_bytes());
        body.resize(body.len().next_multiple_of(4), 0);
        let mut record = (body.len() as i32).to_le_bytes().to_vec();
        record.extend_from_slice(&body);
        record
    }

    #[test]
    fn hints_give_the_best_version() {
        let mut map = 1i32.to_le_bytes().to_vec();
        for (version, file) in [
            (1, "old.ko"),
            (3, "three.ko"),
            (2, "two.ko"),
            (9, "nine.ko"),
        ] {
            map.extend(record("usb", version, file));
        }
        let wanted = |minimum, preferred, maximum| Versions {
            minimum,
            preferred,
            maximum,
        };
        let found = |versions| hinted(&map, "usb", versions);
        assert_eq!(found(None).as_deref(), Some("old.ko"));
        assert_eq!(found(Some(wanted(1, 2, 3))).as_deref(), Some("two.ko"));
        assert_eq!(found(Some(wanted(1, 4, 5))).as_deref(), Some("three.ko"));
        assert_eq!(found(Some(wanted(4, 5, 6))), None);
        assert_eq!(hinted(&map, "us", None), None);
        for cut in 0..map.len() {
            let _ = hinted(&map[..cut], "usb", None);
        }
    }

    #[test]
    fn paths_are_lists_of_directories() {
        let env = |path| {
            let mut env = Environment::default();
            env.force("module_path", path);
            directories(&env)
        };
        assert_eq!(
            env("/boot/kernel/;/x;;/boot/kernel"),
            ["/boot/kernel", "/x"]
        );
        assert_eq!(join("/boot/", "/kernel"), "/boot//kernel");
        assert_eq!(directories(&Environment::default()).len(), 2);
    }
}
