//! The PC's legacy devices, as far as a guest without firmware meets them.
//!
//! The interrupt controllers, the interval timer and port 0x61 are KVM's own, in the kernel. Every
//! device here has a `register` that puts it on the port bus under its usual ports.

mod calendar;
pub mod clock;
pub mod debugexit;
pub mod i8042;
pub mod pm;
pub mod post;
pub mod reset;
pub mod rtc;
pub mod uart;

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use proptest::collection::vec;
    use proptest::prelude::*;
    use vmm_api::memory::MemoryLayout;

    use super::uart::{COM_PORTS, PORTS, Uart};
    use crate::bus::{IoSize, PortBus};
    use crate::config::PciAddress;
    use crate::console::{Console, GuestEnd};
    use crate::pci::{Bridge, ConfigPorts, PciBus};
    use crate::testing::{FakeClock, FakeIrq, FakeSuspend};

    /// A whole board, with every device at its ports.
    struct Board {
        bus: PortBus,
        clock: Arc<FakeClock>,
        wires: Vec<(Arc<Uart>, Arc<Console>)>,
    }

    fn board() -> Board {
        let (bus, clock, suspend) = (PortBus::new(), FakeClock::new(), FakeSuspend::new());
        let mut wires = Vec::new();
        for com in &COM_PORTS {
            let console = Console::new();
            let uart = Uart::new(FakeIrq::new(), console.clone());
            let ports = com.base..=com.base + (PORTS - 1);
            bus.register(ports, com.name, uart.clone()).unwrap();
            wires.push((uart, console));
        }
        let memory = MemoryLayout {
            lowmem: 1 << 28,
            highmem: 0,
        };
        let rtc = super::rtc::Rtc::new(clock.clone(), FakeIrq::new(), 0, &memory);
        rtc.register(&bus).unwrap();
        super::i8042::I8042::new(suspend.clone())
            .register(&bus)
            .unwrap();
        super::post::Post::new().register(&bus).unwrap();
        super::debugexit::DebugExit::new(suspend.clone())
            .register(&bus, 0xf4)
            .unwrap();
        let pm = super::pm::Pm::new(clock.clone(), FakeIrq::new(), suspend.clone());
        pm.register(&bus).unwrap();
        let pci = PciBus::new();
        pci.plug(PciAddress::HOST_BRIDGE, Bridge::host()).unwrap();
        let reset = super::reset::ResetControl::new(suspend);
        ConfigPorts::new(pci, reset).register(&bus).unwrap();
        Board { bus, clock, wires }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Read(u16, IoSize),
        Write(u16, IoSize, u32),
        Pass(u64),
        Type(usize, Vec<u8>),
    }

    /// Any port, but mostly those where something is, or almost.
    fn port() -> impl Strategy<Value = u16> {
        let near = |first: u16, last: u16| first - 4..=last + 1;
        prop_oneof![
            4 => near(0x3f8, 0x3ff),
            1 => near(0x2e8, 0x2ff),
            4 => near(0x60, 0x84),
            3 => near(0x400, 0x40b),
            1 => near(0xb2, 0xf7),
            3 => near(0xcf8, 0xcff),
            1 => any::<u16>(),
        ]
    }

    fn step() -> impl Strategy<Value = Step> {
        let size = || prop_oneof![Just(IoSize::Byte), Just(IoSize::Word), Just(IoSize::Dword)];
        let value = prop_oneof![any::<u32>(), 0..256_u32, Just(0x8000_0000), Just(u32::MAX)];
        prop_oneof![
            8 => (port(), size()).prop_map(|(port, size)| Step::Read(port, size)),
            8 => (port(), size(), value).prop_map(|(port, size, value)| {
                Step::Write(port, size, value)
            }),
            1 => (0..u64::MAX >> 12).prop_map(Step::Pass),
            1 => (0..4_usize, vec(any::<u8>(), 0..40)).prop_map(|(com, text)| Step::Type(com, text)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Whatever a guest does to the ports, every access returns, soon, and reads no more than its
        /// width.
        #[test]
        fn no_access_panics_or_blocks(steps in vec(step(), 1..300)) {
            let board = board();
            let start = Instant::now();
            for step in steps {
                match step {
                    Step::Read(port, size) => {
                        let value = board.bus.read(port, size).unwrap_or(size.ones());
                        prop_assert_eq!(value & !size.ones(), 0);
                    }
                    Step::Write(port, size, value) => {
                        let _ = board.bus.write(port, size, value);
                    }
                    Step::Pass(nanos) => {
                        board.clock.advance(Duration::from_nanos(nanos));
                        board.wires.iter().for_each(|(uart, _)| uart.console_event());
                    }
                    Step::Type(com, text) => {
                        board.wires[com].1.push_input(&text);
                    }
                }
            }
            prop_assert!(start.elapsed() < Duration::from_secs(5));
        }
    }
}
