//! Disks side by side, in the nested lane: the same kernel, root and data disk, fio in the guest, one
//! vCPU, KVM for both. Networks are measured on the same [`Stage`], by [`super::net`].
//!
//! Both guests stay up and measure by turns, while the other stands still: what disturbs the machine for a
//! while disturbs both.

use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::process::{Mapping, Monitor, time};
use super::sample::Sample;

/// A guest's memory.
pub const MEMORY_MIB: u32 = 512;
/// Bytes of the disk that is measured.
const DATA: u64 = 256 << 20;

/// What fio does: a name for the table, what of it counts, and its options.
const JOBS: [(&str, Unit, &str); 7] = [
    (
        "sequential read, 128 KiB",
        Unit::Rate,
        "rw=read bs=128k iodepth=8",
    ),
    (
        "sequential write, 128 KiB",
        Unit::Rate,
        "rw=write bs=128k iodepth=8",
    ),
    (
        "random read, 4 KiB, depth 1",
        Unit::Requests,
        "rw=randread bs=4k iodepth=1",
    ),
    (
        "random read, 4 KiB, depth 32",
        Unit::Requests,
        "rw=randread bs=4k iodepth=32",
    ),
    (
        "random write, 4 KiB, depth 1",
        Unit::Requests,
        "rw=randwrite bs=4k iodepth=1",
    ),
    (
        "random write, 4 KiB, depth 32",
        Unit::Requests,
        "rw=randwrite bs=4k iodepth=32",
    ),
    (
        "write and fsync, 4 KiB",
        Unit::Requests,
        "rw=write bs=4k iodepth=1 fsync=1",
    ),
];

#[derive(Clone, Copy)]
enum Unit {
    /// MiB a second.
    Rate,
    /// Requests a second.
    Requests,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Unit::Rate => "MiB/s",
            Unit::Requests => "1/s",
        }
    }
}

/// What is booted, and with what.
#[derive(Clone, Debug, Args)]
pub struct Parts {
    #[arg(long)]
    pub runs: u32,
    /// Seconds of each fio job, and of each of iperf3
    #[arg(long)]
    pub seconds: u32,
    /// Directory of rhyveload, rhyve and vmmctl
    #[arg(long)]
    programs: PathBuf,
    #[arg(long)]
    kernel: PathBuf,
    #[arg(long)]
    initrd: PathBuf,
    #[arg(long)]
    disk: PathBuf,
    #[arg(long)]
    qemu: PathBuf,
    #[arg(long)]
    pub iperf3: PathBuf,
    #[arg(long, value_enum)]
    pub device: Device,
}

/// Processors of the lane. With two of them a guest under load dies of a triple fault within a minute or
/// two, QEMU's as well as rhyve's: see docs/testing.md.
pub const CPUS: u32 = 1;

/// What is measured in one lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Device {
    Disks,
    Net,
}

impl Device {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Device::Disks => "disks",
            Device::Net => "net",
        }
    }
}

/// What was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Disks {
    /// One a job, in the order of the table.
    rhyve: Vec<Sample>,
    qemu: Vec<Sample>,
    /// Exits of the vCPU to user space for a thousand requests, in steady state at depth 32.
    exits_per_thousand: f64,
}

/// Boots both and measures.
pub fn measure(parts: &Parts) -> Result<Disks, Box<dyn Error>> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let stage = Stage {
        parts,
        dir: dir.path(),
    };
    let [slots, drives] = ["rhyve", "qemu"].map(|name| dir.path().join(format!("{name}-data")));
    for path in [&slots, &drives] {
        fs::File::create(path)?.set_len(DATA)?;
    }
    let slot = format!("3,virtio-blk,{},virtio=modern", slots.display());
    let mut rhyve = stage.rhyve("ip=off", &slot)?;
    let mut qemu = stage.qemu("ip=off", "qemu", &Stage::drive(1, &drives))?;
    for guest in [&mut rhyve, &mut qemu] {
        guest.ask("echo there", "there\r\n")?;
        // fio as a file of options; what is printed is short, for a console is slow.
        let mut file = format!(
            "[global]\\nfilename=/dev/vdb\\ndirect=1\\nioengine=libaio\\nthread=1\\ntime_based=1\\n\
             runtime={}\\nramp_time=1\\nsize={DATA}\\nnorandommap=1\\n",
            parts.seconds
        );
        for (number, (_, _, options)) in JOBS.iter().enumerate() {
            let options = options.replace(' ', "\\n");
            write!(file, "[j{number}]\\nstonewall\\n{options}\\n")?;
        }
        guest.ask(
            &format!("printf '{file}' >/tmp/jobs; echo ma''de"),
            "made\r\n",
        )?;
        // All of it is there, so that neither pays for holes.
        guest.ask(
            "dd if=/dev/zero of=/dev/vdb bs=1M 2>/dev/null; echo fi''lled",
            "filled\r\n",
        )?;
        guest.stand_still(true)?;
    }
    let mut samples = [vec![Vec::new(); JOBS.len()], vec![Vec::new(); JOBS.len()]];
    for round in 1..=parts.runs {
        for (guest, samples) in [&mut rhyve, &mut qemu].into_iter().zip(&mut samples) {
            guest.stand_still(false)?;
            for (place, value) in samples.iter_mut().zip(fio(guest)?) {
                place.push(value);
            }
            guest.stand_still(true)?;
        }
        eprintln!("round {round} of {} is done", parts.runs);
    }
    rhyve.stand_still(false)?;
    let exits_per_thousand = stage.exits(&mut rhyve)?;
    let [rhyve, qemu] = samples.map(|all| all.into_iter().map(Sample::from).collect());
    Ok(Disks {
        rhyve,
        qemu,
        exits_per_thousand,
    })
}

