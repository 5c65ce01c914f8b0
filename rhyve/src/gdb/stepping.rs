//! Steps and breakpoints without a debugger: what `vmmctl --step` and `--until` ask for.
//!
//! Each call leaves the machine paused with nothing armed, so that whoever asked may go away at any
//! time, and so that a breakpoint that was not reached yet is not passed between two calls.

use std::os::fd::AsFd;
use std::sync::TryLockError;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_api::control::Refusal;
use vmm_api::kvm::{DebugControl, Point, PointKind};

use super::{DR6_SINGLE_STEP, Debugger, Stop};
use crate::control::refusal;
use crate::machine::Machine;

/// How long one instruction may take. One that waits, as HLT does, takes longer.
const INSTRUCTION: Duration = Duration::from_millis(500);

/// DR6.B0 (Intel SDM volume 3, 17.2.3).
const DR6_POINT_0: u64 = 1;

impl Machine {
    /// Has one vCPU execute one instruction while the others wait; interrupts wait as well where KVM can
    /// have them wait. The machine is paused afterwards.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, it waits for an interrupt or to be started, a debugger is connected, or
    /// this KVM cannot debug guests.
    pub fn step_one(&self, vcpu: u32) -> Result<(), Refusal> {
        self.seat(vcpu)?;
        let control = DebugControl {
            step: true,
            ..DebugControl::default()
        };
        let session = Session::begin(self, control)?;
        session.arm([vcpu], &control)?;
        let stop = session.run(
            |one| one == vcpu,
            INSTRUCTION,
            |stop| stop.vcpu == vcpu && stop.dr6 & DR6_SINGLE_STEP != 0,
        )?;
        match stop {
            Some(_) => Ok(()),
            None => Err(Refusal::Failed(format!(
                "vCPU {vcpu} waits: it is halted, or not started yet"
            ))),
        }
    }

    /// Lets all vCPUs run until one is about to execute the instruction at `gla`, but not longer than
    /// `patience`: which vCPU, or none. The machine is paused afterwards. A vCPU that is there at the
    /// beginning counts at once.
    ///
    /// # Errors
    ///
    /// The machine is ending, a debugger is connected, or this KVM cannot debug guests.
    pub fn run_until(&self, gla: u64, patience: Duration) -> Result<Option<u32>, Refusal> {
        let mut control = DebugControl::default();
        control.points[0] = Point::new(gla, 1, PointKind::Execute);
        let session = Session::begin(self, control)?;
        session.arm(0..self.vcpu_count(), &control)?;
        let stop = session.run(|_| true, patience, |stop| stop.dr6 & DR6_POINT_0 != 0)?;
        Ok(stop.map(|stop| stop.vcpu))
    }
}

/// The machine, paused, with nobody else to debug it.
struct Session<'a> {
    machine: &'a Machine,
    debugger: &'a Debugger,
    /// What the vCPUs that run stop at.
    control: DebugControl,
    _seat: std::sync::MutexGuard<'a, ()>,
}

impl<'a> Session<'a> {
    fn begin(machine: &'a Machine, control: DebugControl) -> Result<Self, Refusal> {
        let debugger = &*machine.debugger;
        let seat = match debugger.seat.try_lock() {
            Ok(seat) => seat,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let why = "a debugger is connected: step there, or detach it";
                return Err(Refusal::Unsupported(why.into()));
            }
        };
        machine.pause()?;
        debugger.set_attached(true);
        Ok(Self {
            machine,
            debugger,
            control,
            _seat: seat,
        })
    }

    /// Says what these vCPUs stop at.
    fn arm(
        &self,
        vcpus: impl IntoIterator<Item = u32>,
        control: &DebugControl,
    ) -> Result<(), Refusal> {
        for vcpu in vcpus {
            let control = *control;
            let armed = self.machine.ask(vcpu, move |kvm| kvm.set_debug(&control))?;
            armed.map_err(refusal)?;
        }
        Ok(())
    }

    /// Lets some vCPUs run until one stops as it should; none if none does in time. All are held then.
    fn run(
        &self,
        which: impl Fn(u32) -> bool,
        patience: Duration,
        wanted: impl Fn(&Stop) -> bool,
    ) -> Result<Option<Stop>, Refusal> {
        let deadline = Instant::now() + patience;
        self.machine.resume_some(which)?;
        let mut found = None;
        while found.is_none() && self.wait(deadline) {
            found = self.sort(&wanted)?;
        }
        self.machine.pause()?;
        // One may have come there as the time was over.
        match found {
            None => self.sort(&wanted),
            found => Ok(found),
        }
    }

    /// Waits for a stop; false once the time is over or the machine ends.
    fn wait(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut fds = [self.debugger.as_fd(), self.machine.ending.as_fd()]
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let polled = poll(&mut fds, timeout);
        let [stopped, ended] = fds;
        match polled {
            Ok(0) => false,
            Ok(_) => stopped.any() == Some(true) && ended.any() != Some(true),
            // A signal: it is waited again, for as long as is left.
            Err(_) => true,
        }
    }

    /// Takes the stops so far: the one that was wanted. Any other is an exception of the guest's own.
    fn sort(&self, wanted: &impl Fn(&Stop) -> bool) -> Result<Option<Stop>, Refusal> {
        let mut found = None;
        while let Some(stop) = self.debugger.take() {
            if wanted(&stop) {
                found = found.or(Some(stop));
                continue;
            }
            let Stop {
                vcpu, exception, ..
            } = stop;
            self.machine.pass_on(vcpu, exception, &self.control)?;
        }
        Ok(found)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        let all = 0..self.machine.vcpu_count();
        if let Err(error) = self.arm(all, &DebugControl::default()) {
            // A vCPU that stopped for nobody would end the machine without a word of why.
            tracing::error!(target: "rhyve::gdb", "a breakpoint stays: {error}");
        }
        self.debugger.set_attached(false);
    }
}
