//! A device's function: a type 0 header, BARs that move about the buses, interrupts.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use vmm_api::state::{DeviceState, StateError};

use super::bar::{Bar, BarKind, NoRoom, Placement};
use super::config::{BAR0, COMMAND, STATUS};
use super::msix::SavedMsix;
use super::{ConfigSpace, Ident, Msi, Msix, PciFunction};
use crate::bus::{InOut, IoSize, PortBus};
use crate::irq::IrqLine;
use crate::lifecycle::{self, Lifecycle};
use crate::mmio::{Mmio, MmioBus};

/// COMMAND as firmware leaves it: ports and memory decoded, the function may be master (6.2.2).
const COMMAND_START: u16 = 0b111;
/// COMMAND: INTx is not to be asserted.
const INTX_DISABLE: u32 = 1 << 10;
/// STATUS: INTx is asserted, or would be if it were not disabled.
const INTERRUPT_STATUS: u32 = 1 << 3;

/// The device behind a function. Its methods are called on virtual CPU threads.
pub trait PciDevice: Send + Sync {
    /// Reads 1 to 8 bytes at `offset` of a BAR, all of them in it.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// Writes 1 to 8 bytes at `offset` of a BAR, all of them in it.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);

    /// The BAR decodes from this address on, or not at all. Called with the function's lock held.
    fn bar_moved(&self, bar: u8, base: Option<u64>) {
        let _ = (bar, base);
    }

    /// What the guest reads in configuration space, if the device knows better than the registers.
    /// Called with the function's lock held, as the next.
    fn config_read(&self, space: &ConfigSpace, register: u8, size: IoSize) -> Option<u32> {
        let _ = (space, register, size);
        None
    }

    /// How its state is saved, but for configuration space and MSI-X; a device that has none cannot
    /// be.
    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        None
    }

    /// The guest has written to configuration space.
    fn config_written(&self, space: &ConfigSpace, register: u8) {
        let _ = (space, register);
    }
}

/// INTx of one function, level triggered and often shared.
pub struct Intx {
    line: Arc<dyn IrqLine>,
    state: Mutex<IntxState>,
}

#[derive(Clone, Copy, Default)]
struct IntxState {
    asserted: bool,
    disabled: bool,
}

impl Intx {
    /// Drives `line`, which is this function's own source of a shared one.
    pub fn new(line: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self {
            line,
            state: Mutex::default(),
        })
    }

    /// Whether the device wants to interrupt.
    pub fn set(&self, asserted: bool) {
        self.change(|state| state.asserted = asserted);
    }

    fn change(&self, change: impl FnOnce(&mut IntxState)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let level = |state: IntxState| state.asserted && !state.disabled;
        let before = *state;
        change(&mut state);
        if level(before) != level(*state) {
            self.line.set(level(*state));
        }
    }

    fn is_asserted(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.asserted
    }
}

/// INTx as configuration space shows it.
pub struct IntxPin {
    /// 1 for INTA to 4 for INTD.
    pub pin: u8,
    /// The 8259s' input it goes to, for guests that know no better.
    pub line: u8,
    /// How the device asserts it.
    pub intx: Arc<Intx>,
}

/// How a function interrupts by messages.
#[derive(Clone)]
pub enum Messages {
    /// By MSI-X, with a BAR of its own.
    Msix(Arc<Msix>),
    /// By MSI.
    Msi(Arc<Msi>),
}

impl Messages {
    /// Whether the guest uses them, so that there is no INTx.
    pub fn are_enabled(&self) -> bool {
        match self {
            Self::Msix(msix) => msix.is_enabled(),
            Self::Msi(msi) => msi.is_enabled(),
        }
    }

    fn msix(&self) -> Option<&Msix> {
        match self {
            Self::Msix(msix) => Some(msix),
            Self::Msi(_) => None,
        }
    }

    fn install(&self, space: &mut ConfigSpace) -> u8 {
        match self {
            Self::Msix(msix) => msix.install(space),
            Self::Msi(msi) => msi.install(space),
        }
    }

    fn configure(&self, space: &ConfigSpace, at: u8) {
        match self {
            Self::Msix(msix) => msix.configure(space, at),
            Self::Msi(msi) => msi.configure(space, at),
        }
    }
}

