//! SMBIOS 2.8 (DMTF DSP0134): who made the machine, its UUID, its processors and its memory.

use uuid::Uuid;
use vmm_api::memory::HIGHMEM_BASE;
use vmm_api::name::VmName;

use super::{FirmwareSpec, checksum};

/// The two parts of a table.
pub(super) struct Table {
    /// What guests scan for.
    pub(super) entry_point: Vec<u8>,
    /// What it points to.
    pub(super) structures: Vec<u8>,
}

/// Version of the standard the structures follow.
const VERSION: (u8, u8) = (2, 8);

/// Namespace of the UUIDs that are made from names: version 5 of "rhyve" in the DNS namespace.
fn namespace() -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_DNS, b"rhyve")
}

/// The UUID of a VM that was given none.
///
/// It comes from the VM's name alone (RFC 9562, version 5), so that it is the same at every run and
/// on every host. bhyve mixes the host's name in, and so its VMs change when they move.
pub fn default_uuid(name: &VmName) -> Uuid {
    Uuid::new_v5(&namespace(), name.as_str().as_bytes())
}

/// Structures one behind the other.
#[derive(Default)]
struct Structures {
    bytes: Vec<u8>,
    count: u16,
    largest: u16,
}

/// One structure under construction: its formatted area and its strings (6.1.2, 6.1.3).
struct Structure {
    formatted: Vec<u8>,
    strings: Vec<u8>,
    last_string: u8,
}

impl Structure {
    /// The four bytes all begin with; the length is filled in at the end.
    fn new(kind: u8, handle: u16) -> Self {
        let mut formatted = vec![kind, 0];
        formatted.extend(handle.to_le_bytes());
        Self {
            formatted,
            strings: Vec::new(),
            last_string: 0,
        }
    }

    fn byte(mut self, value: u8) -> Self {
        self.formatted.push(value);
        self
    }

    fn word(self, value: u16) -> Self {
        self.raw(&value.to_le_bytes())
    }

    fn dword(self, value: u32) -> Self {
        self.raw(&value.to_le_bytes())
    }

    fn qword(self, value: u64) -> Self {
        self.raw(&value.to_le_bytes())
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.formatted.extend_from_slice(bytes);
        self
    }

    /// A reference to a text, which is kept behind the formatted area.
    fn string(mut self, text: &str) -> Self {
        self.strings.extend_from_slice(text.as_bytes());
        self.strings.push(0);
        self.last_string += 1;
        let number = self.last_string;
        self.byte(number)
    }
}

impl Structures {
    fn push(&mut self, mut structure: Structure) {
        structure.formatted[1] = structure.formatted.len() as u8;
        if structure.strings.is_empty() {
            structure.strings.push(0);
        }
        let start = self.bytes.len();
        self.bytes.extend(structure.formatted);
        self.bytes.extend(structure.strings);
        self.bytes.push(0);
        self.count += 1;
        self.largest = self.largest.max((self.bytes.len() - start) as u16);
    }
}

/// Texts of the machine.
const MAKER: &str = "rhyve";
const PRODUCT: &str = "Virtual Machine";
const RELEASE: &str = env!("CARGO_PKG_VERSION");
const NONE: &str = "None";

/// Handles; sockets and memory ranges count on from theirs.
const BOARD: u16 = 0x0200;
const CHASSIS: u16 = 0x0300;
const SOCKET: u16 = 0x0400;
const MEMORY_ARRAY: u16 = 0x1000;
const MEMORY_DEVICE: u16 = 0x1100;
const MEMORY_RANGE: u16 = 0x1300;

/// The table, with its structures at guest-physical `base`.
pub(super) fn build(spec: &FirmwareSpec, base: u64) -> Table {
    let mut all = Structures::default();
    firmware(&mut all);
    system(spec, &mut all);
    board_and_chassis(&mut all);
    for socket in 0..spec.topology.sockets {
        processor(spec, socket, &mut all);
    }
    memory(spec, &mut all);
    // System boot information: no errors (7.33). End of table (7.45).
    all.push(Structure::new(32, 0x2000).raw(&[0; 6]).byte(0));
    all.push(Structure::new(127, 0x7f00));
    Table {
        entry_point: entry_point(&all, base as u32),
        structures: all.bytes,
    }
}

