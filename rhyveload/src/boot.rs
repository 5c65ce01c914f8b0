//! Booting from a directory or from disks, as bhyveload does it: which file system `/boot` is in,
//! and what FreeBSD's loader makes of it.

use std::io;
use std::path::PathBuf;

use vmm_api::state::BootInfo;

use crate::freebsd::config::Config;
use crate::freebsd::console::Console;
use crate::freebsd::env::Environment;
use crate::freebsd::loader::{Loader, LoaderError, Outcome};
use crate::load::{CopyJob, Filling, Job, LoadError, Loaded, Module};
use crate::plan::Protocol;
use crate::progress::Progress;
use crate::source::dir::HostDir;
use crate::source::disk::{DISKS_MAX, DiskError, volumes};
use crate::source::{BootFs, FileKind};

/// What to boot from.
#[derive(Clone, Debug, Default)]
pub struct BootJob {
    /// A directory that holds `boot/`.
    pub directory: Option<PathBuf>,
    /// Disk images, in order; they come before the directory.
    pub disks: Vec<PathBuf>,
}

/// Why nothing can be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The directory cannot be opened.
    #[error("{}: cannot open the directory", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// More disks than bhyveload takes.
    #[error("{0} disks: at most {DISKS_MAX} are possible")]
    Disks(usize),
    /// Neither a directory nor a disk.
    #[error("nothing to boot from: give a directory by -h, or a disk by -d")]
    Nothing,
    /// The loader.
    #[error(transparent)]
    Loader(#[from] LoaderError),
}

/// A file system to boot from, and its name as FreeBSD's loader has it.
#[derive(Debug)]
struct Device {
    name: String,
    fs: Box<dyn BootFs>,
}

impl BootJob {
    /// Finds the file system to boot from: the first one with a `/boot`, or else the first one.
    fn device(&self) -> Result<Device, BootError> {
        if self.disks.len() > DISKS_MAX {
            return Err(BootError::Disks(self.disks.len()));
        }
        let mut devices = Vec::new();
        let mut empty = None;
        for (unit, path) in self.disks.iter().enumerate() {
            match volumes(path, unit) {
                Ok(found) => devices.extend(found.into_iter().map(|volume| Device {
                    name: volume.name,
                    fs: volume.fs,
                })),
                // There may be disks for other purposes among them.
                Err(error @ DiskError::NoFileSystem { .. }) => {
                    empty.get_or_insert(error);
                }
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(path) = &self.directory {
            let fs = HostDir::new(path).map_err(|source| BootError::Directory {
                path: path.clone(),
                source,
            })?;
            devices.push(Device {
                name: "host0:".to_owned(),
                fs: Box::new(fs),
            });
        }
        let has_boot = |device: &Device| {
            let stat = device.fs.stat("/boot");
            stat.is_ok_and(|stat| stat.kind == FileKind::Directory)
        };
        let index = devices.iter().position(has_boot).unwrap_or(0);
        match (devices.is_empty(), empty) {
            (false, _) => Ok(devices.swap_remove(index)),
            (true, Some(error)) => Err(error.into()),
            (true, None) => Err(BootError::Nothing),
        }
    }

    /// Reads the configuration and lays everything out.
    pub(crate) fn plan(
        &self,
        job: &Job,
        console: &mut Console<'_>,
        progress: &mut Progress,
    ) -> Result<(Filling, Loaded), LoadError> {
        let device = self.device()?;
        console.say("Consoles: userboot");
        console.say("");
        let version = env!("CARGO_PKG_VERSION");
        console.say(&format!("FreeBSD/amd64 User boot, rhyveload {version}"));
        let mut env = Environment::new(&job.env);
        // bhyveload's own, and userboot's.
        for (name, value) in [
            ("LINES", "24"),
            ("smbios.bios.vendor", "BHYVE"),
            ("boot_serial", "1"),
            ("console", "userboot"),
            ("interpret", "OK"),
        ] {
            env.set(name, value);
        }
        env.force("currdev", &device.name);
        env.force("loaddev", &device.name);
        let config = Config::read(&*device.fs, env, console);
        let layout = job.memory.layout;
        let env = config.env.clone();
        let loaded = Loader::new(&*device.fs, layout, env, console, progress)
            .and_then(|mut loader| {
                loader.load_kernel()?;
                loader.load_modules(&config);
                loader.finish()
            })
            .map_err(BootError::from)?;
        Ok(outcome(job, &device.name, loaded))
    }
}

fn outcome(job: &Job, device: &str, outcome: Outcome) -> (Filling, Loaded) {
    let mut loaded = Loaded {
        vm: job.name.clone(),
        kernel: String::new(),
        protocol: Protocol::Freebsd,
        summary: String::new(),
        entry: outcome.registers.rip,
        segments: Vec::new(),
        initrd: None,
        modules: Vec::new(),
        cmdline: None,
        memory: job.memory.layout,
    };
    let mut copies = Vec::new();
    for (index, file) in outcome.files.into_iter().enumerate() {
        let records = file.records;
        if index == 0 {
            loaded.kernel.clone_from(&records.name);
            loaded.segments.clone_from(&file.segments);
        } else {
            loaded.modules.push(Module {
                path: records.name.clone(),
                kind: records.kind,
                gpa: records.addr,
                size: records.size,
            });
        }
        copies.push(CopyJob {
            path: format!("{device}{}", records.name).into(),
            from: Box::new(file.image),
            segments: file.segments,
        });
    }
    let filling = Filling {
        copies,
        ramdisk: None,
        blobs: outcome.blobs,
        registers: outcome.registers,
        boot: BootInfo {
            kernel: format!("{device}{}", loaded.kernel),
            protocol: Protocol::Freebsd.to_string(),
            cmdline: None,
        },
    };
    (filling, loaded)
}
