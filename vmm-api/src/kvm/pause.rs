//! The time that a machine was not there.
//!
//! A machine's clocks (time stamp counters, KVM's paravirtual clock, the PM timer) are read one after
//! the other, and set one after the other in another process. To the guest they must have stopped and
//! started at the same moments, or it takes the one for wrong that the others disagree with. So each
//! is stored with the host's time at which it was read, and is set to what it would show by then had
//! the machine been away for exactly this long.

use nix::time::{ClockId, clock_gettime};

/// How long a machine was away, the same for all its clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Away {
    ns: i128,
}

/// The host's monotonic clock, in nanoseconds.
pub fn host_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

impl Away {
    /// A machine that was stopped at `at_ns` of the host's clock, and starts now. The clock may have
    /// been another host's.
    pub fn since(at_ns: u64) -> Self {
        Self {
            ns: i128::from(host_ns()) - i128::from(at_ns),
        }
    }

    /// How far a clock of `hz` has come since it was read at `at_ns`, the time away not counted: a
    /// number to be added modulo 2^64.
    pub fn ticks_since(&self, at_ns: u64, hz: u64) -> u64 {
        let ns = i128::from(host_ns()) - i128::from(at_ns) - self.ns;
        // Both ways within an hour: what is stored may be anything.
        let ns = ns.clamp(-3_600_000_000_000, 3_600_000_000_000);
        (ns * i128::from(hz) / 1_000_000_000) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_later_is_less_far() {
        let stopped = host_ns();
        let away = Away::since(stopped);
        let (first, second) = (stopped, stopped + 1_000_000);
        let difference = || {
            let later = away.ticks_since(second, 1_000_000_000);
            away.ticks_since(first, 1_000_000_000).wrapping_sub(later)
        };
        assert!(
            (900_000..1_100_000).contains(&difference()),
            "{}",
            difference()
        );
        assert!(away.ticks_since(0, u64::MAX) > 0);
        assert!(Away::since(u64::MAX).ticks_since(u64::MAX, 1) <= 3600);
    }
}
