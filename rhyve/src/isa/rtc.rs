//! The CMOS clock at ports 0x70 and 0x71: an MC146818 with 128 bytes, as every PC since the AT has.
//!
//! Facts are from the MC146818A data sheet (Motorola, 1984). Nothing ticks here: the time is the host's
//! plus an offset, and what happened since the last look (`Chip::advance`) is worked out when
//! somebody looks. Only an interrupt the guest enabled has a timer of the host's.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_api::inspect::CmosState;
use vmm_api::memory::MemoryLayout;
use vmm_api::state::{DeviceState, StateError};

use super::clock::Clock;
use crate::bus::{InOut, IoSize, Overlap, PortBus};
use crate::config::RtcBase;
use crate::irq::IrqLine;
use crate::lifecycle::{self, Lifecycle};
use crate::mevent::{Mevent, Timer};

mod chip;
#[cfg(test)]
mod tests;

use chip::{Chip, FLAGS, Mode, Now, REGISTER_A, SECOND, VALID, reg};

/// Its interrupt.
pub const IRQ: u8 = 8;

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;

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
    state: Mutex<Chip>,
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
        let mut state = Chip {
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

    fn state(&self) -> MutexGuard<'_, Chip> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self, state: &Chip) -> Now {
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

    fn update_line(&self, state: &mut Chip) {
        let asserted = state.interrupts();
        if asserted != state.asserted {
            state.asserted = asserted;
            self.irq.set(asserted);
        }
    }

    /// Arms the timer for the next interrupt. While one is pending there is no next.
    fn arm(&self, state: &Chip) {
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
        *self.state() = Chip {
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
