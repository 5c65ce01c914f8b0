//! `--boot-profile FILE`: where a boot's time goes.
//!
//! A thread of its own samples each vCPU about every millisecond: registers and the top of the stack,
//! taken by the vCPU's thread between two entries, so that both are of one moment. It ends when a
//! vCPU was seen in user mode, which is init, and a byte on a console, or when the guest ends before. Only then are
//! the stacks followed and named (`stacks`), for a kernel's names cannot be read before it runs.
//! FILE becomes JSON, and a flame graph in SVG (`svg`) is put beside it.
//!
//! Sampling takes at most a tenth of the time, by sleeping nine times as long as it takes.

mod stacks;
mod svg;

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use vmm_api::guest::View;
use vmm_api::kvm::KvmVcpu;
use vmm_api::memory::GuestRam;
use vmm_api::regs::Registers;
use vmm_api::say;
use vmm_api::state::{Activity, BootInfo};

use crate::console;
use crate::machine::Machine;

/// Between two samples, at least.
const PERIOD: Duration = Duration::from_millis(1);
/// How many times as long as a sample takes is waited for the next.
const REST: u32 = 9;
/// A boot that takes longer is not seen to its end.
const LONGEST: Duration = Duration::from_secs(120);
/// How long an init is waited for to say something.
const SILENCE: Duration = Duration::from_secs(10);
/// Samples that are kept at most: some 100 MiB.
const SAMPLES_MAX: usize = 20_000;
/// What is kept of a stack.
const STACK: usize = 4096;
const INTERRUPT_FLAG: u64 = 1 << 9;

/// The files that are to be written.
pub struct BootProfile {
    json: (PathBuf, File),
    svg: (PathBuf, File),
    program: Instant,
}

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
#[error("--boot-profile: {}", path.display())]
pub struct ProfileError {
    path: PathBuf,
    source: io::Error,
}

/// What a round of samples has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// A vCPU in user mode.
    User,
    /// None.
    Kernel,
    /// The machine is gone, or all vCPUs have halted with interrupts off.
    Dead,
}

/// A moment of a vCPU.
struct Sample {
    vcpu: u32,
    registers: Registers,
    /// From the stack pointer on.
    stack: Vec<u8>,
}

/// A part of the boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Phase {
    name: &'static str,
    /// Microseconds from rhyve's start to the phase's end; none if it never came. Loading is before
    /// rhyve's start and has its own length.
    until_us: Option<u64>,
    /// Its length in microseconds.
    us: Option<u64>,
}

#[derive(Serialize)]
struct Report<'a> {
    vm: &'a str,
    phases: Vec<Phase>,
    samples: usize,
    /// Microseconds between two samples of one vCPU, on the average.
    period_us: u64,
    stacks: Vec<stacks::Folded>,
}

impl BootProfile {
    /// Opens the files: FILE for JSON, and beside it, with the ending .svg, the flame graph.
    ///
    /// # Errors
    ///
    /// One of them cannot be written.
    pub fn create(path: &Path) -> Result<Self, ProfileError> {
        let json = match path.extension() {
            Some(end) if end == "svg" => path.with_extension("json"),
            _ => path.to_owned(),
        };
        let create = |path: PathBuf| match File::create(&path) {
            Ok(file) => Ok((path, file)),
            Err(source) => Err(ProfileError { path, source }),
        };
        Ok(Self {
            svg: create(json.with_extension("svg"))?,
            json: create(json)?,
            program: Instant::now(),
        })
    }

    /// Begins to sample a machine whose vCPUs have just been started.
    ///
    /// # Errors
    ///
    /// There is no thread to be had.
    pub fn start(
        self,
        name: &str,
        load_us: Option<u64>,
        boot: Option<BootInfo>,
        machine: Arc<Machine>,
        ram: GuestRam,
    ) -> io::Result<Profiler> {
        let stop = Arc::<Stop>::default();
        let sampler = Sampler {
            profile: self,
            name: name.to_owned(),
            load_us,
            boot,
            machine,
            ram,
            stop: stop.clone(),
            samples: Vec::new(),
            rounds: 0,
        };
        let thread = crate::thread::builder("profile").spawn(move || sampler.run())?;
        Ok(Profiler { stop, thread })
    }
}

/// A profile that is being taken.
pub struct Profiler {
    stop: Arc<Stop>,
    thread: JoinHandle<()>,
}

impl Profiler {
    /// Ends it if it has not ended by itself. Guest memory is still needed.
    pub fn finish(self) {
        self.stop.set();
        if self.thread.join().is_err() {
            tracing::error!(target: "rhyve", "the boot profile's thread panicked");
        }
    }
}

