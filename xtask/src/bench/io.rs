//! Disks side by side, in the nested lane: the same kernel, root and data disk, fio in the guest, one
//! vCPU, KVM for both. Networks are measured on the same [`Stage`], by [`super::net`].
//!
//! Both guests stay up, with fio at work in both, and go by short turns, while the other stands still: what
//! else the machine does for a while meets both alike. The guests' kernels count what is done.

use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

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

/// Into how many turns a second of a guest's is divided.
const TURNS_PER_SECOND: u32 = 2;
/// How long fio may take until it begins.
const PATIENCE: Duration = Duration::from_secs(60);
/// What of each job is not counted.
const OMITTED: Duration = Duration::from_millis(500);

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
    /// Seconds that each row is measured in a round, for each guest
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
        // fio as a file of options. It works until it is told to end.
        let mut file = format!(
            "[global]\\nfilename=/dev/vdb\\ndirect=1\\nioengine=libaio\\nthread=1\\ntime_based=1\\n\
             runtime=86400\\nsize={DATA}\\nnorandommap=1\\n"
        );
        for (number, (_, _, options)) in JOBS.iter().enumerate() {
            let options = options.replace(' ', "\\n");
            write!(file, "[j{number}]\\n{options}\\n")?;
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
        for (job, (_, unit, _)) in JOBS.iter().enumerate() {
            let mut guests = [&mut rhyve, &mut qemu];
            let values = by_turns(&mut guests, job, *unit, parts.seconds)?;
            for (samples, value) in samples.iter_mut().zip(values) {
                if let Some(place) = samples.get_mut(job) {
                    place.push(value);
                }
            }
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

/// Has both guests do this job by turns, each for so many seconds; what counts of it, of each.
fn by_turns(
    guests: &mut [&mut Monitor; 2],
    job: usize,
    unit: Unit,
    seconds: u32,
) -> Result<[f64; 2], Box<dyn Error>> {
    let mut begun = [Done::default(); 2];
    for (guest, begun) in guests.iter_mut().zip(&mut begun) {
        guest.stand_still(false)?;
        *begun = begin(guest, job)?;
        guest.stand_still(true)?;
    }
    for _ in 0..seconds * TURNS_PER_SECOND {
        for guest in guests.iter_mut() {
            guest.stand_still(false)?;
            sleep(Duration::from_secs(1) / TURNS_PER_SECOND);
            guest.stand_still(true)?;
        }
    }
    let mut values = [0.0; 2];
    for ((guest, begun), value) in guests.iter_mut().zip(begun).zip(&mut values) {
        guest.stand_still(false)?;
        *value = Done::so_far(guest)?.since(begun, unit);
        if *value == 0.0 {
            return Err(format!("fio's job {job} did nothing").into());
        }
        // A loop that looks for it would leave fio little of the guest's one processor to end in.
        guest.ask("kill $!; wait; echo e''nd", "end\r\n")?;
        guest.stand_still(true)?;
    }
    Ok(values)
}

/// Starts a job; what was done when it had found its ways.
fn begin(guest: &mut Monitor, job: usize) -> Result<Done, Box<dyn Error>> {
    let idle = Done::so_far(guest)?;
    let fio = format!("fio --section=j{job} /tmp/jobs >/tmp/said 2>&1 & echo be''gins");
    guest.ask(&fio, "begins\r\n")?;
    let deadline = Instant::now() + PATIENCE;
    while Done::so_far(guest)?.requests == idle.requests {
        if Instant::now() >= deadline {
            let said = guest.ask("cat /tmp/said; echo e''nd", "end\r\n")?;
            return Err(format!("fio does nothing: {said:?}").into());
        }
    }
    sleep(OMITTED);
    Done::so_far(guest)
}

/// What a guest's disk has done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Done {
    requests: f64,
    bytes: f64,
    /// How long the guest had gone by then.
    ran: Duration,
}

impl Done {
    fn so_far(guest: &mut Monitor) -> Result<Self, Box<dyn Error>> {
        let text = guest.ask("cat /sys/block/vdb/stat; echo e''nd", "end\r\n")?;
        let done = Self::parse(&text, guest.ran());
        Ok(done.ok_or_else(|| format!("the disk's statistics are {text:?}"))?)
    }

    /// Linux's Documentation/block/stat.rst: requests, merges, sectors of 512 bytes and ticks of reads;
    /// then the same of writes.
    fn parse(text: &str, ran: Duration) -> Option<Self> {
        text.lines().find_map(|line| {
            let words = line.split_whitespace().map(|word| word.parse().ok());
            let numbers: Vec<f64> = words.collect::<Option<_>>()?;
            let [reads, _, read, _, writes, _, written, ..] = numbers[..] else {
                return None;
            };
            Some(Self {
                requests: reads + writes,
                bytes: (read + written) * 512.0,
                ran,
            })
        })
    }

    /// What counts, a second.
    fn since(self, begun: Self, unit: Unit) -> f64 {
        let done = match unit {
            Unit::Rate => (self.bytes - begun.bytes) / f64::from(1 << 20),
            Unit::Requests => self.requests - begun.requests,
        };
        done / (self.ran - begun.ran).as_secs_f64()
    }
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
                rhyve.ratio(qemu)
            );
        }
        text += &format!(
            "  exits to rhyve, 1000 requests {:9.2}\n",
            self.exits_per_thousand
        );
        text + "\n  columns: rhyve's median, least, most | QEMU's; unit; median of the rounds' ratios\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disks_statistics_are_read() {
        let text = "cat /sys/block/vdb/stat; echo e''nd\r\n     100        2     3200       10       20  \
                    0      800        5        0       12       15        0        0        0        0  \
                    3        1\r\nend\r\n";
        let begun = Done {
            requests: 20.0,
            bytes: 0.0,
            ran: Duration::from_secs(1),
        };
        let done = Done::parse(text, Duration::from_secs(3)).unwrap();
        assert_eq!((done.requests, done.bytes), (120.0, 4000.0 * 512.0));
        assert_eq!(done.since(begun, Unit::Requests), 50.0);
        assert_eq!(done.since(begun, Unit::Rate), 4000.0 / 2048.0 / 2.0);
        assert_eq!(
            Done::parse("cat: no such file\r\nend\r\n", Duration::ZERO),
            None
        );
    }
}
