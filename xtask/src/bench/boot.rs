//! Boots side by side, in the nested lane: the same kernel, initramfs, command line and memory, one
//! vCPU, KVM for all.

use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::copy::{self, Copy};
use super::process::{Mapping, Monitor, time};
use super::sample::Sample;

/// The guest's memory.
pub const MEMORY_MIB: u32 = 256;
/// The guest's command line.
pub const CMDLINE: &str = "console=ttyS0 quiet";

/// What is written anew before each boot: more than a monitor and its guest use.
const SCRUB_MIB: u32 = 1024;

/// The init's first line.
const UP: &str = "rhyve-init: up";
/// The init's last: its shell waits for a command.
const PROMPT: &str = "# ";

/// What a boot needs and no more: no graphics, no network, no disks.
const BARE: [&str; 4] = ["-nodefaults", "-no-user-config", "-display", "none"];

/// What is booted, and with what.
#[derive(Clone, Debug, Args)]
pub struct Parts {
    #[arg(long)]
    runs: u32,
    /// Directory of rhyveload and rhyve
    #[arg(long)]
    programs: PathBuf,
    #[arg(long)]
    kernel: PathBuf,
    #[arg(long)]
    initrd: PathBuf,
    #[arg(long)]
    qemu: PathBuf,
}

/// What was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Boots {
    pub rhyve: Boot,
    pub qemu_pc: Boot,
    /// Without the devices that QEMU adds unasked.
    pub qemu_pc_bare: Boot,
    pub qemu_microvm: Boot,
    /// rhyveload's part of rhyve's boots.
    pub load_seconds: Sample,
    pub copy: Copy,
}

/// One monitor's boots.
#[derive(Debug, Serialize, Deserialize)]
pub struct Boot {
    /// Wall time from the exec of the first command to the init's first line.
    pub seconds: Sample,
    /// Resident memory that is not guest RAM, while the guest idles in its init.
    pub resident_mib: Sample,
}

/// Boots by turns, so that what disturbs the machine for a while disturbs all.
pub fn measure(parts: &Parts) -> Result<Boots, Box<dyn Error>> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let stage = Stage::new(parts, dir.path())?;
    let mut rhyve = Vec::new();
    let (mut pc, mut bare, mut microvm) = (Vec::new(), Vec::new(), Vec::new());
    let mut loads = Vec::new();
    // The first round brings the programs into memory and is not counted.
    for round in 0..=parts.runs {
        let (load, booted) = stage.rhyve()?;
        loads.push(load.as_secs_f64());
        rhyve.push(booted);
        pc.push(stage.qemu("pc", &["-nographic", "-monitor", "none"])?);
        bare.push(stage.qemu("pc", &BARE)?);
        // Without a clock, which is microvm's default, the kernel waits 4 s for one.
        microvm.push(stage.qemu("microvm,rtc=on", &BARE)?);
        let seconds = [&rhyve, &pc, &bare, &microvm];
        let seconds = seconds.map(|boots| boots.last().map_or(0.0, |boot| boot.0));
        eprintln!(
            "round {round} of {}: rhyve {:.2} s, QEMU pc {:.2} s, bare {:.2} s, microvm {:.2} s",
            parts.runs, seconds[0], seconds[1], seconds[2], seconds[3]
        );
    }
    let boot = |runs: Vec<(f64, f64)>| {
        let (seconds, resident): (Vec<_>, Vec<_>) = runs.into_iter().skip(1).unzip();
        Boot {
            seconds: seconds.into(),
            resident_mib: resident.into(),
        }
    };
    Ok(Boots {
        rhyve: boot(rhyve),
        qemu_pc: boot(pc),
        qemu_pc_bare: boot(bare),
        qemu_microvm: boot(microvm),
        load_seconds: loads.split_off(1).into(),
        copy: copy::measure(&parts.programs, &stage.kernel, dir.path(), parts.runs)?,
    })
}

/// The files, on tmpfs.
struct Stage<'a> {
    parts: &'a Parts,
    kernel: PathBuf,
    initrd: PathBuf,
    root: PathBuf,
}

impl<'a> Stage<'a> {
    fn new(parts: &'a Parts, dir: &Path) -> Result<Self, Box<dyn Error>> {
        let stage = Self {
            parts,
            kernel: dir.join("vmlinux"),
            initrd: dir.join("initramfs.cpio"),
            root: dir.join("vms"),
        };
        fs::copy(&parts.kernel, &stage.kernel)?;
        fs::copy(&parts.initrd, &stage.initrd)?;
        Ok(stage)
    }

    /// rhyveload, then rhyve: time of the first, then what counts.
    fn rhyve(&self) -> Result<(Duration, (f64, f64)), Box<dyn Error>> {
        let program = |name: &str| {
            let mut command = Command::new(self.parts.programs.join(name));
            command.env("RHYVE_ROOT", &self.root);
            command
        };
        let mut load = program("rhyveload");
        load.args(["-m", &format!("{MEMORY_MIB}M"), "--cmdline", CMDLINE]);
        load.arg("--kernel").arg(&self.kernel);
        load.arg("--initrd").arg(&self.initrd).arg("bench");
        let mut run = program("rhyve");
        run.args(["-c", "1", "-l", "com1,stdio", "bench"]);

        self.scrub()?;
        let start = Instant::now();
        let loaded = time(&mut load)?;
        let booted = self.boot(start, run, |mapping| {
            mapping.path.starts_with(&*self.root.to_string_lossy())
        })?;
        fs::remove_dir_all(&self.root)?;
        Ok((loaded, booted))
    }

    /// QEMU with its serial port on standard output.
    fn qemu(&self, machine: &str, devices: &[&str]) -> Result<(f64, f64), Box<dyn Error>> {
        let mut run = Command::new(&self.parts.qemu);
        run.args(["-machine", machine, "-accel", "kvm", "-cpu", "host"]);
        run.args(["-smp", "1", "-m", &format!("{MEMORY_MIB}M")]);
        run.args(devices);
        run.args(["-serial", "stdio", "-append", CMDLINE]);
        run.arg("-kernel").arg(&self.kernel);
        run.arg("-initrd").arg(&self.initrd);
        self.scrub()?;
        self.boot(Instant::now(), run, |mapping| {
            mapping.path.is_empty() && mapping.size_kib >= MEMORY_MIB * 1024
        })
    }

    /// Writes memory that the next boot is going to get, so that all find it alike. The lane's software
    /// processor keeps what it has translated of the last guest's code until that memory is written
    /// again, which is then many times slower, and would be counted to whoever comes next.
    fn scrub(&self) -> Result<(), Box<dyn Error>> {
        let path = self.root.with_file_name("scrub");
        let mut file = fs::File::create(&path)?;
        let piece = vec![0; 1 << 20];
        for _ in 0..SCRUB_MIB {
            file.write_all(&piece)?;
        }
        Ok(fs::remove_file(&path)?)
    }

    fn boot(
        &self,
        start: Instant,
        run: Command,
        is_ram: impl Fn(&Mapping<'_>) -> bool,
    ) -> Result<(f64, f64), Box<dyn Error>> {
        let mut monitor = Monitor::start(run)?;
        monitor.expect(UP)?;
        let seconds = start.elapsed().as_secs_f64();
        monitor.expect(PROMPT)?;
        thread::sleep(Duration::from_millis(500));
        Ok((seconds, monitor.resident_mib(is_ram)?))
    }
}
