//! A function's 256 bytes of configuration space.

use vmm_api::state::StateError;

use crate::bus::IoSize;

/// Offset of the first base address register.
pub(super) const BAR0: u8 = 0x10;
/// Offset of the command register.
pub(super) const COMMAND: u8 = offset::COMMAND as u8;
/// Offset of the status register.
pub(super) const STATUS: u8 = offset::STATUS as u8;
/// Offset of the header type.
pub(super) const HEADER_TYPE: u8 = 0x0e;
/// STATUS: there are capabilities.
const CAPABILITIES: u8 = 1 << 4;
/// Where the first capability is: behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// Offsets in a type 0 header (6.1).
mod offset {
    pub const VENDOR: usize = 0x00;
    pub const DEVICE: usize = 0x02;
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const REVISION: usize = 0x08;
    pub const CLASS: usize = 0x09;
    pub const CACHE_LINE: usize = 0x0c;
    pub const LATENCY: usize = 0x0d;
    pub const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub const SUBSYSTEM: usize = 0x2e;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;
    pub const INTERRUPT_PIN: usize = 0x3d;
}

/// Command bits a guest may set: I/O, memory, bus master, parity, SERR#, INTx disable (6.2.2).
const COMMAND_WRITABLE: u16 = 0x0547;
/// Status bits that clear when 1 is written to them (6.2.3).
const STATUS_CLEARED: u16 = 0xf900;

/// What a function says it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ident {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Base class, sub-class and programming interface: 0x060000 is a host bridge.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// The register map: each byte with a mask of the bits a guest may set, and one of those it clears by
/// writing 1. Whatever is in neither is read-only.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    value: [u8; 256],
    writable: [u8; 256],
    cleared: [u8; 256],
    /// Where the link to the next capability goes, and where that would be.
    link: usize,
    free: usize,
}

impl ConfigSpace {
    /// A type 0 header without BARs and capabilities.
    pub fn new(ident: Ident) -> Self {
        let mut space = Self {
            value: [0; 256],
            writable: [0; 256],
            cleared: [0; 256],
            link: offset::CAPABILITIES,
            free: FIRST_CAPABILITY,
        };
        space.set(offset::VENDOR, &ident.vendor.to_le_bytes());
        space.set(offset::DEVICE, &ident.device.to_le_bytes());
        space.set(offset::REVISION, &[ident.revision]);
        let [interface, sub, base, _] = ident.class.to_le_bytes();
        space.set(offset::CLASS, &[interface, sub, base]);
        space.set(
            offset::SUBSYSTEM_VENDOR,
            &ident.subsystem_vendor.to_le_bytes(),
        );
        space.set(offset::SUBSYSTEM, &ident.subsystem.to_le_bytes());
        fill(
            &mut space.writable,
            offset::COMMAND,
            &COMMAND_WRITABLE.to_le_bytes(),
        );
        fill(
            &mut space.cleared,
            offset::STATUS,
            &STATUS_CLEARED.to_le_bytes(),
        );
        for register in [offset::CACHE_LINE, offset::LATENCY, offset::INTERRUPT_LINE] {
            space.allow(register, &[0xff]);
        }
        space
    }

    /// Sets what the guest reads from `at` on; what lies beyond the space is ignored.
    pub fn set(&mut self, at: usize, bytes: &[u8]) {
        fill(&mut self.value, at, bytes);
    }

    /// Lets the guest set the bits of `mask` from `at` on.
    pub fn allow(&mut self, at: usize, mask: &[u8]) {
        fill(&mut self.writable, at, mask);
    }

    /// Adds a capability of `body`, which follows its id and the link to the next (6.7), and says
    /// where it is. There is room for 192 bytes of them.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u8 {
        let at = self.free;
        self.set(self.link, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.link = at + 1;
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        if let Some(status) = self.value.get_mut(offset::STATUS) {
            *status |= CAPABILITIES;
        }
        at as u8
    }

    /// Says that the function interrupts by a pin, 1 for INTA to 4 for INTD, and at which input of
    /// the 8259s; the firmware's tables say where at the I/O APIC.
    pub fn set_interrupt_pin(&mut self, pin: u8, line: u8) {
        self.set(offset::INTERRUPT_PIN, &[pin]);
        self.set(offset::INTERRUPT_LINE, &[line]);
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.value
    }

    /// Takes over what a guest has written to a function like this one.
    ///
    /// # Errors
    ///
    /// It is not one like this.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let other = || StateError::Value("the function there was another one".into());
        let bytes: &[u8; 256] = bytes.try_into().map_err(|_| other())?;
        let masks = self.writable.iter().zip(&self.cleared);
        let same = |((now, then), (writable, cleared)): ((&u8, &u8), (&u8, &u8))| {
            (now ^ then) & !(writable | cleared) == 0
        };
        if !self.value.iter().zip(bytes).zip(masks).all(same) {
            return Err(other());
        }
        self.value = *bytes;
        Ok(())
    }

    /// What a guest reads at `at`, which is a multiple of nothing: bytes beyond the space float.
    pub fn read(&self, at: u8, size: IoSize) -> u32 {
        (0..size.bytes()).rev().fold(0, |value, i| {
            let byte = self.value.get(usize::from(at) + usize::from(i)).copied();
            value << 8 | u32::from(byte.unwrap_or(0xff))
        })
    }

    /// What a guest writes at `at`, as far as the masks let it.
    pub fn write(&mut self, at: u8, size: IoSize, value: u32) {
        let first = usize::from(at);
        for (at, byte) in (first..first + usize::from(size.bytes())).zip(value.to_le_bytes()) {
            let (Some(now), Some(writable), Some(cleared)) = (
                self.value.get_mut(at),
                self.writable.get(at),
                self.cleared.get(at),
            ) else {
                return;
            };
            *now = (*now & !writable | byte & writable) & !(byte & cleared);
        }
    }
}

fn fill(map: &mut [u8; 256], at: usize, bytes: &[u8]) {
    for (to, from) in map.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_hold() {
        let ident = Ident {
            vendor: 0x1af4,
            device: 0x1000,
            class: 0x02_00_00,
            revision: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 1,
        };
        let mut space = ConfigSpace::new(ident);
        for at in (0..=0xfc).step_by(4) {
            space.write(at, IoSize::Dword, 0xffff_ffff);
        }
        assert_eq!(space.read(0x00, IoSize::Dword), 0x1000_1af4);
        assert_eq!(space.read(0x04, IoSize::Dword), 0x0000_0547);
        assert_eq!(space.read(0x08, IoSize::Dword), 0x0200_0000);
        assert_eq!(space.read(0x0c, IoSize::Dword), 0x0000_ffff);
        assert_eq!(space.read(0x10, IoSize::Dword), 0);
        assert_eq!(space.read(0x2c, IoSize::Dword), 0x0001_1af4);
        assert_eq!(space.read(0x3c, IoSize::Dword), 0x0000_00ff);
        assert_eq!(space.read(0xff, IoSize::Dword), 0xffff_ff00);
    }

    #[test]
    fn status_bits_are_cleared_by_ones() {
        let mut space = ConfigSpace::new(Ident::default());
        space.set(offset::STATUS, &[0x10, 0xf9]);
        space.write(0x07, IoSize::Byte, 0x80);
        assert_eq!(space.read(0x06, IoSize::Word), 0x7910);
        space.write(0x06, IoSize::Word, 0xffff);
        assert_eq!(space.read(0x06, IoSize::Word), 0x0010);
    }
}
