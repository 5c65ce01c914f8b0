//! loader(8): a kernel, its modules and its environment out of a boot file system, laid out in
//! guest memory.
//!
//! Files are placed one behind the other, as FreeBSD's loader does it, and what they depend on is
//! loaded when it is missed. Nothing is copied here: [`Loader::finish`] says what is to be copied.
//! What is loaded is decided by the configuration, and by the commands of [`super::shell`].

use vmm_api::memory::MemoryLayout;
use vmm_api::regs::Registers;

use super::config::{self, Config, ModuleSpec};
use super::console::Console;
use super::env::Environment;
use super::kernel::Kernel;
use super::metadata::FileRecords;
use super::modmeta::{Dependency, Modules};
use super::module::{self, Module, ModuleError};
use super::search::{self, Versions};
use super::{FreebsdError, PAGE, Via, hand_off, new_space};
use crate::elf::{self, Elf};
use crate::image::{Image, ImageError};
use crate::linux::bzimage;
use crate::linux::vmlinux::is_vmlinux;
use crate::plan::{Blob, PlanError, Segment};
use crate::progress::Progress;
use crate::source::devices::Devices;
use crate::source::{BootFs, FsError, Source};
use crate::space::{Space, SpaceError};

/// So many files are loaded.
const FILES_MAX: usize = 1024;

/// An `/etc/fstab` may have so many bytes.
const FSTAB_MAX: u64 = 1 << 20;

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum LoaderError {
    /// There is no kernel where it should be.
    #[error(
        "no kernel found: neither /boot/{kernel}/{bootfile} nor {kernel} is there; set kernel or \
        bootfile in loader.conf, or by -e"
    )]
    NoKernel {
        /// `$kernel`.
        kernel: String,
        /// `$bootfile`.
        bootfile: String,
    },
    /// The kernel cannot be loaded.
    #[error("{path}")]
    Kernel {
        /// Its file.
        path: String,
        /// What is wrong.
        source: PlanError,
    },
    /// What the kernel is handed has no room.
    #[error("cannot hand over to the kernel")]
    HandOff(#[source] PlanError),
    /// Nobody is there any more.
    #[error("the terminal is gone")]
    Terminal(#[source] std::io::Error),
}

/// Why a file other than the kernel is left out.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is not there.
    #[error("can't find '{0}'")]
    NotFound(String),
    /// It cannot be opened.
    #[error("can't open '{path}'")]
    Open {
        /// The file.
        path: String,
        /// Why.
        source: FsError,
    },
    /// It cannot be decompressed.
    #[error("{path}")]
    Image {
        /// The file.
        path: String,
        /// Why.
        source: ImageError,
    },
    /// It is no module.
    #[error("{path}")]
    Module {
        /// The file.
        path: String,
        /// Why.
        source: ModuleError,
    },
    /// It has no place.
    #[error("{path}")]
    Space {
        /// The file.
        path: String,
        /// Why.
        source: SpaceError,
    },
    /// It needs another version of something.
    #[error("module '{0}' exists but with wrong version")]
    Version(String),
    /// What it needs cannot be loaded.
    #[error("{path}")]
    Dependency {
        /// The file.
        path: String,
        /// Why.
        source: Box<FileError>,
    },
    /// Too many.
    #[error("more than {FILES_MAX} files")]
    TooMany,
    /// Modules come behind a kernel.
    #[error("no kernel is loaded")]
    NoKernel,
}

/// A file that was loaded.
#[derive(Debug)]
pub(super) struct Loaded {
    image: Image,
    segments: Vec<Segment>,
    /// What the loader adds.
    blobs: Vec<Blob>,
    /// What the kernel is told of it.
    pub records: FileRecords,
    /// What it provides and needs.
    pub modules: Modules,
}

