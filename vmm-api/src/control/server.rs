//! The server of control.sock: one thread, one poll loop, a bounded number of clients.
//!
//! Data flows through three stages a client: bytes gather in `input`, each whole line becomes a call
//! to the [`ControlTarget`], its answer goes to `output`. A client whose `output` is not empty is not
//! read from, so nobody can make the server hold more than one line and one answer for them; a
//! client that leaves a line half-said or an answer unread is dropped after [`PATIENCE`]. Each turn
//! of the loop takes one line of each client, so a flood delays others by one line at most.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use super::ControlTarget;
use super::proto::{
    Answer, Call, Hello, Outcome, PROTOCOL, REQUEST_MAX, Refusal, Reply, Request, decode, encode,
    malformed,
};
use crate::vm::{LockedVm, VmError};

/// How many clients are served at once.
pub const CLIENTS_MAX: usize = 16;

/// How long a client may take to finish a line, or to read an answer.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// How long [`Server::stop`] waits for a call to the machine that is under way.
const STOP_WAIT: Duration = Duration::from_secs(2);

/// Enough for serde_json's deepest recursion, 128 levels, without optimization.
const STACK: usize = 512 << 10;

/// Why the control socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket of a killed `rhyve` cannot be removed.
    #[error(transparent)]
    Stale(#[from] VmError),
    /// The socket cannot be made.
    #[error("control socket: cannot {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// Serves one VM's control socket from a thread of its own, until it is stopped or dropped.
#[derive(Debug)]
pub struct Server {
    // Closing this end wakes the thread and tells it to end.
    wake: Option<UnixStream>,
    ended: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Binds the socket of `vm`, replacing one that a killed `rhyve` left, and begins to serve it.
    /// `program` and `version` are what the hello line says.
    ///
    /// # Errors
    ///
    /// The socket cannot be made.
    pub fn start(
        vm: &LockedVm,
        target: Arc<dyn ControlTarget>,
        program: &str,
        version: &str,
    ) -> Result<Self, ServeError> {
        Self::start_with(vm, target, program, version, PATIENCE)
    }

    pub(super) fn start_with(
        vm: &LockedVm,
        target: Arc<dyn ControlTarget>,
        program: &str,
        version: &str,
        patience: Duration,
    ) -> Result<Self, ServeError> {
        let io = |action| move |source| ServeError::Io { action, source };
        vm.remove_control()?;
        let path = vm.control_path();
        let listener = UnixListener::bind(&path).map_err(io("bind it"))?;
        // The object's directory is 0700: nobody else gets here in the meantime.
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))
            .map_err(io("set its mode"))?;
        listener
            .set_nonblocking(true)
            .map_err(io("set it non-blocking"))?;
        let (wake, woken) = UnixStream::pair().map_err(io("make its wake-up"))?;
        let hello = encode(&Hello {
            protocol: PROTOCOL,
            program: program.to_owned(),
            version: version.to_owned(),
            pid: std::process::id(),
            vm: vm.name().to_string(),
            vcpus: target.status().vcpus,
        });
        let (end, ended) = channel();
        let service = Service {
            listener,
            target,
            hello,
            clients: Vec::new(),
            patience,
        };
        let thread = std::thread::Builder::new()
            .name("control".into())
            .stack_size(STACK)
            .spawn(move || {
                service.run(&woken);
                // Nobody waits any more if stop() lost its patience.
                let _ = end.send(());
            })
            .map_err(io("start its thread"))?;
        Ok(Self {
            wake: Some(wake),
            ended,
            thread: Some(thread),
        })
    }

    /// Ends the service and removes the socket. Answers that were given are sent. Takes two seconds
    /// at most, should the machine hang in a call.
    ///
    /// # Errors
    ///
    /// The socket cannot be removed.
    pub fn stop(mut self, vm: &LockedVm) -> Result<(), VmError> {
        self.end();
        vm.remove_control()
    }

    fn end(&mut self) {
        drop(self.wake.take());
        let Some(thread) = self.thread.take() else {
            return;
        };
        let gone = match self.ended.recv_timeout(STOP_WAIT) {
            Ok(()) => true,
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => true,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => false,
        };
        if !gone {
            tracing::warn!(target: "rhyve::control", "a request hangs, its thread is left behind");
        } else if thread.join().is_err() {
            tracing::error!(target: "rhyve::control", "the control thread panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

struct Service {
    listener: UnixListener,
    target: Arc<dyn ControlTarget>,
    hello: Vec<u8>,
    clients: Vec<Client>,
    patience: Duration,
}

impl Service {
    fn run(mut self, woken: &UnixStream) {
        loop {
            match self.wait(woken.as_fd()) {
                Ok(true) => break,
                Ok(false) => {}
                Err(errno) => {
                    tracing::error!(target: "rhyve::control", %errno, "cannot wait for clients");
                    break;
                }
            }
            self.accept();
            self.serve();
        }
        // What was answered but not yet taken: one try, no waiting.
        for client in &mut self.clients {
            let _ = client.write();
        }
    }

    /// Gives every client a turn, and forgets those that are gone.
    fn serve(&mut self) {
        let now = Instant::now();
        let target = &*self.target;
        let patience = self.patience;
        self.clients
            .retain_mut(|client| client.turn(target, now, patience));
    }

    /// Waits until there is something to do; true when the service is to end.
    fn wait(&self, woken: BorrowedFd<'_>) -> nix::Result<bool> {
        let mut fds = vec![
            PollFd::new(woken, PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(
            self.clients
                .iter()
                .map(|c| PollFd::new(c.stream.as_fd(), c.interest())),
        );
        match poll(&mut fds, self.timeout()) {
            Err(nix::errno::Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno),
            Ok(_) => Ok(fds[0].any().unwrap_or(true)),
        }
    }

    /// How long nothing needs to be done if no client says anything.
    fn timeout(&self) -> PollTimeout {
        if self.clients.iter().any(Client::has_line) {
            return PollTimeout::ZERO;
        }
        let deadline = self.clients.iter().filter_map(|c| c.deadline).min();
        deadline.map_or(PollTimeout::NONE, |at| {
            // Rounded up, or the last millisecond would be spent in a busy loop.
            let left = at.saturating_duration_since(Instant::now()).as_millis() + 1;
            u16::try_from(left).map_or(PollTimeout::MAX, PollTimeout::from)
        })
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Out of descriptors, most likely: poll would come back at once, for ever.
                    tracing::warn!(target: "rhyve::control", %error, "cannot accept a client");
                    std::thread::sleep(Duration::from_millis(10));
                    return;
                }
            }
        }
    }

    fn admit(&mut self, stream: UnixStream) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if self.clients.len() >= CLIENTS_MAX {
            // Some may have left since they were looked at last.
            self.serve();
        }
        let refusal = match getsockopt(&stream, PeerCredentials) {
            Err(_) => return,
            Ok(peer) if peer.uid() != 0 && peer.uid() != geteuid().as_raw() => {
                Some(Refusal::NotPermitted(peer.uid()))
            }
            Ok(_) if self.clients.len() >= CLIENTS_MAX => {
                Some(Refusal::TooManyClients { limit: CLIENTS_MAX })
            }
            Ok(_) => None,
        };
        let mut client = Client::new(stream);
        match refusal {
            None => {
                client.output.clone_from(&self.hello);
                client.deadline = Some(Instant::now() + self.patience);
                self.clients.push(client);
            }
            Some(refusal) => {
                client.output = encode(&Answer {
                    id: None,
                    result: Outcome::Error(refusal),
                });
                // An empty socket buffer takes one line; whoever it does not reach sees the end.
                let _ = client.write();
            }
        }
    }
}

struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// By when the half line in `input` must be whole, or `output` be taken.
    deadline: Option<Instant>,
    /// No more will be read: what is in `output` is the last word.
    closing: bool,
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            deadline: None,
            closing: false,
        }
    }

    fn interest(&self) -> PollFlags {
        if self.output.is_empty() {
            PollFlags::POLLIN
        } else {
            PollFlags::POLLOUT
        }
    }

    /// A whole line waits although nothing new may arrive.
    fn has_line(&self) -> bool {
        self.output.is_empty() && self.input.contains(&b'\n')
    }

    /// One turn: takes in what is there, answers one line, sends what can be sent. False when this
    /// client is done with.
    fn turn(&mut self, target: &dyn ControlTarget, now: Instant, patience: Duration) -> bool {
        let waited = !self.output.is_empty() || !self.input.is_empty();
        if !self.write() {
            return false;
        }
        if self.output.is_empty() {
            if self.closing {
                return false;
            }
            let open = self.has_line() || self.read();
            if let Some(answer) = self.next_line(target) {
                self.output = encode(&answer);
                // Most answers fit in the socket's buffer: no second turn of the loop for them.
                if !self.write() {
                    return false;
                }
                self.deadline = None;
            } else if !open {
                return false;
            }
        }
        let waits = !self.output.is_empty() || (!self.input.is_empty() && !self.has_line());
        match self.deadline {
            _ if !waits => self.deadline = None,
            Some(at) if waited => return now < at,
            _ => self.deadline = Some(now + patience),
        }
        true
    }

    /// Reads what is there, to the length of one line; false at the end of the stream.
    fn read(&mut self) -> bool {
        let mut chunk = [0; 4096];
        while self.input.len() <= REQUEST_MAX {
            match self.stream.read(&mut chunk) {
                Ok(0) => return false,
                Ok(n) => self.input.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return e.kind() == ErrorKind::WouldBlock,
            }
            if self.input.contains(&b'\n') {
                break;
            }
        }
        true
    }

    /// Answers the first whole line.
    fn next_line(&mut self, target: &dyn ControlTarget) -> Option<Answer> {
        let end = self.input.iter().position(|&b| b == b'\n');
        if end.unwrap_or(self.input.len()) > REQUEST_MAX {
            // Where its end is nobody knows: there is no going on after it.
            self.closing = true;
            self.input = Vec::new();
            return Some(Answer {
                id: None,
                result: Outcome::Error(Refusal::TooLong),
            });
        }
        let line: Vec<u8> = self.input.drain(..=end?).collect();
        Some(answer(target, &line))
    }

    /// Sends what can be sent without waiting; false if the client is gone.
    fn write(&mut self) -> bool {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return e.kind() == ErrorKind::WouldBlock,
            }
        }
        true
    }
}

