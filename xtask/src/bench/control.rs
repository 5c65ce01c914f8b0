//! What control of a machine costs, on this machine's own KVM with the probe guest.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::process::{Monitor, time};
use super::sample::Sample;

/// Round trips on the control socket.
const CALLS: u32 = 2000;
/// Processes of each kind.
const PROCESSES: u32 = 100;
/// How often the registers are asked for while it is measured what that costs the guest, in a second.
const RATE: u32 = 100;
/// How long the guest spins, asked or not, before it tells how far it came.
const WINDOW: Duration = Duration::from_millis(250);

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
    /// `vmmctl --snapshot` of the machine while it runs.
    pub snapshot_ms: Sample,
    /// From the start of `vmmctl --clone` to the first entry into the clone.
    pub clone_entry_ms: Sample,
    /// From there to the clone's answer on its console.
    pub clone_answer_ms: Sample,
    /// What the guest's loop loses to 100 questions for all registers in a second, over one connection;
    /// percent.
    pub asked_cost_percent: Sample,
    /// The same with 100 processes `vmmctl --get-all` in a second, or as many as there can be.
    pub get_all_cost_percent: Sample,
    /// How many of those there were in a second.
    pub get_all_rate: Sample,
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
    vmmctl("--snapshot=warm")?;
    let mut snapshots = Vec::new();
    for _ in 0..runs {
        time(program("vmmctl").args(["--vm=warm", "--destroy"]))?;
        snapshots.push(milliseconds(vmmctl("--snapshot=warm")?));
    }
    let (mut entries, mut answers) = (Vec::new(), Vec::new());
    for run in 0..=runs {
        let (entry, answer) = clone(&program, run)?;
        if run != 0 {
            entries.push(milliseconds(entry));
            answers.push(milliseconds(answer));
        }
    }

    let socket = root.join("bench/control.sock");
    let mut asking = Connection::open(&socket)?;
    let (mut asked, mut processes_asked, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..=2 * runs {
        // Undisturbed before and after, for a machine with other work is not the same all the time.
        let before = rounds(&mut guest, || Ok(()))?;
        let with_calls = rounds(&mut guest, || asking.registers())?;
        let mut count = 0_u32;
        let with_processes = rounds(&mut guest, || {
            count += 1;
            vmmctl("--get-all").map(drop)
        })?;
        let after = rounds(&mut guest, || Ok(()))?;
        let cost = |rate: f64| 100.0 * (1.0 - 2.0 * rate / (before + after));
        if run != 0 {
            asked.push(cost(with_calls));
            processes_asked.push(cost(with_processes));
            rates.push(f64::from(count) / WINDOW.as_secs_f64());
        }
    }

    guest.send("spin")?;
    guest.expect("spin\r\n")?;
    let processes = |option: &str| -> Result<Sample, Box<dyn Error>> {
        let runs = (0..PROCESSES).map(|_| Ok(milliseconds(vmmctl(option)?)));
        Ok(runs.collect::<Result<Vec<_>, Box<dyn Error>>>()?.into())
    };
    Ok(Control {
        registers_us: asking.times(CALLS)?.into(),
        get_all_ms: processes("--get-all")?,
        backtrace_ms: processes("--bt")?,
        suspend_ms: suspend.into(),
        resume_ms: resume.into(),
        snapshot_ms: snapshots.into(),
        clone_entry_ms: entries.into(),
        clone_answer_ms: answers.into(),
        asked_cost_percent: asked.into(),
        get_all_cost_percent: processes_asked.into(),
        get_all_rate: rates.into(),
    })
}

/// Clones the snapshot and runs the clone: how long it is to the first entry, and to an answer.
fn clone(
    program: &impl Fn(&str) -> Command,
    run: u32,
) -> Result<(Duration, Duration), Box<dyn Error>> {
    let name = format!("clone{run}");
    let start = Instant::now();
    time(program("vmmctl").args(["--vm=warm", &format!("--clone={name}")]))?;
    let mut rhyve = program("rhyve");
    // The options that the first one had, and what tells of the first entry.
    rhyve.args(["--trace", "rhyve::start=debug", "-l", "com1,stdio", &name]);
    rhyve.stderr(Stdio::piped());
    let mut clone = Monitor::start(rhyve)?;
    let mut told = BufReader::new(clone.errors().ok_or("a monitor has no standard error")?);
    let mut line = String::new();
    while !line.contains("first entry") {
        line.clear();
        if told.read_line(&mut line)? == 0 {
            return Err("a clone does not start".into());
        }
    }
    let entry = start.elapsed();
    clone.send(&format!("echo here-{run}"))?;
    clone.expect(&format!("\nhere-{run}"))?;
    let answer = start.elapsed();
    drop(clone);
    time(program("vmmctl").args([&format!("--vm={name}"), "--destroy"]))?;
    Ok((entry, answer))
}

/// Has the guest spin while `disturb` is called 100 times a second: rounds of its loop in a second. The
/// time in which its thread has to wait for a processor is that of other programs, and does not count.
fn rounds(
    guest: &mut Monitor,
    mut disturb: impl FnMut() -> Result<(), Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    guest.send("spin")?;
    guest.expect("any key ends it\r\n")?;
    let (start, waited) = (Instant::now(), guest.waited("vcpu-0")?);
    let mut next = start;
    while start.elapsed() < WINDOW {
        disturb()?;
        next += Duration::from_secs(1) / RATE;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let text = guest.ask("", " rounds\r\n")?;
    let waited = guest.waited("vcpu-0")?.saturating_sub(waited);
    let time = start.elapsed().saturating_sub(waited);
    let (_, rounds) = text
        .split_once("spin ok, ")
        .ok_or("the guest's loop does not end")?;
    let rounds = rounds.split(' ').next().unwrap_or_default();
    Ok(rounds.parse::<f64>()? / time.as_secs_f64())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A connection to the control socket, as vmm-api's client has it.
struct Connection {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    next: u32,
}

impl Connection {
    fn open(socket: &Path) -> Result<Self, Box<dyn Error>> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut lines = BufReader::new(stream.try_clone()?);
        lines.read_line(&mut String::new())?;
        Ok(Self {
            stream,
            lines,
            next: 1,
        })
    }

    /// Asks for all registers.
    fn registers(&mut self) -> Result<(), Box<dyn Error>> {
        let id = self.next;
        self.next += 1;
        let call = format!("{{\"id\":{id},\"request\":{{\"registers\":{{\"vcpu\":0}}}}}}\n");
        self.stream.write_all(call.as_bytes())?;
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        if line.contains("\"ok\"") {
            Ok(())
        } else {
            Err(format!("the control socket answers {line}").into())
        }
    }

    /// How long that takes, this many times; microseconds.
    fn times(&mut self, calls: u32) -> Result<Vec<f64>, Box<dyn Error>> {
        let time = |_| {
            let start = Instant::now();
            self.registers()?;
            Ok(start.elapsed().as_secs_f64() * 1e6)
        };
        (0..calls).map(time).collect()
    }
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
            (
                "vmmctl --snapshot, of a running VM",
                &self.snapshot_ms,
                "ms",
            ),
            ("clone, to its first entry", &self.clone_entry_ms, "ms"),
            ("clone, to its answer", &self.clone_answer_ms, "ms"),
            (
                "cost of all registers, 100 times a second",
                &self.asked_cost_percent,
                "%",
            ),
            (
                "cost of vmmctl --get-all, likewise",
                &self.get_all_cost_percent,
                "%",
            ),
            ("  of which there were", &self.get_all_rate, "1/s"),
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