/// Runs all jobs; what counts of each.
fn fio(guest: &mut Monitor) -> Result<Vec<f64>, Box<dyn Error>> {
    // Terse version 3: name, then rates in KiB/s and requests of reads and of writes (fio(1)).
    let command = "fio --minimal /tmp/jobs | awk -F';' '{print \"got\",$7,$8,$48,$49}'; echo e''nd";
    let text = guest.ask(command, "end\r\n")?;
    let lines = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("got "));
    let values: Vec<f64> = lines
        .zip(JOBS)
        .filter_map(|(line, (_, unit, _))| {
            let fields: Option<Vec<f64>> = line.split(' ').map(|f| f.parse().ok()).collect();
            let [read, reads, write, writes] = fields?[..] else {
                return None;
            };
            Some(match unit {
                Unit::Rate => (read + write) / 1024.0,
                Unit::Requests => reads + writes,
            })
        })
        .collect();
    if values.len() != JOBS.len() || values.contains(&0.0) {
        return Err(format!("fio says {text:?}").into());
    }
    Ok(values)
}

/// Where guests are booted that differ in little.
pub struct Stage<'a> {
    pub parts: &'a Parts,
    /// On tmpfs.
    pub dir: &'a Path,
}

impl Stage<'_> {
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.parts.programs.join(name));
        command.env("RHYVE_ROOT", self.dir.join("vms"));
        command
    }

    fn cmdline(more: &str) -> String {
        format!("console=ttyS0 quiet root=/dev/vda {more}")
    }

    /// A root disk of a guest's own.
    fn root(&self, name: &str) -> Result<PathBuf, Box<dyn Error>> {
        let root = self.dir.join(format!("{name}-root"));
        let mut cp = Command::new("cp");
        time(cp.arg("--sparse=always").arg(&self.parts.disk).arg(&root))?;
        Ok(root)
    }

    /// A guest of rhyve's with one more device than its root.
    pub fn rhyve(&self, cmdline: &str, slot: &str) -> Result<Monitor, Box<dyn Error>> {
        let root = self.root("rhyve")?;
        let mut load = self.program("rhyveload");
        load.args(["-m", &format!("{MEMORY_MIB}M")]);
        load.arg("--cmdline").arg(Self::cmdline(cmdline));
        load.arg("--kernel").arg(&self.parts.kernel);
        load.arg("--initrd").arg(&self.parts.initrd).arg("bench");
        time(&mut load)?;
        let mut run = self.program("rhyve");
        let disk = format!("2,virtio-blk,{},virtio=modern", root.display());
        run.args(["-s", &disk, "-s", slot]);
        run.args(["-l", "com1,stdio", "bench"]);
        log_in(run)
    }

    /// One of QEMU's, with `more` options for one more device. `name` is for its files.
    pub fn qemu(
        &self,
        cmdline: &str,
        name: &str,
        more: &[String],
    ) -> Result<Monitor, Box<dyn Error>> {
        let root = self.root(name)?;
        let mut run = Command::new(&self.parts.qemu);
        run.args(["-machine", "q35", "-accel", "kvm", "-cpu", "host"]);
        run.args(["-smp", "1", "-m", &format!("{MEMORY_MIB}M")]);
        run.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        run.args(["-serial", "stdio", "-append", &Self::cmdline(cmdline)]);
        run.arg("-kernel").arg(&self.parts.kernel);
        run.arg("-initrd").arg(&self.parts.initrd);
        run.args(Self::drive(0, &root)).args(more);
        log_in(run)
    }

    /// QEMU's best disk: its own thread for each, io_uring, kicks by an access to a port, no legacy registers.
    fn drive(number: u32, path: &Path) -> [String; 6] {
        let drive = format!(
            "file={},if=none,id=d{number},format=raw,cache=writeback,aio=io_uring",
            path.display()
        );
        let device = format!(
            "virtio-blk-pci,drive=d{number},iothread=t{number},disable-legacy=on,modern-pio-notify=on"
        );
        let thread = format!("iothread,id=t{number}");
        [
            "-object".to_owned(),
            thread,
            "-drive".to_owned(),
            drive,
            "-device".to_owned(),
            device,
        ]
    }

    /// Exits to user space for a thousand requests while nothing but the disk is at work.
    fn exits(&self, guest: &mut Monitor) -> Result<f64, Box<dyn Error>> {
        guest.send(
            "fio --name=x --filename=/dev/vdb --direct=1 --ioengine=libaio --thread --time_based \
             --runtime=8 --size=64m --rw=randread --bs=4k --iodepth=32 >/dev/null; echo e''nd",
        )?;
        sleep(Duration::from_secs(4));
        let before = self.counts()?;
        sleep(Duration::from_secs(2));
        let after = self.counts()?;
        guest.expect("end\r\n")?;
        let requests = after.1 - before.1;
        if requests < 100.0 {
            return Err(format!("only {requests} requests in two seconds").into());
        }
        Ok((after.0 - before.0) * 1000.0 / requests)
    }

    /// Exits of the vCPU to user space, and requests that its devices have answered.
    pub fn counts(&self) -> Result<(f64, f64), Box<dyn Error>> {
        let look = |option: &[&str]| -> Result<String, Box<dyn Error>> {
            let mut vmmctl = self.program("vmmctl");
            let output = vmmctl
                .arg("--vm=bench")
                .args(option)
                .stderr(Stdio::inherit())
                .output()?;
            Ok(String::from_utf8(output.stdout)?)
        };
        let last = |line: &str| line.rsplit('\t').next().and_then(|n| n.parse::<f64>().ok());
        let stats = look(&["--cpu=0", "--get-stats"])?;
        let exits = stats
            .lines()
            .filter(|line| line.starts_with("exits to rhyve:"));
        let devices = look(&["--get-devices"])?;
        let requests = devices.lines().filter_map(|line| {
            let (before, _) = line.split_once(" requests, ")?;
            before.rsplit(' ').next()?.parse::<f64>().ok()
        });
        Ok((exits.filter_map(last).sum(), requests.sum()))
    }
}

