//! virtio-balloon: page numbers, reports and statistics.

use std::io;
use std::sync::Arc;

use rhyve::mevent::Mevent;
use rhyve::virtio::VirtioDevice;
use rhyve::virtio::balloon::{Balloon, Reclaim};

use crate::queues::{self, RAM, Subject, input};

/// Takes RAM and nothing else, and holds its device to what it is promised.
struct Host;

impl Reclaim for Host {
    fn release(&self, gpa: u64, len: u64) -> io::Result<()> {
        assert!(gpa.is_multiple_of(4096) && len.is_multiple_of(4096) && len != 0);
        match gpa.checked_add(len) {
            Some(end) if end <= RAM => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

struct Rig {
    balloon: Arc<Balloon>,
    mevent: Arc<Mevent>,
}

impl Rig {
    fn new() -> Self {
        let mevent = Mevent::start().expect("a thread");
        Self {
            balloon: Balloon::new(mevent.clone(), Arc::new(Host), RAM, true),
            mevent,
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.mevent.stop();
    }
}

impl Subject for Rig {
    fn device(&self) -> &dyn VirtioDevice {
        &*self.balloon
    }

    /// Page numbers in a row, or a statistic.
    fn request(&self, [count, tag, value @ ..]: [u8; 5]) -> Vec<u8> {
        let [low, middle, high] = value;
        let first = u32::from_le_bytes([low, middle, high, 0]);
        if tag & 0x80 == 0 {
            let numbers = (0..u32::from(count)).map(|n| first.wrapping_add(n));
            return numbers.flat_map(u32::to_le_bytes).collect();
        }
        let tag = u16::from(tag & 0x7f).to_le_bytes();
        [&tag[..], &u64::from(first).to_le_bytes()].concat()
    }

    fn settle(&self) {
        // To inspect it is to wait for the driver's statistics.
        self.balloon.set_target(0);
    }

    fn outside(&self, _: u8, bytes: [u8; 4]) {
        self.balloon
            .set_target(u64::from(u32::from_le_bytes(bytes)));
    }
}

/// Takes the steps; true if there was one.
///
/// # Panics
///
/// What is not whole pages was given away, or the device was broken by its driver.
pub fn check(input: &[u8]) -> bool {
    queues::drive(&Rig::new(), input)
}

/// A driver that inflates, deflates, reports and tells.
pub fn seeds() -> Vec<Vec<u8>> {
    let steps = [
        [0x0b, 0, 0, 0, 0, 0, 1, 0],
        [5, 0, 8, 0, 16, 0, 0, 0],
        [0, 0, 0, 0, 32, 0, 0, 0],
        [8, 0, 1, 0, 0, 0, 0, 0],
        [0x10, 0, 0, 0, 32, 0, 0, 0],
        [0x18, 0, 1, 0, 0, 0, 0, 0],
        [5, 1, 0, 0x84, 1, 2, 3, 0],
        [0x20, 0, 1, 0, 10, 0, 0, 0],
        [0x28, 0, 1, 0, 0, 0, 0, 0],
        [0x30, 0, 16, 2, 0, 0x40, 0, 0],
        [0x38, 0, 1, 0, 0, 0, 0, 0],
        [0x0e, 4, 0, 0, 8, 0, 0, 0],
    ];
    let all = input(u64::MAX, &steps);
    let again = [&all[..], &[0x0d; 8], &[0x0f; 8]].concat();
    vec![all, again]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_taken() {
        assert!(seeds().iter().all(|seed| check(seed)));
        assert!(!check(&[]));
    }

    #[test]
    fn a_queue_that_nobody_serves_is_waited_for_once() {
        // Without the feature that it belongs to.
        let rig = Rig::new();
        let driver = queues::Driver::new(&rig, 0);
        driver.step([0x3a; 8]);
        let deserted = driver.deserted();
        driver.step([0x3a; 8]);
        assert_eq!((deserted, driver.deserted()), (1 << 3, 1 << 3));
    }

    #[test]
    fn the_driver_is_understood() {
        let rig = Rig::new();
        assert!(queues::drive(&rig, &seeds()[0]));
        let counters = rig.balloon.inspect().counters;
        assert_eq!(
            counters,
            [
                ("pages inflated", 8),
                ("pages deflated", 8),
                ("bytes reported", 0x4000),
                ("bad requests", 0),
                ("errors", 0)
            ]
        );
    }
}
