//! The chip's registers: what a guest reads and writes at a time that it is told, and what the chip
//! would interrupt for. No host's clock, timer or interrupt line is known here.

use bitflags::bitflags;

use crate::isa::calendar::Date;

/// Registers.
pub(super) mod reg {
    pub const SECONDS: u8 = 0x00;
    pub const SECONDS_ALARM: u8 = 0x01;
    pub const MINUTES: u8 = 0x02;
    pub const MINUTES_ALARM: u8 = 0x03;
    pub const HOURS: u8 = 0x04;
    pub const HOURS_ALARM: u8 = 0x05;
    pub const WEEKDAY: u8 = 0x06;
    pub const DAY: u8 = 0x07;
    pub const MONTH: u8 = 0x08;
    pub const YEAR: u8 = 0x09;
    pub const A: u8 = 0x0a;
    pub const B: u8 = 0x0b;
    pub const C: u8 = 0x0c;
    pub const D: u8 = 0x0d;
    pub const CENTURY: u8 = crate::firmware::pm::CMOS_CENTURY;
}

/// Register A: an update is about to begin.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Register A: the divider, whose two highest values hold it in reset.
const DIVIDER: u8 = 7 << 4;
const DIVIDER_RESET: u8 = 6 << 4;
/// Register A after power-on: a 32768 Hz crystal, periodic rate 1024 Hz.
pub(super) const REGISTER_A: u8 = 0x26;
/// Register D: the battery is good.
pub(super) const VALID: u8 = 1 << 7;

/// An alarm register that matches anything: both highest bits set.
const ANY: u8 = 0xc0;
/// PM in 12-hour format.
const PM: u8 = 1 << 7;

pub(super) const SECOND: i128 = 1_000_000_000;
const DAY: i64 = 86_400;
/// How long before an update UIP announces it, in ns.
const UPDATE_WARNING: i128 = 244_000;

bitflags! {
    /// Register B.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(super) struct Mode: u8 {
        const DAYLIGHT = 1 << 0;
        const HOURS_24 = 1 << 1;
        const BINARY = 1 << 2;
        const SQUARE_WAVE = 1 << 3;
        const UPDATE_INTERRUPT = 1 << 4;
        const ALARM_INTERRUPT = 1 << 5;
        const PERIODIC_INTERRUPT = 1 << 6;
        /// Freezes the time registers, to be written.
        const SET = 1 << 7;
    }
}

/// Register C: update, alarm and periodic flags, at the places of their enables in B.
pub(super) const FLAGS: u8 = 0x70;
/// Register C: one of them interrupts.
const INTERRUPT: u8 = 1 << 7;

/// Nanoseconds between the epoch of the clock's own time zone and now.
pub(super) type Now = i128;

/// What the chip holds.
#[derive(Debug)]
pub(super) struct Chip {
    pub index: u8,
    /// All registers; those of the time are current only while they are frozen.
    pub bytes: [u8; 128],
    pub mode: Mode,
    /// Register C without INTERRUPT.
    pub flags: u8,
    /// What the clock shows, less the host's time of day.
    pub offset: Now,
    /// Until when flags have been worked out.
    pub seen: Now,
    /// The level of the interrupt line.
    pub asserted: bool,
}

impl Chip {
    pub fn byte(&self, register: u8) -> u8 {
        self.bytes.get(usize::from(register)).copied().unwrap_or(0)
    }

    pub fn store(&mut self, register: u8, value: u8) {
        if let Some(byte) = self.bytes.get_mut(usize::from(register)) {
            *byte = value;
        }
    }

    /// The time registers do not follow the clock.
    pub fn frozen(&self) -> bool {
        self.mode.contains(Mode::SET) || self.byte(reg::A) & DIVIDER >= DIVIDER_RESET
    }

