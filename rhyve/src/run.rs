//! One machine from its object to its end: open, lock, build, run, capture, store.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, gettid};
use vmm_api::capability;
use vmm_api::control::Server;
use vmm_api::kvm::KvmError;
use vmm_api::memory::{MemSize, MemoryLayout};
use vmm_api::name::VmName;
use vmm_api::root::Root;
use vmm_api::state::{Phase, StopReason, VcpuState, VmState};
use vmm_api::vm::{LockedVm, Vm, VmError};

use crate::builder::{BuildError, Built, build};
use crate::config::MachineSpec;
use crate::machine::Machine;
use crate::sequencer::{Cause, HaltWatch, Vcpu};
use crate::suspend::{SuspendHow, SuspendSink};

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
    /// A device or a table cannot be made.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// KVM refused a step.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The control socket cannot be served.
    #[error("control socket")]
    Control(#[from] vmm_api::control::ServeError),
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
pub fn run(spec: &MachineSpec) -> Result<Cause, RunError> {
    // Before there is any thread: each inherits the mask, so only the descriptor gets these.
    let signals = block_signals()?;
    let root = Root::open().map_err(VmError::from)?;
    let mut vm = Vm::open(&root, &spec.name)?.lock("rhyve")?;
    let mut state = vm.load_state()?;
    check(spec, &state)?;
    let kvm = capability::open()?;
    let ram = vm.map_memory(&state)?;
    let built = build(spec, &state, kvm, ram)?;
    state.machine.topology = Some(built.machine.topology);
    vm.reserve(VCPU_TEXT * (1 + u64::from(built.machine.vcpu_count())))?;

    // Memory is the guest's from here on. If this process is killed, what is loaded is gone.
    state.phase = Phase::Stopped {
        reason: StopReason::Killed,
        detail: None,
    };
    vm.store(&mut state)?;
    let version = env!("CARGO_PKG_VERSION");
    let server = Server::start(&vm, built.machine.clone(), "rhyve", version)?;
    let cause = see_through(&signals, &mut vm, &mut state, built);
    server.stop(&vm)?;
    let cause = cause?;
    if spec.destroy_on_poweroff && cause.reason == StopReason::PowerOff {
        vm.destroy()?;
    }
    Ok(cause)
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
) -> Result<Cause, RunError> {
    let Built {
        machine,
        vcpus,
        consoles,
        mevent,
    } = built;
    let threads = start(vcpus)?;
    let seats = machine.seats.iter().map(|seat| seat.mailbox.clone());
    let mut halt = HaltWatch::new(seats.zip(threads.iter().map(|t| t.tid)));
    let cause = wait(signals, &machine, &mut halt)?;
    capture(&machine, state);
    machine.stop_devices();
    state.phase = cause.phase();
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
    drop(consoles);
    mevent.stop();
    Ok(cause)
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
    halt: &mut HaltWatch,
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
            Ok(0) if !machine.is_paused() && halt.halted() => {
                machine.ending.suspend(SuspendHow::Halt);
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(system("wait for the guest's end")(e.into())),
        }
        while let Ok(Some(signal)) = signals.read_signal() {
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
