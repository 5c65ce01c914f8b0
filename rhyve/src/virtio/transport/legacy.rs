//! The registers of virtio 0.9.5: ports in BAR 0 (4.1.4.10).

use super::core::{Core, Interface};
use crate::regmap::{Register, RegisterMap};

/// The BAR of the legacy interface.
pub const BAR: u8 = 0;
/// Where a driver kicks.
pub const NOTIFY: u16 = 16;
/// End of the registers, where the device configuration begins: without and with MSI-X.
const END: u64 = 20;
const END_MSIX: u64 = 24;

/// Alignment of the used ring, and the unit of a queue's address (2.7.2).
const PAGE: u64 = 4096;

const COMMON: RegisterMap<Core> = RegisterMap::new(&[
    Register::ro(0, 4, |core| core.offered(Interface::Legacy)),
    Register::rw(
        4,
        4,
        |core| core.driver_features & 0xffff_ffff,
        |core, value| {
            if core.negotiating() {
                core.driver_features = value & core.offered(Interface::Legacy);
            }
        },
    ),
    Register::rw(8, 4, queue_page, set_queue_page),
    Register::ro(12, 2, |core| core.queue().map_or(0, |q| q.max_size.into())),
    Register::rw(
        14,
        2,
        |core| core.queue_select.into(),
        |core, value| core.queue_select = value as u16,
    ),
    Register::rw(
        NOTIFY,
        2,
        |_| 0xffff,
        |core, value| core.kick(Interface::Legacy, value as u16),
    ),
    Register::rw(
        18,
        1,
        |core| core.status.into(),
        |core, value| core.set_status(Interface::Legacy, value as u8),
    ),
    Register::ro(19, 1, |core| core.link.take_isr().into()),
]);

/// Two more while MSI-X is enabled.
const VECTORS: RegisterMap<Core> = RegisterMap::new(&[
    Register::rw(
        20,
        2,
        |core| core.link.config_vector().into(),
        |core, value| core.link.set_config_vector(value as u16),
    ),
    Register::rw(
        22,
        2,
        |core| core.link.queue_vector(core.queue_select).into(),
        |core, value| core.link.set_queue_vector(core.queue_select, value as u16),
    ),
]);

fn queue_page(core: &mut Core) -> u64 {
    core.queue()
        .map_or(0, |queue| queue.rings.descriptors / PAGE)
}

fn set_queue_page(core: &mut Core, page: u64) {
    if page == 0 {
        return core.stop_queue();
    }
    let Some(queue) = core.queue().filter(|queue| queue.running.is_none()) else {
        return;
    };
    // A 32-bit page number and at most 32768 descriptors: no overflow.
    let size = u64::from(queue.max_size);
    queue.rings.descriptors = page * PAGE;
    queue.rings.available = queue.rings.descriptors + 16 * size;
    queue.rings.used = (queue.rings.available + 6 + 2 * size).next_multiple_of(PAGE);
    queue.enabled = true;
    core.start_queue();
}

/// Bytes of BAR 0 for a device with this much configuration.
pub fn bar_size(config: usize) -> u64 {
    (END_MSIX + config as u64).next_power_of_two()
}

/// Where the device configuration begins now.
pub fn config_base(core: &Core) -> u64 {
    if core.link.has_vectors() {
        END_MSIX
    } else {
        END
    }
}

/// Reads what lies before the device configuration.
pub fn read(core: &mut Core, offset: u64, data: &mut [u8]) {
    let map = if offset < END { COMMON } else { VECTORS };
    map.read(core, offset, data);
}

/// Writes what lies before the device configuration.
pub fn write(core: &mut Core, offset: u64, data: &[u8]) {
    let map = if offset < END { COMMON } else { VECTORS };
    map.write(core, offset, data);
}
