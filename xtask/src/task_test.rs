//! `cargo xtask test`: everything that is checked, in the order in which mistakes are cheapest to
//! find.
//!
//! Test programs are built by Cargo and run here, each within a time limit, one at a time but for the
//! nested lane, which takes them in pieces ([`Piece`]) and [`side_by_side`]. The name of an integration test says where it runs:
//! `tests/host_*/` on any KVM, that is on this machine's /dev/kvm and in the nested lane;
//! `tests/nested_*/` in the nested lane only (its tests are marked `#[ignore = "nested lane"]`, so
//! that a plain `cargo test` leaves them alone); everything else without KVM. Ignored tests are always
//! included, and a lane that cannot run is a failure with its reason and its mend.

use std::env;
use std::error::Error;
use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::{TaskResult, project, task_guest_image};

/// Run every check: format, lints, documentation, unit tests, both lanes, the demo
///
/// Exit status 0 if all passed, 1 otherwise.
#[derive(Debug, Args)]
pub struct Test {
    /// Only these steps, in the usual order [default: all]
    #[arg(value_enum, value_name = "STEP")]
    steps: Vec<Step>,
    /// Seconds that one test program may take
    #[arg(long, value_name = "S", default_value_t = 2400)]
    timeout: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Step {
    /// rustfmt
    Format,
    /// clippy, warnings denied
    Lint,
    /// rustdoc, warnings denied, the examples in it, and the manual pages
    Doc,
    /// Unit and property tests, and integration tests that need no KVM
    Unit,
    /// `cargo xtask fuzz`, a few seconds for each target
    Fuzz,
    /// Tests on this machine's KVM
    Host,
    /// Tests on real KVM inside QEMU's software CPU
    Nested,
    /// `cargo xtask demo`, twice
    Demo,
}

impl Step {
    fn title(self) -> &'static str {
        match self {
            Step::Format => "format",
            Step::Lint => "lints",
            Step::Doc => "documentation",
            Step::Unit => "unit tests",
            Step::Fuzz => "fuzz targets",
            Step::Host => "host lane",
            Step::Nested => "nested lane",
            Step::Demo => "demo",
        }
    }
}

