//! The client's side of control.sock: connect, check the hello, call.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt::SendTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::Deserialize;

use super::proto::{
    ANSWER_MAX, Answer, Call, Change, Event, Hello, Outcome, PROTOCOL, Refusal, Reply, Request,
    RtcState, Status, decode, encode,
};
use crate::inspect::{DeviceDetail, MachineDetail, VcpuDetail};
use crate::name::VmName;
use crate::profile::ExitStats;
use crate::regs::Registers;
use crate::stats::{VcpuStats, VmStats};
use crate::vm::Vm;

/// How long a server may take for one answer.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Why a running VM cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: the VM does not run (any more), or its `rhyve` is not that far yet.
    #[error("{0} has no control socket: it is starting or ending, or its rhyve was killed")]
    Absent(VmName),
    /// The server did not answer in time.
    #[error("{vm} does not answer: its rhyve is stopped or hangs")]
    Timeout {
        /// The VM.
        vm: VmName,
    },
    /// The server went away in the middle.
    #[error("{0} ended in the middle of the conversation")]
    Closed(VmName),
    /// The server speaks another version.
    #[error(
        "{vm} is run by {program} {version}, whose control protocol is version {theirs}, not {PROTOCOL}: use the vmmctl that came with it"
    )]
    Version {
        /// The VM.
        vm: VmName,
        /// The serving program.
        program: String,
        /// Its version.
        version: String,
        /// Its protocol's version.
        theirs: u32,
    },
    /// What came is not of this protocol.
    #[error("{vm}: its control socket says what vmmctl does not understand: {what}")]
    Protocol {
        /// The VM.
        vm: VmName,
        /// What is wrong.
        what: String,
    },
    /// The server refused.
    #[error("{vm}: {refusal}")]
    Refused {
        /// The VM.
        vm: VmName,
        /// Why.
        refusal: Refusal,
    },
    /// The connection failed.
    #[error("{vm}: control socket")]
    Io {
        /// The VM.
        vm: VmName,
        /// The system's answer.
        source: io::Error,
    },
}

/// A connection to a VM that runs.
#[derive(Debug)]
pub struct Client {
    lines: Lines,
    hello: Hello,
    next_id: u64,
}

impl Client {
    /// Connects to the `rhyve` that runs `vm`, and checks that both speak the same version.
    ///
    /// # Errors
    ///
    /// It does not run, does not answer in time, or speaks another version.
    pub fn connect(vm: &Vm) -> Result<Self, ClientError> {
        Self::connect_within(vm, PATIENCE)
    }