/// What one line comes to: the whole protocol but for the socket.
pub fn answer(target: &dyn ControlTarget, line: &[u8]) -> Answer {
    let call: Call = match decode(line) {
        Ok(call) => call,
        Err(error) => return malformed(line, &error),
    };
    tracing::debug!(target: "rhyve::control", ?call);
    let done = |()| Reply::Done;
    let result = match call.request {
        Request::Status => Ok(Reply::Status(target.status())),
        Request::Registers { vcpu } => target
            .registers(vcpu)
            .map(|r| Reply::Registers(Box::new(r))),
        Request::Update { vcpu, changes } => target.update(vcpu, &changes).map(done),
        Request::VcpuStats { vcpu } => target.vcpu_stats(vcpu).map(Reply::VcpuStats),
        Request::VmStats => target.vm_stats().map(Reply::VmStats),
        Request::Exits { vcpu } => target.exits(vcpu).map(|e| Reply::Exits(Box::new(e))),
        Request::ResetStats => target.reset_stats().map(done),
        Request::Pause => target.pause().map(done),
        Request::Resume => target.resume().map(done),
        Request::SuspendCpu { vcpu } => target.suspend_cpu(vcpu).map(done),
        Request::ResumeCpu { vcpu } => target.resume_cpu(vcpu).map(done),
        Request::Step { vcpu } => target.step(vcpu).map(done),
        Request::RunUntil { address, ms } => target
            .run_until(address, ms)
            .map(|vcpu| Reply::Reached { vcpu }),
        Request::Suspend => target.suspend().map(done),
        Request::Settle => target.settle().map(done),
        Request::Snapshot { name } => target.snapshot(&name).map(done),
        Request::Stop => target.stop().map(done),
        Request::Reset => target.reset().map(done),
        Request::PowerButton => target.power_button().map(done),
        Request::Nmi { vcpu } => target.nmi(vcpu).map(done),
        Request::VcpuDetail { vcpu } => target
            .vcpu_detail(vcpu)
            .map(|d| Reply::VcpuDetail(Box::new(d))),
        Request::MachineDetail => target
            .machine_detail()
            .map(|d| Reply::MachineDetail(Box::new(d))),
        Request::Devices => target.devices().map(Reply::Devices),
        Request::SetBalloon { bytes } => target.set_balloon(bytes).map(done),
        Request::SetLink { slot, up } => target.set_link(&slot, up).map(done),
        Request::SetDisk { slot, bytes } => target.set_disk(&slot, bytes).map(done),
        Request::Pin { vcpu, cpus } => target.pin(vcpu, &cpus).map(done),
        Request::X2apic { vcpu, on } => target.set_x2apic(vcpu, on).map(done),
        Request::Inject { vcpu, event } => target.inject(vcpu, event).map(done),
        Request::Rtc => target.rtc().map(Reply::Rtc),
        Request::SetRtcTime { seconds } => target.set_rtc_time(seconds).map(done),
        Request::SetRtcNvram { offset, value } => target.set_rtc_nvram(offset, value).map(done),
    };
    Answer {
        id: Some(call.id),
        result: result.map_or_else(Outcome::Error, Outcome::Ok),
    }
}