impl Test {
    pub fn run(self) -> TaskResult {
        let start = Instant::now();
        let mut run = Run {
            // Now: building the workspace may put another file in this program's place.
            xtask: env::current_exe()?,
            timeout: self.timeout,
            passed: 0,
            failures: Vec::new(),
            programs: None,
            tools: Vec::new(),
        };
        for &step in Step::value_variants() {
            if self.steps.is_empty() || self.steps.contains(&step) {
                let begun = Instant::now();
                println!("== {}", step.title());
                if let Err(error) = run.step(step) {
                    run.fail(step.title(), &error.to_string());
                }
                println!("   {:.1} s", begun.elapsed().as_secs_f32());
            }
        }
        println!("== summary ({} s)", start.elapsed().as_secs());
        for failure in &run.failures {
            println!("FAILED {failure}");
        }
        println!("{} passed, {} failed", run.passed, run.failures.len());
        Ok(if run.failures.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// What a whole run has come to.
struct Run {
    /// This program.
    xtask: PathBuf,
    timeout: u64,
    passed: usize,
    /// One line each.
    failures: Vec<String>,
    /// The test programs, once they are built.
    programs: Option<Vec<Program>>,
    /// Programs of Debian's that tests find by these environment variables.
    tools: Vec<(&'static str, PathBuf)>,
}

impl Run {
    fn step(&mut self, step: Step) -> Result<(), Box<dyn Error>> {
        match step {
            Step::Format => {
                self.check("cargo fmt", cargo(["fmt", "--all", "--check"]))?;
                // The probe kernel is not a crate of the workspace.
                let mut rustfmt = Command::new("rustfmt");
                rustfmt.args(["--check", "--edition", "2024"]);
                let guests = project::root().join("guest-image/guests");
                rustfmt.args(
                    [
                        "probe/main.rs",
                        "freebsd/main.rs",
                        "freebsd/modules/base.rs",
                        "freebsd/modules/user.rs",
                    ]
                    .map(|source| guests.join(source)),
                );
                self.check("rustfmt of the probe kernels", rustfmt)
            }
            Step::Lint => {
                let mut clippy = cargo(["clippy", "--quiet", "--workspace", "--all-targets"]);
                clippy.args(["--", "-D", "warnings"]);
                self.check("cargo clippy", clippy)
            }
            Step::Doc => {
                let mut rustdoc = cargo(["doc", "--quiet", "--workspace", "--no-deps"]);
                rustdoc.env("RUSTDOCFLAGS", "-D warnings");
                self.check("cargo doc", rustdoc)?;
                let examples = cargo(["test", "--quiet", "--workspace", "--doc"]);
                self.check("examples in the documentation", examples)?;
                let mut man = Command::new(&self.xtask);
                man.arg("man");
                self.check("cargo xtask man", man)
            }
            Step::Unit => {
                self.tools()?;
                self.programs(Lane::Any)
            }
            Step::Fuzz => {
                let mut fuzz = Command::new(&self.xtask);
                fuzz.args(["fuzz", "--seconds", "5"]);
                self.check("cargo xtask fuzz", fuzz)
            }
            Step::Host => {
                open_kvm()?;
                self.tools()?;
                let lane = task_guest_image::make("lane")?;
                self.tools
                    .push(("RHYVE_QEMU", lane.path("qemu")?.to_owned()));
                self.programs(Lane::Host)
            }
            Step::Nested => {
                // What its tests boot; they do not make it themselves.
                task_guest_image::make_linux_disk()?;
                task_guest_image::make("linux-full")?;
                self.tools()?;
                self.programs(Lane::Nested)
            }
            Step::Demo => {
                open_kvm()?;
                for round in ["demo", "demo, again"] {
                    let mut demo = Command::new(&self.xtask);
                    demo.arg("demo");
                    self.check(round, demo)?;
                }
                Ok(())
            }
        }
    }

    /// Fetches what tests compare with.
    fn tools(&mut self) -> Result<(), Box<dyn Error>> {
        let tools = task_guest_image::make("tools")?;
        self.tools.clear();
        for (variable, role) in [
            ("MAKEFS", "makefs"),
            ("RHYVE_GRUB_MKIMAGE", "grubmkimage"),
            ("RHYVE_GRUB", "grub"),
        ] {
            self.tools.push((variable, tools.path(role)?.to_owned()));
        }
        Ok(())
    }

    /// Runs a command that passes or fails as a whole.
    fn check(&mut self, what: &str, mut command: Command) -> Result<(), Box<dyn Error>> {
        let output = command.current_dir(project::root()).output()?;
        if output.status.success() {
            println!("   {what}: ok");
            self.passed += 1;
        } else {
            show(&output);
            self.fail(what, &output.status.to_string());
        }
        Ok(())
    }

    fn fail(&mut self, what: &str, why: &str) {
        println!("   {what}: FAILED: {why}");
        self.failures.push(format!("{what}: {why}"));
    }

    /// The command that runs tests of a program in a lane.
    fn command(&self, piece: &Piece, lane: Lane) -> Command {
        let program = piece.program;
        let mut command;
        if lane == Lane::Nested {
            command = Command::new(&self.xtask);
            command.args(["nested", "--timeout", &self.timeout.to_string()]);
            // With two processors, guests and the lane's own kernel now and then take a fault that there
            // is no reason for; with one, none was seen to.
            command.args(["--cpus", "1"]);
            command.args(["--env", "MAKEFS", "--"]);
        } else {
            // timeout(1) ends the whole process group, and so what a test has started.
            command = Command::new("timeout");
            command.args(["--kill-after=5", &self.timeout.to_string()]);
        }
        command
            .arg(&program.executable)
            .args(choice(lane))
            .args(piece.choice())
            .current_dir(&program.package)
            .env("CARGO_MANIFEST_DIR", &program.package)
            .envs(self.tools.iter().map(|(name, path)| (name, path)));
        command
    }

    /// Runs the test programs of a lane.
    fn programs(&mut self, lane: Lane) -> Result<(), Box<dyn Error>> {
        let programs = match self.programs.take() {
            Some(programs) => programs,
            None => build()?,
        };
        let mut chosen: Vec<&Program> = programs.iter().filter(|one| one.runs_in(lane)).collect();
        if chosen.is_empty() {
            return Err("there is no test program for this".into());
        }
        // What takes longest begins first.
        chosen.sort_by_key(|program| !program.target.starts_with("nested_linux"));
        let mut pieces = Vec::new();
        for program in chosen {
            pieces.extend(Piece::of(program, lane)?);
        }
        for report in self.reports(&pieces, lane)? {
            self.passed += report.passed;
            self.failures.extend(report.failures);
        }
        self.programs = Some(programs);
        Ok(())
    }

    /// Runs tests, [`side_by_side`] if the lane allows, and prints what each piece comes to.
    fn reports(&self, pieces: &[Piece], lane: Lane) -> io::Result<Vec<Report>> {
        let queue = Mutex::new(pieces.iter());
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..side_by_side(lane) {
                let (queue, sender) = (&queue, sender.clone());
                scope.spawn(move || {
                    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                    while let Some(piece) = next() {
                        let begun = Instant::now();
                        let output = self.command(piece, lane).output();
                        // The receiver outlives this scope.
                        let _ = sender.send((piece, begun.elapsed(), output));
                    }
                });
            }
            drop(sender);
            receiver
                .iter()
                .map(|(piece, time, output)| Ok(Report::new(piece, time, &output?)))
                .collect()
        })
    }
}

/// Tests of one program that one command runs.
struct Piece<'a> {
    program: &'a Program,
    /// The tests' names; empty for all.
    tests: Vec<String>,
    /// Which piece of how many.
    part: (usize, usize),
}

impl std::fmt::Display for Piece<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (part, parts) = self.part;
        write!(f, "{}", self.program)?;
        match parts {
            1 => Ok(()),
            _ => write!(f, " ({part}/{parts})"),
        }
    }
}