/// What a function is made of.
pub struct Parts {
    /// For messages.
    pub name: String,
    /// The header and capabilities, but for BARs, messages and the interrupt pin.
    pub space: ConfigSpace,
    /// The device's own BARs.
    pub bars: Vec<Bar>,
    /// Messages.
    pub messages: Option<Messages>,
    /// INTx.
    pub intx: Option<IntxPin>,
}

impl Parts {
    /// A function that is nothing but its identity.
    pub fn new(name: &str, ident: Ident) -> Self {
        Self {
            name: name.to_owned(),
            space: ConfigSpace::new(ident),
            bars: Vec::new(),
            messages: None,
            intx: None,
        }
    }
}

/// The buses on which BARs are.
#[derive(Clone)]
pub struct Buses {
    /// Ports.
    pub ports: Arc<PortBus>,
    /// Memory.
    pub mmio: Arc<MmioBus>,
}

/// A function with a device behind it.
pub struct Endpoint {
    name: String,
    device: Arc<dyn PciDevice>,
    buses: Buses,
    /// And where their capability is.
    messages: Option<(Messages, u8)>,
    intx: Option<Arc<Intx>>,
    state: Mutex<State>,
    me: Weak<Self>,
}

struct State {
    space: ConfigSpace,
    bars: Vec<(Bar, Option<RangeInclusive<u64>>)>,
}

