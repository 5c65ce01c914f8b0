//! The lines on the control socket, protocol version [`PROTOCOL`].
//!
//! Every line is one JSON object. The server speaks first ([`Hello`]); then each [`Call`] of a
//! client is answered by one [`Answer`] of the same id, in order:
//!
//! ```text
//! {"protocol":1,"program":"rhyve","version":"0.1.0","pid":4711,"vm":"guest0","vcpus":2}
//! {"id":1,"request":{"registers":{"vcpu":0}}}
//! {"id":1,"result":{"ok":{"registers":{"rip":"0xfff0",...}}}}
//! {"id":2,"request":"pause"}
//! {"id":2,"result":{"error":"ending"}}
//! ```
//!
//! Fields that a reader does not know are passed over, so that fields may be added; anything else is
//! a new version.

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::encoding::{bulk, hex};
use crate::inspect::{DeviceDetail, MachineDetail, VcpuDetail};
use crate::memory::MemoryLayout;
use crate::profile::ExitStats;
use crate::regs::{Access, Reg, RegError, Registers, SegReg};
use crate::stats::{VcpuStats, VmStats};

/// The version of what is spoken here.
pub const PROTOCOL: u32 = 1;

/// Longest line that a server reads, in bytes, its newline not counted.
pub const REQUEST_MAX: usize = 64 << 10;

/// Longest line that a client reads, in bytes.
pub const ANSWER_MAX: usize = 1 << 20;

/// The server's first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`] of the server.
    pub protocol: u32,
    /// The serving program.
    pub program: String,
    /// Its version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// The VM that it runs.
    pub vm: String,
    /// How many vCPUs that VM has.
    pub vcpus: u32,
}

/// One request with its number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the client.
    pub id: u64,
    /// What is asked.
    pub request: Request,
}

/// What a client may ask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// What the machine is doing.
    Status,
    /// All registers of one vCPU.
    Registers {
        /// Its index.
        vcpu: u32,
    },
    /// Changes to one vCPU: all of them or none.
    Update {
        /// Its index.
        vcpu: u32,
        /// Applied in this order.
        changes: Vec<Change>,
    },
    /// What one vCPU has counted.
    VcpuStats {
        /// Its index.
        vcpu: u32,
    },
    /// What the machine has counted.
    VmStats,
    /// Why one vCPU left the guest, by place and caller.
    Exits {
        /// Its index.
        vcpu: u32,
    },
    /// Count from 0 again.
    ResetStats,
    /// Hold every vCPU.
    Pause,
    /// Go on.
    Resume,
    /// Hold one vCPU.
    SuspendCpu {
        /// Its index.
        vcpu: u32,
    },
    /// Let one vCPU go on.
    ResumeCpu {
        /// Its index.
        vcpu: u32,
    },
    /// Have one vCPU execute one instruction; the machine is paused afterwards.
    Step {
        /// Its index.
        vcpu: u32,
    },
    /// Run until a vCPU comes to an instruction; the machine is paused afterwards.
    RunUntil {
        /// Linear address of the instruction.
        #[serde(with = "hex")]
        address: u64,
        /// Milliseconds at most.
        ms: u32,
    },
    /// End in the middle, with the whole machine stored.
    Suspend,
    /// Write what a clone's memory holds to its file.
    Settle,
    /// Make a suspended VM that is as this one is now.
    Snapshot {
        /// Its name.
        name: String,
    },
    /// Forced power-off.
    Stop,
    /// Forced reset.
    Reset,
    /// The ACPI power button.
    PowerButton,
    /// A non-maskable interrupt.
    Nmi {
        /// For this vCPU.
        vcpu: u32,
    },
    /// What one vCPU has beyond registers.
    VcpuDetail {
        /// Its index.
        vcpu: u32,
    },
    /// What the machine is made of.
    MachineDetail,
    /// What its devices are, and what they have served.
    Devices,
    /// Ask the guest for memory.
    SetBalloon {
        /// Bytes in all.
        bytes: u64,
    },
    /// Plug a network card's cable in, or out.
    SetLink {
        /// Where the card is, as `-s` says it.
        slot: String,
        /// In.
        up: bool,
    },
    /// Make a disk larger.
    SetDisk {
        /// Where the disk is, as `-s` says it.
        slot: String,
        /// Bytes; none: as large as its image has become.
        bytes: Option<u64>,
    },
    /// Pin a vCPU's thread.
    Pin {
        /// Its index.
        vcpu: u32,
        /// Host processors; empty: run anywhere.
        cpus: BTreeSet<usize>,
    },
    /// Turn x2APIC mode on or off.
    X2apic {
        /// The vCPU.
        vcpu: u32,
        /// On.
        on: bool,
    },
    /// Put an event into a vCPU.
    Inject {
        /// Its index.
        vcpu: u32,
        /// Which.
        event: Event,
    },
    /// What the CMOS clock shows and holds.
    Rtc,
    /// Set the CMOS clock.
    SetRtcTime {
        /// Seconds since 1970-01-01 00:00 of the clock's own time zone.
        seconds: i64,
    },
    /// Write one byte of the CMOS memory.
    SetRtcNvram {
        /// Its offset, beyond the clock's registers.
        offset: u8,
        /// Its new value.
        value: u8,
    },
}