#[derive(Default)]
struct Stop {
    stop: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    fn set(&self) {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits; true if it is time to stop.
    fn wait(&self, time: Duration) -> bool {
        let stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(stop, time, |stop| !*stop);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

struct Sampler {
    profile: BootProfile,
    name: String,
    load_us: Option<u64>,
    boot: Option<BootInfo>,
    machine: Arc<Machine>,
    ram: GuestRam,
    stop: Arc<Stop>,
    samples: Vec<Sample>,
    rounds: u32,
}

impl Sampler {
    fn run(mut self) {
        let began = Instant::now();
        let mut init = None;
        while began.elapsed() < LONGEST && self.samples.len() < SAMPLES_MAX {
            let before = Instant::now();
            match self.round() {
                Seen::User => init = init.or(Some(before)),
                Seen::Kernel => {}
                // Sampling keeps them busy: nobody else would notice.
                Seen::Dead => break,
            }
            // An init may be the first that has anything to say.
            let silent = console::first_output().is_none();
            if init.is_some_and(|init| !silent || init.elapsed() > SILENCE) {
                break;
            }
            let pause = PERIOD.max(before.elapsed() * REST);
            if self.stop.wait(pause) {
                break;
            }
        }
        let sampled = began.elapsed();
        if let Err(error) = self.write(init, sampled) {
            say!("rhyve: {}: {}", self.name, crate::chain(&error));
        }
    }

    /// Samples each vCPU once.
    fn round(&mut self) -> Seen {
        let (mut user, mut alive) = (false, false);
        self.rounds += 1;
        for (vcpu, seat) in (0..).zip(&self.machine.seats) {
            let ram = self.ram.clone();
            let Some(sample) = seat.mailbox.ask(move |kvm| sample(kvm, &ram)) else {
                return Seen::Dead;
            };
            if let Some((registers, stack, halted)) = sample {
                user |= is_user(&registers);
                alive |= !halted || registers.rflags & INTERRUPT_FLAG != 0;
                self.samples.push(Sample {
                    vcpu,
                    registers,
                    stack,
                });
            }
        }
        match (user, alive) {
            (true, _) => Seen::User,
            (false, true) => Seen::Kernel,
            (false, false) => Seen::Dead,
        }
    }

    fn write(&mut self, init: Option<Instant>, sampled: Duration) -> Result<(), ProfileError> {
        let stacks = stacks::fold(&self.samples, &self.ram, self.boot.as_ref());
        let phases = self.phases(init);
        let told: Vec<_> = phases.iter().map(Phase::text).collect();
        let title = format!("{}: {}", self.name, told.join(", "));
        let report = Report {
            vm: &self.name,
            phases,
            samples: self.samples.len(),
            period_us: micros(sampled) / u64::from(self.rounds.max(1)),
            stacks,
        };
        let mut json = serde_json::to_vec_pretty(&report).unwrap_or_default();
        json.push(b'\n');
        let svg = svg::flame_graph(&title, &report.stacks);
        let files = [
            (&mut self.profile.json, json),
            (&mut self.profile.svg, svg.into_bytes()),
        ];
        for ((path, file), bytes) in files {
            file.write_all(&bytes).map_err(|source| ProfileError {
                path: path.clone(),
                source,
            })?;
        }
        say!("rhyve: {title}; see {}", self.profile.json.0.display());
        Ok(())
    }

    fn phases(&self, init: Option<Instant>) -> Vec<Phase> {
        let mailboxes = self.machine.seats.iter().map(|seat| &seat.mailbox);
        let mut ends = [
            ("tables", Some(self.machine.started)),
            ("first entry", mailboxes.filter_map(|m| m.bound()).min()),
            ("first console byte", console::first_output()),
            ("init", init),
        ];
        // What came never is last; an init may come before the first byte.
        ends.sort_by_key(|(_, end)| (end.is_none(), *end));
        let mut phases = vec![Phase {
            name: "load",
            until_us: None,
            us: self.load_us,
        }];
        let mut last = 0;
        for (name, end) in ends {
            let since = |end: Instant| micros(end.saturating_duration_since(self.profile.program));
            let until = end.map(since);
            phases.push(Phase {
                name,
                until_us: until,
                us: until.map(|until| until.saturating_sub(last)),
            });
            last = until.unwrap_or(last);
        }
        phases
    }
}

impl Phase {
    fn text(&self) -> String {
        match self.us {
            Some(us) => format!("{} {:.1} ms", self.name, us as f64 / 1e3),
            None => format!("{} -", self.name),
        }
    }
}

/// In the vCPU's thread. None for one that waits to be started, or whose registers cannot be had.
fn sample(kvm: &KvmVcpu, ram: &GuestRam) -> Option<(Registers, Vec<u8>, bool)> {
    let activity = kvm.activity().ok()?;
    if !activity.is_none_or(Activity::started) {
        return None;
    }
    let halted = activity == Some(Activity::Halted);
    let registers = kvm.registers().ok()?;
    if is_user(&registers) {
        return Some((registers, Vec::new(), halted));
    }
    let view = View {
        memory: ram,
        registers: &registers,
    };
    // A stack's end may be the end of what is mapped.
    let to_page = (4096 - registers.rsp % 4096) as usize;
    let stack = view.bytes(registers.rsp, STACK);
    let stack = stack.or_else(|_| view.bytes(registers.rsp, to_page));
    let stack = stack.unwrap_or_default();
    Some((registers, stack, halted))
}

/// Whether it executes at privilege level 3, in protected mode.
fn is_user(registers: &Registers) -> bool {
    registers.cr0 & 1 != 0 && registers.cs.selector & 3 == 3
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