/// A loader at work.
#[derive(Debug)]
pub struct Loader<'a, 'c> {
    pub(super) devices: &'a mut Devices,
    pub(super) console: &'a mut Console<'c>,
    /// Variables, and the modules to load.
    pub(super) config: Config,
    pub(super) files: Vec<Loaded>,
    /// How many files' commands are being run, one by the other; 0: what is typed.
    pub(super) depth: usize,
    layout: MemoryLayout,
    via: Via,
    progress: &'a mut Progress,
    /// What `module_path` was before a kernel's directory came in front, and with it.
    paths: Option<(String, String)>,
    space: Space,
    registers: Registers,
}

/// What a loader came to.
#[derive(Debug)]
pub struct Outcome {
    /// The kernel first, with the files that are copied from.
    pub files: Vec<LoadedFile>,
    /// What the loader adds.
    pub blobs: Vec<Blob>,
    /// The state in which vCPU 0 starts.
    pub registers: Registers,
    /// The variables that the kernel gets.
    pub env: Environment,
}

/// A file, and what of it goes where.
#[derive(Debug)]
pub struct LoadedFile {
    /// What the kernel knows of it.
    pub records: FileRecords,
    /// Its bytes.
    pub image: Image,
    /// What is copied.
    pub segments: Vec<Segment>,
}

impl<'a, 'c> Loader<'a, 'c> {
    /// A loader that has loaded nothing yet. The kernel will be entered `via` a protocol.
    ///
    /// # Errors
    ///
    /// The guest has too little memory for the loader's own pages.
    pub fn new(
        devices: &'a mut Devices,
        layout: MemoryLayout,
        via: Via,
        env: Environment,
        console: &'a mut Console<'c>,
        progress: &'a mut Progress,
    ) -> Result<Self, LoaderError> {
        let space = new_space(layout, via).map_err(|error| LoaderError::HandOff(error.into()))?;
        Ok(Self {
            devices,
            console,
            config: Config {
                env,
                ..Config::default()
            },
            files: Vec::new(),
            depth: 0,
            layout,
            via,
            progress,
            paths: None,
            space,
            registers: Registers::default(),
        })
    }

    /// Reads the configuration of the current device, over the variables that there are.
    pub fn configure(&mut self) {
        config::read(self);
    }

    pub(super) fn env(&self) -> &Environment {
        &self.config.env
    }

    /// Forgets all files.
    pub fn unload(&mut self) {
        self.files.clear();
        // It fit before.
        if let Ok(space) = new_space(self.layout, self.via) {
            self.space = space;
        }
        self.config.env.unset("kernelname");
    }

    /// Loads the kernel and the modules that the configuration asks for.
    ///
    /// # Errors
    ///
    /// As [`Self::load_kernel`].
    pub fn load_configured(&mut self) -> Result<(), LoaderError> {
        self.unload();
        self.load_kernel()?;
        self.load_modules();
        Ok(())
    }

    /// Loads the kernel that the environment asks for.
    ///
    /// # Errors
    ///
    /// It is not there, or it is no kernel that fits.
    pub fn load_kernel(&mut self) -> Result<(), LoaderError> {
        // The directory of the kernel before is no place to look for this one's modules.
        if let Some((before, with)) = self.paths.take()
            && self.env().get("module_path") == Some(&with)
        {
            self.config.env.set("module_path", &before);
        }
        let env = self.env();
        let before = env.get("module_path").unwrap_or_default().to_owned();
        let found = search::find_kernel(self.devices, env);
        let found = found.ok_or_else(|| LoaderError::NoKernel {
            kernel: env.get("kernel").unwrap_or("kernel").to_owned(),
            bootfile: env.get("bootfile").unwrap_or("kernel").to_owned(),
        })?;
        let args = env.get("kernel_options").unwrap_or_default().to_owned();
        self.config.env.set("module_path", &found.module_path);
        self.paths = Some((before, found.module_path));
        self.kernel_file(&found.path, args)
    }

