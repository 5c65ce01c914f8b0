//! The server's thread: it listens, and serves one debugger after the other.

use std::collections::BTreeSet;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vmm_api::control::Refusal;
use vmm_api::kvm::{DebugControl, KvmError};
use vmm_api::memory::GuestRam;
use vmm_api::say;

use super::registers::VcpuRegisters;
use super::session::{Event, Leaving, Wire, serve};
use super::target::{GuestTarget, Inferior, InferiorError};
use crate::config::{GdbPlace, GdbSpec};
use crate::machine::Machine;
use crate::sequencer::Cause;
use crate::unix_socket::{self, SocketFile};

/// Nobody can be served.
#[derive(Debug, thiserror::Error)]
#[error("-G: cannot listen at {place}")]
pub struct GdbError {
    place: GdbPlace,
    source: io::Error,
}

/// A debug server. Dropping it sends its debugger away and takes breakpoints out of memory.
pub struct GdbServer {
    quit: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    _file: Option<SocketFile>,
}

impl GdbServer {
    /// Listens, and says where on standard error. With `w` the machine is held.
    ///
    /// # Errors
    ///
    /// The address is taken, or is none of this host's.
    pub fn start(spec: &GdbSpec, machine: &Arc<Machine>, ram: GuestRam) -> Result<Self, GdbError> {
        Self::listen(spec, machine, ram).map_err(|source| GdbError {
            place: spec.place.clone(),
            source,
        })
    }

    fn listen(spec: &GdbSpec, machine: &Arc<Machine>, ram: GuestRam) -> io::Result<Self> {
        let (listener, place, file) = match &spec.place {
            GdbPlace::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                let place = listener.local_addr()?.to_string();
                (Listener::Tcp(listener), place, None)
            }
            GdbPlace::Unix(path) => {
                let (listener, file) = unix_socket::bind(path)?;
                let place = path.display().to_string();
                (Listener::Unix(listener), place, Some(file))
            }
        };
        let quit = Arc::new(EventFd::from_flags(
            EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
        )?);
        if spec.wait {
            machine.hold_before_start();
        }
        let then = if spec.wait {
            ", which the guest waits for"
        } else {
            ""
        };
        say!("rhyve: gdb: target remote {place}{then}");
        let server = Server {
            listener,
            machine: machine.clone(),
            ram,
            quit: quit.clone(),
        };
        let thread = crate::thread::builder("gdb").spawn(move || server.run())?;
        Ok(Self {
            quit,
            thread: Some(thread),
            _file: file,
        })
    }
}