/// The 2.1 entry point (5.2.1).
fn entry_point(all: &Structures, base: u32) -> Vec<u8> {
    const LENGTH: u8 = 31;
    let (major, minor) = VERSION;
    let mut outer = b"_SM_".to_vec();
    outer.extend([0, LENGTH, major, minor]);
    outer.extend(all.largest.to_le_bytes());
    outer.extend([0; 6]);

    let mut inner = b"_DMI_".to_vec();
    inner.push(0);
    // What does not fit is refused by its size before any guest sees it.
    inner.extend((all.bytes.len() as u16).to_le_bytes());
    inner.extend(base.to_le_bytes());
    inner.extend(all.count.to_le_bytes());
    inner.push(major << 4 | minor);
    inner[5] = checksum(&inner);

    outer.extend(inner);
    outer[4] = checksum(&outer);
    outer
}

/// Type 0 (7.1).
fn firmware(all: &mut Structures) {
    /// Bit 3: characteristics are not told here.
    const CHARACTERISTICS: u64 = 1 << 3;
    /// ACPI is supported.
    const EXTENSION_1: u8 = 1 << 0;
    /// The table describes a virtual machine.
    const EXTENSION_2: u8 = 1 << 4;
    let structure = Structure::new(0, 0)
        .string(MAKER)
        .string(RELEASE)
        .word(0xe000)
        .string("01/01/2026")
        // 64 KiB blocks less one: 0xe0000 to 0xfffff.
        .byte(1)
        .qword(CHARACTERISTICS)
        .byte(EXTENSION_1)
        .byte(EXTENSION_2)
        // No releases of the system firmware and of an embedded controller.
        .raw(&[0xff; 4]);
    all.push(structure);
}

/// Type 1 (7.2).
fn system(spec: &FirmwareSpec, all: &mut Structures) {
    const POWER_SWITCH: u8 = 6;
    let uuid = spec.uuid.unwrap_or_else(|| default_uuid(&spec.name));
    let structure = Structure::new(1, 0x0100)
        .string(MAKER)
        .string(PRODUCT)
        .string(RELEASE)
        .string(NONE)
        // The first three fields are little-endian here (7.2.1).
        .raw(&uuid.to_bytes_le())
        .byte(POWER_SWITCH)
        .string(NONE)
        .string(PRODUCT);
    all.push(structure);
}

/// Types 2 and 3 (7.3, 7.4).
fn board_and_chassis(all: &mut Structures) {
    const HOSTING_BOARD: u8 = 1;
    const MOTHERBOARD: u8 = 10;
    const OTHER: u8 = 1;
    const UNKNOWN: u8 = 2;
    const SAFE: u8 = 3;
    let board = Structure::new(2, BOARD)
        .string(MAKER)
        .string(PRODUCT)
        .string(RELEASE)
        .string(NONE)
        .string(NONE)
        .byte(HOSTING_BOARD)
        .string(NONE)
        .word(CHASSIS)
        .byte(MOTHERBOARD)
        .byte(0);
    all.push(board);
    let chassis = Structure::new(3, CHASSIS)
        .string(MAKER)
        .byte(OTHER)
        .string(RELEASE)
        .string(NONE)
        .string(NONE)
        // States of boot, power supply and temperature, then security.
        .raw(&[SAFE, SAFE, SAFE, UNKNOWN])
        .dword(0)
        // Height and power cords are not told; there are no contained elements.
        .raw(&[0; 4])
        .string(NONE);
    all.push(chassis);
}

