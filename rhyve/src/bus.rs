//! Who answers at which address.
//!
//! An [`AddressSpace`] maps disjoint ranges to whatever lives there. [`PortBus`] is the one of x86's
//! 64 Ki ports: a virtual CPU's port exit comes in through [`PortBus::read`] or [`PortBus::write`],
//! is looked up, and reaches a device's [`InOut`] *after* the map's lock was released, so that a
//! handler may take its own locks and may itself change the map (a BAR that moves).
//!
//! As on an ISA bus an access that is wider than the device decodes, or that runs from one device
//! into the next, becomes single bytes at ascending ports. Ports nobody claims read as all ones,
//! and swallow what is written.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

/// Width of a port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum IoSize {
    /// 8 bits: `inb`, `outb`.
    Byte = 1,
    /// 16 bits: `inw`, `outw`.
    Word = 2,
    /// 32 bits: `inl`, `outl`.
    Dword = 4,
}

impl IoSize {
    /// The width of `bytes` bytes; `None` unless that is 1, 2 or 4.
    pub const fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            1 => Some(Self::Byte),
            2 => Some(Self::Word),
            4 => Some(Self::Dword),
            _ => None,
        }
    }

    /// Number of bytes: 1, 2 or 4.
    pub const fn bytes(self) -> u16 {
        self as u16
    }

    /// All ones of this width: what a floating bus reads, and the mask of what counts.
    pub const fn ones(self) -> u32 {
        u32::MAX >> (32 - 8 * self as u32)
    }

    /// The assembler's suffix: b, w or l.
    pub const fn suffix(self) -> char {
        match self {
            Self::Byte => 'b',
            Self::Word => 'w',
            Self::Dword => 'l',
        }
    }
}

/// A device's port handler; bhyve's `inout_func_t`.
///
/// Called on virtual CPU threads, several at a time: state is behind the device's own lock. A
/// handler never blocks on anything a guest or a peer controls.
pub trait InOut: Send + Sync {
    /// The widest access the device decodes; the bus splits wider ones into bytes.
    fn width(&self) -> IoSize {
        IoSize::Byte
    }

    /// Reads from `port`, which is in a range this handler was registered for, as is the last byte
    /// of the access. Bits above `size` are ignored.
    fn read(&self, port: u16, size: IoSize) -> u32;

    /// Writes `value`, whose bits above `size` are zero.
    fn write(&self, port: u16, size: IoSize, value: u32);

    /// Whether what is behind these ports goes into a suspended machine's state, by a
    /// [`Lifecycle`](crate::lifecycle::Lifecycle), or has none. A machine with a device that says no
    /// cannot be suspended.
    fn saved(&self) -> bool {
        false
    }
}

/// Two claims to the same addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{new_name} at {:#x}-{:#x} overlaps {old_name} at {:#x}-{:#x}",
    .new.start(), .new.end(), .old.start(), .old.end()
)]
pub struct Overlap {
    /// Name of the claim that was refused.
    pub new_name: String,
    /// Its addresses.
    pub new: RangeInclusive<u64>,
    /// Name of the claim that was there before.
    pub old_name: String,
    /// Its addresses.
    pub old: RangeInclusive<u64>,
}

/// A range of an [`AddressSpace`] and what lives there.
#[derive(Debug)]
pub struct Claim<T> {
    /// First and last address.
    pub range: RangeInclusive<u64>,
    /// Who claims it, for statistics and errors.
    pub name: String,
    /// What lives there.
    pub value: T,
}

/// Disjoint address ranges with a value each, found by binary search.
#[derive(Debug)]
pub struct AddressSpace<T> {
    /// Sorted by address.
    claims: Vec<Claim<T>>,
}

impl<T> Default for AddressSpace<T> {
    fn default() -> Self {
        Self { claims: Vec::new() }
    }
}