/// An event that is put into a vCPU from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// An interrupt by its vector (libvmmapi's vm_lapic_irq).
    Interrupt {
        /// The vector.
        vector: u8,
    },
    /// A pin of the local APIC's vector table (vm_lapic_local_irq).
    LocalPin {
        /// 0 timer, 1 LINT0, 2 LINT1, 3 error, 4 performance counters, 5 thermal, 6 CMCI.
        pin: u32,
    },
    /// An exception (vm_inject_exception).
    Exception {
        /// The vector.
        vector: u8,
        /// The error code, if it pushes one.
        #[serde(default)]
        error: Option<u32>,
    },
}

/// What the CMOS clock shows and holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// Seconds since 1970-01-01 00:00 of the clock's own time zone.
    pub seconds: i64,
    /// Its 128 bytes as the guest would read them.
    #[serde(with = "bulk")]
    pub nvram: Vec<u8>,
}

/// One change to a vCPU's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// A register, or a segment's selector.
    Register {
        /// Which.
        #[serde(with = "by_name")]
        reg: Reg,
        /// Its new value.
        #[serde(with = "hex")]
        value: u64,
    },
    /// A segment's hidden part, or a table register; the selector stays.
    Descriptor {
        /// Which.
        #[serde(with = "by_name")]
        seg: SegReg,
        /// Linear base address.
        #[serde(with = "hex")]
        base: u64,
        /// Limit in bytes, inclusive.
        limit: u32,
        /// Access rights in the VMX format; of no account for a table register.
        access: Access,
    },
}

impl Change {
    /// Applies one change.
    ///
    /// # Errors
    ///
    /// The register cannot be set to that.
    pub fn apply(self, registers: &mut Registers) -> Result<(), RegError> {
        match self {
            Self::Register { reg, value } => registers.set(reg, value),
            Self::Descriptor {
                seg,
                base,
                limit,
                access,
            } => registers.set_desc(seg, base, limit, access),
        }
    }

    /// The registers after all of `changes`.
    ///
    /// # Errors
    ///
    /// One of them cannot be applied: then none is.
    pub fn apply_all(changes: &[Self], registers: &Registers) -> Result<Registers, RegError> {
        let mut changed = registers.clone();
        changes.iter().try_for_each(|c| c.apply(&mut changed))?;
        Ok(changed)
    }
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The request's number; none when the request had none that could be read.
    pub id: Option<u64>,
    /// What came of it.
    pub result: Outcome,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was done.
    Ok(Reply),
    /// It was not.
    Error(Refusal),
}

