//! ACPI's fixed hardware: PM1 event and control blocks, PM timer, power button, soft off.
//!
//! The ports and values are those the tables tell the guest ([`crate::firmware::pm`]); the registers
//! are of ACPI 6.5, 4.8.3. There is no general-purpose event, no sleep button and no sleep state but S5.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use vmm_api::kvm::{Away, host_ns};
use vmm_api::state::{DeviceState, StateError};

use super::clock::Clock;
use crate::bus::{InOut, IoSize, Overlap, PortBus};
use crate::firmware::pm;
use crate::irq::IrqLine;
use crate::lifecycle::{self, Lifecycle};
use crate::mevent::{Mevent, Timer};
use crate::suspend::{SuspendHow, SuspendSink};

/// Frequency of the PM timer in Hz (4.8.2.1).
const TIMER_HZ: u128 = 3_579_545;
/// Last port of the blocks: event and control, which are contiguous.
const PM1_LAST: u16 = pm::PM1A_CNT + 1;
/// Last port of the timer.
const TIMER_LAST: u16 = pm::TIMER + 3;

bitflags! {
    /// PM1 status and enable (4.8.3.1): the same bits mean the same event.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    struct Event: u16 {
        /// The timer's highest bit changed.
        const TIMER = 1 << 0;
        /// The firmware released the global lock, which it never takes.
        const GLOBAL = 1 << 5;
        const POWER_BUTTON = 1 << 8;
        /// The clock's alarm, which never comes here: the tables say so, but Linux enables it all
        /// the same, and complains when it reads back as 0.
        const ALARM = 1 << 10;
    }

    /// PM1 control (4.8.3.2).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    struct Control: u16 {
        const SCI_EN = 1 << 0;
        const BM_RLD = 1 << 1;
        const SLP_TYP = 7 << 10;
        /// Write-only.
        const SLP_EN = 1 << 13;
    }
}

#[derive(Default)]
struct State {
    status: Event,
    enable: Event,
    control: Control,
    smi_command: u8,
    /// Half-turns of the timer that the status shows, or showed.
    half_turns: u64,
    /// The level of the SCI.
    asserted: bool,
}

impl State {
    fn word(&self, port: u16) -> u16 {
        match port & !1 {
            pm::PM1A_EVT => self.status.bits(),
            pm::PM1A_CNT => self.control.bits(),
            _ => self.enable.bits(),
        }
    }

    /// Writes one byte; true if it says SLP_EN.
    fn write(&mut self, port: u16, byte: u8) -> bool {
        let shift = 8 * (port & 1);
        let written = u16::from(byte) << shift;
        let replaced = self.word(port) & !(0xff << shift) | written;
        match port & !1 {
            // Status bits are cleared by writing ones.
            pm::PM1A_EVT => self.status -= Event::from_bits_truncate(written),
            pm::PM1A_CNT => {
                self.control = Control::from_bits_truncate(replaced) - Control::SLP_EN;
                return written & Control::SLP_EN.bits() != 0;
            }
            _ => self.enable = Event::from_bits_truncate(replaced),
        }
        false
    }

    fn sleep_type(&self) -> u8 {
        ((self.control & Control::SLP_TYP).bits() >> 10) as u8
    }
}

/// ACPI's fixed hardware.
pub struct Pm {
    clock: Arc<dyn Clock>,
    sci: Arc<dyn IrqLine>,
    suspend: Arc<dyn SuspendSink>,
    /// What the timer is ahead of the host's clock, modulo 2^64.
    ahead: AtomicU64,
    /// How long a suspended machine was away.
    away: Mutex<Away>,
    state: Mutex<State>,
    timer: OnceLock<Timer>,
}

impl Pm {
    /// The hardware after power-on, in legacy mode: `sci` is silent until the guest has enabled ACPI.
    /// S5 suspends the machine with [`SuspendHow::PowerOff`].
    pub fn new(
        clock: Arc<dyn Clock>,
        sci: Arc<dyn IrqLine>,
        suspend: Arc<dyn SuspendSink>,
    ) -> Arc<Self> {
        Arc::new(Self {
            clock,
            sci,
            suspend,
            ahead: AtomicU64::new(0),
            away: Mutex::default(),
            state: Mutex::default(),
            timer: OnceLock::new(),
        })
    }