impl<'a> Piece<'a> {
    /// How many tests one lane of QEMU runs: few, so that the lanes are done at about the same time, but
    /// not so few that starting lanes counts.
    const TESTS: usize = 8;

    /// A program's tests in the pieces for a lane.
    fn of(program: &'a Program, lane: Lane) -> Result<Vec<Self>, String> {
        if lane != Lane::Nested {
            let (tests, part) = (Vec::new(), (1, 1));
            return Ok(vec![Self {
                program,
                tests,
                part,
            }]);
        }
        let mut list = Command::new(&program.executable);
        list.args(["--list", "--format=terse", "--include-ignored"]);
        let output = list.output().map_err(|e| format!("{program}: {e}"))?;
        let names = String::from_utf8_lossy(&output.stdout);
        let names: Vec<&str> = names
            .lines()
            .filter_map(|line| line.strip_suffix(": test"))
            .collect();
        if names.is_empty() {
            return Err(format!("{program} lists no tests"));
        }
        let pieces = names.chunks(Self::TESTS);
        let parts = pieces.len();
        Ok(pieces
            .zip(1..)
            .map(|(names, part)| Self {
                program,
                tests: names.iter().map(|name| (*name).to_owned()).collect(),
                part: (part, parts),
            })
            .collect())
    }

    /// The arguments of libtest that choose these tests.
    fn choice(&self) -> impl Iterator<Item = &str> {
        let exact = (!self.tests.is_empty()).then_some("--exact");
        exact
            .into_iter()
            .chain(self.tests.iter().map(|name| &**name))
    }
}

/// How many of a lane's pieces run at once: each piece in the nested lane has a QEMU of its own, and two
/// cores serve two of them.
fn side_by_side(lane: Lane) -> usize {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    if lane == Lane::Nested {
        cores.min(2)
    } else {
        1
    }
}