/// What a request that was done brings back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Nothing to tell.
    Done,
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::Registers`].
    Registers(Box<Registers>),
    /// To [`Request::RunUntil`].
    Reached {
        /// The vCPU that is there; none if time was over before.
        vcpu: Option<u32>,
    },
    /// To [`Request::VcpuStats`].
    VcpuStats(VcpuStats),
    /// To [`Request::VmStats`].
    VmStats(VmStats),
    /// To [`Request::Exits`].
    Exits(Box<ExitStats>),
    /// To [`Request::VcpuDetail`].
    VcpuDetail(Box<VcpuDetail>),
    /// To [`Request::MachineDetail`].
    MachineDetail(Box<MachineDetail>),
    /// To [`Request::Devices`].
    Devices(Vec<DeviceDetail>),
    /// To [`Request::Rtc`].
    Rtc(RtcState),
}

/// What a machine is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether its vCPUs may execute.
    pub phase: RunPhase,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// Milliseconds since its first instruction, time in pause included.
    pub uptime_ms: u64,
    /// Where its RAM lies.
    pub memory: MemoryLayout,
}

/// Whether a machine's vCPUs may execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunPhase {
    /// They may.
    Running,
    /// They are held.
    Paused,
}

impl RunPhase {
    /// The phase in one word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
        }
    }
}

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Refusal {
    /// No vCPU has this index.
    #[error("there is no vCPU {vcpu}: the VM has {vcpus}, numbered from 0")]
    NoSuchVcpu {
        /// What was asked for.
        vcpu: u32,
        /// How many there are.
        vcpus: u32,
    },
    /// A register cannot be set to that; nothing was changed.
    #[error("{0}")]
    Register(String),
    /// KVM refused.
    #[error("KVM: {action}: {reason}")]
    Kvm {
        /// What was tried.
        action: String,
        /// The system's answer.
        reason: String,
    },
    /// A vCPU did not answer in time.
    #[error("vCPU {vcpu} does not answer")]
    Timeout {
        /// Its index.
        vcpu: u32,
    },
    /// The VM is about to end.
    #[error("the VM is ending")]
    Ending,
    /// It was tried, and did not come about.
    #[error("{0}")]
    Failed(String),
    /// This machine has no such thing.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The line is no request of this protocol.
    #[error("the request is not understood: {0}")]
    Malformed(String),
    /// The line is longer than [`REQUEST_MAX`].
    #[error("the request has more than {REQUEST_MAX} bytes")]
    TooLong,
    /// The server has no room for this client.
    #[error("{limit} programs are connected to this VM, no more are served: try again")]
    TooManyClients {
        /// How many are served.
        limit: usize,
    },
    /// The client belongs to another user.
    #[error("uid {0} may not control this VM")]
    NotPermitted(u32),
}

impl From<RegError> for Refusal {
    fn from(error: RegError) -> Self {
        Self::Register(error.to_string())
    }
}

/// A message as its line, newline included.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Only maps with odd keys or a failing writer make serde_json fail, and there is neither here;
    // an empty line would be answered by the other side's error.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// A line, without its newline, as a message.
///
/// # Errors
///
/// It is none.
pub fn decode<T: DeserializeOwned>(line: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(line)
}

/// A line that [`decode`] did not take as a [`Call`]: the answer to it.
pub fn malformed(line: &[u8], error: &serde_json::Error) -> Answer {
    #[derive(Deserialize)]
    struct Numbered {
        id: u64,
    }
    Answer {
        id: decode::<Numbered>(line).ok().map(|n| n.id),
        result: Outcome::Error(Refusal::Malformed(error.to_string())),
    }
}

/// A name that is shown and parsed, as text.
mod by_name {
    use std::borrow::Cow;
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(d: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        Cow::<'de, str>::deserialize(d)?
            .parse()
            .map_err(D::Error::custom)
    }
}
