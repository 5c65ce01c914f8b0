//! Where a vCPU's time in user space goes: exits by reason, place and caller.
//!
//! A vCPU's thread notes each exit as it comes and settles it when the guest is entered again, so
//! that what lies between is the host's time for it. It asks for no lock and no clock of its own:
//! the times are those that are taken around KVM_RUN anyway. Whoever wants to see the profile has
//! that thread make a copy ([`ExitProfile::stats`]) between two entries.
//!
//! A guest chooses the places, so there is a bound to them ([`PLACES_MAX`]): what comes later is
//! counted by its reason alone. Callers are kept by the Space-Saving rule (Metwally, Agrawal, El
//! Abbadi, 2005): a new one takes the place of the rarest and its count, so that the counts are right
//! or too high, and a frequent caller is never missed.

use std::collections::HashMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::exit::{Direction, ExitKind, PortAccess, VmExit};
use crate::state::Hex;

/// Places that are told apart.
pub const PLACES_MAX: usize = 512;

/// Callers that are kept of each place.
pub const CALLERS_MAX: usize = 8;

/// What one vCPU has left the guest for since it was made, or since the counting began anew.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStats {
    /// Nanoseconds that are counted.
    pub span_ns: u64,
    /// One for each reason and place.
    pub exits: Vec<ExitStat>,
}

/// Exits for one reason at one place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStat {
    /// [`ExitKind`]'s name.
    pub reason: String,
    /// Whether the guest read or wrote, where that is the question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write: Option<bool>,
    /// The port, guest-physical address or MSR; none where there is none, or where there were too
    /// many to tell apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<Hex>,
    /// Who answers there; filled in by the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// How often.
    pub count: u64,
    /// Nanoseconds from the exits to the entries that followed them.
    pub host_ns: u64,
    /// Instructions that did it, the most frequent first.
    #[serde(default)]
    pub callers: Vec<Caller>,
}

/// An instruction that made a vCPU leave the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// The instruction pointer when the guest was left.
    pub rip: Hex,
    /// How often, at most.
    pub count: u64,
}

/// What tells exits apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    kind: ExitKind,
    write: Option<bool>,
    address: Option<u64>,
}

impl Place {
    fn of(exit: &VmExit) -> Self {
        let (write, address) = match *exit {
            VmExit::Port(PortAccess {
                direction, port, ..
            }) => (Some(direction == Direction::Out), Some(port.into())),
            VmExit::MmioRead { gpa, .. } => (Some(false), Some(gpa)),
            VmExit::MmioWrite { gpa, .. } => (Some(true), Some(gpa)),
            VmExit::Rdmsr { index } | VmExit::Wrmsr { index, .. } => (None, Some(index.into())),
            _ => (None, None),
        };
        Self {
            kind: exit.kind(),
            write,
            address,
        }
    }
}

#[derive(Clone, Debug)]
struct Entry {
    place: Place,
    count: u64,
    host_ns: u64,
    /// Instruction pointer and count; those that count nothing are free.
    callers: [(u64, u64); CALLERS_MAX],
}

impl Entry {
    fn caller(&mut self, rip: u64) {
        if let Some((_, count)) = self.callers.iter_mut().find(|c| c.0 == rip && c.1 > 0) {
            *count += 1;
        } else if let Some(rarest) = self.callers.iter_mut().min_by_key(|c| c.1) {
            *rarest = (rip, rarest.1 + 1);
        }
    }
}

/// A vCPU's exits so far.
#[derive(Clone, Debug)]
pub struct ExitProfile {
    since: Instant,
    index: HashMap<Place, usize>,
    entries: Vec<Entry>,
    /// The exit that is being served, and when it came.
    open: Option<(usize, Instant)>,
}

impl Default for ExitProfile {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            index: HashMap::new(),
            entries: Vec::new(),
            open: None,
        }
    }
}

impl ExitProfile {
    /// The guest was left at `now`, at this instruction if that is known.
    pub fn note(&mut self, exit: &VmExit, rip: Option<u64>, now: Instant) {
        let place = Place::of(exit);
        // A guest that leaves again and again mostly does so for the same thing.
        let last = self.open.map(|(at, _)| at);
        let same = |&at: &usize| self.entries.get(at).is_some_and(|e| e.place == place);
        let at = last.filter(same).unwrap_or_else(|| self.find(place));
        if let Some(entry) = self.entries.get_mut(at) {
            entry.count += 1;
            if let Some(rip) = rip {
                entry.caller(rip);
            }
        }
        self.open = Some((at, now));
    }

