//! Kernel modules and the order in which they can be loaded.
//!
//! A module names what it depends on in its `.modinfo` section (`depends=a,b`). Packages carry no
//! `modules.dep`: depmod writes that when a kernel is installed, and we install none.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};

use crate::file::{FileError, at};

/// Why a set of modules cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The kernel has neither a module of this name nor the feature built in.
    #[error("the kernel in {dir} has no module {name}")]
    Missing {
        /// The module's name.
        name: String,
        /// The kernel's module directory.
        dir: PathBuf,
    },
    /// A module is no ELF file with a `.modinfo` section.
    #[error("module {name} is damaged: {reason}")]
    Damaged {
        /// The module's name.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

/// The modules of one kernel.
#[derive(Debug)]
pub struct Modules {
    dir: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: Vec<String>,
}

/// A module's uncompressed file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// The name, with underscores.
    pub name: String,
    /// The ELF file.
    pub data: Vec<u8>,
}

impl Modules {
    /// Lists the modules below `dir`, a kernel's `lib/modules/RELEASE`.
    ///
    /// # Errors
    ///
    /// [`Error::File`].
    pub fn list(dir: &Path) -> Result<Self, Error> {
        let mut files = BTreeMap::new();
        let mut pending = vec![dir.join("kernel")];
        while let Some(next) = pending.pop() {
            for entry in fs::read_dir(&next).map_err(at(&next))? {
                let path = entry.map_err(at(&next))?.path();
                if path.is_dir() {
                    pending.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        let builtin = dir.join("modules.builtin");
        let builtin = fs::read_to_string(&builtin).map_err(at(&builtin))?;
        let builtin = builtin
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        Ok(Self {
            dir: dir.to_owned(),
            files,
            builtin,
        })
    }

    /// The modules `names` and all they depend on, each after its dependencies. What is built into
    /// the kernel needs no loading and is left out.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn closure(&self, names: &[&str]) -> Result<Vec<Module>, Error> {
        let mut loaded = Vec::new();
        for name in names {
            self.visit(name, &mut loaded)?;
        }
        Ok(loaded)
    }

    fn visit(&self, name: &str, loaded: &mut Vec<Module>) -> Result<(), Error> {
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) || loaded.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let Some(path) = self.files.get(&name) else {
            return Err(Error::Missing {
                name,
                dir: self.dir.clone(),
            });
        };
        let mut data = fs::read(path).map_err(at(path))?;
        if path.extension().is_some_and(|extension| extension == "xz") {
            let mut plain = Vec::new();
            liblzma::read::XzDecoder::new(data.as_slice())
                .read_to_end(&mut plain)
                .map_err(at(path))?;
            data = plain;
        }
        let depends = depends(&data).map_err(|reason| Error::Damaged {
            name: name.clone(),
            reason,
        })?;
        // depmod refuses cycles when a kernel is built, so this ends.
        for dependency in depends {
            self.visit(&dependency, loaded)?;
        }
        loaded.push(Module { name, data });
        Ok(())
    }
}

/// The name in `virtio-rng.ko` or `virtio_blk.ko.xz`; dashes and underscores are the same to the
/// kernel.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = file
        .strip_suffix(".xz")
        .unwrap_or(file)
        .strip_suffix(".ko")?;
    Some(stem.replace('-', "_"))
}

/// The modules that a module depends on.
fn depends(module: &[u8]) -> Result<Vec<String>, String> {
    let file = object::File::parse(module).map_err(|error| error.to_string())?;
    let section = file
        .section_by_name(".modinfo")
        .ok_or("no .modinfo section")?;
    let info = section.data().map_err(|error| error.to_string())?;
    Ok(info
        .split(|&byte| byte == 0)
        .filter_map(|entry| std::str::from_utf8(entry).ok()?.strip_prefix("depends="))
        .flat_map(|list| list.split(','))
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_kernels() {
        let name = |path| module_name(Path::new(path));
        assert_eq!(
            name("kernel/drivers/char/hw_random/virtio-rng.ko").as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(name("kvm-amd.ko.xz").as_deref(), Some("kvm_amd"));
        assert_eq!(name("modules.order"), None);
    }
}
