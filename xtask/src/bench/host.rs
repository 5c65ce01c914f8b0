//! What is measured on this machine's own KVM, with the probe guest, which runs on any.

use std::error::Error;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

use super::copy::{self, Copy};
use super::process::{Monitor, time};
use super::sample::Sample;

/// Measurements of each kind.
const RUNS: u32 = 20;

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Host {
    /// CPU time, user and system, of all threads, from rhyve's exec to its first KVM_RUN.
    pub first_entry_cpu_ms: Sample,
    /// Wall time of the process `vmmctl --get-all` for a VM that runs.
    pub get_all_ms: Sample,
    pub copy: Copy,
}

/// What it was measured on.
#[derive(Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cpus: usize,
    pub kernel: String,
    /// The processor is shared, or KVM is not the processor's own.
    pub hypervisor: bool,
}

impl Machine {
    pub fn this() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            let value = line.and_then(|line| line.split_once(": "));
            value.map_or("", |(_, value)| value)
        };
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            cpu: field("model name").to_owned(),
            cpus: cpuinfo.matches("processor\t").count(),
            kernel: kernel.trim().to_owned(),
            hypervisor: field("flags").split(' ').any(|flag| flag == "hypervisor"),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, cpus, .. } = self;
        let kind = if self.hypervisor { "virtual" } else { "bare" };
        write!(f, "{cpus} CPUs, {cpu}, {kind}, Linux {}", self.kernel)
    }
}

/// Measures with the programs in `programs`, the probe's kernel, and Linux' to be copied.
pub fn measure(programs: &Path, probe: &Path, linux: &Path) -> Result<Host, Box<dyn Error>> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let program = |name: &str| {
        let mut command = Command::new(programs.join(name));
        command.env("RHYVE_ROOT", dir.path().join("vms"));
        command
    };
    let trace = dir.path().join("trace");
    let mut first_entry = Vec::new();
    let mut get_all = Vec::new();
    for run in 0..=RUNS {
        let mut load = program("rhyveload");
        load.args(["-m", "256M", "--boot", "plain", "--kernel"]);
        time(load.arg(probe).arg("bench"))?;
        let mut rhyve = program("rhyve");
        rhyve.args(["--trace", "rhyve::start=debug", "-l", "com1,stdio", "bench"]);
        rhyve.stderr(Stdio::from(fs::File::create(&trace)?));
        let mut monitor = Monitor::start(rhyve)?;
        monitor.expect("probe> ")?;
        let ms = cpu_ms(&fs::read_to_string(&trace)?).ok_or("rhyve traced no start")?;
        let asked = time(program("vmmctl").args(["--vm=bench", "--cpu=0", "--get-all"]))?;
        if run != 0 {
            first_entry.push(ms);
            get_all.push(asked.as_secs_f64() * 1e3);
        }
    }
    let kernel = dir.path().join("vmlinux");
    fs::copy(linux, &kernel)?;
    Ok(Host {
        first_entry_cpu_ms: first_entry.into(),
        get_all_ms: get_all.into(),
        copy: copy::measure(programs, &kernel, dir.path(), RUNS)?,
    })
}

/// Reads `cpu_us=` in rhyve's trace.
fn cpu_ms(trace: &str) -> Option<f64> {
    let (_, rest) = trace.split_once("cpu_us=")?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some(digits.parse::<f64>().ok()? / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trace_is_read() {
        let line = "2026-01-01T00:00:00Z DEBUG rhyve::start: first entry cpu_us=4321\n";
        assert_eq!(cpu_ms(line), Some(4.321));
        assert_eq!(cpu_ms("nothing"), None);
    }
}