impl<T> AddressSpace<T> {
    /// Gives `range` to `value`.
    ///
    /// # Errors
    /// [`Overlap`] if any address of it is taken; the space is unchanged then.
    pub fn insert(
        &mut self,
        range: RangeInclusive<u64>,
        name: &str,
        value: T,
    ) -> Result<(), Overlap> {
        let at = self
            .claims
            .partition_point(|claim| claim.range.end() < range.start());
        match self.claims.get(at) {
            Some(old) if old.range.start() <= range.end() => Err(Overlap {
                new_name: name.to_owned(),
                new: range,
                old_name: old.name.clone(),
                old: old.range.clone(),
            }),
            _ => {
                self.claims.insert(
                    at,
                    Claim {
                        range,
                        name: name.to_owned(),
                        value,
                    },
                );
                Ok(())
            }
        }
    }

    /// Takes out the claim that starts at `start`.
    pub fn remove(&mut self, start: u64) -> Option<Claim<T>> {
        let at = self
            .claims
            .iter()
            .position(|claim| *claim.range.start() == start)?;
        Some(self.claims.remove(at))
    }

    /// The claim that holds `address`.
    pub fn find(&self, address: u64) -> Option<&Claim<T>> {
        let at = self
            .claims
            .partition_point(|claim| *claim.range.end() < address);
        self.claims
            .get(at)
            .filter(|claim| claim.range.contains(&address))
    }

    /// All claims by ascending address.
    pub fn iter(&self) -> impl Iterator<Item = &Claim<T>> {
        self.claims.iter()
    }
}

/// An access to ports nobody claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unclaimed {
    /// First port of the access.
    pub port: u16,
    /// Its width.
    pub size: IoSize,
    /// What was written; `None` for a read.
    pub written: Option<u32>,
}

/// bhyve's message: `Unhandled inb 0x0070`.
impl fmt::Display for Unclaimed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.written.is_some() { "out" } else { "in" };
        write!(
            f,
            "Unhandled {verb}{} {:#06x}",
            self.size.suffix(),
            self.port
        )
    }
}

impl std::error::Error for Unclaimed {}

/// Traffic of one claim, or of the ports nobody claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortStats {
    /// Name of the handler; "unclaimed" for the rest.
    pub name: String,
    /// First and last port.
    pub ports: RangeInclusive<u16>,
    /// Calls of its read handler.
    pub reads: u64,
    /// Calls of its write handler.
    pub writes: u64,
}

#[derive(Default)]
struct Traffic {
    reads: AtomicU64,
    writes: AtomicU64,
}

struct Handler {
    inout: Arc<dyn InOut>,
    width: IoSize,
    traffic: Traffic,
}

/// What serves one access.
enum Route {
    Whole(Arc<Handler>),
    ByteByByte,
    Nobody,
}

/// The 64 Ki I/O ports.
#[derive(Default)]
pub struct PortBus {
    map: RwLock<AddressSpace<Arc<Handler>>>,
    unclaimed: Traffic,
}