impl Endpoint {
    /// Makes the function of its parts, as firmware leaves it: BARs placed and decoded.
    ///
    /// # Errors
    /// [`NoRoom`].
    pub fn new(
        parts: Parts,
        device: Arc<dyn PciDevice>,
        buses: Buses,
        placement: &mut Placement,
    ) -> Result<Arc<Self>, NoRoom> {
        let Parts {
            name,
            mut space,
            mut bars,
            messages,
            intx,
        } = parts;
        let msix = messages.as_ref().and_then(Messages::msix);
        bars.extend(msix.map(Msix::bar));
        bars.sort_by_key(|bar| bar.index);
        for bar in &bars {
            bar.install(&mut space, placement.place(bar)?);
        }
        let messages = messages.map(|messages| {
            let at = messages.install(&mut space);
            (messages, at)
        });
        if let Some(IntxPin { pin, line, .. }) = &intx {
            space.set_interrupt_pin(*pin, *line);
        }
        space.set(COMMAND.into(), &COMMAND_START.to_le_bytes());
        let endpoint = Arc::new_cyclic(|me| Self {
            name,
            device,
            buses,
            messages,
            intx: intx.map(|pin| pin.intx),
            state: Mutex::new(State {
                space,
                bars: bars.into_iter().map(|bar| (bar, None)).collect(),
            }),
            me: me.clone(),
        });
        endpoint.claim_bars();
        Ok(endpoint)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives `bar` these addresses; false if somebody else has some of them.
    fn claim(&self, bar: &Bar, range: &RangeInclusive<u64>) -> bool {
        let window = Arc::new(Window {
            endpoint: self.me.clone(),
            bar: bar.index,
            base: *range.start(),
        });
        let name = format!("{} bar{}", self.name, bar.index);
        let claimed = match bar.kind {
            BarKind::Io => {
                // Lossless: no other range of ports is decoded.
                let ports = *range.start() as u16..=*range.end() as u16;
                self.buses.ports.register(ports, &name, window)
            }
            _ => self.buses.mmio.register(range.clone(), &name, window),
        };
        if let Err(overlap) = &claimed {
            tracing::debug!(target: "rhyve::pci", "{overlap}");
        }
        claimed.is_ok()
    }

    fn release(&self, bar: &Bar, range: &RangeInclusive<u64>) {
        match bar.kind {
            BarKind::Io => self.buses.ports.unregister(*range.start() as u16),
            _ => self.buses.mmio.unregister(*range.start()),
        };
    }

    fn update_bars(&self, state: &mut State) {
        let State { space, bars } = state;
        let moved: Vec<_> = bars
            .iter_mut()
            .map(|(bar, claimed)| (bar.decoded(space), bar, claimed))
            .filter(|(decoded, _, claimed)| decoded != *claimed)
            .collect();
        // All of them go before the first comes, for they may change places.
        for (_, bar, claimed) in &moved {
            if let Some(range) = claimed {
                self.release(bar, range);
            }
        }
        for (decoded, bar, claimed) in moved {
            let before = claimed.take();
            *claimed = decoded.filter(|range| self.claim(bar, range));
            if before != *claimed {
                let base = claimed.as_ref().map(|range| *range.start());
                self.device.bar_moved(bar.index, base);
            }
        }
    }

    fn msix(&self) -> Option<&Msix> {
        self.messages.as_ref()?.0.msix()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        match self.msix() {
            Some(msix) if msix.bar().index == bar => msix.read(offset, data),
            _ => self.device.bar_read(bar, offset, data),
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        match self.msix() {
            Some(msix) if msix.bar().index == bar => msix.write(offset, data),
            _ => self.device.bar_write(bar, offset, data),
        }
    }
}

/// A function as it is stored.
#[derive(Serialize, Deserialize)]
struct Saved {
    #[serde(with = "lifecycle::bytes")]
    config: Vec<u8>,
    msix: Option<SavedMsix>,
    device: DeviceState,
}

impl Endpoint {
    /// What the guest has written to the command register, and to the messages'.
    fn settle(&self, state: &State) {
        if let Some((messages, at)) = &self.messages {
            messages.configure(&state.space, *at);
        }
        if let Some(intx) = &self.intx {
            let command = state.space.read(COMMAND, IoSize::Word);
            // Who sends messages does not assert its pin (6.8.1.3, 6.8.2.3).
            let messages = self.messages.as_ref();
            let instead = messages.is_some_and(|(messages, _)| messages.are_enabled());
            intx.change(|intx| intx.disabled = instead || command & INTX_DISABLE != 0);
        }
    }
}

impl Lifecycle for Endpoint {
    fn freeze(&self) {
        if let Some(device) = self.device.lifecycle() {
            device.freeze();
        }
    }

    fn thaw(&self) {
        if let Some(device) = self.device.lifecycle() {
            device.thaw();
        }
    }

    fn save(&self) -> Result<DeviceState, String> {
        let device = self
            .device
            .lifecycle()
            .ok_or("it has no state to be saved")?;
        let device = device.save()?;
        let saved = Saved {
            config: self.lock().space.bytes().to_vec(),
            msix: self.msix().map(Msix::save),
            device,
        };
        lifecycle::save("pci", 1, &saved)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Saved = lifecycle::load("pci", 1, state)?;
        let none = || StateError::Value("it has no state to be restored".into());
        let device = self.device.lifecycle().ok_or_else(none)?;
        {
            let mut state = self.lock();
            state.space.restore(&saved.config)?;
            self.update_bars(&mut state);
            if let (Some(msix), Some(saved)) = (self.msix(), &saved.msix) {
                msix.restore(saved)?;
            }
            self.settle(&state);
        }
        device.restore(&saved.device)
    }
}

impl PciFunction for Endpoint {
    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        self.device.lifecycle().map(|_| self as &dyn Lifecycle)
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, register: u8, size: IoSize) -> u32 {
        let state = self.lock();
        if let Some(value) = self.device.config_read(&state.space, register, size) {
            return value & size.ones();
        }
        let value = state.space.read(register, size);
        let asserted = self.intx.as_ref().is_some_and(|intx| intx.is_asserted());
        match (register, asserted) {
            (STATUS, true) => value | INTERRUPT_STATUS,
            (COMMAND, true) if size == IoSize::Dword => value | INTERRUPT_STATUS << 16,
            _ => value,
        }
    }

    fn config_write(&self, register: u8, size: IoSize, value: u32) {
        let mut state = self.lock();
        state.space.write(register, size, value);
        if register < BAR0 + 6 * 4 {
            self.update_bars(&mut state);
        }
        self.settle(&state);
        self.device.config_written(&state.space, register);
    }

    fn claim_bars(&self) {
        self.update_bars(&mut self.lock());
    }
}

/// A BAR where it is now.
struct Window {
    endpoint: Weak<Endpoint>,
    bar: u8,
    base: u64,
}

impl InOut for Window {
    // The function does that.
    fn saved(&self) -> bool {
        true
    }

    fn width(&self) -> IoSize {
        IoSize::Dword
    }