/// Type 4 (7.5).
fn processor(spec: &FirmwareSpec, socket: u16, all: &mut Structures) {
    const CENTRAL: u8 = 3;
    const OTHER: u8 = 1;
    const UNKNOWN: u8 = 2;
    const POPULATED_AND_ENABLED: u8 = 0x41;
    const NO_CACHE: u16 = 0xffff;
    /// 64-bit capable; more than one core; more than one thread a core.
    const LONG_MODE: u16 = 1 << 2;
    const MULTI_CORE: u16 = 1 << 3;
    const MULTI_THREAD: u16 = 1 << 4;

    let topology = spec.topology;
    // 255 says "more than fits here".
    let byte = |count: u32| u8::try_from(count).unwrap_or(0xff);
    let cores = byte(topology.cores.into());
    let threads = byte(u32::from(topology.cores) * u32::from(topology.threads));
    let mut characteristics = LONG_MODE;
    if topology.cores > 1 {
        characteristics |= MULTI_CORE;
    }
    if topology.threads > 1 {
        characteristics |= MULTI_THREAD;
    }
    let structure = Structure::new(4, SOCKET.wrapping_add(socket))
        .string(&format!("CPU {socket}"))
        .byte(CENTRAL)
        .byte(OTHER)
        .string(MAKER)
        .dword(spec.processor.signature)
        .dword(spec.processor.features)
        .string(NONE)
        // Voltage, external clock, maximal and current speed are unknown.
        .byte(0)
        .word(0)
        .word(0)
        .word(0)
        .byte(POPULATED_AND_ENABLED)
        .byte(UNKNOWN)
        .word(NO_CACHE)
        .word(NO_CACHE)
        .word(NO_CACHE)
        .string(NONE)
        .string(NONE)
        .string(NONE)
        .raw(&[cores, cores, threads])
        .word(characteristics)
        .word(OTHER.into());
    all.push(structure);
}

/// Types 16, 17 and 19 (7.17, 7.18, 7.20): one array of one module, mapped in one or two ranges.
fn memory(spec: &FirmwareSpec, all: &mut Structures) {
    const MOTHERBOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const NO_CORRECTION: u8 = 3;
    const NO_ERRORS: u16 = 0xfffe;
    const UNKNOWN_WIDTH: u16 = 0xffff;
    const FORM_UNKNOWN: u8 = 2;
    const RAM: u8 = 7;
    const DETAIL_UNKNOWN: u16 = 1 << 2;

    let total = spec.memory.total();
    // In KiB below 2 TiB, else in the extended field, in bytes.
    let (capacity, extended) = match u32::try_from(total >> 10) {
        Ok(kib) if kib < 0x8000_0000 => (kib, 0),
        _ => (0x8000_0000, total),
    };
    let array = Structure::new(16, MEMORY_ARRAY)
        .byte(MOTHERBOARD)
        .byte(SYSTEM_MEMORY)
        .byte(NO_CORRECTION)
        .dword(capacity)
        .word(NO_ERRORS)
        .word(1)
        .qword(extended);
    all.push(array);

    // In MiB below 32767, else in the extended field; what is no whole number of MiB in KiB, with
    // bit 15, as far as that reaches.
    let (size, extended) = match (total >> 20, total >> 10) {
        (_, kib) if !total.is_multiple_of(1 << 20) && kib < 0x7fff => (0x8000 | kib as u16, 0),
        (mib, _) if mib < 0x7fff => (mib as u16, 0),
        (mib, _) => (0x7fff, mib as u32 & 0x7fff_ffff),
    };
    let module = Structure::new(17, MEMORY_DEVICE)
        .word(MEMORY_ARRAY)
        .word(NO_ERRORS)
        .word(UNKNOWN_WIDTH)
        .word(UNKNOWN_WIDTH)
        .word(size)
        .byte(FORM_UNKNOWN)
        .byte(0)
        .string("DIMM 0")
        .string(NONE)
        .byte(RAM)
        .word(DETAIL_UNKNOWN)
        .word(0)
        .string(MAKER)
        .string(NONE)
        .string(NONE)
        .string(NONE)
        .byte(0)
        .dword(extended)
        // Speed and voltages are unknown.
        .word(0)
        .raw(&[0; 6]);
    all.push(module);

    let ranges = [(0, spec.memory.lowmem), (HIGHMEM_BASE, spec.memory.highmem)];
    for (number, (start, length)) in ranges.into_iter().filter(|(_, len)| *len > 0).enumerate() {
        let last = start + (length - 1);
        // In KiB below 4 TiB, else in the extended fields, in bytes.
        let (first_kib, last_kib, extended) = match u32::try_from(last >> 10) {
            Ok(kib) if kib < u32::MAX => ((start >> 10) as u32, kib, (0, 0)),
            _ => (u32::MAX, u32::MAX, (start, last)),
        };
        let range = Structure::new(19, MEMORY_RANGE + number as u16)
            .dword(first_kib)
            .dword(last_kib)
            .word(MEMORY_ARRAY)
            .byte(1)
            .qword(extended.0)
            .qword(extended.1);
        all.push(range);
    }
}