impl PortBus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Hands `ports` to `inout`. A device with several ranges registers for each.
    ///
    /// # Errors
    /// [`Overlap`], naming both claims.
    pub fn register(
        &self,
        ports: RangeInclusive<u16>,
        name: &str,
        inout: Arc<dyn InOut>,
    ) -> Result<(), Overlap> {
        let handler = Handler {
            width: inout.width(),
            inout,
            traffic: Traffic::default(),
        };
        let range = u64::from(*ports.start())..=u64::from(*ports.end());
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        map.insert(range, name, Arc::new(handler))
    }

    /// A device whose state cannot be saved, if there is one.
    pub fn unsaved(&self) -> Option<String> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let unsaved = map.iter().find(|claim| !claim.value.inout.saved());
        unsaved.map(|claim| claim.name.clone())
    }

    /// Takes back the claim that starts at `start`; whether there was one. A handler that runs on
    /// another thread at this moment finishes its access.
    pub fn unregister(&self, start: u16) -> bool {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        map.remove(u64::from(start)).is_some()
    }

    /// `in` from `port`. Bits above `size` of the value are zero.
    ///
    /// # Errors
    /// [`Unclaimed`] if nobody answers at any of the ports: the guest should see `size.ones()`.
    pub fn read(&self, port: u16, size: IoSize) -> Result<u32, Unclaimed> {
        match self.route(port, size) {
            Route::Whole(handler) => Ok(handler.read(port, size)),
            Route::ByteByByte => Ok((0..size.bytes()).rev().fold(0, |value, i| {
                let byte = port
                    .checked_add(i)
                    .and_then(|port| self.handler(port).zip(Some(port)));
                let byte = byte.map_or(0xff, |(handler, port)| handler.read(port, IoSize::Byte));
                value << 8 | byte
            })),
            Route::Nobody => {
                self.unclaimed.reads.fetch_add(1, Relaxed);
                Err(Unclaimed {
                    port,
                    size,
                    written: None,
                })
            }
        }
    }

    /// `out` to `port`. Bits above `size` of `value` are ignored.
    ///
    /// # Errors
    /// [`Unclaimed`] if nobody listens at any of the ports.
    pub fn write(&self, port: u16, size: IoSize, value: u32) -> Result<(), Unclaimed> {
        match self.route(port, size) {
            Route::Whole(handler) => handler.write(port, size, value),
            Route::ByteByByte => {
                for (i, byte) in (0..size.bytes()).zip(value.to_le_bytes()) {
                    let Some(port) = port.checked_add(i) else {
                        break;
                    };
                    if let Some(handler) = self.handler(port) {
                        handler.write(port, IoSize::Byte, u32::from(byte));
                    }
                }
            }
            Route::Nobody => {
                self.unclaimed.writes.fetch_add(1, Relaxed);
                return Err(Unclaimed {
                    port,
                    size,
                    written: Some(value & size.ones()),
                });
            }
        }
        Ok(())
    }

    /// Traffic so far, by ascending port; the last entry is that of unclaimed ports.
    pub fn stats(&self) -> Vec<PortStats> {
        let stats = |name: &str, ports, traffic: &Traffic| PortStats {
            name: name.to_owned(),
            ports,
            reads: traffic.reads.load(Relaxed),
            writes: traffic.writes.load(Relaxed),
        };
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.iter()
            .map(|claim| {
                // Lossless: only `register` inserts.
                let ports = *claim.range.start() as u16..=*claim.range.end() as u16;
                stats(&claim.name, ports, &claim.value.traffic)
            })
            .chain([stats("unclaimed", 0..=u16::MAX, &self.unclaimed)])
            .collect()
    }

    /// Counts from 0 again.
    pub fn reset_stats(&self) {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let all = map.iter().map(|claim| &claim.value.traffic);
        for traffic in all.chain([&self.unclaimed]) {
            traffic.reads.store(0, Relaxed);
            traffic.writes.store(0, Relaxed);
        }
    }

    /// Who answers at a port.
    pub fn name(&self, port: u16) -> Option<String> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.find(port.into()).map(|claim| claim.name.clone())
    }

    fn handler(&self, port: u16) -> Option<Arc<Handler>> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.find(u64::from(port))
            .map(|claim| Arc::clone(&claim.value))
    }

    fn route(&self, port: u16, size: IoSize) -> Route {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let first = u64::from(port);
        let last = first + u64::from(size.bytes()) - 1;
        match map.find(first) {
            Some(claim) if *claim.range.end() >= last && claim.value.width >= size => {
                Route::Whole(Arc::clone(&claim.value))
            }
            Some(_) => Route::ByteByByte,
            None if (first + 1..=last).any(|port| map.find(port).is_some()) => Route::ByteByByte,
            None => Route::Nobody,
        }
    }
}

impl Handler {
    fn read(&self, port: u16, size: IoSize) -> u32 {
        self.traffic.reads.fetch_add(1, Relaxed);
        self.inout.read(port, size) & size.ones()
    }

