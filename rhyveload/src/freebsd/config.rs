//! What loader.conf(5) and the files around it say: variables, and modules to load.
//!
//! The order is the loader's: `/boot/defaults/loader.conf`, the files that `loader_conf_files` names
//! (each once, however often it is named), those of `loader_conf_dirs`, `local_loader_conf_files`,
//! and `nextboot_conf`. Files that are not there are passed over; what is wrong in one is said with
//! its name and line, and the rest counts.

use std::collections::HashSet;

use super::env::Environment;
use super::loader_conf::{Assignment, parse};
use crate::source::{BootFs, FileKind, FsError};

/// The first file.
pub const DEFAULTS: &str = "/boot/defaults/loader.conf";

/// Whether there is something to be done at the next boot only.
const NEXTBOOT: &str = "nextboot_enable";

/// A configuration file may have so many bytes.
const FILE_MAX: u64 = 8 << 20;

/// So many configuration files are read.
const FILES_MAX: usize = 256;

/// A value may have so many bytes; expansion could double it in every line.
const VALUE_MAX: usize = 64 << 10;

/// A module, or another file to be handed to the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModuleSpec {
    /// What is before `_load`.
    pub key: String,
    /// Whether it is wanted.
    pub load: bool,
    /// `_name`: the file, if it is not the key.
    pub name: Option<String>,
    /// `_type`: what it is, if it is no kernel module.
    pub kind: Option<String>,
    /// `_flags`: its arguments.
    pub flags: String,
    /// `_before`: a command to run first.
    pub before: Option<String>,
    /// `_after`: a command to run when it is loaded.
    pub after: Option<String>,
    /// `_error`: a command to run when it cannot be loaded.
    pub error: Option<String>,
}

impl ModuleSpec {
    /// The file to look for.
    pub fn file(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.key)
    }
}

/// What the configuration came to.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The loader's variables.
    pub env: Environment,
    /// Modules in the order in which they were first mentioned.
    pub modules: Vec<ModuleSpec>,
    /// `module_blacklist`: modules that are not loaded, whatever else is said.
    pub blacklist: Vec<String>,
}

/// Who reads a configuration, and runs the commands in it.
pub trait Host {
    /// Where files are.
    fn fs(&self) -> &dyn BootFs;

    /// What was read so far.
    fn config(&mut self) -> &mut Config;

    /// Says what is wrong.
    fn complain(&mut self, text: &str);

    /// Runs a command that a file asks for at `origin`.
    fn command(&mut self, origin: &str, command: &str);
}

/// Reads all configuration of a boot file system, over the variables that there are.
pub fn read(host: &mut dyn Host) {
    let mut reader = Reader {
        host,
        seen: HashSet::new(),
    };
    reader.all();
}

impl Config {
    /// Whether a module is not to be loaded, whatever else is said.
    pub fn is_blacklisted(&self, key: &str) -> bool {
        let list = self.env.get("module_blacklist").unwrap_or_default();
        words(list).iter().any(|module| module == key)
    }

    fn module(&mut self, key: &str) -> &mut ModuleSpec {
        let index = self.modules.iter().position(|module| module.key == key);
        let index = index.unwrap_or_else(|| {
            self.modules.push(ModuleSpec {
                key: key.to_owned(),
                ..ModuleSpec::default()
            });
            self.modules.len() - 1
        });
        &mut self.modules[index]
    }

    /// Takes one assignment.
    pub fn assign(&mut self, name: &str, value: String) {
        let some = |value: String| Some(value).filter(|value| !value.is_empty());
        match name.rsplit_once('_').filter(|(key, _)| !key.is_empty()) {
            Some((key, "load")) => self.module(key).load = value.eq_ignore_ascii_case("yes"),
            Some((key, "name")) => self.module(key).name = some(value),
            Some((key, "type")) => self.module(key).kind = some(value),
            Some((key, "flags")) => self.module(key).flags = value,
            Some((key, "before")) => self.module(key).before = some(value),
            Some((key, "after")) => self.module(key).after = some(value),
            Some((key, "error")) => self.module(key).error = some(value),
            _ => self.env.set(name, &value),
        }
    }
}

/// The words of a list of files or modules.
fn words(list: &str) -> Vec<String> {
    let separators = |c: char| c.is_ascii_whitespace() || c == ',';
    let words = list.split(separators).filter(|word| !word.is_empty());
    words.map(str::to_owned).collect()
}

struct Reader<'a> {
    host: &'a mut dyn Host,
    seen: HashSet<String>,
}