/// How a lane's tests are run. In the nested lane one at a time: with two guests at once its own kernel
/// has now and then stopped, having handled a fault with a guest's GS base instead of its own.
fn choice(lane: Lane) -> &'static [&'static str] {
    match lane {
        Lane::Nested => &["--include-ignored", "--test-threads=1"],
        _ => &["--include-ignored"],
    }
}

/// The status of timeout(1) and of the nested lane for a command that took too long.
const TIMED_OUT: i32 = 124;

/// Where a test program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    Any,
    Host,
    Nested,
}

/// What one test program came to. It is printed when the program ends.
struct Report {
    passed: usize,
    /// One line each.
    failures: Vec<String>,
}

impl Report {
    fn new(piece: &Piece, time: Duration, output: &Output) -> Self {
        let seconds = time.as_secs_f32();
        let counts = Counts::read(&String::from_utf8_lossy(&output.stdout));
        let passed = counts.passed;
        let mut failures = counts.failed;
        if output.status.success() && counts.complete {
            if passed > 0 {
                println!("   {piece}: {passed} passed, {seconds:.1} s");
            }
            failures.clear();
        } else {
            show(output);
            if output.status.code() == Some(TIMED_OUT) {
                failures.insert(0, format!("not done in {seconds:.0} s"));
            } else if failures.is_empty() {
                failures.push(output.status.to_string());
            }
        }
        let asked = piece.tests.len();
        if asked > 0 && failures.is_empty() && passed != asked {
            failures.push(format!("{passed} of {asked} tests ran"));
        }
        for failure in &mut failures {
            *failure = format!("{piece}: {failure}");
            println!("   FAILED {failure}");
        }
        Self { passed, failures }
    }
}

/// A test program that Cargo has built.
#[derive(Debug)]
struct Program {
    package: PathBuf,
    target: String,
    executable: PathBuf,
}

impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let package = self.package.file_name().unwrap_or_default();
        write!(f, "{} {}", package.to_string_lossy(), self.target)
    }
}

impl Program {
    /// Whether it belongs to a lane. What runs on any KVM runs on both.
    fn runs_in(&self, lane: Lane) -> bool {
        let host = self.target.starts_with("host_");
        let nested = self.target.starts_with("nested_");
        // A QEMU of its own, which would be slow inside of another.
        let qemu = self.target.starts_with("qemu_");
        match lane {
            Lane::Any => !host && !nested && !qemu,
            Lane::Host => host || qemu,
            Lane::Nested => host || nested,
        }
    }
}

