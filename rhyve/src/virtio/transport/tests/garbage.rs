//! Drivers that do anything at all.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::rig::rig;
use crate::bus::IoSize;
use crate::virtio::transport::Transport;

/// Something a driver does.
#[derive(Clone, Debug)]
enum Act {
    Config(u8, IoSize, u32),
    Port(u16, IoSize, u32),
    Memory(u64, usize, u64),
    Ring(u16, u16),
    Serve(u16),
    SetUp,
}

fn size() -> impl Strategy<Value = IoSize> {
    prop_oneof![Just(IoSize::Byte), Just(IoSize::Word), Just(IoSize::Dword)]
}

/// Values that mean something more often than chance has it.
fn value() -> impl Strategy<Value = u32> {
    prop_oneof![
        any::<u32>(),
        0u32..32,
        Just(0x10),
        Just(0xf),
        Just(0xffff_ffff)
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let config = (any::<u8>(), size(), value()).prop_map(|(at, size, value)| {
        let size_mask = (size.bytes() - 1) as u8;
        Act::Config(at & !size_mask, size, value)
    });
    let memory = prop_oneof![
        0u64..64,
        0x1000u64..0x1002,
        0x2000u64..0x2010,
        0x3000u64..0x300c
    ];
    prop_oneof![
        1 => config,
        4 => (0u16..40, size(), value()).prop_map(|(at, size, value)| Act::Port(at, size, value)),
        6 => (memory, 1usize..9, value()).prop_map(|(at, len, value)| Act::Memory(at, len, value.into())),
        1 => (any::<u16>(), any::<u16>()).prop_map(|(head, index)| Act::Ring(head, index)),
        2 => (0u16..3).prop_map(Act::Serve),
        2 => Just(Act::SetUp),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// A device is activated and reset in turn whatever its driver does, and nothing panics.
    #[test]
    fn any_driver_is_survived(acts in proptest::collection::vec(act(), 1..120)) {
        let rig = rig(Transport::Transitional);
        // Placed once: the driver may well lose them.
        let (ports, memory) = (rig.bar(0) as u16, rig.bar(4));
        for act in acts {
            match act {
                Act::Config(at, size, value) => {
                    rig.set_config(at, size, value);
                    rig.config(at, size);
                }
                Act::Port(at, size, value) => {
                    let _ = rig.buses.ports.write(ports + at, size, value);
                    let _ = rig.buses.ports.read(ports + at, size);
                }
                Act::Memory(at, len, value) => {
                    let _ = rig.buses.mmio.write(memory + at, &value.to_le_bytes()[..len]);
                    let _ = rig.buses.mmio.read(memory + at, &mut [0; 8][..len]);
                }
                Act::Ring(head, index) => {
                    let entry = [0, index, head, head];
                    for (i, word) in (0..).zip(entry) {
                        rig.memory.write_obj(word, GuestAddress(0x1_0040 + 2 * i)).unwrap();
                    }
                }
                Act::Serve(queue) => rig.echo.serve(queue),
                Act::SetUp => {
                    // What a driver would do, so that garbage meets a device that runs.
                    for (at, len, value) in [
                        (20, 1, 0), (8, 4, 1), (12, 4, 1), (20, 1, 11), (22, 2, 0), (24, 2, 4),
                        (32, 8, 0x1_0000), (40, 8, 0x1_0040), (48, 8, 0x1_1000), (28, 2, 1),
                        (20, 1, 15), (0x3000, 2, 0u64),
                    ] {
                        let bytes = value.to_le_bytes();
                        let _ = rig.buses.mmio.write(memory + at, &bytes[..len]);
                    }
                }
            }
        }
    }
}