    fn write(&self, port: u16, size: IoSize, value: u32) {
        self.traffic.writes.fetch_add(1, Relaxed);
        self.inout.write(port, size, value & size.ones());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Reads as its port's low byte, and remembers what is written.
    struct Probe {
        width: IoSize,
        writes: Mutex<Vec<(u16, IoSize, u32)>>,
    }

    impl Probe {
        fn new(width: IoSize) -> Arc<Self> {
            Arc::new(Self {
                width,
                writes: Mutex::default(),
            })
        }
    }

    impl InOut for Probe {
        fn width(&self) -> IoSize {
            self.width
        }
        fn read(&self, port: u16, size: IoSize) -> u32 {
            let byte = u32::from(port & 0xff);
            if size == IoSize::Byte {
                byte
            } else {
                0xaaaa_aa00 | byte
            }
        }
        fn write(&self, port: u16, size: IoSize, value: u32) {
            self.writes.lock().unwrap().push((port, size, value));
        }
    }

    #[test]
    fn unclaimed_ports_float_and_are_counted() {
        let bus = PortBus::new();
        let unclaimed = bus.read(0x70, IoSize::Byte).unwrap_err();
        assert_eq!(unclaimed.to_string(), "Unhandled inb 0x0070");
        let unclaimed = bus.write(0xffff, IoSize::Dword, 7).unwrap_err();
        assert_eq!(unclaimed.to_string(), "Unhandled outl 0xffff");
        assert_eq!(unclaimed.written, Some(7));
        let stats = bus.stats();
        assert_eq!((stats[0].reads, stats[0].writes), (1, 1));
        assert_eq!(IoSize::Byte.ones(), 0xff);
        assert_eq!(IoSize::Word.ones(), 0xffff);
        assert_eq!(IoSize::Dword.ones(), 0xffff_ffff);
    }

    #[test]
    fn overlap_names_both() {
        let bus = PortBus::new();
        bus.register(0x3f8..=0x3ff, "com1", Probe::new(IoSize::Byte))
            .unwrap();
        let error = bus
            .register(0x3f0..=0x3f8, "floppy", Probe::new(IoSize::Byte))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "floppy at 0x3f0-0x3f8 overlaps com1 at 0x3f8-0x3ff"
        );
        bus.register(0x3f0..=0x3f7, "floppy", Probe::new(IoSize::Byte))
            .unwrap();
        assert!(bus.unregister(0x3f8));
        assert!(!bus.unregister(0x3f8));
        assert!(bus.read(0x3f8, IoSize::Byte).is_err());
    }

    #[test]
    fn a_wide_access_becomes_bytes_where_the_device_is_narrow() {
        let bus = PortBus::new();
        let narrow = Probe::new(IoSize::Byte);
        bus.register(0x70..=0x71, "rtc", narrow.clone()).unwrap();
        assert_eq!(bus.read(0x70, IoSize::Word), Ok(0x7170));
        assert_eq!(bus.read(0x6f, IoSize::Dword), Ok(0xff71_70ff));
        bus.write(0x71, IoSize::Dword, 0x0102_0304).unwrap();
        assert_eq!(*narrow.writes.lock().unwrap(), [(0x71, IoSize::Byte, 4)]);
    }

    #[test]
    fn a_wide_device_gets_it_whole_unless_it_straddles() {
        let bus = PortBus::new();
        let wide = Probe::new(IoSize::Dword);
        bus.register(0xfffc..=0xffff, "wide", wide.clone()).unwrap();
        assert_eq!(bus.read(0xfffc, IoSize::Dword), Ok(0xaaaa_aafc));
        assert_eq!(bus.read(0xfffe, IoSize::Word), Ok(0xaafe));
        // Past the last port: the bytes beyond float.
        assert_eq!(bus.read(0xfffe, IoSize::Dword), Ok(0xffff_fffe));
        bus.write(0xfffd, IoSize::Word, 0xdead_beef).unwrap();
        assert_eq!(
            *wide.writes.lock().unwrap(),
            [(0xfffd, IoSize::Word, 0xbeef)]
        );
        assert_eq!(bus.stats()[0].reads, 4);
    }
}