/// Builds all programs and all tests, and says which test programs there are.
fn build() -> Result<Vec<Program>, Box<dyn Error>> {
    let built = cargo(["build", "--quiet", "--workspace"]).status()?;
    if !built.success() {
        return Err("the programs do not build".into());
    }
    let mut command = cargo([
        "test",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--no-run",
    ]);
    command.arg("--message-format=json-render-diagnostics");
    let output = command.stderr(std::process::Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err("the tests do not build".into());
    }
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

/// The test programs in Cargo's messages (The Cargo Book, "External tools", JSON messages).
fn parse(messages: &str) -> Vec<Program> {
    #[derive(Deserialize)]
    struct Message {
        manifest_path: PathBuf,
        target: Target,
        profile: Profile,
        executable: Option<PathBuf>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    #[derive(Deserialize)]
    struct Profile {
        test: bool,
    }
    let artifacts = messages.lines().filter_map(|line| {
        // Messages of other kinds lack these fields.
        serde_json::from_str::<Message>(line).ok()
    });
    artifacts
        .filter(|artifact| artifact.profile.test)
        .filter_map(|artifact| {
            let kind = artifact.target.kind.first()?;
            Some(Program {
                package: artifact.manifest_path.parent()?.to_owned(),
                target: match &**kind {
                    "test" => artifact.target.name,
                    _ => kind.clone(),
                },
                executable: artifact.executable?,
            })
        })
        .collect()
}

/// What a test program reports.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: usize,
    failed: Vec<String>,
    /// Whether the line with the result came.
    complete: bool,
}

impl Counts {
    /// Reads libtest's result, `test result: ok. 2 passed; 0 failed; ...`, and the names in the
    /// last of its lists of failures. Not the line of each test: what tests write may run into it.
    fn read(output: &str) -> Self {
        let mut counts = Counts::default();
        let mut listing = false;
        for line in output.lines() {
            if line == "failures:" {
                listing = true;
                counts.failed.clear();
            } else if let Some(result) = line.strip_prefix("test result: ") {
                let number = result.split(['.', ';']).nth(1);
                let number = number.and_then(|text| text.trim().strip_suffix(" passed"));
                if let Some(Ok(passed)) = number.map(str::parse) {
                    counts.passed = passed;
                    counts.complete = true;
                }
            } else if let Some(name) = line.strip_prefix("    ").filter(|_| listing) {
                counts.failed.push(name.to_owned());
            }
        }
        counts
    }
}

/// Whether this machine's KVM can be used; an error says why not, and what mends it.
fn open_kvm() -> Result<(), String> {
    let path = Path::new("/dev/kvm");
    let Err(error) = OpenOptions::new().read(true).write(true).open(path) else {
        return Ok(());
    };
    let mend = match error.kind() {
        io::ErrorKind::NotFound => {
            "load kvm_amd or kvm_intel, and switch virtualization on in the firmware or the \
             hypervisor around this machine"
        }
        io::ErrorKind::PermissionDenied => "join the group kvm: usermod -aG kvm \"$USER\"",
        _ => "`vmmctl --host` says what this machine's KVM can do",
    };
    Err(format!("/dev/kvm: {error}; {mend}"))
}

/// Shows what a failed command wrote.
fn show(output: &Output) {
    for text in [&output.stdout, &output.stderr] {
        for line in String::from_utf8_lossy(text).lines() {
            println!("   | {line}");
        }
    }
}

fn cargo<const N: usize>(arguments: [&str; N]) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(project::root()).args(arguments);
    cargo
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtests_lines_are_counted() {
        let output = "\nrunning 3 tests\ntest a::b ... some output\nok\ntest c ... ok\n\
                      test d ... FAILED\n\nfailures:\n\n---- d stdout ----\n    indented\n\n\
                      failures:\n    d\n\ntest result: FAILED. 2 passed; 1 failed; 0 ignored\n";
        let counts = Counts::read(output);
        assert_eq!(counts.passed, 2);
        assert_eq!(counts.failed, ["d"]);
        assert!(counts.complete);
        let counts = Counts::read("test a ...     x\nok\ntest result: ok. 1 passed; 0 failed\n");
        assert_eq!((counts.passed, counts.complete), (1, true));
        assert!(!Counts::read("test a ... ok\n").complete, "it died");
    }

    #[test]
    fn test_programs_are_found_in_cargos_messages() {
        let message = |kind: &str, name: &str, test: bool| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/w/rhyve/Cargo.toml",
                    "target":{{"kind":["{kind}"],"name":"{name}"}},
                    "profile":{{"test":{test}}},"executable":"/t/{name}"}}"#
            )
        };
        let messages = [
            message("lib", "rhyve", true),
            message("bin", "rhyve", false),
            message("test", "host_boot", true),
            message("test", "nested_boot", true),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ];
        // Cargo writes each on one line.
        let messages = messages.map(|message| message.replace('\n', ""));
        let programs = parse(&messages.join("\n"));
        let of = |lane| {
            let programs = programs.iter().filter(move |program| program.runs_in(lane));
            programs.map(Program::to_string).collect::<Vec<_>>()
        };
        assert_eq!(of(Lane::Any), ["rhyve lib"]);
        assert_eq!(of(Lane::Host), ["rhyve host_boot"]);
        assert_eq!(of(Lane::Nested), ["rhyve host_boot", "rhyve nested_boot"]);
    }
}
