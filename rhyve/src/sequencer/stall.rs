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
use vmm_api::kvm::{Counters, KvmVcpu};
use vmm_api::stats;

use super::Mailbox;

/// How long a vCPU has to be busy with itself.
const LONG: Duration = Duration::from_secs(10);
/// In how many looks after that it has to have interrupts off, without having taken one in between.
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
    /// Looks that have seen the same darkness.
    looks: u32,
    dark: Option<Dark>,
}

/// A vCPU with interrupts off.
#[derive(Clone, Copy, PartialEq)]
struct Dark {
    /// How many it has taken so far, if KVM counts them.
    taken: Option<u64>,
}

impl Streak {
    /// Counts the looks that have seen the same. One that takes interrupts now and then was looked at while
    /// it served one: as after the monitor stood still, when guest and look go on at the same moment.
    fn saw(&mut self, dark: Option<Dark>) {
        self.looks = match dark {
            None => 0,
            Some(_) if dark == self.dark => self.looks + 1,
            Some(_) => 1,
        };
        self.dark = dark;
    }
}

/// Whether a busy vCPU with these RFLAGS seems out of reach, by the interrupts that it ever took.
///
/// One that was started by another and never took any waits to be launched: FreeBSD's do so with
/// interrupts off and a processor to themselves, until the first one has found all devices.
fn unreachable(index: u32, rflags: u64, taken: impl FnOnce() -> Option<u64>) -> Option<Dark> {
    let taken = (rflags & INTERRUPT_FLAG == 0).then(taken)?;
    (index == 0 || taken != Some(0)).then_some(Dark { taken })
}

/// Interrupts that KVM has injected into a vCPU, if it counts them.
fn interrupts(kvm: &KvmVcpu) -> Option<u64> {
    let stats = stats::read(&kvm.stats_file().ok()?).ok()?;
    let stat = stats.iter().find(|stat| stat.name == "irq_injections")?;
    stat.value()
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
                streak.busy = Duration::ZERO;
                streak.saw(None);
                continue;
            }
            streak.busy += period;
            if streak.busy < LONG {
                continue;
            }
            let dark = vcpu.mailbox.ask(move |kvm| {
                let registers = kvm.registers().ok()?;
                unreachable(index, registers.rflags, || interrupts(kvm))
            });
            streak.saw(dark.flatten());
            if streak.looks >= LOOKS {
                return Some(Stall::Dark(index));
            }
            found = Some(Stall::Busy);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_that_waits_to_be_launched_is_not_stuck() {
        let reach = |index, rflags, taken| unreachable(index, rflags, || taken).is_some();
        assert!(!reach(1, 2, Some(0)));
        assert!(reach(1, 2, Some(7)));
        assert!(reach(1, 2, None));
        assert!(!reach(1, 2 | INTERRUPT_FLAG, Some(7)));
        // Who starts a machine is launched.
        assert!(reach(0, 2, Some(0)));
    }

    #[test]
    fn a_processor_that_takes_interrupts_is_not_stuck() {
        let mut streak = Streak::default();
        let dark = |taken| Some(Dark { taken });
        for taken in 0..20 {
            streak.saw(dark(Some(taken)));
            assert_eq!(streak.looks, 1);
        }
        for looks in 2..=LOOKS {
            streak.saw(dark(Some(19)));
            assert_eq!(streak.looks, looks);
        }
        streak.saw(None);
        assert_eq!(streak.looks, 0);
        // Where KVM does not count, its flags are what there is.
        for looks in 1..=LOOKS {
            streak.saw(dark(None));
            assert_eq!(streak.looks, looks);
        }
    }
}
