//! virtio-console with two ports: control messages, output, and input that comes meanwhile.

use std::sync::Arc;

use rhyve::console::Console;
use rhyve::mevent::Mevent;
use rhyve::virtio::VirtioDevice;
use rhyve::virtio::console::{Port, VirtioConsole};

use crate::queues::{self, Subject, input};

struct Rig {
    device: Arc<VirtioConsole>,
    wires: [Arc<Console>; 2],
    mevent: Arc<Mevent>,
}

impl Rig {
    fn new() -> Self {
        let wires = [Console::new(), Console::new()];
        let ports = ["console", "agent"].into_iter().zip(&wires);
        let ports = ports.map(|(name, wire)| Port {
            name: name.into(),
            console: name == "console",
            place: "here".into(),
            wire: wire.clone(),
        });
        let mevent = Mevent::start().expect("a thread");
        Self {
            device: VirtioConsole::new(mevent.clone(), ports.collect()),
            wires,
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
        &*self.device
    }

    /// A control message: port, event, value.
    fn request(&self, [port, event, value, ..]: [u8; 5]) -> Vec<u8> {
        let id = if port == 0xff { u32::MAX } else { port.into() };
        [
            &id.to_le_bytes()[..],
            &u16::from(event).to_le_bytes(),
            &u16::from(value).to_le_bytes(),
        ]
        .concat()
    }

    fn outside(&self, what: u8, bytes: [u8; 4]) {
        let wire = &self.wires[usize::from(what & 1)];
        match what >> 1 & 3 {
            0 => _ = wire.push_input(&bytes.repeat(1 + usize::from(what >> 3))),
            1 => {
                wire.consume_output(usize::from(bytes[0]) * 16);
                wire.notify_guest();
            }
            2 => wire.discard_output(),
            _ => wire.notify_guest(),
        }
    }
}

/// Takes the steps; true if there was one.
///
/// # Panics
///
/// The device was broken by its driver.
pub fn check(input: &[u8]) -> bool {
    queues::drive(&Rig::new(), input)
}

/// A driver that sets two ports up and writes into one.
pub fn seeds() -> Vec<Vec<u8>> {
    let start = [
        // Buffers for what it is told.
        [0x20, 0, 0, 2, 32, 0, 0, 0],
        [0x20, 1, 1, 2, 32, 0, 0, 0],
        [0x20, 2, 2, 2, 32, 0, 0, 0],
        [0x20, 3, 3, 2, 32, 0, 0, 0],
        [0x28, 0, 4, 0, 0, 1, 2, 3],
        // It is ready; so are both ports, and a program has the second one open.
        [5, 8, 0xff, 0, 1, 0, 0, 0],
        [5, 9, 0, 3, 1, 0, 0, 0],
        [5, 10, 1, 3, 1, 0, 0, 0],
        [5, 11, 1, 6, 1, 0, 0, 0],
        [0x30, 0, 8, 0, 8, 0, 0, 0],
        [0x30, 1, 9, 0, 8, 0, 0, 0],
        [0x30, 2, 10, 0, 8, 0, 0, 0],
        [0x30, 3, 11, 0, 8, 0, 0, 0],
        [0x38, 0, 4, 0, 0, 1, 2, 3],
        // More than a wire holds, then room; input.
        [0x50, 0, 16, 0, 0, 0x20, 0, 0],
        [0x58, 0, 1, 0, 0, 0, 0, 0],
        [0x5d, 0, 0, 0, 0, 0, 0, 0],
        [0x5b, 3, 0, 0, 0xff, 0, 0, 0],
        [0x40, 0, 32, 2, 16, 0, 0, 0],
        [0x48, 0, 1, 0, 0, 0, 0, 0],
        [0x4b, 1, 0, 0, 1, 2, 3, 4],
    ];
    let all = input(1 << 32 | 7, &start);
    let again = [&all[..], &[0x0f; 8], &[0x0d; 8]].concat();
    vec![all, again, input(0, &start[14..])]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_taken() {
        assert!(seeds().iter().all(|seed| check(seed)));
        assert!(!check(&[]));
        // Nothing stays: there are not this many descriptors.
        assert_eq!((0..200).filter(|_| check(&seeds()[1])).count(), 200);
    }

    #[test]
    fn the_driver_is_understood() {
        let rig = Rig::new();
        assert!(queues::drive(&rig, &seeds()[0]));
        let counters = rig.device.inspect().counters;
        assert_eq!(
            counters,
            [
                ("bytes from the guest", 4096 + 255 * 16),
                ("bytes to the guest", 4),
                ("control messages", 4),
                ("bad requests", 0)
            ]
        );
    }
}
