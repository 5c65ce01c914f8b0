//! Booting from a directory or from disks, as bhyveload does it: which file system `/boot` is in,
//! and what FreeBSD's loader makes of it.

use std::io;
use std::path::PathBuf;

use vmm_api::state::BootInfo;

use crate::freebsd::Via;
use crate::freebsd::console::Console;
use crate::freebsd::env::Environment;
use crate::freebsd::loader::{Loader, LoaderError, Outcome};
use crate::freebsd::session::End;
use crate::load::{CopyJob, Filling, Job, LoadError, Loaded, Module};
use crate::plan::Protocol;
use crate::progress::Progress;
use crate::source::devices::Devices;
use crate::source::dir::HostDir;
use crate::source::disk::{DISKS_MAX, Disk, DiskError};

/// What to boot from.
#[derive(Clone, Debug, Default)]
pub struct BootJob {
    /// A directory that holds `boot/`.
    pub directory: Option<PathBuf>,
    /// Disk images, in order; they come before the directory.
    pub disks: Vec<PathBuf>,
    /// How the kernel is entered.
    pub via: Via,
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
    /// The user had enough.
    #[error("nothing was loaded: quit at the loader's prompt")]
    Quit,
    /// The loader.
    #[error(transparent)]
    Loader(#[from] LoaderError),
}

impl BootJob {
    /// Opens all there is, and finds what to boot from: the first file system with a `/boot`, or
    /// else the first one.
    fn devices(&self) -> Result<Devices, BootError> {
        if self.disks.len() > DISKS_MAX {
            return Err(BootError::Disks(self.disks.len()));
        }
        let mut devices = Devices::default();
        let mut empty = None;
        for (unit, path) in self.disks.iter().enumerate() {
            let disk = Disk::open(path, unit)?;
            // There may be disks for other purposes among them.
            let error = disk.without_file_system();
            if !devices.add_disk(disk) {
                empty.get_or_insert(error);
            }
        }
        if let Some(path) = &self.directory {
            let fs = HostDir::new(path).map_err(|source| BootError::Directory {
                path: path.clone(),
                source,
            })?;
            devices.add_directory(path, Box::new(fs));
        }
        devices.choose();
        match (devices.is_empty(), empty) {
            (false, _) => Ok(devices),
            (true, Some(error)) => Err(error.into()),
            (true, None) => Err(BootError::Nothing),
        }
    }

    /// Reads the configuration, asks the user if there is one, and lays everything out.
    pub(crate) fn plan(
        &self,
        job: &Job,
        console: &mut Console<'_>,
        progress: &mut Progress,
    ) -> Result<(Filling, Loaded), LoadError> {
        loop {
            let mut devices = self.devices()?;
            console.say("Consoles: userboot");
            console.say("");
            let version = env!("CARGO_PKG_VERSION");
            console.say(&format!("FreeBSD/amd64 User boot, rhyveload {version}"));
            let env = environment(job, devices.current());
            let layout = job.memory.layout;
            let mut loader = Loader::new(&mut devices, layout, self.via, env, console, progress)
                .map_err(BootError::from)?;
            match loader.session().map_err(BootError::from)? {
                End::Boot => {}
                End::Reboot => continue,
                End::Quit => return Err(BootError::Quit.into()),
            }
            let loaded = loader.finish().map_err(BootError::from)?;
            progress.restart();
            return Ok(outcome(job, self.via.protocol(), devices.current(), loaded));
        }
    }
}

/// The variables of the command line, bhyveload's own, and userboot's.
fn environment(job: &Job, device: &str) -> Environment {
    let mut env = Environment::new(&job.env);
    for (name, value) in [
        ("LINES", "24"),
        ("smbios.bios.vendor", "BHYVE"),
        ("boot_serial", "1"),
        ("console", "userboot"),
        ("interpret", "OK"),
        ("prompt", "${interpret}"),
    ] {
        env.set(name, value);
    }
    env.force("currdev", device);
    env.force("loaddev", device);
    env
}

fn outcome(job: &Job, protocol: Protocol, device: &str, outcome: Outcome) -> (Filling, Loaded) {
    let mut loaded = Loaded {
        vm: job.name.clone(),
        kernel: String::new(),
        protocol,
        summary: String::new(),
        entry: outcome.registers.rip,
        segments: Vec::new(),
        initrd: None,
        modules: Vec::new(),
        cmdline: None,
        memory: job.memory.layout,
    };
    let mut copies = Vec::new();
    let mut symbols = None;
    for (index, file) in outcome.files.into_iter().enumerate() {
        let records = file.records;
        if index == 0 {
            symbols = records.symbols();
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
            protocol: protocol.to_string(),
            cmdline: None,
            symbols,
        },
    };
    (filling, loaded)
}
