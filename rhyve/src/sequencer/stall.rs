//! Notices a machine that burns time without getting anywhere: a vCPU that runs for seconds with
//! interrupts off and never needs user space, so that nothing can ever reach it; or a kernel that has
//! panicked and waits for nobody.
//!
//! Only a vCPU that has used its processor for [`LONG`] without an exit is looked at: the clocks of
//! the threads are read, which costs a guest nothing.

use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use vmm_api::exit::ExitKind;
use vmm_api::kvm::Counters;

use super::Mailbox;

/// How long a vCPU has to be busy with itself.
const LONG: Duration = Duration::from_secs(10);
/// In how many looks after that it has to have interrupts off.
const LOOKS: u32 = 6;
const INTERRUPT_FLAG: u64 = 1 << 9;

/// One vCPU.
pub struct Watched {
    /// Notes to it.
    pub mailbox: Arc<Mailbox>,
    /// What it counts.
    pub counters: Arc<Counters>,
    /// Its thread's processor time.
    pub clock: ClockId,
}

/// What may be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stall {
    /// This vCPU runs with interrupts off and needs nobody.
    Dark(u32),
    /// Some vCPU is busy with itself: its kernel may have panicked.
    Busy,
}

#[derive(Clone, Copy, Default)]
struct Streak {
    used: Duration,
    exits: u64,
    /// Busy without an exit for this long.
    busy: Duration,
    dark: u32,
}

/// Looks at a machine's vCPUs now and then.
pub struct StallWatch {
    vcpus: Vec<(Watched, Streak)>,
}

impl StallWatch {
    /// Watches these.
    pub fn new(vcpus: impl IntoIterator<Item = Watched>) -> Self {
        let vcpus = vcpus.into_iter();
        Self {
            vcpus: vcpus.map(|vcpu| (vcpu, Streak::default())).collect(),
        }
    }

    /// What seems wrong. To be asked every `period` while the machine runs.
    pub fn look(&mut self, period: Duration) -> Option<Stall> {
        let mut found = None;
        for (index, (vcpu, streak)) in (0..).zip(&mut self.vcpus) {
            let used = clock_gettime(vcpu.clock).map_or(Duration::ZERO, Duration::from);
            let exits = ExitKind::ALL
                .into_iter()
                .filter(|&kind| kind != ExitKind::Interrupted)
                .map(|kind| vcpu.counters.exits(kind))
                .sum();
            // Where many share a processor, busy is who had a tenth of it: interrupts off in each of
            // several looks is what tells.
            let busy = used.saturating_sub(streak.used) > period / 10 && exits == streak.exits;
            (streak.used, streak.exits) = (used, exits);
            if !busy {
                (streak.busy, streak.dark) = (Duration::ZERO, 0);
                continue;
            }
            streak.busy += period;
            if streak.busy < LONG {
                continue;
            }
            let flags = vcpu.mailbox.ask(|kvm| kvm.registers().map(|r| r.rflags));
            let dark = matches!(flags, Some(Ok(flags)) if flags & INTERRUPT_FLAG == 0);
            streak.dark = if dark { streak.dark + 1 } else { 0 };
            if streak.dark >= LOOKS {
                return Some(Stall::Dark(index));
            }
            found = Some(Stall::Busy);
        }
        found
    }
}
