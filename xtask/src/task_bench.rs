//! `cargo xtask bench`: measurements that are printed, not tests that pass or fail.
//!
//! `bench boot` builds what is needed, has one nested run measure boots side by side, measures start
//! and inspection on this machine's own KVM, and prints both. The parts that run in a lane are in
//! [`crate::bench`]; in the nested one it is this program that runs them, under a hidden verb.

use std::env;
use std::error::Error;
use std::process::{Command, ExitCode, Stdio};

use clap::{Args, Subcommand};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::bench::boot::{self, Boots, Parts};
use crate::bench::control;
use crate::bench::host::{self, Host};
use crate::bench::io::{self, Device, Disks};
use crate::bench::load;
use crate::bench::net::{self, Networks};
use crate::bench::sample::Sample;
use crate::{TaskResult, project, task_guest_image};

/// Measure, and print what was measured
#[derive(Debug, Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Boot(Boot),
    Load(Load),
    Control(Control),
    Io(Io),
    /// What the nested lane runs
    #[command(hide = true)]
    InLane(Parts),
    /// The same for disks and networks
    #[command(hide = true)]
    IoInLane(io::Parts),
}

/// Boot Debian's kernel under rhyve and under QEMU, and see what each takes
#[derive(Debug, Args)]
struct Boot {
    /// Measured boots of each monitor, after one that is not counted
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Load a FreeBSD kernel of 20 MB and 20 modules, from a directory and from a disk image
#[derive(Debug, Args)]
struct Load {
    /// Measured loads of each kind, after one that is not counted
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Look into a running machine, suspend it and run it again
#[derive(Debug, Args)]
struct Control {
    /// How often it is suspended, after once that is not counted
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Have fio work on a disk, and iperf3 on a network, under rhyve and under QEMU
#[derive(Debug, Args)]
struct Io {
    /// Only one of them
    #[arg(long, value_enum, value_name = "WHAT")]
    only: Option<Device>,
    /// Measurements of each kind
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// One second for each of fio's and iperf3's jobs instead of three
    #[arg(long)]
    quick: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What was measured of devices.
#[derive(Debug, Default, Serialize)]
struct Devices {
    disks: Option<Disks>,
    networks: Option<Networks>,
}

/// Everything that was measured.
#[derive(Debug, Serialize)]
struct Report {
    machine: host::Machine,
    nested: Boots,
    host: Host,
}

impl Bench {
    pub fn run(self) -> TaskResult {
        match self.what {
            What::Boot(boot) => boot.run(),
            What::Load(load) => load.run(),
            What::Control(control) => control.run(),
            What::Io(io) => io.run(),
            What::IoInLane(parts) => {
                let measured = match parts.device {
                    Device::Disks => serde_json::to_string(&io::measure(&parts)?),
                    Device::Net => serde_json::to_string(&net::measure(&parts)?),
                };
                println!("{}", measured?);
                Ok(ExitCode::SUCCESS)
            }
            What::InLane(parts) => {
                let boots = boot::measure(&parts)?;
                println!("{}", serde_json::to_string(&boots)?);
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

impl Boot {
    fn run(self) -> TaskResult {
        let programs = project::build(&["rhyveload", "rhyve", "vmmctl"], true)?;
        let probe = task_guest_image::make("probe")?;
        let linux = task_guest_image::make("linux")?;
        let lane = task_guest_image::make("lane")?;

        // First, while nothing else runs.
        let host = host::measure(&programs, probe.path("kernel")?, linux.path("kernel")?)?;

        let xtask = env::current_exe()?;
        let mut nested = Command::new(&xtask);
        nested.args(["nested", "--timeout", &(300 + 120 * self.runs).to_string()]);
        nested.arg("--").arg(&xtask).args(["bench", "in-lane"]);
        nested.args(["--runs", &self.runs.to_string()]);
        nested.arg("--programs").arg(&programs);
        nested.arg("--kernel").arg(linux.path("kernel")?);
        nested.arg("--initrd").arg(linux.path("initrd")?);
        nested.arg("--qemu").arg(lane.path("qemu")?);
        let report = Report {
            machine: host::Machine::this(),
            nested: measured(nested)?,
            host,
        };
        show(&report, self.json, || report.table())
    }
}

impl Load {
    fn run(self) -> TaskResult {
        let programs = project::build(&["rhyveload"], true)?;
        let tools = task_guest_image::make("tools")?;
        let loads = load::measure(&programs, tools.path("makefs")?, self.runs)?;
        show(&loads, self.json, || {
            format!("{}\n{}", host::Machine::this(), loads.table())
        })
    }
}

impl Control {
    fn run(self) -> TaskResult {
        let programs = project::build(&["rhyveload", "rhyve", "vmmctl"], true)?;
        let probe = task_guest_image::make("probe")?;
        let control = control::measure(&programs, probe.path("kernel")?, self.runs)?;
        show(&control, self.json, || {
            format!("{}\n{}", host::Machine::this(), control.table())
        })
    }
}

impl Io {
    fn run(self) -> TaskResult {
        let programs = project::build(&["rhyveload", "rhyve", "vmmctl"], true)?;
        let linux = task_guest_image::make_linux_disk()?;
        let lane = task_guest_image::make("lane")?;
        let seconds = if self.quick { 1 } else { 3 };
        let xtask = env::current_exe()?;
        let nested = |device: Device| -> Result<Command, Box<dyn Error>> {
            let mut nested = Command::new(&xtask);
            // Several times what it takes on a machine with nothing else to do.
            let timeout = 1200 + self.runs * 100 * (seconds + 2);
            nested.args(["nested", "--mem", "6G", "--timeout", &timeout.to_string()]);
            nested.args(["--cpus", &io::CPUS.to_string()]);
            nested.arg("--").arg(&xtask).args(["bench", "io-in-lane"]);
            nested.args(["--device", device.name()]);
            nested.args(["--runs", &self.runs.to_string()]);
            nested.args(["--seconds", &seconds.to_string()]);
            nested.arg("--programs").arg(&programs);
            nested.arg("--kernel").arg(linux.path("kernel")?);
            nested.arg("--initrd").arg(linux.path("initrd")?);
            nested.arg("--disk").arg(linux.path("disk")?);
            nested.arg("--qemu").arg(lane.path("qemu")?);
            nested.arg("--iperf3").arg(linux.path("iperf3")?);
            Ok(nested)
        };
        let mut devices = Devices::default();
        if self.only != Some(Device::Net) {
            devices.disks = Some(measured(nested(Device::Disks)?)?);
        }
        if self.only != Some(Device::Disks) {
            devices.networks = Some(measured(nested(Device::Net)?)?);
        }
        show(&devices, self.json, || {
            let disks = devices.disks.as_ref().map(Disks::table);
            let networks = devices.networks.as_ref().map(Networks::table);
            let tables = disks.into_iter().chain(networks).collect::<String>();
            format!("{}\n{tables}", host::Machine::this())
        })
    }
}

/// Prints what was measured, as JSON or as a table.
fn show(measured: &impl Serialize, json: bool, table: impl FnOnce() -> String) -> TaskResult {
    if json {
        println!("{}", serde_json::to_string_pretty(measured)?);
    } else {
        print!("{}", table());
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs what measures in the nested lane, and reads what it prints.
fn measured<T: DeserializeOwned>(mut nested: Command) -> Result<T, Box<dyn Error>> {
    let output = nested
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("the nested run ended with {}", output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

impl Report {
    fn table(&self) -> String {
        let mut text = format!("{}\n", self.machine);
        text += &format!(
            "\nnested lane: {} MiB, one vCPU, vmlinux and initramfs on tmpfs, \"{}\"\n",
            boot::MEMORY_MIB,
            boot::CMDLINE
        );
        let mut row = |name: &str, sample: &Sample, unit: &str, ratio: Option<f64>| {
            let ratio = ratio.map_or(String::new(), |ratio| format!("{ratio:8.2}"));
            let Sample {
                median, min, max, ..
            } = sample;
            let line = format!("  {name:<44}{median:9.2}{min:9.2}{max:9.2} {unit:<4}{ratio}");
            text += line.trim_end();
            text += "\n";
        };
        let boots = &self.nested;
        let pc = &boots.qemu_pc;
        for (name, boot) in [
            ("boot: rhyveload + rhyve", &boots.rhyve),
            ("boot: QEMU -M pc", pc),
            ("boot: QEMU -M pc -nodefaults", &boots.qemu_pc_bare),
            ("boot: QEMU -M microvm,rtc=on", &boots.qemu_microvm),
        ] {
            let ratio = boot.seconds.median / pc.seconds.median;
            row(name, &boot.seconds, "s", Some(ratio));
        }
        row("  of it rhyveload", &boots.load_seconds, "s", None);
        for (name, boot) in [
            ("resident beyond RAM: rhyve", &boots.rhyve),
            ("resident beyond RAM: QEMU -M pc", pc),
            (
                "resident beyond RAM: QEMU -M pc -nodefaults",
                &boots.qemu_pc_bare,
            ),
            (
                "resident beyond RAM: QEMU -M microvm,rtc=on",
                &boots.qemu_microvm,
            ),
        ] {
            let ratio = boot.resident_mib.median / pc.resident_mib.median;
            row(name, &boot.resident_mib, "MiB", Some(ratio));
        }
        let copies = [("nested", &boots.copy), ("host", &self.host.copy)];
        for (lane, copy) in copies {
            let ratio = copy.rhyveload_ms.median / copy.cp_ms.median;
            row(
                &format!("cp vmlinux ({lane})"),
                &copy.cp_ms,
                "ms",
                Some(1.0),
            );
            let name = format!("rhyveload vmlinux ({lane})");
            row(&name, &copy.rhyveload_ms, "ms", Some(ratio));
        }
        let host = &self.host;
        row(
            "rhyve: exec to first KVM_RUN (host)",
            &host.first_entry_cpu_ms,
            "ms",
            None,
        );
        row(
            "vmmctl --get-all, running VM (host)",
            &host.get_all_ms,
            "ms",
            None,
        );
        text + "\n  columns: median, least, most, unit, ratio to QEMU -M pc or to cp; \
                exec to first KVM_RUN is CPU time, all else wall time\n"
    }
}