    /// A number as the registers show it.
    fn encode(&self, value: u8) -> u8 {
        if self.mode.contains(Mode::BINARY) {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.mode.contains(Mode::BINARY) {
            value
        } else {
            (value >> 4) * 10 + (value & 0xf)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.mode.contains(Mode::HOURS_24) {
            return self.encode(hour);
        }
        let twelve = self.encode((hour + 11) % 12 + 1);
        if hour >= 12 { twelve | PM } else { twelve }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.mode.contains(Mode::HOURS_24) {
            return self.decode(value);
        }
        let hour = self.decode(value & !PM) % 12;
        if value & PM != 0 { hour + 12 } else { hour }
    }

    /// Puts the time into its registers.
    pub fn show(&mut self, now: Now) {
        let seconds = now.div_euclid(SECOND) as i64;
        let date = Date::from_days(seconds.div_euclid(DAY));
        let (hour, minute, second) = time_of_day(seconds);
        let year = date.year.rem_euclid(100) as u8;
        let century = date.year.div_euclid(100).rem_euclid(100) as u8;
        let hour = self.encode_hour(hour);
        for (register, value) in [
            (reg::SECONDS, second),
            (reg::MINUTES, minute),
            (reg::WEEKDAY, date.weekday),
            (reg::DAY, date.day),
            (reg::MONTH, date.month),
            (reg::YEAR, year),
            (reg::CENTURY, century),
        ] {
            self.store(register, self.encode(value));
        }
        self.store(reg::HOURS, hour);
    }

    /// The time in the registers, in seconds. Nonsense gives some time, not an error.
    fn shown(&self) -> i64 {
        let number = |register| i64::from(self.decode(self.byte(register)));
        let date = Date {
            year: number(reg::CENTURY) * 100 + number(reg::YEAR),
            month: self.decode(self.byte(reg::MONTH)),
            day: self.decode(self.byte(reg::DAY)),
            weekday: 0,
        };
        let hour = i64::from(self.decode_hour(self.byte(reg::HOURS)));
        let minutes = hour * 60 + number(reg::MINUTES);
        date.to_days() * DAY + minutes * 60 + number(reg::SECONDS)
    }

    /// Whether the alarm is set for this second.
    fn alarm_at(&self, seconds: i64) -> bool {
        let (hour, minute, second) = time_of_day(seconds);
        let matches = |register, value| {
            let alarm = self.byte(register);
            alarm >= ANY || alarm == value
        };
        matches(reg::SECONDS_ALARM, self.encode(second))
            && matches(reg::MINUTES_ALARM, self.encode(minute))
            && matches(reg::HOURS_ALARM, self.encode_hour(hour))
    }

    /// The first second after `after` the alarm is set for; there is none if it holds nonsense.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        (after + 1..=after + DAY).find(|second| self.alarm_at(*second))
    }

    /// Whether the alarm was set for a second after `after` and until `until`.
    fn alarmed(&self, after: i64, until: i64) -> bool {
        // It comes once a day at least, or never.
        (after.max(until - DAY) + 1..=until).any(|second| self.alarm_at(second))
    }

    /// Nanoseconds between periodic interrupts, if they are on (table 5, 32768 Hz).
    fn period(&self) -> Option<i128> {
        let rate = match self.byte(reg::A) & 0xf {
            0 => return None,
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        Some(SECOND / i128::from(32_768_u32 >> (rate - 1)))
    }

    /// Works out which flags have risen since the last call.
    pub fn advance(&mut self, now: Now) {
        let seen = std::mem::replace(&mut self.seen, now);
        if now <= seen {
            return;
        }
        let running = self.byte(reg::A) & DIVIDER < DIVIDER_RESET;
        if running
            && self
                .period()
                .is_some_and(|period| now.div_euclid(period) != seen.div_euclid(period))
        {
            self.flags |= Mode::PERIODIC_INTERRUPT.bits();
        }
        let (from, to) = (
            seen.div_euclid(SECOND) as i64,
            now.div_euclid(SECOND) as i64,
        );
        if !self.frozen() && to > from {
            self.flags |= Mode::UPDATE_INTERRUPT.bits();
            if self.alarmed(from, to) {
                self.flags |= Mode::ALARM_INTERRUPT.bits();
            }
        }
    }

    pub fn interrupts(&self) -> bool {
        self.flags & self.mode.bits() & FLAGS != 0
    }

    /// When the next enabled interrupt is due.
    pub fn next_interrupt(&self, now: Now) -> Option<Now> {
        let second = now.div_euclid(SECOND) as i64;
        let at = |second: i64| i128::from(second) * SECOND;
        let running = self.byte(reg::A) & DIVIDER < DIVIDER_RESET;
        let enabled = |mode| self.mode.contains(mode);
        let periodic = self
            .period()
            .filter(|_| running && enabled(Mode::PERIODIC_INTERRUPT))
            .map(|period| (now.div_euclid(period) + 1) * period);
        let update = (enabled(Mode::UPDATE_INTERRUPT) && !self.frozen()).then(|| at(second + 1));
        let alarm = (enabled(Mode::ALARM_INTERRUPT) && !self.frozen())
            .then(|| self.next_alarm(second).map(at))
            .flatten();
        [periodic, update, alarm].into_iter().flatten().min()
    }

    pub fn read(&mut self, now: Now) -> u8 {
        match self.index {
            reg::SECONDS | reg::MINUTES | reg::HOURS | reg::WEEKDAY..=reg::YEAR | reg::CENTURY => {
                if !self.frozen() {
                    self.show(now);
                }
                self.byte(self.index)
            }
            reg::A => {
                let left = SECOND - now.rem_euclid(SECOND);
                let updating = !self.frozen() && left <= UPDATE_WARNING;
                self.byte(reg::A) | if updating { UPDATE_IN_PROGRESS } else { 0 }
            }
            reg::B => self.mode.bits(),
            reg::C => {
                let interrupt = if self.interrupts() { INTERRUPT } else { 0 };
                std::mem::take(&mut self.flags) | interrupt
            }
            reg::D => VALID,
            register => self.byte(register),
        }
    }

    /// Writes the indexed register at `now`, by the host's time of day without the offset.
    pub fn write(&mut self, value: u8, now: Now) {
        match self.index {
            reg::C | reg::D => {}
            reg::A => self.configure(now, |chip| {
                chip.store(reg::A, value & !UPDATE_IN_PROGRESS);
            }),
            reg::B => self.configure(now, |chip| {
                chip.mode = Mode::from_bits_retain(value);
                // The data sheet has SET clear the update interrupt's enable.
                if chip.mode.contains(Mode::SET) {
                    chip.mode -= Mode::UPDATE_INTERRUPT;
                }
            }),
            reg::SECONDS | reg::MINUTES | reg::HOURS | reg::WEEKDAY..=reg::YEAR | reg::CENTURY => {
                if self.frozen() {
                    self.store(self.index, value);
                } else {
                    self.show(now);
                    self.store(self.index, value);
                    self.set_time(now, now.rem_euclid(SECOND));
                }
            }
            register => self.store(register, value),
        }
    }

    /// Changes register A or B. The time freezes as it is, and goes on from what the registers say: half
    /// a second before the next update if the divider was held in reset, with the fraction the clock
    /// has if not.
    fn configure(&mut self, now: Now, change: impl FnOnce(&mut Self)) {
        let (was_frozen, was_reset) = (self.frozen(), self.byte(reg::A) & DIVIDER >= DIVIDER_RESET);
        if !was_frozen {
            self.show(now);
        }
        change(self);
        if was_frozen && !self.frozen() {
            let fraction = if was_reset {
                SECOND / 2
            } else {
                now.rem_euclid(SECOND)
            };
            self.set_time(now, fraction);
        }
    }

    /// Makes the clock show what is in the registers.
    fn set_time(&mut self, now: Now, fraction: Now) {
        let shown = i128::from(self.shown()) * SECOND + fraction;
        self.offset += shown - now;
        self.seen = shown;
    }
}

fn time_of_day(seconds: i64) -> (u8, u8, u8) {
    let seconds = seconds.rem_euclid(DAY);
    // Each is below 60.
    (
        (seconds / 3600) as u8,
        (seconds / 60 % 60) as u8,
        (seconds % 60) as u8,
    )
}