    fn read(&self, port: u16, size: IoSize) -> u32 {
        let mut data = [0xff; 4];
        if let Some(bytes) = data.get_mut(..usize::from(size.bytes())) {
            Mmio::read(self, port.into(), bytes);
        }
        u32::from_le_bytes(data)
    }

    fn write(&self, port: u16, size: IoSize, value: u32) {
        if let Some(bytes) = value.to_le_bytes().get(..usize::from(size.bytes())) {
            Mmio::write(self, port.into(), bytes);
        }
    }
}

impl Mmio for Window {
    fn saved(&self) -> bool {
        true
    }

    fn read(&self, gpa: u64, data: &mut [u8]) {
        if let Some(endpoint) = self.endpoint.upgrade() {
            endpoint.bar_read(self.bar, gpa.wrapping_sub(self.base), data);
        }
    }

    fn write(&self, gpa: u64, data: &[u8]) {
        if let Some(endpoint) = self.endpoint.upgrade() {
            endpoint.bar_write(self.bar, gpa.wrapping_sub(self.base), data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PciAddress;
    use crate::pci::PciBus;

    /// Reads as its number, and remembers where its BAR is.
    struct Numbered(u8, Mutex<Option<u64>>);

    impl PciDevice for Numbered {
        fn bar_read(&self, _: u8, offset: u64, data: &mut [u8]) {
            for (byte, at) in data.iter_mut().zip(offset..) {
                *byte = self.0 << 4 | at as u8;
            }
        }
        fn bar_write(&self, _: u8, _: u64, _: &[u8]) {}
        fn bar_moved(&self, _: u8, base: Option<u64>) {
            *self.1.lock().unwrap() = base;
        }
    }

    #[test]
    fn bars_change_places_one_after_the_other() {
        let buses = Buses {
            ports: Arc::default(),
            mmio: Arc::default(),
        };
        let bus = PciBus::new();
        let mut placement = Placement::new(0x2000..0x1_0000, 0xc000_0000..0xc001_0000);
        let plug = |number: u8, kind, placement: &mut Placement| {
            let device = Arc::new(Numbered(number, Mutex::default()));
            let mut parts = Parts::new("numbered", Ident::default());
            parts.bars.push(Bar {
                index: 0,
                kind,
                size: 16,
            });
            let endpoint = Endpoint::new(parts, device.clone(), buses.clone(), placement);
            let address = PciAddress::new(0, number.into(), 0).unwrap();
            bus.plug(address, endpoint.unwrap()).unwrap();
            device
        };
        for (kind, start) in [(BarKind::Io, 0x2000), (BarKind::Memory32, 0xc000_0000)] {
            let first = u8::try_from(start & 0xf).unwrap() + if start == 0x2000 { 1 } else { 3 };
            let one = plug(first, kind, &mut placement);
            let two = plug(first + 1, kind, &mut placement);
            let place = |device: &Numbered| *device.1.lock().unwrap();
            let read = |at: u64| match kind {
                BarKind::Io => buses.ports.read(at as u16, IoSize::Word).ok(),
                _ => {
                    let mut data = [0; 2];
                    let read = buses.mmio.read(at, &mut data);
                    read.ok().map(|()| u16::from_le_bytes(data).into())
                }
            };
            let set = |number: u8, at: u64| {
                bus.write(
                    PciAddress::on_wire(0, number << 3),
                    BAR0,
                    IoSize::Dword,
                    at as u32,
                );
            };
            assert_eq!((place(&one), place(&two)), (Some(start), Some(start + 16)));
            // The first goes where the second still is: nowhere, until that goes away.
            set(first, start + 16);
            assert_eq!((place(&one), read(start)), (None, None));
            assert_eq!(
                read(start + 17),
                Some(u32::from(first + 1) * 0x1010 + 0x0201)
            );
            set(first + 1, start);
            assert_eq!((place(&one), place(&two)), (Some(start + 16), Some(start)));
            assert_eq!(read(start + 16), Some(u32::from(first) * 0x1010 + 0x0100));
            bus.write(PciAddress::on_wire(0, first << 3), COMMAND, IoSize::Word, 0);
            assert_eq!((place(&one), read(start + 16)), (None, None));
        }
    }
}
