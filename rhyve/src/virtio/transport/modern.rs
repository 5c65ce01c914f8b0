//! The registers of virtio 1.0 and later: structures in a BAR, found by capabilities (4.1.4).

use super::core::{Core, Interface, QueueSetup};
use crate::pci::ConfigSpace;
use crate::regmap::{Register, RegisterMap};
use crate::virtio::feature;

/// The BAR that holds the structures.
pub const BAR: u8 = 4;
/// The BAR of the port at which a driver kicks.
pub const PORT_BAR: u8 = 2;
/// Bytes of [`PORT_BAR`].
pub const PORT_BAR_SIZE: u64 = 4;

/// Where the structures are in [`BAR`].
pub const COMMON: u64 = 0x0000;
const COMMON_LEN: u64 = 64;
pub const ISR: u64 = 0x1000;
pub const DEVICE: u64 = 0x2000;
pub const NOTIFY: u64 = 0x3000;
/// Bytes from one structure to the next, and of each but the last.
pub const PART: u64 = 0x1000;

/// Bytes from one queue's notification address to the next.
pub const NOTIFY_STEP: u64 = 4;

/// Capability id: vendor specific.
const VENDOR: u8 = 9;
/// Kinds of structures (4.1.4).
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// The common configuration (4.1.4.3).
const REGISTERS: RegisterMap<Core> = RegisterMap::new(&[
    Register::rw(
        0,
        4,
        |core| core.device_feature_select.into(),
        |core, value| core.device_feature_select = value as u32,
    ),
    Register::ro(4, 4, |core| {
        half(core.offered(Interface::Modern), core.device_feature_select).into()
    }),
    Register::rw(
        8,
        4,
        |core| core.driver_feature_select.into(),
        |core, value| core.driver_feature_select = value as u32,
    ),
    Register::rw(
        12,
        4,
        |core| half(core.driver_features, core.driver_feature_select).into(),
        set_driver_features,
    ),
    Register::rw(
        16,
        2,
        |core| core.link.config_vector().into(),
        |core, value| core.link.set_config_vector(value as u16),
    ),
    Register::ro(18, 2, |core| core.queues.len() as u64),
    Register::rw(
        20,
        1,
        |core| core.device_status().into(),
        |core, value| core.set_status(Interface::Modern, value as u8),
    ),
    Register::ro(21, 1, |core| core.device.config_generation().into()),
    Register::rw(
        22,
        2,
        |core| core.queue_select.into(),
        |core, value| core.queue_select = value as u16,
    ),
    Register::rw(
        24,
        2,
        |core| core.queue().map_or(0, |q| q.rings.size.into()),
        |core, value| set_up(core, |q| q.rings.size = value as u16),
    ),
    Register::rw(
        26,
        2,
        |core| core.link.queue_vector(core.queue_select).into(),
        |core, value| core.link.set_queue_vector(core.queue_select, value as u16),
    ),
    Register::rw(
        28,
        2,
        |core| core.queue().map_or(0, |q| q.enabled.into()),
        enable_queue,
    ),
    // The offset in units of NOTIFY_STEP.
    Register::ro(30, 2, |core| core.queue_select.into()),
    Register::rw(
        32,
        8,
        |core| core.queue().map_or(0, |q| q.rings.descriptors),
        |core, value| set_up(core, |q| q.rings.descriptors = value),
    ),
    Register::rw(
        40,
        8,
        |core| core.queue().map_or(0, |q| q.rings.available),
        |core, value| set_up(core, |q| q.rings.available = value),
    ),
    Register::rw(
        48,
        8,
        |core| core.queue().map_or(0, |q| q.rings.used),
        |core, value| set_up(core, |q| q.rings.used = value),
    ),
    // No NOTIF_CONFIG_DATA.
    Register::ro(56, 2, |_| 0),
    // A queue is reset as soon as it was asked for.
    Register::rw(58, 2, |_| 0, reset_queue),
    // No administration queues.
    Register::ro(60, 4, |_| 0),
]);

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_driver_features(core: &mut Core, value: u64) {
    let (mask, value) = match core.driver_feature_select {
        0 => (0xffff_ffff, value),
        1 => (0xffff_ffff << 32, value << 32),
        // There are none to be taken.
        _ => return,
    };
    if core.negotiating() {
        core.driver_features = core.driver_features & !mask | value & mask;
    }
}

/// Changes a queue that is not enabled (4.1.4.3.2).
fn set_up(core: &mut Core, change: impl FnOnce(&mut QueueSetup)) {
    if let Some(queue) = core.queue().filter(|queue| !queue.enabled) {
        change(queue);
    }
}

fn enable_queue(core: &mut Core, value: u64) {
    if value != 1 {
        return;
    }
    set_up(core, |queue| queue.enabled = true);
    core.start_queue();
}

fn reset_queue(core: &mut Core, value: u64) {
    if value == 1 && core.driver_features & feature::RING_RESET != 0 {
        core.stop_queue();
    }
}

/// Reads the common configuration.
pub fn read(core: &mut Core, offset: u64, data: &mut [u8]) {
    REGISTERS.read(core, offset, data);
}

/// Writes the common configuration.
pub fn write(core: &mut Core, offset: u64, data: &[u8]) {
    REGISTERS.write(core, offset, data);
}

/// Bytes of [`BAR`].
pub fn bar_size(queues: usize) -> u64 {
    (NOTIFY + NOTIFY_STEP * queues as u64).next_power_of_two()
}

/// Where the capability of PCI configuration access has its window, in the capability.
pub const WINDOW: u8 = 16;

/// Puts the capabilities into `space`; says where the one of PCI configuration access is, through
/// which a guest reaches BARs that it cannot map (4.1.4.9).
pub fn install(space: &mut ConfigSpace, queues: usize) -> u8 {
    let mut add = |kind: u8, bar: u8, offset: u64, len: u64, more: &[u8]| {
        let body = [
            &[16 + more.len() as u8, kind, bar, 0, 0, 0][..],
            &(offset as u32).to_le_bytes(),
            &(len as u32).to_le_bytes(),
            more,
        ];
        space.add_capability(VENDOR, &body.concat())
    };
    add(COMMON_CFG, BAR, COMMON, COMMON_LEN, &[]);
    add(ISR_CFG, BAR, ISR, 1, &[]);
    add(DEVICE_CFG, BAR, DEVICE, PART, &[]);
    // A driver takes the first it can use (4.1.4.1). A port costs less than memory where a
    // processor does not tell KVM what was written where, so that KVM has to read the instruction;
    // all queues kick at the same one.
    add(NOTIFY_CFG, PORT_BAR, 0, PORT_BAR_SIZE, &0u32.to_le_bytes());
    let len = NOTIFY_STEP * queues as u64;
    let step = (NOTIFY_STEP as u32).to_le_bytes();
    add(NOTIFY_CFG, BAR, NOTIFY, len, &step);
    let at = add(PCI_CFG, 0, 0, 0, &[0; 4]);
    // BAR, offset, length and data.
    space.allow(usize::from(at) + 4, &[0xff]);
    space.allow(usize::from(at) + 8, &[0xff; 12]);
    at
}
