//! `cargo xtask fuzz`: libFuzzer on everything that reads bytes of others.
//!
//! The targets are xtask/fuzz, built with LLVM's coverage instrumentation by the stable compiler and
//! linked with libFuzzer, in a build directory of their own. What a target has learnt stays in
//! `target/fuzz/corpus`, what breaks it in `target/fuzz/artifacts`.

use std::env;
use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Args, ValueEnum};

use crate::{TaskResult, project};

/// Feed random bytes to everything that reads bytes of others, until the time is up
///
/// Exit status 0 if nothing broke. Needs a C++ compiler.
#[derive(Debug, Args)]
pub struct Fuzz {
    /// What reads the bytes [default: all, one behind the other]
    #[arg(value_enum, value_name = "TARGET")]
    target: Option<Target>,
    /// Seconds for each target
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// Only this input, to see again what broke
    #[arg(long, value_name = "FILE", requires = "target")]
    input: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// The kernel loaders
    Kernel,
    /// FreeBSD kernel modules
    Module,
    /// loader.conf and its neighbours
    #[value(name = "loader_conf")]
    LoaderConf,
    /// UFS
    Ufs,
    /// FAT file systems
    Fat,
    /// Partition tables
    Partitions,
    /// vm.json
    #[value(name = "vm_json")]
    VmJson,
    /// The control protocol
    Control,
    /// KVM's binary statistics
    Stats,
    /// A guest's memory, as its kernel left it
    Guest,
    /// The programs' command lines
    Options,
    /// PCI configuration, both virtio transports, virtio-blk
    Virtio,
    /// A network card's queues
    Net,
    /// virtio-console
    Console,
    /// virtio-balloon
    Balloon,
    /// virtio-vsock
    Vsock,
    /// virtio-9p's requests
    P9,
    /// A debugger's packets
    Gdb,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Target::Kernel => "kernel",
            Target::Module => "module",
            Target::LoaderConf => "loader_conf",
            Target::Ufs => "ufs",
            Target::Fat => "fat",
            Target::Partitions => "partitions",
            Target::VmJson => "vm_json",
            Target::Control => "control",
            Target::Stats => "stats",
            Target::Guest => "guest",
            Target::Options => "options",
            Target::Virtio => "virtio",
            Target::Net => "net",
            Target::Console => "console",
            Target::Balloon => "balloon",
            Target::Vsock => "vsock",
            Target::P9 => "p9",
            Target::Gdb => "gdb",
        }
    }

    /// Longest input in bytes: what the seeds need, with room to grow.
    fn max_len(self) -> u32 {
        match self {
            Target::Guest
            | Target::Kernel
            | Target::VmJson
            | Target::Module
            | Target::Fat
            | Target::Partitions => 8192,
            Target::LoaderConf => 4096,
            // Inodes, directories and a file behind a superblock.
            Target::Ufs => 70_000,
            // Some more than the longest line that is read.
            Target::Control => 70_000,
            Target::Stats | Target::Virtio | Target::P9 | Target::Gdb => 2048,
            Target::Net | Target::Console | Target::Balloon | Target::Vsock => 8 + 8 * 64,
            Target::Options => 512,
        }
    }
}

/// What cargo-fuzz asks of rustc for its targets, less the sanitizers, which need a nightly compiler:
/// edge coverage by 8-bit counters, and the operands of comparisons, for libFuzzer to solve.
const RUSTFLAGS: [&str; 7] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg",
    "fuzzing",
];

/// Cargo's separator in CARGO_ENCODED_RUSTFLAGS.
const SEPARATOR: &str = "\x1f";

/// Lines of libFuzzer's report that are shown of a failure.
const REPORT_TAIL: usize = 60;

