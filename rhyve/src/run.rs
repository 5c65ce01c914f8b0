//! One machine from its object to its end: open, lock, build, run, capture, store.

use std::ffi::OsString;
use std::mem::replace;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, gettid};
use vmm_api::capability;
use vmm_api::control::Server;
use vmm_api::kvm::KvmError;
use vmm_api::memory::{GuestRam, MemSize, MemoryLayout};
use vmm_api::name::VmName;
use vmm_api::resident;
use vmm_api::root::Root;
use vmm_api::state::{Phase, StopReason, VcpuState, VmState};
use vmm_api::vm::{LockedVm, Vm, VmError};

use crate::bootprofile::{BootProfile, ProfileError};
use crate::builder::{BuildError, Built, build};
use crate::config::MachineSpec;
use crate::console::Attached;
use crate::gdb::server::{GdbError, GdbServer};
use crate::machine::Machine;
use crate::report::{self, Death};
use crate::saving::forget;
use crate::sequencer::{Cause, HaltWatch, Stall, StallWatch, Vcpu, Watched, cpu_clock};
use crate::suspend::{SuspendHow, SuspendSink};

mod again;

/// Room in vm.json for a vCPU's registers, MSRs and local APIC, and for its XSAVE area in base64.
const VCPU_TEXT: u64 = 48 << 10;

/// What ends a machine, or asks its guest to end.
const SIGNALS: [Signal; 4] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

