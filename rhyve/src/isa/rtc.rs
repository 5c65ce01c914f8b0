//! The CMOS clock at ports 0x70 and 0x71: an MC146818 with 128 bytes, as every PC since the AT has.
//!
//! Facts are from the MC146818A data sheet (Motorola, 1984). Nothing ticks here: the time is the host's
//! plus an offset, and what happened since the last look (`State::advance`) is worked out when
//! somebody looks. Only an interrupt the guest enabled has a timer of the host's.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use vmm_api::inspect::CmosState;
use vmm_api::memory::MemoryLayout;
use vmm_api::state::{DeviceState, StateError};

use super::calendar::Date;
use super::clock::Clock;
use crate::bus::{InOut, IoSize, Overlap, PortBus};
use crate::config::RtcBase;
use crate::irq::IrqLine;
use crate::lifecycle::{self, Lifecycle};
use crate::mevent::{Mevent, Timer};

/// Its interrupt.
pub const IRQ: u8 = 8;

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;

/// Registers.
mod reg {
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
const REGISTER_A: u8 = 0x26;
/// Register D: the battery is good.
const VALID: u8 = 1 << 7;

/// An alarm register that matches anything: both highest bits set.
const ANY: u8 = 0xc0;
/// PM in 12-hour format.
const PM: u8 = 1 << 7;

const SECOND: i128 = 1_000_000_000;
const DAY: i64 = 86_400;
/// How long before an update UIP announces it, in ns.
const UPDATE_WARNING: i128 = 244_000;

bitflags! {
    /// Register B.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    struct Mode: u8 {
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
const FLAGS: u8 = 0x70;
/// Register C: one of them interrupts.
const INTERRUPT: u8 = 1 << 7;

/// Nanoseconds between the epoch of the clock's own time zone and now.
type Now = i128;

#[derive(Debug)]
struct State {
    index: u8,
    /// All registers; those of the time are current only while they are frozen.
    bytes: [u8; 128],
    mode: Mode,
    /// Register C without INTERRUPT.
    flags: u8,
    /// What the clock shows, less the host's time of day.
    offset: Now,
    /// Until when flags have been worked out.
    seen: Now,
    /// The level of the interrupt line.
    asserted: bool,
}

impl State {
    fn byte(&self, register: u8) -> u8 {
        self.bytes.get(usize::from(register)).copied().unwrap_or(0)
    }

    fn store(&mut self, register: u8, value: u8) {
        if let Some(byte) = self.bytes.get_mut(usize::from(register)) {
            *byte = value;
        }
    }

    /// The time registers do not follow the clock.
    fn frozen(&self) -> bool {
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
    fn show(&mut self, now: Now) {
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
    fn advance(&mut self, now: Now) {
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

    fn interrupts(&self) -> bool {
        self.flags & self.mode.bits() & FLAGS != 0
    }

    /// When the next enabled interrupt is due.
    fn next_interrupt(&self, now: Now) -> Option<Now> {
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

    fn read(&mut self, now: Now) -> u8 {
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
    fn write(&mut self, value: u8, now: Now) {
        match self.index {
            reg::C | reg::D => {}
            reg::A => self.configure(now, |state| {
                state.store(reg::A, value & !UPDATE_IN_PROGRESS);
            }),
            reg::B => self.configure(now, |state| {
                state.mode = Mode::from_bits_retain(value);
                // The data sheet has SET clear the update interrupt's enable.
                if state.mode.contains(Mode::SET) {
                    state.mode -= Mode::UPDATE_INTERRUPT;
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

/// How many seconds a machine's clock is to be ahead of UTC.
///
/// For [`RtcBase::LocalTime`] it is what the host's time zone (`TZ`, or /etc/localtime) has now; a
/// host without one keeps UTC.
pub fn base_offset(base: RtcBase) -> i32 {
    let local = || {
        let zone = tz::TimeZone::local().ok()?;
        Some(zone.find_current_local_time_type().ok()?.ut_offset())
    };
    match base {
        RtcBase::Utc => 0,
        RtcBase::LocalTime => local().unwrap_or(0),
    }
}

/// The clock.
pub struct Rtc {
    clock: Arc<dyn Clock>,
    irq: Arc<dyn IrqLine>,
    /// Seconds that its time zone is ahead of UTC.
    base: i32,
    state: Mutex<State>,
    timer: OnceLock<Timer>,
}

impl Rtc {
    /// A clock that shows the host's time of day plus `offset` seconds (see [`base_offset`]) and
    /// interrupts through `irq`, which is [`IRQ`]. `memory` is what its non-volatile bytes tell a guest
    /// that asks no better source.
    pub fn new(
        clock: Arc<dyn Clock>,
        irq: Arc<dyn IrqLine>,
        offset: i32,
        memory: &MemoryLayout,
    ) -> Arc<Self> {
        let (base, offset) = (offset, i128::from(offset) * SECOND);
        let seen = nanoseconds(clock.realtime()) + offset;
        let mut state = State {
            index: 0,
            bytes: memory_bytes(memory),
            mode: Mode::HOURS_24,
            flags: 0,
            offset,
            seen,
            asserted: false,
        };
        state.store(reg::A, REGISTER_A);
        Arc::new(Self {
            clock,
            irq,
            base,
            state: Mutex::new(state),
            timer: OnceLock::new(),
        })
    }

    /// Lets interrupts come by themselves. Without this flags are right whenever they are looked at.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn attach_timer(self: &Arc<Self>, mevent: &Mevent) -> io::Result<()> {
        let me = Arc::downgrade(self);
        let timer = mevent.timer("rtc", move || {
            if let Some(rtc) = me.upgrade() {
                rtc.tick();
            }
        })?;
        // A second timer is not needed.
        let _ = self.timer.set(timer);
        Ok(())
    }

    /// Puts it at 0x70 and 0x71.
    ///
    /// # Errors
    /// [`Overlap`].
    pub fn register(self: &Arc<Self>, bus: &PortBus) -> Result<(), Overlap> {
        bus.register(INDEX..=DATA, "rtc", self.clone())
    }

    /// Seconds since 1970-01-01 00:00 that it shows, and its bytes as a guest would read them.
    pub fn look(&self) -> (i64, [u8; 128]) {
        let mut state = self.state();
        let now = self.now(&state);
        state.advance(now);
        if !state.frozen() {
            state.show(now);
        }
        let mut bytes = state.bytes;
        for (register, value) in [
            (reg::B, state.mode.bits()),
            (reg::C, state.flags),
            (reg::D, VALID),
        ] {
            bytes[usize::from(register)] = value;
        }
        (now.div_euclid(SECOND) as i64, bytes)
    }

    /// Makes it show this time, in seconds since 1970-01-01 00:00. An alarm in between is passed over.
    pub fn set_seconds(&self, seconds: i64) {
        let mut state = self.state();
        let now = self.now(&state);
        state.advance(now);
        let shown = i128::from(seconds) * SECOND + now.rem_euclid(SECOND);
        state.offset += shown - now;
        state.seen = shown;
        if state.frozen() {
            state.show(shown);
        }
        self.arm(&state);
    }

    /// Writes a byte of its memory; false if there is none at this offset.
    pub fn set_byte(&self, offset: u8, value: u8) -> bool {
        let memory = CmosState::is_memory(offset);
        if memory {
            self.state().store(offset, value);
        }
        memory
    }

    /// What its battery keeps.
    pub fn save(&self) -> CmosState {
        let state = self.state();
        CmosState {
            base: self.base.into(),
            ahead: (state.offset.div_euclid(SECOND) - i128::from(self.base)) as i64,
            nvram: state.bytes.to_vec(),
        }
    }

    /// Goes on from what its battery kept. What this machine's memory says of itself stays.
    pub fn restore(&self, cmos: &CmosState) {
        let mut state = self.state();
        if cmos.ahead != 0 {
            // Somebody set it: it keeps that time, whatever this machine's time zone is.
            let shown = i128::from(cmos.base.saturating_add(cmos.ahead)) * SECOND;
            state.seen += shown - state.offset;
            state.offset = shown;
        }
        for (offset, &value) in (0..).zip(&cmos.nvram) {
            if CmosState::is_memory(offset) && state.byte(offset) == 0 {
                state.store(offset, value);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self, state: &State) -> Now {
        nanoseconds(self.clock.realtime()) + state.offset
    }

    /// Works out what has happened, and drives the interrupt line.
    fn tick(&self) {
        let mut state = self.state();
        let now = self.now(&state);
        state.advance(now);
        self.update_line(&mut state);
        self.arm(&state);
    }

    fn update_line(&self, state: &mut State) {
        let asserted = state.interrupts();
        if asserted != state.asserted {
            state.asserted = asserted;
            self.irq.set(asserted);
        }
    }

    /// Arms the timer for the next interrupt. While one is pending there is no next.
    fn arm(&self, state: &State) {
        let Some(timer) = self.timer.get() else {
            return;
        };
        let now = self.now(state);
        let next = if state.asserted {
            None
        } else {
            state.next_interrupt(now)
        };
        match next {
            Some(at) => timer.arm(Duration::from_nanos(u64::try_from(at - now).unwrap_or(0))),
            None => timer.disarm(),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    index: u8,
    #[serde(with = "lifecycle::bytes")]
    bytes: Vec<u8>,
    mode: u8,
    flags: u8,
    /// Nanoseconds.
    offset: i64,
    seen: i64,
}

const KIND: &str = "rtc-chip";

/// All of it, where [`Rtc::save`] is what its battery keeps.
impl Lifecycle for Rtc {
    fn save(&self) -> Result<DeviceState, String> {
        let state = self.state();
        let number = |ns: Now| i64::try_from(ns).unwrap_or(i64::MAX);
        let saved = Saved {
            index: state.index,
            bytes: state.bytes.to_vec(),
            mode: state.mode.bits(),
            flags: state.flags,
            offset: number(state.offset),
            seen: number(state.seen),
        };
        lifecycle::save(KIND, 1, &saved)
    }

    /// The clock shows the time that it is now; what was due in between happens now.
    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Saved = lifecycle::load(KIND, 1, state)?;
        let bytes = saved.bytes.as_slice().try_into();
        let bytes = bytes.map_err(|_| StateError::Value("rtc-chip: not 128 bytes".into()))?;
        *self.state() = State {
            index: saved.index,
            bytes,
            mode: Mode::from_bits_retain(saved.mode),
            flags: saved.flags & FLAGS,
            offset: saved.offset.into(),
            seen: saved.seen.into(),
            asserted: false,
        };
        self.tick();
        Ok(())
    }
}

impl InOut for Rtc {
    fn saved(&self) -> bool {
        true
    }

    fn read(&self, port: u16, _size: IoSize) -> u32 {
        if port == INDEX {
            // Write-only on a PC.
            return 0xff;
        }
        let mut state = self.state();
        let now = self.now(&state);
        state.advance(now);
        let value = state.read(now);
        let was_asserted = state.asserted;
        self.update_line(&mut state);
        if was_asserted && !state.asserted {
            self.arm(&state);
        }
        u32::from(value)
    }

    fn write(&self, port: u16, _size: IoSize, value: u32) {
        let mut state = self.state();
        // Lossless: the bus hands over bytes.
        let value = value as u8;
        if port == INDEX {
            // The highest bit masks NMI, on a board.
            state.index = value & 0x7f;
            return;
        }
        let now = self.now(&state);
        state.advance(now);
        state.write(value, now);
        self.update_line(&mut state);
        // NVRAM is not worth a system call.
        if state.index <= reg::D || state.index == reg::CENTURY {
            self.arm(&state);
        }
    }
}

fn nanoseconds(time: Duration) -> i128 {
    time.as_nanos() as i128
}

/// The memory sizes an AT's firmware leaves in CMOS: base and extended memory in KiB, memory above
/// 16 MiB and above 4 GiB in units of 64 KiB (SeaBIOS, src/hw/rtc.h).
fn memory_bytes(memory: &MemoryLayout) -> [u8; 128] {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    let mut bytes = [0; 128];
    let mut put = |at: usize, count: u64, limit: u64, width: usize| {
        let count = count.min(limit).to_le_bytes();
        for (to, from) in bytes.iter_mut().skip(at).zip(&count[..width]) {
            *to = *from;
        }
    };
    let extended = memory.lowmem.saturating_sub(MIB) / KIB;
    put(0x15, 640, 0xffff, 2);
    put(0x17, extended, 0xffff, 2);
    put(0x30, extended, 0xffff, 2);
    put(
        0x34,
        memory.lowmem.saturating_sub(16 * MIB) / (64 * KIB),
        0xffff,
        2,
    );
    put(0x5b, memory.highmem / (64 * KIB), 0xff_ffff, 3);
    bytes
}

#[cfg(test)]
mod tests;