    /// The same with another limit than [`PATIENCE`] for this and for each answer.
    ///
    /// # Errors
    ///
    /// As [`Client::connect`].
    pub fn connect_within(vm: &Vm, patience: Duration) -> Result<Self, ClientError> {
        let io = |source| ClientError::Io {
            vm: vm.name().clone(),
            source,
        };
        let stream = dial(vm, patience).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ECONNREFUSED => ClientError::Absent(vm.name().clone()),
            Errno::EAGAIN => ClientError::Timeout {
                vm: vm.name().clone(),
            },
            errno => io(errno.into()),
        })?;
        Self::greet(stream, vm.name().clone(), patience)
    }

    pub(super) fn greet(
        stream: UnixStream,
        vm: VmName,
        patience: Duration,
    ) -> Result<Self, ClientError> {
        let timeout = stream.set_write_timeout(Some(patience));
        let mut lines = Lines {
            stream,
            vm,
            rest: Vec::new(),
            patience,
        };
        timeout.map_err(|e| lines.error(e))?;
        let line = lines.next(Instant::now() + patience)?;
        let hello = lines.hello(&line)?;
        Ok(Self {
            lines,
            hello,
            next_id: 1,
        })
    }

    /// What the server said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Makes one request and waits for its answer.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] is the machine's answer, after which other requests may be made; any
    /// other error ends the conversation.
    pub fn call(&mut self, request: Request) -> Result<Reply, ClientError> {
        let deadline = Instant::now() + self.lines.patience;
        let id = self.next_id;
        self.next_id += 1;
        let line = encode(&Call { id, request });
        let sent = self.lines.stream.write_all(&line);
        // A server that refuses a client closes at once: what it said is still there to be read.
        match sent {
            Err(e) if e.kind() != ErrorKind::BrokenPipe => return Err(self.lines.error(e)),
            _ => {}
        }
        let line = self.lines.next(deadline)?;
        let answer: Answer =
            decode(&line).map_err(|e| self.lines.protocol(format!("an answer: {e}")))?;
        match (answer.id, answer.result) {
            (Some(got), Outcome::Ok(reply)) if got == id => Ok(reply),
            (Some(got), Outcome::Error(refusal)) if got == id => Err(self.lines.refused(refusal)),
            (None, Outcome::Error(refusal)) => Err(self.lines.refused(refusal)),
            (got, _) => Err(self
                .lines
                .protocol(format!("answer {got:?} to request {id}"))),
        }
    }

    fn expect<T>(
        &mut self,
        request: Request,
        pick: impl FnOnce(Reply) -> Option<T>,
    ) -> Result<T, ClientError> {
        let reply = self.call(request)?;
        pick(reply).ok_or_else(|| self.lines.protocol("an answer to another request".into()))
    }

    fn done(&mut self, request: Request) -> Result<(), ClientError> {
        self.expect(request, |r| matches!(r, Reply::Done).then_some(()))
    }

    /// What the machine is doing.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn status(&mut self) -> Result<Status, ClientError> {
        self.expect(Request::Status, |r| match r {
            Reply::Status(status) => Some(status),
            _ => None,
        })
    }

    /// All registers of one vCPU.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn registers(&mut self, vcpu: u32) -> Result<Registers, ClientError> {
        self.expect(Request::Registers { vcpu }, |r| match r {
            Reply::Registers(registers) => Some(*registers),
            _ => None,
        })
    }

    /// Changes registers of one vCPU, all or none.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn update(&mut self, vcpu: u32, changes: Vec<Change>) -> Result<(), ClientError> {
        self.done(Request::Update { vcpu, changes })
    }

    /// What one vCPU has counted.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn vcpu_stats(&mut self, vcpu: u32) -> Result<VcpuStats, ClientError> {
        self.expect(Request::VcpuStats { vcpu }, |r| match r {
            Reply::VcpuStats(stats) => Some(stats),
            _ => None,
        })
    }

    /// What the machine has counted.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn vm_stats(&mut self) -> Result<VmStats, ClientError> {
        self.expect(Request::VmStats, |r| match r {
            Reply::VmStats(stats) => Some(stats),
            _ => None,
        })
    }

    /// Why one vCPU left the guest.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn exits(&mut self, vcpu: u32) -> Result<ExitStats, ClientError> {
        self.expect(Request::Exits { vcpu }, |r| match r {
            Reply::Exits(exits) => Some(*exits),
            _ => None,
        })
    }

    /// Begins to count anew.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn reset_stats(&mut self) -> Result<(), ClientError> {
        self.done(Request::ResetStats)
    }

    /// Holds every vCPU.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn pause(&mut self) -> Result<(), ClientError> {
        self.done(Request::Pause)
    }

    /// Lets every vCPU go on.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn resume(&mut self) -> Result<(), ClientError> {
        self.done(Request::Resume)
    }

    /// Holds one vCPU; the others go on.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn suspend_cpu(&mut self, vcpu: u32) -> Result<(), ClientError> {
        self.done(Request::SuspendCpu { vcpu })
    }

    /// Lets one vCPU go on, whatever the others do.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn resume_cpu(&mut self, vcpu: u32) -> Result<(), ClientError> {
        self.done(Request::ResumeCpu { vcpu })
    }

    /// Has one vCPU execute one instruction; the machine is paused afterwards.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn step(&mut self, vcpu: u32) -> Result<(), ClientError> {
        self.done(Request::Step { vcpu })
    }

    /// Lets it run until a vCPU comes to this linear address, for `ms` milliseconds at most: which one.
    /// The machine is paused afterwards.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn run_until(&mut self, address: u64, ms: u32) -> Result<Option<u32>, ClientError> {
        self.expect(Request::RunUntil { address, ms }, |r| match r {
            Reply::Reached { vcpu } => Some(vcpu),
            _ => None,
        })
    }

    /// Ends it in the middle, to be run again from there.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn suspend(&mut self) -> Result<(), ClientError> {
        self.done(Request::Suspend)
    }

    /// Has what a clone's memory holds written to its file.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn settle(&mut self) -> Result<(), ClientError> {
        self.done(Request::Settle)
    }

    /// Makes a suspended VM that is as this one is now.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn snapshot(&mut self, name: &VmName) -> Result<(), ClientError> {
        self.done(Request::Snapshot {
            name: name.to_string(),
        })
    }

    /// Forces a power-off.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn stop(&mut self) -> Result<(), ClientError> {
        self.done(Request::Stop)
    }

    /// Forces a reset.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn reset(&mut self) -> Result<(), ClientError> {
        self.done(Request::Reset)
    }

    /// Presses the ACPI power button.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn power_button(&mut self) -> Result<(), ClientError> {
        self.done(Request::PowerButton)
    }

    /// Injects a non-maskable interrupt.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn nmi(&mut self, vcpu: u32) -> Result<(), ClientError> {
        self.done(Request::Nmi { vcpu })
    }

    /// What one vCPU has beyond registers.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn vcpu_detail(&mut self, vcpu: u32) -> Result<VcpuDetail, ClientError> {
        self.expect(Request::VcpuDetail { vcpu }, |r| match r {
            Reply::VcpuDetail(detail) => Some(*detail),
            _ => None,
        })
    }

    /// What the machine is made of.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn machine_detail(&mut self) -> Result<MachineDetail, ClientError> {
        self.expect(Request::MachineDetail, |r| match r {
            Reply::MachineDetail(detail) => Some(*detail),
            _ => None,
        })
    }

    /// What its devices are, and what they have served.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn devices(&mut self) -> Result<Vec<DeviceDetail>, ClientError> {
        self.expect(Request::Devices, |r| match r {
            Reply::Devices(devices) => Some(devices),
            _ => None,
        })
    }

    /// Asks the guest to lend this many bytes of its memory in all.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn set_balloon(&mut self, bytes: u64) -> Result<(), ClientError> {
        self.done(Request::SetBalloon { bytes })
    }

    /// Plugs the cable of the network card at `slot` in, or out.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn set_link(&mut self, slot: &str, up: bool) -> Result<(), ClientError> {
        let slot = slot.to_owned();
        self.done(Request::SetLink { slot, up })
    }

    /// Makes the disk at `slot` this many bytes large, or without a size as large as its image has
    /// become.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn set_disk(&mut self, slot: &str, bytes: Option<u64>) -> Result<(), ClientError> {
        let slot = slot.to_owned();
        self.done(Request::SetDisk { slot, bytes })
    }

    /// Moves a vCPU's thread to these host processors; to any, if there are none.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn pin(&mut self, vcpu: u32, cpus: BTreeSet<usize>) -> Result<(), ClientError> {
        self.done(Request::Pin { vcpu, cpus })
    }

    /// Turns a local APIC's x2APIC mode on or off.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn set_x2apic(&mut self, vcpu: u32, on: bool) -> Result<(), ClientError> {
        self.done(Request::X2apic { vcpu, on })
    }

    /// Puts an event into a vCPU.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn inject(&mut self, vcpu: u32, event: Event) -> Result<(), ClientError> {
        self.done(Request::Inject { vcpu, event })
    }

    /// What the CMOS clock shows and holds.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn rtc(&mut self) -> Result<RtcState, ClientError> {
        self.expect(Request::Rtc, |r| match r {
            Reply::Rtc(rtc) => Some(rtc),
            _ => None,
        })
    }

    /// Sets the CMOS clock: seconds since 1970 in its own time zone.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn set_rtc_time(&mut self, seconds: i64) -> Result<(), ClientError> {
        self.done(Request::SetRtcTime { seconds })
    }

    /// Writes a byte of the CMOS memory.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub fn set_rtc_nvram(&mut self, offset: u8, value: u8) -> Result<(), ClientError> {
        self.done(Request::SetRtcNvram { offset, value })
    }
}

