//! What can go wrong, and the exit status that says so.

use std::path::PathBuf;
use std::process::ExitCode;

use vmm_api::control::{ClientError, Refusal};
use vmm_api::guest::{GuestError, SymbolError};
use vmm_api::inspect::CoreError;
use vmm_api::name::VmName;
use vmm_api::pagewalk::WalkError;
use vmm_api::regs::RegError;
use vmm_api::root::RootError;
use vmm_api::state::{Phase, StateError};
use vmm_api::vm::VmError;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// All was done.
    Done,
    /// Something failed; what comes later in the order was not done.
    Failed,
    /// Something was asked that KVM does not show.
    Unavailable,
    /// The command line is wrong (EX_USAGE of sysexits.h); nothing was done.
    Usage,
    /// `--run`: rhyve's own.
    Rhyve(u8),
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        Self::from(match status {
            Status::Done => 0,
            Status::Failed => 1,
            Status::Unavailable => 2,
            Status::Usage => 64,
            Status::Rhyve(status) => status,
        })
    }
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The root directory.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The VM's object.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The running VM.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A register cannot be read or set so.
    #[error("{vm}: {source}")]
    Register {
        /// The VM.
        vm: VmName,
        /// Why not.
        source: RegError,
    },
    /// The stored VM has no such vCPU.
    #[error("{vm}: {refusal}")]
    Refused {
        /// The VM.
        vm: VmName,
        /// Why.
        refusal: Refusal,
    },
    /// What was asked is only known of a running VM.
    #[error("{vm} is not running: {}", match phase {
        Phase::Created => "nothing is loaded in it; load it with rhyveload".to_owned(),
        Phase::Loaded | Phase::Suspended => format!("run it with rhyve {vm}, or vmmctl --vm={vm} --run"),
        Phase::Stopped { .. } => "its guest has ended; load it again with rhyveload".to_owned(),
    })]
    NotRunning {
        /// The VM.
        vm: VmName,
        /// What it is instead.
        phase: Phase,
    },
    /// A clone is of what stands still.
    #[error("{0} runs: clone a copy of it, which --snapshot=NAME makes, or --suspend it first")]
    CloneOfRunning(VmName),
    /// A VM that was told to end goes on.
    #[error("{0} was told to end, but still runs: see what its rhyve says, or kill it")]
    NotEnding(VmName),
    /// Asked for something that KVM does not show. The names are the options'.
    #[error("not available through KVM, which shows no field of a VMCS or VMCB: {}", .0.join(" "))]
    Unavailable(Vec<String>),
    /// Asked for a device of the host's.
    #[error(
        "rhyve hands no PCI device of the host's to a guest: on Linux that is VFIO's, see driverctl(8)"
    )]
    Passthru,
    /// This machine's KVM, or this VM so far, has nothing to tell.
    #[error("{vm}: {option} is not available through this machine's KVM, or not yet")]
    Unknown {
        /// The VM.
        vm: VmName,
        /// What was asked for.
        option: &'static str,
    },
    /// KVM has it fixed.
    #[error("{vm}: capability {name} {}", match is {
        Some(true) => "is set, and KVM lets nobody clear it",
        Some(false) => "is not set, and KVM lets nobody set it",
        None => "is not available through KVM",
    })]
    Capability {
        /// The VM.
        vm: VmName,
        /// bhyve's name of it.
        name: String,
        /// Whether it is set.
        is: Option<bool>,
    },
    /// The VM has no clock so far.
    #[error("{0} has no CMOS clock yet: run it, or set it with --set-rtc-time or --set-rtc-nvram")]
    NoClock(VmName),
    /// There is no such processor to be pinned to.
    #[error("this machine has no processor {0}: see lscpu(1)")]
    NoHostCpu(usize),
    /// An address leads nowhere.
    #[error("{vm}")]
    Walk {
        /// The VM.
        vm: VmName,
        /// Why.
        source: WalkError,
    },
    /// The guest's kernel does not tell.
    #[error("{vm}")]
    Guest {
        /// The VM.
        vm: VmName,
        /// Why not.
        source: GuestError,
    },
    /// There are no names for addresses.
    #[error("{vm}")]
    Symbols {
        /// The VM.
        vm: VmName,
        /// Why not.
        source: SymbolError,
    },
    /// The kernel has nothing of this name.
    #[error(
        "{vm}: its kernel has nothing called {name}: see /proc/kallsyms there, or give an address"
    )]
    NoSymbol {
        /// The VM.
        vm: VmName,
        /// What was asked for.
        name: String,
    },
    /// A signal came before a vCPU was where it was waited for.
    #[error("{vm}: interrupted before a vCPU came to {place}; the VM is {phase}, as before")]
    Interrupted {
        /// The VM.
        vm: VmName,
        /// Where it should have come.
        place: String,
        /// What it does now.
        phase: &'static str,
    },
    /// Signals cannot be waited for.
    #[error("signals cannot be blocked")]
    Signals(#[source] nix::errno::Errno),
    /// There is no core file.
    #[error("{vm}: {}", path.display())]
    Core {
        /// The VM.
        vm: VmName,
        /// Where it was to be.
        path: PathBuf,
        /// Why not.
        source: CoreError,
    },
    /// The stored state of a device is of no use.
    #[error("{vm}")]
    State {
        /// The VM.
        vm: VmName,
        /// What is wrong.
        source: StateError,
    },
    /// `top` where there is no terminal.
    #[error("top shows itself on a terminal, and this is none: use --list, or --get-exits")]
    NoTerminal,
    /// The terminal does not do what it should.
    #[error("the terminal")]
    Terminal(#[source] std::io::Error),
    /// Nothing can be said.
    #[error("standard output")]
    Output(#[source] std::io::Error),
    /// rhyve cannot be started.
    #[error("cannot start {program}")]
    Run {
        /// What was to be started.
        program: String,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl Error {
    /// The exit status that says so.
    pub fn status(&self) -> Status {
        match self {
            Self::Unavailable(_)
            | Self::Passthru
            | Self::Unknown { .. }
            | Self::Capability { .. }
            | Self::Register {
                source: RegError::Unavailable(_),
                ..
            } => Status::Unavailable,
            _ => Status::Failed,
        }
    }
}

/// `outer: cause: its cause`; a cause that the outer text says already is passed over.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