    /// Lets the PM timer's interrupt come by itself. Without this its status is right whenever it is
    /// looked at.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn attach_timer(self: &Arc<Self>, mevent: &Mevent) -> io::Result<()> {
        let me = Arc::downgrade(self);
        let timer = mevent.timer("pm", move || {
            if let Some(pm) = me.upgrade() {
                pm.update(&mut pm.state());
            }
        })?;
        // A second timer is not needed.
        let _ = self.timer.set(timer);
        Ok(())
    }

    /// Puts it at its ports.
    ///
    /// # Errors
    /// [`Overlap`].
    pub fn register(self: &Arc<Self>, bus: &PortBus) -> Result<(), Overlap> {
        bus.register(pm::PM1A_EVT..=PM1_LAST, "pm1", self.clone())?;
        bus.register(pm::TIMER..=TIMER_LAST, "pmtimer", self.clone())?;
        bus.register(pm::SMI_CMD..=pm::SMI_CMD, "smi-command", self.clone())
    }

    /// Presses the power button; whether the guest listens, that is, has enabled ACPI and the button's
    /// event. If not, the event stays pending until it does.
    pub fn power_button(&self) -> bool {
        let mut state = self.state();
        state.status |= Event::POWER_BUTTON;
        self.update(&mut state);
        state.control.contains(Control::SCI_EN) && state.enable.contains(Event::POWER_BUTTON)
    }

    /// A suspended machine was away: said before its state is restored.
    pub fn set_away(&self, away: Away) {
        *self.away.lock().unwrap_or_else(PoisonError::into_inner) = away;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The PM timer, before it is cut to 32 bits.
    fn ticks(&self) -> u64 {
        let ticks = (self.clock.monotonic().as_nanos() * TIMER_HZ / 1_000_000_000) as u64;
        ticks.wrapping_add(self.ahead.load(Relaxed))
    }

    /// Brings the timer's status and the SCI up to date.
    fn update(&self, state: &mut State) {
        let ticks = self.ticks();
        let half_turns = ticks >> 31;
        if half_turns != state.half_turns {
            state.half_turns = half_turns;
            state.status |= Event::TIMER;
        }
        let enabled = state.control.contains(Control::SCI_EN);
        let asserted = enabled && state.status.intersects(state.enable);
        if asserted != state.asserted {
            state.asserted = asserted;
            self.sci.set(asserted);
        }
        if state.enable.contains(Event::TIMER)
            && !state.status.contains(Event::TIMER)
            && let Some(timer) = self.timer.get()
        {
            let left = u128::from(((half_turns + 1) << 31) - ticks);
            timer.arm(Duration::from_nanos(
                (left * 1_000_000_000 / TIMER_HZ) as u64 + 1,
            ));
        }
    }

    fn smi_command(&self, state: &mut State, command: u8) {
        state.smi_command = command;
        match command {
            pm::ACPI_ENABLE => state.control |= Control::SCI_EN,
            pm::ACPI_DISABLE => state.control -= Control::SCI_EN,
            _ => {}
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    status: u16,
    enable: u16,
    control: u16,
    smi_command: u8,
    ticks: u64,
    at_ns: u64,
}

const KIND: &str = "pm";

impl Lifecycle for Pm {
    fn save(&self) -> Result<DeviceState, String> {
        let mut state = self.state();
        self.update(&mut state);
        let saved = Saved {
            status: state.status.bits(),
            enable: state.enable.bits(),
            control: state.control.bits(),
            smi_command: state.smi_command,
            ticks: self.ticks(),
            at_ns: host_ns(),
        };
        lifecycle::save(KIND, 1, &saved)
    }

    /// The timer goes on from where it was.
    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Saved = lifecycle::load(KIND, 1, state)?;
        // So far that it does not wrap in the lifetime of any host.
        let away = *self.away.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = away.ticks_since(saved.at_ns, TIMER_HZ as u64);
        let ticks = saved.ticks.wrapping_add(passed) & (u64::MAX >> 8);
        let mut state = self.state();
        let ahead = self.ahead.load(Relaxed);
        let now = self.ticks().wrapping_sub(ahead);
        self.ahead.store(ticks.wrapping_sub(now), Relaxed);
        *state = State {
            status: Event::from_bits_truncate(saved.status),
            enable: Event::from_bits_truncate(saved.enable),
            control: Control::from_bits_truncate(saved.control) - Control::SLP_EN,
            smi_command: saved.smi_command,
            half_turns: ticks >> 31,
            asserted: false,
        };
        self.update(&mut state);
        Ok(())
    }
}

impl InOut for Pm {
    fn saved(&self) -> bool {
        true
    }

    fn width(&self) -> IoSize {
        IoSize::Dword
    }

    fn read(&self, port: u16, size: IoSize) -> u32 {
        if (pm::TIMER..=TIMER_LAST).contains(&port) {
            return self.ticks() as u32 >> (8 * (port - pm::TIMER));
        }
        let mut state = self.state();
        if port == pm::SMI_CMD {
            return u32::from(state.smi_command);
        }
        self.update(&mut state);
        (0..size.bytes()).rev().fold(0, |value, i| {
            let port = port + i;
            let byte = state.word(port) >> (8 * (port & 1)) & 0xff;
            value << 8 | u32::from(byte)
        })
    }

    fn write(&self, port: u16, size: IoSize, value: u32) {
        if (pm::TIMER..=TIMER_LAST).contains(&port) {
            return;
        }
        let mut state = self.state();
        let mut sleeps = false;
        if port == pm::SMI_CMD {
            self.smi_command(&mut state, value as u8);
        } else {
            self.update(&mut state);
            for (port, byte) in (port..port + size.bytes()).zip(value.to_le_bytes()) {
                sleeps |= state.write(port, byte);
            }
        }
        self.update(&mut state);
        if sleeps {
            match state.sleep_type() {
                pm::S5_SLP_TYP => self.suspend.suspend(SuspendHow::PowerOff),
                other => tracing::warn!(slp_typ = other, "the guest asked for an unknown sleep"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeClock, FakeIrq, FakeSuspend};

    struct Rig {
        bus: PortBus,
        pm: Arc<Pm>,
        clock: Arc<FakeClock>,
        sci: Arc<FakeIrq>,
        suspend: Arc<FakeSuspend>,
    }

    fn rig() -> Rig {
        let (clock, sci, suspend) = (FakeClock::new(), FakeIrq::new(), FakeSuspend::new());
        let pm = Pm::new(clock.clone(), sci.clone(), suspend.clone());
        let bus = PortBus::new();
        pm.register(&bus).unwrap();
        Rig {
            bus,
            pm,
            clock,
            sci,
            suspend,
        }
    }

    impl Rig {
        fn get(&self, port: u16, size: IoSize) -> u32 {
            self.bus.read(port, size).unwrap()
        }
        fn set(&self, port: u16, size: IoSize, value: u32) {
            self.bus.write(port, size, value).unwrap();
        }
    }

    #[test]
    fn acpi_is_switched_on_and_off() {
        let rig = rig();
        assert_eq!(rig.get(0x404, IoSize::Word), 0);
        rig.set(0xb2, IoSize::Byte, 0xa0);
        assert_eq!(rig.get(0x404, IoSize::Word), 1);
        assert_eq!(rig.get(0xb2, IoSize::Byte), 0xa0);
        rig.set(0xb2, IoSize::Byte, 0xa1);
        assert_eq!(rig.get(0x404, IoSize::Word), 0);
    }

    #[test]
    fn the_alarm_can_be_enabled() {
        let rig = rig();
        rig.set(0x402, IoSize::Word, 0x0400);
        assert_eq!(rig.get(0x400, IoSize::Dword), 0x0400_0000);
    }

    #[test]
    fn power_button() {
        let rig = rig();
        assert!(!rig.pm.power_button());
        assert!(!rig.sci.level());
        rig.set(0xb2, IoSize::Byte, 0xa0);
        rig.set(0x402, IoSize::Word, 0x0100);
        assert!(rig.sci.level(), "it was pending");
        assert_eq!(rig.get(0x400, IoSize::Dword), 0x0100_0100);
        rig.set(0x401, IoSize::Byte, 0x01);
        assert!(!rig.sci.level());
        assert!(rig.pm.power_button());
        assert_eq!(rig.sci.edges(), [true, false, true]);
    }

    #[test]
    fn soft_off() {
        let rig = rig();
        rig.set(0x404, IoSize::Word, 0x1401);
        assert_eq!(rig.suspend.requests(), []);
        rig.set(0x404, IoSize::Word, 0x2001);
        assert_eq!(rig.suspend.requests(), [], "SLP_TYP 0");
        rig.set(0x404, IoSize::Word, 0x3401);
        assert_eq!(rig.suspend.requests(), [SuspendHow::PowerOff]);
        assert_eq!(rig.get(0x404, IoSize::Word), 0x1401, "SLP_EN reads 0");
        rig.set(0x405, IoSize::Byte, 0x34);
        assert_eq!(rig.suspend.requests().len(), 2);
    }

    #[test]
    fn the_timer_counts_wraps_and_tells() {
        let rig = rig();
        rig.clock.advance(Duration::from_secs(1));
        assert_eq!(rig.get(0x408, IoSize::Dword), 3_579_545);
        assert_eq!(rig.get(0x409, IoSize::Byte), 3_579_545 >> 8 & 0xff);
        rig.set(0xb2, IoSize::Byte, 0xa0);
        rig.set(0x402, IoSize::Word, 0x0001);
        assert!(!rig.sci.level());
        rig.clock.advance(Duration::from_secs(600));
        assert_eq!(rig.get(0x400, IoSize::Word), 1);
        assert!(rig.sci.level());
        rig.set(0x400, IoSize::Word, 1);
        assert!(!rig.sci.level());
        rig.clock.advance(Duration::from_secs(600));
        let ticks = 1201 * 3_579_545_u64;
        assert_eq!(
            u64::from(rig.get(0x408, IoSize::Dword)),
            ticks & 0xffff_ffff
        );
    }
}