/// Connects, without waiting longer than `patience` for room in the server's queue.
fn dial(vm: &Vm, patience: Duration) -> Result<UnixStream, Errno> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // connect(2) on a Unix socket waits as long as sending would (unix(7), SO_SNDTIMEO).
    let limit = i64::try_from(patience.as_millis()).unwrap_or(i64::MAX);
    setsockopt(&fd, SendTimeout, &TimeVal::milliseconds(limit))?;
    let address = UnixAddr::new(&vm.control_path())?;
    loop {
        match connect(fd.as_raw_fd(), &address) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
            Ok(()) => return Ok(fd.into()),
        }
    }
}

/// The lines that a server says.
#[derive(Debug)]
struct Lines {
    stream: UnixStream,
    vm: VmName,
    rest: Vec<u8>,
    patience: Duration,
}

impl Lines {
    /// The next line, without its newline.
    fn next(&mut self, deadline: Instant) -> Result<Vec<u8>, ClientError> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.rest[searched..].iter().position(|&b| b == b'\n') {
                let mut line: Vec<u8> = self.rest.drain(..=searched + end).collect();
                line.pop();
                return Ok(line);
            }
            searched = self.rest.len();
            if searched > ANSWER_MAX {
                return Err(self.protocol("a line without end".into()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            // A timeout of zero would be none at all.
            let left = left.max(Duration::from_millis(1));
            let mut chunk = [0; 4096];
            let read = self
                .stream
                .set_read_timeout(Some(left))
                .and_then(|()| self.stream.read(&mut chunk));
            match read {
                Ok(0) => return Err(ClientError::Closed(self.vm.clone())),
                Ok(n) => self.rest.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.error(e)),
            }
            if Instant::now() >= deadline {
                return Err(self.timeout());
            }
        }
    }