/// Why a machine did not start, or could not be put away.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The object cannot be opened, locked or written.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Nothing is in it.
    #[error("nothing is loaded in {0}: load it with rhyveload")]
    NotLoaded(VmName),
    /// The guest in it has ended.
    #[error("the guest in {0} has ended ({1}): load it again with rhyveload")]
    Ended(VmName, &'static str),
    /// -m says something else.
    #[error("{name} was loaded with {} of memory, not with {}: leave -m out, or load it again",
        MemSize(.loaded.total()), MemSize(.wanted.total()))]
    Memory {
        /// The VM.
        name: VmName,
        /// What the object has.
        loaded: MemoryLayout,
        /// What was asked for.
        wanted: MemoryLayout,
    },
    /// This machine's KVM cannot run it.
    #[error(transparent)]
    Host(#[from] capability::CapabilityError),
    /// How it was run before cannot be read.
    #[error("the options that the VM was suspended with are not understood")]
    Options(#[source] crate::cli::CliError),
    /// A device or a table cannot be made.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// KVM refused a step.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The control socket cannot be served.
    #[error("control socket")]
    Control(#[from] vmm_api::control::ServeError),
    /// The debug server cannot listen.
    #[error(transparent)]
    Gdb(#[from] GdbError),
    /// The boot's profile cannot be written.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// A thread, a descriptor or a signal cannot be had.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
}

fn system(action: &'static str) -> impl Fn(std::io::Error) -> RunError {
    move |source| RunError::System { action, source }
}

/// Runs the machine until it ends, and says why it did.
///
/// # Errors
///
/// It does not start. The object is then as it was.
pub fn run(
    spec: MachineSpec,
    args: &[OsString],
    boot_profile: Option<&Path>,
) -> Result<Cause, RunError> {
    let boot_profile = boot_profile.map(BootProfile::create).transpose()?;
    // Before there is any thread: each inherits the mask, so only the descriptor gets these.
    let signals = block_signals()?;
    let root = Root::open().map_err(VmError::from)?;
    let mut vm = Vm::open(&root, &spec.name)?.lock("rhyve")?;
    let mut state = vm.load_state()?;
    let (spec, run) = again::options(spec, args, &state)?;
    let spec = &spec;
    check(spec, &state)?;
    let kvm = capability::open()?;
    let ram = vm.map_memory(&state)?;
    let built = build(spec, &state, kvm, ram, run)?;
    forget(&mut state);
    state.machine.topology = Some(built.machine.topology);
    vm.reserve(VCPU_TEXT * (1 + u64::from(built.machine.vcpu_count())))?;
    let gdb = spec.gdb.as_ref().zip(built.vcpus.first());
    let gdb = gdb.map(|(gdb, vcpu)| GdbServer::start(gdb, &built.machine, vcpu.ram.clone()));
    let gdb = gdb.transpose()?;

    let template = (root, state.clone());
    // The first and only time.
    let _ = built.machine.object.set(template);
    // Before the object says that the guest has it: whoever reads that finds somebody to ask.
    let version = env!("CARGO_PKG_VERSION");
    let server = Server::start(&vm, built.machine.clone(), "rhyve", version)?;
    let cause = hand_over(&mut vm, &mut state, &built.machine)
        .and_then(|()| see_through(&signals, &mut vm, &mut state, built, boot_profile));
    drop(gdb);
    server.stop(&vm)?;
    let cause = cause?;
    if spec.destroy_on_poweroff && cause.reason == StopReason::PowerOff {
        vm.destroy()?;
    }
    Ok(cause)
}

/// Says that memory is the guest's from here on: if this process is killed, what is loaded is gone.
fn hand_over(vm: &mut LockedVm, state: &mut VmState, machine: &Machine) -> Result<(), RunError> {
    let mut killed = state.clone();
    killed.phase = Phase::Stopped {
        reason: StopReason::Killed,
        detail: None,
    };
    // As many as there are; what became of them nobody will know.
    let vcpus = machine.seats.len();
    killed.vcpus.resize_with(vcpus, VcpuState::reset);
    vm.store(&mut killed)?;
    *state = killed;
    Ok(vm.remove_report()?)
}

fn check(spec: &MachineSpec, state: &VmState) -> Result<(), RunError> {
    let name = || spec.name.clone();
    match &state.phase {
        Phase::Created => return Err(RunError::NotLoaded(name())),
        Phase::Stopped { reason, .. } => return Err(RunError::Ended(name(), reason.words())),
        Phase::Loaded | Phase::Suspended => {}
    }
    let loaded = state.machine.memory;
    match spec.memory {
        Some(wanted) if wanted != loaded => Err(RunError::Memory {
            name: name(),
            loaded,
            wanted,
        }),
        _ => Ok(()),
    }
}

fn block_signals() -> Result<SignalFd, RunError> {
    let set = SigSet::from_iter(SIGNALS);
    // An image that reaches RLIMIT_FSIZE is an error of the guest's write (EFBIG), not our end.
    let mut blocked = set;
    blocked.add(Signal::SIGXFSZ);
    // A terminal's new size is told to guests that have a console for it.
    let mut set = set;
    set.add(Signal::SIGWINCH);
    blocked.add(Signal::SIGWINCH);
    blocked
        .thread_block()
        .map_err(|e| system("block signals")(e.into()))?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    SignalFd::with_flags(&set, flags).map_err(|e| system("wait for signals")(e.into()))
}

/// From the first entry into the guest to the stored last state.
fn see_through(
    signals: &SignalFd,
    vm: &mut LockedVm,
    state: &mut VmState,
    built: Built,
    boot_profile: Option<BootProfile>,
) -> Result<Cause, RunError> {
    let Built {
        machine,
        vcpus,
        consoles,
        sockets,
        mevent,
    } = built;
    let ram = vcpus.first().map(|vcpu| vcpu.ram.clone());
    let threads = start(vcpus)?;
    let profiler = match boot_profile.zip(ram.clone()) {
        Some((profile, ram)) => {
            let boot = state.machine.boot.clone();
            let (name, load_us) = (vm.name().as_str(), state.machine.load_us);
            let started = profile.start(name, load_us, boot, machine.clone(), ram);
            Some(started.map_err(system("start the boot profile's thread"))?)
        }
        None => None,
    };
    let seats = machine.seats.iter().map(|seat| seat.mailbox.clone());
    let mut halt = HaltWatch::new(seats.zip(threads.iter().map(|t| t.tid)));
    let seats = machine.seats.iter().zip(&threads);
    let mut stalls = Stalls {
        watch: Some(StallWatch::new(seats.map(|(seat, thread)| Watched {
            mailbox: seat.mailbox.clone(),
            counters: seat.counters.clone(),
            clock: cpu_clock(thread.tid),
        }))),
        death: None,
        tries: 3,
        ram: ram.clone(),
    };
    let mut started = false;
    let mut cause = wait(signals, &machine, &consoles, &mut halt, |machine| {
        if !replace(&mut started, true) {
            // Most of it will not run again.
            resident::give_back();
        }
        stalls.look(vm, state, machine);
    })?;
    if let Some(profiler) = profiler {
        profiler.finish();
    }
    let suspended = machine.suspended.lock();
    let suspended = suspended.unwrap_or_else(PoisonError::into_inner).take();
    match suspended.filter(|_| cause == Cause::suspended()) {
        Some(saved) => {
            machine.rtc.save().store(state);
            saved.store(state);
            machine.stop_devices();
        }
        None => {
            capture(&machine, state);
            machine.stop_devices();
            if let Some(ram) = &ram {
                cause.written = report::at_end(vm, state, &cause, ram);
            }
            state.phase = cause.phase();
        }
    }
    // Nobody writes to memory any more. What a clone has written is nowhere else.
    let cause = match machine.ram.keep() {
        Ok(()) => cause,
        Err(error) => {
            let cause = Cause::error(crate::chain(&error));
            state.phase = cause.phase();
            cause
        }
    };
    // The last store: it uses up the room that was set aside, and leaves none for another.
    vm.reserve(0)?;
    vm.store(state)?;
    machine.seats.iter().for_each(|seat| seat.mailbox.quit());
    for thread in threads {
        if thread.handle.join().is_err() {
            tracing::error!(target: "rhyve", "a vCPU's thread panicked");
        }
    }
    // Consoles write out what is pending and restore the terminal.
    drop((consoles, sockets));
    mevent.stop();
    Ok(cause)
}

/// Reports once of a machine that makes no progress.
struct Stalls {
    watch: Option<StallWatch>,
    death: Option<Death>,
    /// How often its place is still looked for: a kernel may be at its very start.
    tries: u32,
    ram: Option<GuestRam>,
}

impl Stalls {
    fn look(&mut self, vm: &LockedVm, state: &VmState, machine: &Machine) {
        let (Some(watch), Some(ram)) = (&mut self.watch, &self.ram) else {
            return;
        };
        let why = match watch.look(HaltWatch::PERIOD) {
            Some(Stall::Dark(vcpu)) => {
                format!("makes no progress: vCPU {vcpu} runs with interrupts off, on and on")
            }
            Some(Stall::Busy) => {
                if self.death.is_none() && self.tries > 0 {
                    self.tries -= 1;
                    let registers = machine.ask(0, |kvm| kvm.registers());
                    let registers = registers.ok().and_then(Result::ok);
                    let boot = state.machine.boot.as_ref();
                    self.death = registers.and_then(|r| Death::find(ram, &[r], boot));
                    // A kernel has a hundred thousand names.
                    resident::give_back();
                }
                if self.death.as_ref().is_none_or(|death| !death.is(ram)) {
                    return;
                }
                "makes no progress: its kernel has panicked".to_owned()
            }
            None => return,
        };
        report::of_stall(vm, state, machine, &why, ram);
        resident::give_back();
        // Once is enough.
        self.watch = None;
    }
}

struct Thread {
    handle: JoinHandle<()>,
    tid: Pid,
}

fn start(vcpus: Vec<Vcpu>) -> Result<Vec<Thread>, RunError> {
    let mut threads = Vec::with_capacity(vcpus.len());
    for vcpu in vcpus {
        let (send, receive) = std::sync::mpsc::sync_channel(1);
        let handle = crate::thread::builder(format!("vcpu-{}", vcpu.kvm.index()))
            .spawn(move || {
                // The receiver waits for exactly this.
                let _ = send.send(gettid());
                vcpu.run();
            })
            .map_err(system("start a vCPU's thread"))?;
        let gone = || system("start a vCPU's thread")(std::io::ErrorKind::BrokenPipe.into());
        threads.push(Thread {
            handle,
            tid: receive.recv().map_err(|_| gone())?,
        });
    }
    Ok(threads)
}

/// Waits for the end, passing signals on to the guest.
fn wait(
    signals: &SignalFd,
    machine: &Arc<Machine>,
    consoles: &[Attached],
    halt: &mut HaltWatch,
    mut look: impl FnMut(&Machine),
) -> Result<Cause, RunError> {
    let period = u16::try_from(HaltWatch::PERIOD.as_millis()).unwrap_or(u16::MAX);
    let mut asked = false;
    loop {
        if let Some(cause) = machine.ending.cause() {
            return Ok(cause.clone());
        }
        let mut fds = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(machine.ending.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::from(period)) {
            Ok(0) if machine.is_paused() => {}
            Ok(0) if halt.halted() => machine.ending.suspend(SuspendHow::Halt),
            Ok(0) => look(machine),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(system("wait for the guest's end")(e.into())),
        }
        while let Ok(Some(signal)) = signals.read_signal() {
            if signal.ssi_signo == Signal::SIGWINCH as u32 {
                consoles.iter().for_each(Attached::resized);
                continue;
            }
            let terminate = signal.ssi_signo == Signal::SIGTERM as u32;
            if terminate && !asked && machine.press_power_button() {
                asked = true;
                continue;
            }
            let name = i32::try_from(signal.ssi_signo)
                .ok()
                .and_then(|n| Signal::try_from(n).ok());
            machine
                .ending
                .end(Cause::stopped(name.map_or("signal", Signal::as_str)));
        }
    }
}

/// Takes the last state of every vCPU; one that cannot be had keeps what was stored before.
fn capture(machine: &Machine, state: &mut VmState) {
    if let Err(stuck) = machine.hold() {
        tracing::error!(target: "rhyve", "{stuck}: its last state is not stored");
    }
    state
        .vcpus
        .resize_with(machine.seats.len(), VcpuState::reset);
    machine.rtc.save().store(state);
    for (vcpu, place) in (0..).zip(&mut state.vcpus) {
        match machine.ask(vcpu, |kvm| kvm.capture()) {
            Ok(Ok(captured)) => {
                let pinning = std::mem::take(&mut place.pinning);
                *place = VcpuState {
                    pinning,
                    ..captured
                };
            }
            Ok(Err(error)) => tracing::error!(target: "rhyve", "{}", crate::chain(&error)),
            Err(refusal) => tracing::error!(target: "rhyve", "{refusal}"),
        }
    }
}