    /// The guest is entered, or the exit's access completed, at `now`: the last exit was served.
    pub fn settle(&mut self, now: Instant) {
        let Some((at, since)) = self.open else {
            return;
        };
        if let Some(entry) = self.entries.get_mut(at) {
            let spent = now.saturating_duration_since(since).as_nanos();
            entry.host_ns += u64::try_from(spent).unwrap_or(u64::MAX);
        }
        // It is kept as what the next exit may be for again, but costs nothing more.
        self.open = Some((at, now));
    }

    /// The time until `now` is no exit's.
    pub fn skip(&mut self, now: Instant) {
        if let Some((_, since)) = &mut self.open {
            *since = now;
        }
    }

    fn find(&mut self, place: Place) -> usize {
        let full = self.index.len() >= PLACES_MAX;
        let place = match self.index.get(&place) {
            Some(&at) => return at,
            None if full => Place {
                address: None,
                ..place
            },
            None => place,
        };
        // Without an address there are few.
        *self.index.entry(place).or_insert_with(|| {
            self.entries.push(Entry {
                place,
                count: 0,
                host_ns: 0,
                callers: [(0, 0); CALLERS_MAX],
            });
            self.entries.len() - 1
        })
    }

    /// All of it, what took the host longest first.
    pub fn stats(&self) -> ExitStats {
        let mut exits: Vec<_> = self.entries.iter().map(stat).collect();
        exits.sort_by_key(|exit| std::cmp::Reverse((exit.host_ns, exit.count)));
        let span = self.since.elapsed().as_nanos();
        ExitStats {
            span_ns: u64::try_from(span).unwrap_or(u64::MAX),
            exits,
        }
    }
}

fn stat(entry: &Entry) -> ExitStat {
    let mut callers: Vec<_> = entry
        .callers
        .iter()
        .filter(|(_, count)| *count > 0)
        .map(|&(rip, count)| Caller {
            rip: Hex(rip),
            count,
        })
        .collect();
    callers.sort_by_key(|caller| std::cmp::Reverse(caller.count));
    ExitStat {
        reason: entry.place.kind.name().to_owned(),
        write: entry.place.write,
        place: entry.place.address.map(Hex),
        device: None,
        count: entry.count,
        host_ns: entry.host_ns,
        callers,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn port(direction: Direction, port: u16) -> VmExit {
        VmExit::Port(PortAccess {
            direction,
            port,
            size: 1,
            count: 1,
        })
    }

    #[test]
    fn exits_are_told_apart_by_reason_place_and_direction() {
        let mut profile = ExitProfile::default();
        let now = Instant::now();
        let at = |us| now + Duration::from_micros(us);
        profile.note(&port(Direction::Out, 0x3f8), Some(0x1000), at(0));
        profile.settle(at(7));
        profile.note(&port(Direction::In, 0x3fd), Some(0x1010), at(10));
        profile.settle(at(11));
        profile.note(&port(Direction::Out, 0x3f8), Some(0x1000), at(20));
        profile.settle(at(25));
        // Held for a second meanwhile: nobody's time.
        profile.skip(at(1_000_000));
        profile.note(&VmExit::Interrupted, None, at(1_000_001));
        let stats = profile.stats();
        let brief: Vec<_> = stats
            .exits
            .iter()
            .map(|e| (&*e.reason, e.write, e.place, e.count, e.host_ns))
            .collect();
        assert_eq!(
            brief,
            [
                ("inout", Some(true), Some(Hex(0x3f8)), 2, 12_000),
                ("inout", Some(false), Some(Hex(0x3fd)), 1, 1_000),
                ("interrupted", None, None, 1, 0),
            ]
        );
        let rip = Hex(0x1000);
        assert_eq!(stats.exits[0].callers, [Caller { rip, count: 2 }]);
        let json = serde_json::to_string(&stats).unwrap();
        assert_eq!(serde_json::from_str::<ExitStats>(&json).unwrap(), stats);
    }

    #[test]
    fn a_guest_that_touches_everything_fills_no_memory() {
        let mut profile = ExitProfile::default();
        for gpa in 0..100_000 {
            let exit = VmExit::MmioRead { gpa, len: 4 };
            profile.note(&exit, Some(gpa), Instant::now());
        }
        let stats = profile.stats();
        assert_eq!(stats.exits.len(), PLACES_MAX + 1);
        let counts: u64 = stats.exits.iter().map(|e| e.count).sum();
        assert_eq!(counts, 100_000);
        assert!(serde_json::to_vec(&stats).unwrap().len() < 512 << 10);
    }

    #[test]
    fn a_frequent_caller_is_found_among_many() {
        let mut profile = ExitProfile::default();
        for n in 0..10_000 {
            let rip = if n % 3 == 0 { 7 } else { 1000 + n };
            profile.note(&VmExit::Hlt, Some(rip), Instant::now());
        }
        let first = profile.stats().exits[0].callers[0];
        assert_eq!(first.rip, Hex(7));
        assert!(first.count >= 3334);
    }
}