    /// The server's first line: a hello, or the reason why there is none.
    fn hello(&self, line: &[u8]) -> Result<Hello, ClientError> {
        // What every version's hello has.
        #[derive(Deserialize)]
        struct Version {
            protocol: u32,
            #[serde(default)]
            program: String,
            #[serde(default)]
            version: String,
        }
        let Ok(version) = decode::<Version>(line) else {
            return Err(match decode::<Answer>(line) {
                Ok(Answer {
                    result: Outcome::Error(refusal),
                    ..
                }) => self.refused(refusal),
                _ => self.protocol("its first line is no hello".into()),
            });
        };
        if version.protocol != PROTOCOL {
            return Err(ClientError::Version {
                vm: self.vm.clone(),
                program: version.program,
                version: version.version,
                theirs: version.protocol,
            });
        }
        decode(line).map_err(|e| self.protocol(format!("a hello: {e}")))
    }

    fn refused(&self, refusal: Refusal) -> ClientError {
        ClientError::Refused {
            vm: self.vm.clone(),
            refusal,
        }
    }

    fn protocol(&self, what: String) -> ClientError {
        ClientError::Protocol {
            vm: self.vm.clone(),
            what,
        }
    }

    fn timeout(&self) -> ClientError {
        ClientError::Timeout {
            vm: self.vm.clone(),
        }
    }

    fn error(&self, source: io::Error) -> ClientError {
        match source.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => self.timeout(),
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                ClientError::Closed(self.vm.clone())
            }
            _ => ClientError::Io {
                vm: self.vm.clone(),
                source,
            },
        }
    }
}