    /// Loads a kernel from a file, in place of whatever was loaded.
    ///
    /// # Errors
    ///
    /// It is no kernel that fits; nothing is loaded then.
    pub fn kernel_file(&mut self, path: &str, args: String) -> Result<(), LoaderError> {
        self.unload();
        if let Err(source) = self.kernel(path, args) {
            self.unload();
            return Err(LoaderError::Kernel {
                path: path.to_owned(),
                source,
            });
        }
        self.config.env.force("kernelname", path);
        Ok(())
    }

    fn kernel(&mut self, path: &str, args: String) -> Result<(), PlanError> {
        let read = |error| PlanError::Read(std::io::Error::other(error));
        let (file, _) = search::open(self.devices, path).map_err(read)?;
        let image = Image::new(file, self.room(), self.progress)?;
        let head = image.head(elf::HEAD).map_err(PlanError::Read)?;
        if bzimage::is_bzimage(&head) {
            return Err(FreebsdError::Linux.into());
        }
        if !head.starts_with(elf::MAGIC) {
            return Err(PlanError::Unknown);
        }
        let elf = Elf::parse(&head, &image)?;
        if is_vmlinux(&elf) {
            return Err(FreebsdError::Linux.into());
        }
        let mut kernel = Kernel::place(&elf, self.via.protocol(), &mut self.space)?;
        self.registers = self.via.registers(&elf, &kernel)?;
        let mut blobs = Vec::new();
        let described = kernel.describe(&elf, &image, &mut self.space, &mut blobs)?;
        self.console.say(&format!("{path} {}", described.summary));
        let mut records = described.records;
        records.name = path.to_owned();
        records.args = args;
        self.files.push(Loaded {
            image,
            segments: kernel.segments,
            blobs,
            records,
            modules: described.modules,
        });
        Ok(())
    }

    /// Loads the modules that the configuration asks for. Those that cannot be loaded are named,
    /// and left out.
    pub fn load_modules(&mut self) {
        let mut index = 0;
        // Commands may change what is to be loaded.
        while let Some(spec) = self.config.modules.get(index).cloned() {
            index += 1;
            if !spec.load {
                continue;
            }
            let spec = &spec;
            if self.config.is_blacklisted(&spec.key) {
                let text = format!("not loading blacklisted module '{}'", spec.key);
                self.console.say(&text);
                continue;
            }
            self.command(spec, "before", spec.before.as_deref());
            let loaded = match &spec.kind {
                Some(kind) => self.load_raw(spec.file(), kind, &spec.flags),
                None => self.load_kld(spec.file(), &spec.flags),
            };
            match loaded {
                Ok(()) => self.command(spec, "after", spec.after.as_deref()),
                Err(error) => {
                    let text = format!("{}_load: {}", spec.key, chain(&error));
                    self.console.complain(&text);
                    self.command(spec, "error", spec.error.as_deref());
                }
            }
        }
    }

    fn command(&mut self, spec: &ModuleSpec, suffix: &str, command: Option<&str>) {
        if let Some(command) = command {
            let origin = format!("{}_{suffix}", spec.key);
            self.obey(&origin, command);
        }
    }

    /// Loads a kernel module, by a path, a module's name or a file's name, and what it needs.
    ///
    /// # Errors
    ///
    /// See [`FileError`]; nothing is loaded then.
    pub fn load_kld(&mut self, name: &str, args: &str) -> Result<(), FileError> {
        let path = match search::has_path(name) {
            true => search::find_kld(self.devices, self.env(), name),
            false => {
                if self.provided(name, None) {
                    return Ok(());
                }
                search::find_module(self.devices, self.env(), name, None)
            }
        };
        let path = path.ok_or_else(|| FileError::NotFound(name.to_owned()))?;
        let before = self.files.len();
        let loaded = self.load_with_needs(path, args);
        if loaded.is_err() {
            self.files.truncate(before);
        }
        loaded
    }

