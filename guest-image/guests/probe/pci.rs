//! PCI functions, by configuration mechanism 1: of bus 0 and of the buses that the MP table lists.

use crate::console::{Hex, say};
use crate::{apic, cpu, mptable};

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

/// A function: bus, device and function number, as they are on the wire.
#[derive(Clone, Copy)]
pub struct Function(pub u16);

/// Where a base address register leads.
#[derive(Clone, Copy)]
pub enum Place {
    /// A port.
    Port(u16),
    /// Memory, at an address that may be read and written as a device's.
    Memory(u64),
}

impl Function {
    /// Reads four bytes of configuration space at a multiple of 4.
    pub fn read(self, register: u8) -> u32 {
        self.select(register);
        cpu::inl(DATA)
    }

    /// Writes four bytes of configuration space at a multiple of 4.
    pub fn write(self, register: u8, value: u32) {
        self.select(register);
        cpu::outl(DATA, value);
    }

    fn select(self, register: u8) {
        cpu::outl(
            ADDRESS,
            1 << 31 | u32::from(self.0) << 8 | u32::from(register & 0xfc),
        );
    }

    /// Vendor in the low half, device in the high one.
    pub fn ident(self) -> u32 {
        self.read(0)
    }

    /// Lets the function decode its BARs and be master.
    pub fn enable(self) {
        self.write(4, self.read(4) & 0xffff | 7);
    }

    /// Where BAR `index` is; None if there is none.
    pub fn bar(self, index: u8) -> Option<Place> {
        let low = self.read(0x10 + 4 * index);
        if low & 1 != 0 {
            return Some(Place::Port(low as u16 & 0xfffc));
        }
        let mut base = u64::from(low & !0xf);
        if low & 6 == 4 {
            base |= u64::from(self.read(0x14 + 4 * index)) << 32;
        }
        (base != 0).then_some(Place::Memory(base))
    }

    /// Has the function interrupt this CPU by its one message (PCI 3.0, 6.8.1); false if it has none.
    pub fn enable_msi(self, vector: u8) -> bool {
        const WIDE: u32 = 1 << 23;
        let Some(at) = self.capabilities(5).next() else {
            return false;
        };
        // An address of the local APICs, with the APIC id (Intel SDM volume 3, 11.11).
        self.write(at + 4, 0xfee0_0000 | (apic::id() & 0xff) << 12);
        let data = if self.read(at) & WIDE != 0 {
            self.write(at + 8, 0);
            at + 12
        } else {
            at + 8
        };
        self.write(data, vector.into());
        self.write(at, 1 << 16);
        true
    }

    /// The registers of the capabilities with this id, one after the other; at most 48 of all.
    pub fn capabilities(self, id: u8) -> impl Iterator<Item = u8> {
        let mut at = self.read(0x34) as u8;
        (0..48)
            .map_while(move |_| {
                let here = at & 0xfc;
                if here == 0 {
                    return None;
                }
                let head = self.read(here);
                at = (head >> 8) as u8;
                Some((here, head as u8))
            })
            .filter(move |(_, found)| *found == id)
            .map(|(here, _)| here)
    }
}

/// All functions that are there.
pub fn functions() -> impl Iterator<Item = Function> {
    let listed = mptable::find().ok().flatten();
    let others = listed.map_or(0, |table| table.pci_buses) & !1;
    let buses = (0..64).filter(move |bus| (others | 1) & 1 << bus != 0);
    let all = buses.flat_map(|bus: u16| (bus << 8..=bus << 8 | 0xff).map(Function));
    all.filter(|function| {
        let ident = function.ident();
        ident as u16 != 0xffff && ident != 0
    })
}

/// Prints them.
pub fn list() {
    for function in functions() {
        say!(
            "probe: pci ",
            u32::from(function.0 >> 8),
            ":",
            u32::from(function.0 >> 3 & 31),
            ":",
            u32::from(function.0 & 7),
            " ",
            Hex(function.ident().into()),
            " class ",
            Hex((function.read(8) >> 8).into())
        );
    }
}