impl Fuzz {
    pub fn run(self) -> TaskResult {
        let programs = build()?;
        let mut failed = false;
        for &target in Target::value_variants() {
            if self.target.is_none_or(|only| only == target) {
                let run = Run::new(target, programs.join(target.name()))?;
                failed |= !match &self.input {
                    None => run.search(self.seconds)?,
                    Some(input) => run.replay(input)?,
                };
            }
        }
        Ok(if failed {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }
}

/// Where everything of ours is.
fn home() -> PathBuf {
    project::target_dir().join("fuzz")
}

/// Builds all targets; the directory that holds them.
fn build() -> Result<PathBuf, Box<dyn Error>> {
    if let Err(error) = Command::new("c++").arg("--version").output() {
        return Err(
            format!("c++: {error}: libFuzzer needs a C++ compiler: apt-get install g++").into(),
        );
    }
    let rustc = Command::new("rustc")
        .args(["--print", "host-tuple"])
        .output()?;
    let host = String::from_utf8(rustc.stdout)?.trim().to_owned();
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(project::root())
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join(SEPARATOR))
        .args(["build", "--quiet", "--package", "fuzz", "--bins"])
        .args(["--features", "libfuzzer", "--profile", "fuzz"])
        // With a target that is named, build scripts and procedural macros are not instrumented.
        .args(["--target", &host, "--target-dir"])
        .arg(home());
    if !cargo.status()?.success() {
        return Err("the fuzz targets do not build".into());
    }
    Ok(home().join(host).join("fuzz"))
}

/// One target that is about to run.
struct Run {
    target: Target,
    program: PathBuf,
    corpus: PathBuf,
    artifacts: PathBuf,
    /// Seeds, and the objects of VMs: gone at the end.
    scratch: tempfile::TempDir,
}

impl Run {
    fn new(target: Target, program: PathBuf) -> io::Result<Self> {
        let this = Self {
            target,
            program,
            corpus: home().join("corpus").join(target.name()),
            artifacts: home().join("artifacts").join(target.name()),
            scratch: tempfile::Builder::new()
                .prefix("rhyve-fuzz-")
                .tempdir_in("/dev/shm")?,
        };
        for dir in [&this.corpus, &this.artifacts, &this.seeds()] {
            fs::create_dir_all(dir)?;
        }
        Ok(this)
    }

    fn seeds(&self) -> PathBuf {
        self.scratch.path().join("seeds")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .env("FUZZ_SEEDS", self.seeds())
            .env("RHYVE_ROOT", self.scratch.path().join("root"))
            .arg(format!("-max_len={}", self.target.max_len()))
            .arg(format!("-artifact_prefix={}/", self.artifacts.display()))
            .args(["-timeout=5", "-rss_limit_mb=2048", "-print_final_stats=1"]);
        command
    }

    /// Looks for an input that breaks the target; true if there was none.
    fn search(&self, seconds: u32) -> Result<bool, Box<dyn Error>> {
        let mut command = self.command();
        command
            .arg(format!("-max_total_time={seconds}"))
            .args([&self.corpus, &self.seeds()]);
        let output = command.output()?;
        let report = String::from_utf8_lossy(&output.stderr);
        let name = self.target.name();
        if output.status.success() {
            let Some(done) = Done::read(&report) else {
                return Err(format!("{name}: libFuzzer ended without a result:\n{report}").into());
            };
            println!("{name}: {} inputs, {} edges: ok", done.inputs, done.edges);
            return Ok(true);
        }
        let lines: Vec<&str> = report.lines().collect();
        for line in &lines[lines.len().saturating_sub(REPORT_TAIL)..] {
            eprintln!("| {line}");
        }
        match artifact(&report) {
            Some(input) => eprintln!(
                "{name}: broken by {input}\nto see it again: cargo xtask fuzz {name} --input {input}"
            ),
            None => eprintln!("{name}: {}", output.status),
        }
        Ok(false)
    }

    /// Runs the target on one input; true if it holds.
    fn replay(&self, input: &Path) -> io::Result<bool> {
        Ok(self.command().arg(input).status()?.success())
    }
}

/// What libFuzzer says at the end of a search.
#[derive(Debug, PartialEq, Eq)]
struct Done {
    inputs: u64,
    edges: u64,
}

impl Done {
    /// Reads `#123 DONE   cov: 45 ft: ...`.
    fn read(report: &str) -> Option<Self> {
        let line = report.lines().rfind(|line| line.contains("\tDONE "))?;
        let mut words = line.split_whitespace();
        let inputs = words.next()?.strip_prefix('#')?.parse().ok()?;
        let edges = words.skip_while(|&word| word != "cov:").nth(1)?;
        Some(Self {
            inputs,
            edges: edges.parse().ok()?,
        })
    }
}

/// The file that libFuzzer has put a bad input into.
fn artifact(report: &str) -> Option<&str> {
    report
        .lines()
        .find_map(|line| line.split_once("Test unit written to "))
        .map(|(_, path)| path.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libfuzzers_report_is_read() {
        let report = "INFO: Seed: 1\n#2\tINITED cov: 3 ft: 3 corp: 1/1b exec/s: 0 rss: 27Mb\n\
                      #98\tDONE   cov: 28 ft: 30 corp: 5/532b lim: 4096 exec/s: 9 rss: 28Mb\n\
                      Done 98 runs in 4 second(s)\n";
        let done = Done {
            inputs: 98,
            edges: 28,
        };
        assert_eq!(Done::read(report), Some(done));
        assert_eq!(Done::read("==1== ERROR: libFuzzer: timeout\n"), None);
        let report = "artifact_prefix='/t/'; Test unit written to /t/crash-0a1b\nBase64: eA==\n";
        assert_eq!(artifact(report), Some("/t/crash-0a1b"));
        assert_eq!(artifact("DONE"), None);
    }
}