    /// Loads a file and what it needs, depth first, without recursion. FreeBSD's loader keeps needs in
    /// a list that it adds to in front, so the last one is first.
    fn load_with_needs(&mut self, path: String, args: &str) -> Result<(), FileError> {
        let first = self.files.len();
        self.load_object(path, args)?;
        let mut left = self.needs(first);
        while let Some((of, need)) = left.pop() {
            if self.provided(&need.name, Some(need.versions)) {
                continue;
            }
            let wrap = |source| FileError::Dependency {
                path: of.clone(),
                source: Box::new(source),
            };
            self.console
                .say(&format!("loading required module '{}'", need.name));
            let path =
                search::find_module(self.devices, self.env(), &need.name, Some(need.versions));
            let path = path.ok_or_else(|| wrap(FileError::NotFound(need.name.clone())))?;
            self.load_object(path, "").map_err(wrap)?;
            if !self.provided(&need.name, Some(need.versions)) {
                return Err(wrap(FileError::Version(need.name)));
            }
            left.extend(self.needs(self.files.len() - 1));
        }
        Ok(())
    }

    /// What a loaded file needs, and its name.
    fn needs(&self, at: usize) -> Vec<(String, Dependency)> {
        let Some(file) = self.files.get(at) else {
            return Vec::new();
        };
        let needs = file.modules.needs.iter();
        needs
            .map(|need| (file.records.name.clone(), need.clone()))
            .collect()
    }

    /// Whether a module of some version is loaded.
    fn provided(&self, name: &str, versions: Option<Versions>) -> bool {
        let all = self.files.iter().flat_map(|file| &file.modules.provides);
        all.into_iter().any(|(module, version)| {
            module == name && versions.is_none_or(|versions| versions.allow(*version))
        })
    }

    fn load_object(&mut self, path: String, args: &str) -> Result<(), FileError> {
        if self.files.iter().any(|file| file.records.name == path) {
            return Ok(());
        }
        let image = self.open(&path, true)?;
        let mut file = self.object(image).map_err(|source| FileError::Module {
            path: path.clone(),
            source,
        })?;
        let (addr, size) = (file.records.addr, file.records.size);
        self.console
            .say(&format!("{path} size {size:#x} at {addr:#x}"));
        file.records.name = path;
        file.records.args = args.to_owned();
        self.add(file)
    }

    /// Lays out a module: relocatable, as amd64's are, or a shared object, as i386's are.
    fn object(&self, image: Image) -> Result<Loaded, ModuleError> {
        let dest = self.next().next_multiple_of(PAGE);
        let head = image.head(elf::HEAD).map_err(ModuleError::Read)?;
        if module::is_shared(&head) {
            let elf = Elf::parse_shared(&head, &image)?;
            // What is claimed here is claimed again, as a whole, when it is added.
            let mut space = self.space.clone();
            let mut placed = Kernel::place_shared(&elf, dest, &mut space)?;
            let mut blobs = Vec::new();
            let described = placed.describe(&elf, &image, &mut space, &mut blobs);
            let mut described = described.map_err(|error| ModuleError::Shared(Box::new(error)))?;
            described.records.kind = "elf module".to_owned();
            return Ok(Loaded {
                image,
                segments: placed.segments,
                blobs,
                records: described.records,
                modules: described.modules,
            });
        }
        let module = Module::place(&image, dest)?;
        Ok(Loaded {
            image,
            segments: module.segments,
            blobs: Vec::new(),
            records: module.records,
            modules: module.modules,
        })
    }

    /// Loads a file of a type that the loader does not look into.
    ///
    /// # Errors
    ///
    /// See [`FileError`]; nothing is loaded then.
    pub fn load_raw(&mut self, name: &str, kind: &str, args: &str) -> Result<(), FileError> {
        let path = search::find_file(self.devices, self.env(), name, &[""]);
        let path = path.ok_or_else(|| FileError::NotFound(name.to_owned()))?;
        if self
            .files
            .iter()
            .any(|file| file.records.name == path && file.records.kind == kind)
        {
            return Ok(());
        }
        let image = self.open(&path, false)?;
        let size = image.size();
        let mut records = FileRecords::new(kind, self.next(), size);
        let segment = Segment {
            offset: 0,
            filesz: size,
            memsz: size,
            gpa: records.addr,
        };
        records.name = path;
        records.args = args.to_owned();
        self.add(Loaded {
            image,
            segments: vec![segment],
            blobs: Vec::new(),
            records,
            modules: Modules::default(),
        })
    }