impl Drop for GdbServer {
    fn drop(&mut self) {
        // Once: the counter does not overflow.
        let _ = self.quit.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(target: "rhyve::gdb", "the debug server's thread panicked");
        }
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn accept(&self) -> io::Result<Wire> {
        let wire = match self {
            Self::Tcp(listener) => Wire::Tcp(listener.accept()?.0),
            Self::Unix(listener) => Wire::Unix(listener.accept()?.0),
        };
        wire.prepare()?;
        Ok(wire)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

struct Server {
    listener: Listener,
    machine: Arc<Machine>,
    ram: GuestRam,
    quit: Arc<EventFd>,
}

impl Server {
    fn run(self) {
        loop {
            match ready(&[self.quit.as_fd(), self.listener.as_fd()]) {
                Ok(Some(1)) => {}
                Ok(Some(_)) => return,
                Ok(None) => continue,
                Err(error) => {
                    tracing::error!(target: "rhyve::gdb", "waiting for debuggers: {error}");
                    return;
                }
            }
            match self.listener.accept() {
                Ok(wire) => {
                    if self.session(wire) == Leaving::Ended {
                        return;
                    }
                }
                // It has left before it was here.
                Err(error) => tracing::debug!(target: "rhyve::gdb", "a debugger: {error}"),
            }
        }
    }

    /// From the machine's stop when a debugger comes to its going on when that leaves.
    fn session(&self, wire: Wire) -> Leaving {
        let debugger = &self.machine.debugger;
        // A step of vmmctl's is over in a moment.
        let _seat = debugger.seat.lock().unwrap_or_else(PoisonError::into_inner);
        let inferior = MachineInferior {
            machine: &self.machine,
            ram: &self.ram,
            can_stop: self.can_stop(),
        };
        let mut target = GuestTarget::new(inferior);
        debugger.set_attached(true);
        let served = match target.hold() {
            Ok(()) => serve(wire, &mut target, debugger, |wire, runs| {
                self.wait(wire, runs)
            }),
            Err(error) => Err(error.to_string()),
        };
        let leaving = served.unwrap_or_else(|error| {
            tracing::warn!(target: "rhyve::gdb", "the debugger is gone: {error}");
            Leaving::Gone
        });
        if leaving == Leaving::Ended || self.machine.ending.cause().is_some() {
            target.clean();
            return Leaving::Ended;
        }
        // Nothing of it may stay: without debugger, a vCPU that stops for one ends the machine.
        if let Err(error) = target.hold().and_then(|()| target.disarm()) {
            let why = format!("the debugger has left, but its breakpoints stay: {error}");
            self.machine.ending.end(Cause::error(why));
            return Leaving::Ended;
        }
        debugger.set_attached(false);
        debugger.set_holding(false);
        if leaving == Leaving::Kill {
            self.machine.ending.end(Cause::stopped("debugger"));
            return Leaving::Ended;
        }
        if let Err(refusal) = self.machine.resume() {
            tracing::debug!(target: "rhyve::gdb", "{refusal}");
        }
        leaving
    }

    /// Whether this KVM lets guests be debugged: asked by asking for nothing.
    fn can_stop(&self) -> bool {
        let tried = self
            .machine
            .ask(0, |kvm| kvm.set_debug(&DebugControl::default()));
        match tried.map_err(InferiorError::from) {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                let error = crate::chain(&error);
                tracing::warn!(
                    target: "rhyve::gdb",
                    "no breakpoints and no steps, for this machine's KVM has none: {error}"
                );
                false
            }
            Err(error) => {
                tracing::warn!(target: "rhyve::gdb", "no breakpoints and no steps: {error}");
                false
            }
        }
    }

    fn wait(&self, wire: BorrowedFd<'_>, runs: bool) -> io::Result<Event> {
        loop {
            let ending = self.machine.ending.as_fd();
            let all = [
                self.quit.as_fd(),
                ending,
                wire,
                self.listener.as_fd(),
                self.machine.debugger.as_fd(),
            ];
            let fds = if runs { &all[..] } else { &all[..4] };
            match ready(fds)? {
                Some(0) => return Ok(Event::Quit),
                Some(1) => {
                    let cause = self.machine.ending.cause();
                    return Ok(Event::Ended(cause.map_or(0, |cause| cause.status)));
                }
                Some(2) => return Ok(Event::Bytes),
                // One at a time: this one is told so by its connection's end.
                Some(3) => drop(self.listener.accept()),
                Some(_) => return Ok(Event::Stopped),
                None => {}
            }
        }
    }
}

/// Waits until one of these can be read; the first that can.
fn ready(fds: &[BorrowedFd<'_>]) -> io::Result<Option<usize>> {
    let mut polled: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    match poll(&mut polled, PollTimeout::NONE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(polled.iter().position(|fd| fd.any() == Some(true)))
}

struct MachineInferior<'a> {
    machine: &'a Arc<Machine>,
    ram: &'a GuestRam,
    can_stop: bool,
}

impl From<Refusal> for InferiorError {
    fn from(refusal: Refusal) -> Self {
        Self(refusal.to_string())
    }
}

impl From<KvmError> for InferiorError {
    fn from(error: KvmError) -> Self {
        Self(crate::chain(&error))
    }
}

impl Inferior for MachineInferior<'_> {
    fn vcpus(&self) -> u32 {
        self.machine.vcpu_count()
    }

    fn can_stop(&self) -> bool {
        self.can_stop
    }

    fn ram(&self) -> &GuestRam {
        self.ram
    }

    fn registers(&self, vcpu: u32) -> Result<VcpuRegisters, InferiorError> {
        let read = self.machine.ask(vcpu, |kvm| {
            Ok::<_, KvmError>(VcpuRegisters {
                system: kvm.registers()?,
                fpu: kvm.fpu()?,
            })
        });
        Ok(read??)
    }

    fn change(&self, vcpu: u32, wanted: &VcpuRegisters) -> Result<(), InferiorError> {
        let before = self.registers(vcpu)?;
        let mut after = before.clone();
        after
            .change(wanted)
            .map_err(|e| InferiorError(e.to_string()))?;
        let set = self.machine.ask(vcpu, move |kvm| {
            if after.system != before.system {
                kvm.set_registers(&after.system)?;
            }
            if after.fpu != before.fpu {
                kvm.set_fpu(&after.fpu)?;
            }
            Ok::<_, KvmError>(())
        });
        Ok(set??)
    }

    fn arm(&self, vcpu: u32, control: &DebugControl) -> Result<(), InferiorError> {
        let control = *control;
        Ok(self
            .machine
            .ask(vcpu, move |kvm| kvm.set_debug(&control))??)
    }

    fn pass_on(
        &self,
        vcpu: u32,
        exception: u32,
        control: &DebugControl,
    ) -> Result<(), InferiorError> {
        Ok(self.machine.pass_on(vcpu, exception, control)?)
    }

    fn hold(&self) -> Result<(), InferiorError> {
        self.machine.debugger.set_holding(true);
        Ok(self.machine.pause()?)
    }

    fn release(&self, vcpus: &BTreeSet<u32>) -> Result<(), InferiorError> {
        self.machine.debugger.set_holding(false);
        Ok(self.machine.resume_some(|vcpu| vcpus.contains(&vcpu))?)
    }
}
