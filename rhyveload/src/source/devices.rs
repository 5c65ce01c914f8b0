//! All that a loader can read from, under the names that FreeBSD's loader has for it: `disk0p2:`,
//! `host0:`.
//!
//! A path may begin with a device's name (`disk1:/boot`); without one it is on the current device.

use std::fmt::Write;
use std::path::Path;

use super::disk::{Disk, Mounted};
use super::{BootFs, DirEntry, FileKind, FsError, Source, Stat};

/// A name of a device with its file system.
#[derive(Debug)]
pub struct Device {
    /// `disk0p2:`.
    pub name: String,
    /// What it is: `UFS2`, `directory`.
    pub kind: &'static str,
    fs: Box<dyn BootFs>,
}

/// The devices, one of which is current.
#[derive(Debug, Default)]
pub struct Devices {
    devices: Vec<Device>,
    current: usize,
    /// For lsdev, a line a disk or partition.
    lines: Vec<String>,
}

impl Devices {
    /// Adds a disk's file systems. False if it has none.
    pub fn add_disk(&mut self, disk: Disk) -> bool {
        let name = disk.volumes.last().map_or("", |whole| &whole.name);
        let (path, size) = (disk.path.display(), mib(disk.size));
        self.lines
            .push(format!("    {name}   {path} ({}, {size})", disk.format));
        let before = self.devices.len();
        for volume in disk.volumes {
            let kind = volume.fs.as_ref().map_or("-", |fs| fs.kind);
            self.lines
                .push(format!("      {} {kind} {}", volume.name, mib(volume.size)));
            if let Some(Mounted { kind, fs }) = volume.fs {
                self.add(volume.name, kind, fs);
            }
        }
        self.devices.len() > before
    }

    /// Adds a directory of the host.
    pub fn add_directory(&mut self, path: &Path, fs: Box<dyn BootFs>) {
        self.lines.push(format!("    host0:   {}", path.display()));
        self.add("host0:".to_owned(), "directory", fs);
    }

    /// Adds a file system.
    pub fn add(&mut self, name: String, kind: &'static str, fs: Box<dyn BootFs>) {
        self.devices.push(Device { name, kind, fs });
    }

    /// Whether there is nothing at all.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// Makes the first device with a `/boot` the current one, or else the first.
    pub fn choose(&mut self) {
        let has_boot = |device: &Device| {
            let stat = device.fs.stat("/boot");
            stat.is_ok_and(|stat| stat.kind == FileKind::Directory)
        };
        self.current = self.devices.iter().position(has_boot).unwrap_or(0);
    }

    /// Makes a device the current one, by its name with or without the colon. False if there is none.
    pub fn select(&mut self, name: &str) -> bool {
        let index = self.index(name.trim_end_matches(['/', ':']));
        self.current = index.unwrap_or(self.current);
        index.is_some()
    }

    /// The current device's name.
    pub fn current(&self) -> &str {
        self.devices
            .get(self.current)
            .map_or("", |device| &device.name)
    }

    /// What lsdev says.
    pub fn list(&self) -> String {
        let mut text = String::new();
        for line in &self.lines {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{line}");
        }
        text
    }

    fn index(&self, name: &str) -> Option<usize> {
        let matches = |device: &Device| device.name.trim_end_matches(':') == name;
        self.devices.iter().position(matches)
    }

    /// The device that a path is on, and the path there.
    fn split<'p>(&self, path: &'p str) -> Result<(&dyn BootFs, &'p str), FsError> {
        let (index, path) = match path.split_once(':') {
            Some((name, rest)) if !name.contains('/') => (self.index(name), rest),
            _ => (Some(self.current), path),
        };
        let device = index.and_then(|index| self.devices.get(index));
        let device = device.ok_or(FsError::NotFound)?;
        Ok((&*device.fs, path))
    }
}

/// A length, in MiB or KiB.
fn mib(bytes: u64) -> String {
    match bytes >> 20 {
        0 => format!("{} KiB", bytes >> 10),
        mib => format!("{mib} MiB"),
    }
}

impl BootFs for Devices {
    fn open(&self, path: &str) -> Result<Box<dyn Source>, FsError> {
        let (fs, path) = self.split(path)?;
        fs.open(path)
    }

    fn read_dir(&self, path: &str) -> Result<Vec<DirEntry>, FsError> {
        let (fs, path) = self.split(path)?;
        fs.read_dir(path)
    }

    fn stat(&self, path: &str) -> Result<Stat, FsError> {
        let (fs, path) = self.split(path)?;
        fs.stat(path)
    }
}
