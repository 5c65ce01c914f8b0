//! Time, as devices see it.

use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

/// Where a device gets the time from; tests bring their own.
pub trait Clock: Send + Sync {
    /// Time since an arbitrary moment, never going back.
    fn monotonic(&self) -> Duration;

    /// Time since 1970-01-01 00:00:00 UTC, as far as the host knows it.
    fn realtime(&self) -> Duration;
}

/// The host's clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostClock;

impl Clock for HostClock {
    fn monotonic(&self) -> Duration {
        now(ClockId::CLOCK_MONOTONIC)
    }

    fn realtime(&self) -> Duration {
        now(ClockId::CLOCK_REALTIME)
    }
}

fn now(clock: ClockId) -> Duration {
    // Both clocks are on every Linux; a host before 1970 shows its epoch.
    let now = clock_gettime(clock).unwrap_or(TimeSpec::new(0, 0));
    Duration::from(now)
}
