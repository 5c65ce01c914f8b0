//! What control of a machine costs, on this machine's own KVM with the probe guest.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::process::{Monitor, time};
use super::sample::Sample;

/// Round trips on the control socket.
const CALLS: u32 = 2000;
/// Processes of each kind.
const PROCESSES: u32 = 100;

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Control {
    /// All registers of a vCPU that runs, over one connection, in microseconds.
    pub registers_us: Sample,
    /// The process `vmmctl --get-all`.
    pub get_all_ms: Sample,
    /// The process `vmmctl --bt`.
    pub backtrace_ms: Sample,
    /// `vmmctl --suspend`, until the state is stored: 512 MiB, of which 64 MiB are used.
    pub suspend_ms: Sample,
    /// From the start of `rhyve` to the guest's answer on its console.
    pub resume_ms: Sample,
}

/// Measures all of it.
pub fn measure(programs: &Path, probe: &Path, runs: u32) -> Result<Control, Box<dyn Error>> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let root = dir.path().join("root");
    let program = |name: &str| {
        let mut command = Command::new(programs.join(name));
        command.env("RHYVE_ROOT", &root);
        command
    };
    let vmmctl = |option: &str| time(program("vmmctl").args(["--vm=bench", option]));
    time(
        program("rhyveload")
            .args(["-m", "512M", "--kernel"])
            .arg(probe)
            .arg("bench"),
    )?;
    let mut rhyve = program("rhyve");
    rhyve.args(["-l", "com1,stdio", "bench"]);
    let mut guest = Monitor::start(rhyve)?;
    guest.expect("probe> ")?;
    // Page by page, as a guest uses memory.
    guest.send("touch 0x4000000 0x4000000")?;
    guest.expect("touch 0x4000000 0x4000000 ok")?;

    let (mut suspend, mut resume) = (Vec::new(), Vec::new());
    for run in 0..=runs {
        let suspended = vmmctl("--suspend")?;
        guest.wait()?;
        let start = Instant::now();
        let mut rhyve = program("rhyve");
        rhyve.arg("bench");
        guest = Monitor::start(rhyve)?;
        guest.send(&format!("echo again-{run}"))?;
        // The echo of what was typed has no line before it.
        guest.expect(&format!("\nagain-{run}"))?;
        if run != 0 {
            suspend.push(milliseconds(suspended));
            resume.push(milliseconds(start.elapsed()));
        }
    }
    guest.send("spin")?;
    guest.expect("spin\r\n")?;
    let processes = |option: &str| -> Result<Sample, Box<dyn Error>> {
        let runs = (0..PROCESSES).map(|_| Ok(milliseconds(vmmctl(option)?)));
        Ok(runs.collect::<Result<Vec<_>, Box<dyn Error>>>()?.into())
    };
    Ok(Control {
        registers_us: calls(&root.join("bench/control.sock"))?.into(),
        get_all_ms: processes("--get-all")?,
        backtrace_ms: processes("--bt")?,
        suspend_ms: suspend.into(),
        resume_ms: resume.into(),
    })
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Asks for all registers again and again, as vmm-api's client does; microseconds.
fn calls(socket: &Path) -> Result<Vec<f64>, Box<dyn Error>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    lines.read_line(&mut line)?;
    let mut times = Vec::new();
    for id in 0..CALLS {
        let call = format!("{{\"id\":{id},\"request\":{{\"registers\":{{\"vcpu\":0}}}}}}\n");
        let start = Instant::now();
        stream.write_all(call.as_bytes())?;
        line.clear();
        lines.read_line(&mut line)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
        if !line.contains("\"ok\"") {
            return Err(format!("the control socket answers {line}").into());
        }
    }
    Ok(times)
}

/// The value that 99 of 100 are not above.
fn p99(sample: &Sample) -> f64 {
    let mut runs = sample.runs.clone();
    runs.sort_by(f64::total_cmp);
    let at = (runs.len() * 99).div_ceil(100).saturating_sub(1);
    runs.get(at).copied().unwrap_or(f64::NAN)
}

impl Control {
    /// For people.
    pub fn table(&self) -> String {
        let mut text = format!("  {:<44}{:>9}{:>9}{:>9}\n", "", "p50", "p99", "max");
        for (name, sample, unit) in [
            (
                "all registers, over one connection",
                &self.registers_us,
                "us",
            ),
            ("vmmctl --get-all", &self.get_all_ms, "ms"),
            ("vmmctl --bt", &self.backtrace_ms, "ms"),
            ("vmmctl --suspend, 512 MiB, 64 used", &self.suspend_ms, "ms"),
            ("rhyve again, to the guest's answer", &self.resume_ms, "ms"),
        ] {
            let (median, p99, max) = (sample.median, p99(sample), sample.max);
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {name:<44}{median:9.2}{p99:9.2}{max:9.2} {unit}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p99_is_one_of_the_highest() {
        let sample = Sample::from((1..=200).map(f64::from).collect::<Vec<_>>());
        assert_eq!(p99(&sample), 198.0);
        assert_eq!(p99(&Sample::from(vec![5.0])), 5.0);
    }
}