/// Resident memory of rhyve that is not its guest's.
pub fn rhyve_mib(rhyve: &Monitor) -> Result<f64, Box<dyn Error>> {
    rhyve.resident_mib(|mapping| mapping.path.ends_with("/mem"))
}

/// The same of QEMU.
pub fn qemu_mib(qemu: &Monitor) -> Result<f64, Box<dyn Error>> {
    qemu.resident_mib(|mapping: &Mapping<'_>| {
        mapping.path.is_empty() && mapping.size_kib >= MEMORY_MIB * 1024
    })
}

fn log_in(run: Command) -> Result<Monitor, Box<dyn Error>> {
    let mut guest = Monitor::start(run)?;
    guest.expect("login: ")?;
    guest.send("root")?;
    guest.expect("Password: ")?;
    guest.send("rhyve")?;
    guest.expect("# ")?;
    Ok(guest)
}

impl Disks {
    /// The table that is printed.
    pub fn table(&self) -> String {
        let mut text = format!(
            "\nnested lane: {MEMORY_MIB} MiB, one vCPU, a raw disk of {} MiB on tmpfs, fio with libaio \
             and O_DIRECT in the guest\n",
            DATA >> 20
        );
        let rows = JOBS.iter().zip(self.rhyve.iter().zip(&self.qemu));
        for ((name, unit, _), (rhyve, qemu)) in rows {
            let show = |sample: &Sample| {
                format!("{:9.0}{:9.0}{:9.0}", sample.median, sample.min, sample.max)
            };
            text += &format!(
                "  {name:<30}{} |{} {:<6}{:7.2}\n",
                show(rhyve),
                show(qemu),
                unit.name(),
                rhyve.median / qemu.median
            );
        }
        text += &format!(
            "  exits to rhyve, 1000 requests {:9.2}\n",
            self.exits_per_thousand
        );
        text + "\n  columns: rhyve's median, least, most | QEMU's; unit; ratio of the medians\n"
    }
}