    /// Opens a file; one that is compressed is expanded, if that is asked for or if it was found by
    /// the name of what is inside.
    fn open(&mut self, path: &str, expand: bool) -> Result<Image, FileError> {
        let (file, gz) = search::open(self.devices, path).map_err(|source| FileError::Open {
            path: path.to_owned(),
            source,
        })?;
        if !expand && !gz {
            return Ok(Image::File(file));
        }
        Image::whole(file, self.room(), self.progress).map_err(|source| FileError::Image {
            path: path.to_owned(),
            source,
        })
    }

    /// No file that fits is larger.
    fn room(&self) -> u64 {
        self.space.limit()
    }

    /// Where the next file may begin.
    fn next(&self) -> u64 {
        let last = self.files.last();
        last.map_or(0, |file| file.records.addr + file.records.size)
    }

    fn add(&mut self, file: Loaded) -> Result<(), FileError> {
        if self.files.len() >= FILES_MAX {
            return Err(FileError::TooMany);
        }
        if self.files.is_empty() {
            return Err(FileError::NoKernel);
        }
        let records = &file.records;
        // Behind everything else, so that it can only be too long.
        self.space
            .fits(records.name.clone(), records.addr, records.size)
            .map_err(|source| FileError::Space {
                path: records.name.clone(),
                source,
            })?;
        self.files.push(file);
        Ok(())
    }

    /// Finds the root file system in `/etc/fstab`, unless the environment names it.
    fn find_root(&mut self) {
        if self.env().get("vfs.root.mountfrom").is_some() {
            return;
        }
        // The device of the root file system, as a loader names it, is the current one or $rootdev.
        let device = self.env().get("rootdev").unwrap_or_default();
        let device = device.trim_end_matches('/');
        let colon = if device.is_empty() || device.ends_with(':') {
            ""
        } else {
            ":"
        };
        let path = format!("{device}{colon}/etc/fstab");
        let Ok(fstab) = self.devices.read_file(&path, FSTAB_MAX) else {
            return;
        };
        let fstab = String::from_utf8_lossy(&fstab);
        let mut lines = fstab.lines().map(|line| {
            let line = line.split('#').next().unwrap_or_default();
            line.split_whitespace().collect::<Vec<_>>()
        });
        let root = lines.find(|fields| fields.get(1) == Some(&"/"));
        if let Some(&[device, _, kind, options, ..]) = root.as_deref() {
            let from = format!("{kind}:{device}");
            self.config.env.set("vfs.root.mountfrom", &from);
            self.config.env.set("vfs.root.mountfrom.options", options);
        }
    }

    /// Completes what the kernel is handed.
    ///
    /// # Errors
    ///
    /// There is no room for it.
    pub fn finish(mut self) -> Result<Outcome, LoaderError> {
        self.find_root();
        let mut blobs = Vec::new();
        let files = self.files.into_iter();
        let (mut records, files): (Vec<_>, Vec<_>) = files
            .map(|mut file| {
                blobs.append(&mut file.blobs);
                (file.records, (file.image, file.segments))
            })
            .unzip();
        let env = self.config.env;
        let low = hand_off(&mut records, &env, self.layout, self.via, &mut self.space);
        blobs.extend(low.map_err(LoaderError::HandOff)?);
        let files = records.into_iter().zip(files);
        Ok(Outcome {
            files: files
                .map(|(records, (image, segments))| LoadedFile {
                    records,
                    image,
                    segments,
                })
                .collect(),
            blobs,
            registers: self.registers,
            env,
        })
    }
}

/// `outer: cause: its cause`.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
