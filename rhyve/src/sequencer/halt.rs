//! Notices a machine in which nothing can ever happen again: every vCPU in HLT with interrupts off.
//!
//! KVM's in-kernel local APIC keeps HLT to itself, so there is no exit to see it by. A vCPU that
//! halted for good uses no processor time; only when none of the threads used any between two looks
//! are the vCPUs asked (which wakes them for a moment) what they are doing.

use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use vmm_api::state::Activity;

use super::Mailbox;

const INTERRUPT_FLAG: u64 = 1 << 9;

/// Looks at a machine's vCPU threads now and then.
pub struct HaltWatch {
    vcpus: Vec<(Arc<Mailbox>, ClockId)>,
    last: Option<Vec<Duration>>,
}

impl HaltWatch {
    /// How often to look.
    pub const PERIOD: Duration = Duration::from_millis(500);

    /// Watches these vCPUs and the threads that run them.
    pub fn new(vcpus: impl IntoIterator<Item = (Arc<Mailbox>, Pid)>) -> Self {
        let vcpus = vcpus
            .into_iter()
            .map(|(mailbox, tid)| (mailbox, cpu_clock(tid)))
            .collect();
        Self { vcpus, last: None }
    }

    /// Whether every vCPU has halted for good. To be asked every [`HaltWatch::PERIOD`] while the
    /// machine runs.
    pub fn halted(&mut self) -> bool {
        let used: Option<Vec<_>> = self
            .vcpus
            .iter()
            .map(|(_, clock)| clock_gettime(*clock).ok().map(Duration::from))
            .collect();
        let idle = used.is_some() && used == self.last;
        self.last = used;
        if !idle {
            return false;
        }
        let dead = self.vcpus.iter().all(|(mailbox, _)| {
            let dead = mailbox.ask(|vcpu| {
                vcpu.capture().is_ok_and(|state| {
                    let masked = state.registers.rflags & INTERRUPT_FLAG == 0;
                    let nmi = state.events.as_ref().is_some_and(|e| e.nmi_pending);
                    match state.activity {
                        Some(Activity::Halted) => masked && !nmi,
                        Some(Activity::Uninitialized | Activity::InitReceived) => true,
                        _ => false,
                    }
                })
            });
            dead == Some(true)
        });
        // Asking took time of its own, which is no sign of life.
        self.last = None;
        dead
    }
}

/// The clock of a thread's processor time (Linux: the complement of its id, shifted by three, with
/// the bits for "per thread" and "scheduler's count").
pub fn cpu_clock(tid: Pid) -> ClockId {
    ClockId::from_raw((!tid.as_raw() << 3) | 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_clock_runs_only_while_it_works() {
        let clock = cpu_clock(nix::unistd::gettid());
        let before = clock_gettime(clock).unwrap();
        let work = std::time::Instant::now();
        while work.elapsed() < Duration::from_millis(5) {
            std::hint::spin_loop();
        }
        let after = clock_gettime(clock).unwrap();
        assert!(after > before);
    }
}