impl Reader<'_> {
    fn env(&mut self) -> &mut Environment {
        &mut self.host.config().env
    }

    fn all(&mut self) {
        // What a distribution's defaults say, for trees that have none.
        let defaults = [
            ("kernel", "kernel"),
            ("bootfile", "kernel"),
            ("kernel_options", ""),
            ("module_path", "/boot/modules"),
            (
                "loader_conf_files",
                "/boot/device.hints /boot/loader.conf /boot/loader.conf.local",
            ),
            ("loader_conf_dirs", "/boot/loader.conf.d"),
            ("nextboot_conf", "/boot/nextboot.conf"),
        ];
        if !self.file(DEFAULTS) {
            for (name, value) in defaults {
                self.env().set_default(name, value);
            }
            self.files("loader_conf_files");
        }
        for (name, value) in &defaults[..4] {
            self.env().set_default(name, value);
        }
        for directory in self.list("loader_conf_dirs") {
            self.directory(&directory);
        }
        self.files("local_loader_conf_files");
        self.nextboot();
    }

    /// Takes what nextboot(8) has written for the next boot only. Its first line says whether it is
    /// still to come: FreeBSD's loader changes that line, which is not done to a disk that is only
    /// read.
    fn nextboot(&mut self) {
        let Some(path) = self.list("nextboot_conf").into_iter().next() else {
            return;
        };
        let text = self.host.fs().read_file(&path, FILE_MAX);
        let text = text.unwrap_or_default();
        let first = parse(&String::from_utf8_lossy(&text)).next();
        let flag = match first {
            Some(Ok(first)) if first.name == NEXTBOOT => Some(first.value),
            _ => self.env().get(NEXTBOOT).map(str::to_owned),
        };
        if flag.is_some_and(|value| value.eq_ignore_ascii_case("yes")) && self.file(&path) {
            self.host.complain(&format!(
                "{path}: in effect until it is removed: nothing is written to the boot file system"
            ));
        }
    }

    fn list(&mut self, name: &str) -> Vec<String> {
        words(self.env().get(name).unwrap_or_default())
    }

    fn files(&mut self, name: &str) {
        for path in self.list(name) {
            self.file(&path);
        }
    }

    fn directory(&mut self, path: &str) {
        let Ok(entries) = self.host.fs().read_dir(path) else {
            return;
        };
        for entry in entries {
            if entry.kind != FileKind::Directory && entry.name.ends_with(".conf") {
                self.file(&format!("{}/{}", path.trim_end_matches('/'), entry.name));
            }
        }
    }

    /// Reads one file and those it names, unless that was done before. False if it is not there.
    fn file(&mut self, path: &str) -> bool {
        // A stack of its own: files that name files must not use up the program's.
        let mut found = None;
        let mut left = vec![path.to_owned()];
        while let Some(path) = left.pop() {
            if self.seen.contains(&path) {
                continue;
            }
            if self.seen.len() >= FILES_MAX {
                let text = format!("{path}: not read: there are more than {FILES_MAX} files");
                self.host.complain(&text);
                break;
            }
            self.seen.insert(path.clone());
            let text = match self.host.fs().read_file(&path, FILE_MAX) {
                Ok(bytes) => Some(bytes),
                Err(FsError::NotFound | FsError::NotDirectory) => None,
                Err(error) => {
                    self.host.complain(&format!("{path}: {error}"));
                    None
                }
            };
            found.get_or_insert(text.is_some());
            if let Some(bytes) = text {
                let named = self.text(&path, &String::from_utf8_lossy(&bytes));
                left.extend(named.into_iter().rev());
            }
        }
        found.unwrap_or(false)
    }

    /// Takes a file's assignments. Answers with the files that it names.
    fn text(&mut self, path: &str, text: &str) -> Vec<String> {
        let mut named = Vec::new();
        for line in parse(text) {
            let result = match line {
                Ok(Assignment { line, name, value }) => match self.expand(&value) {
                    Ok(value) => {
                        match name.as_str() {
                            "exec" => self.host.command(&format!("{path}:{line}"), &value),
                            "loader_conf_files" => {
                                self.env().set(&name, &value);
                                named.extend(self.list(&name));
                            }
                            _ => self.host.config().assign(&name, value),
                        }
                        Ok(())
                    }
                    Err(error) => Err((line, error)),
                },
                Err(error) => Err((error.line, error.to_string())),
            };
            if let Err((line, error)) = result {
                self.host.complain(&format!("{path}:{line}: {error}"));
            }
        }
        named
    }

    /// Puts values in the places of `${name}` and `$name`.
    fn expand(&mut self, value: &str) -> Result<String, String> {
        let mut expanded = String::new();
        let mut rest = value;
        while let Some((before, after)) = rest.split_once('$') {
            expanded += before;
            let (name, after) = variable(after);
            match name {
                "" => expanded.push('$'),
                name => expanded += self.env().get(name).unwrap_or_default(),
            }
            rest = after;
            if expanded.len() > VALUE_MAX {
                break;
            }
        }
        expanded += rest;
        match expanded.len() {
            0..=VALUE_MAX => Ok(expanded),
            _ => Err(format!("the value has more than {VALUE_MAX} bytes")),
        }
    }
}

/// The name behind a dollar sign, which is empty if there is none, and what follows it.
fn variable(text: &str) -> (&str, &str) {
    if let Some((name, after)) = text.strip_prefix('{').and_then(|text| text.split_once('}')) {
        return (name, after);
    }
    let part = |c: char| c.is_ascii_alphanumeric() || "_.".contains(c);
    let end = text.find(|c| !part(c)).unwrap_or(text.len());
    text.split_at(end)
}
