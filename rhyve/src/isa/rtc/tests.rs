//! The clock as a guest sees and sets it.

use super::*;
use crate::testing::{FakeClock, FakeIrq};

/// 2012-04-10 23:59:58 UTC, a Tuesday.
const BOOT: u64 = 15_440 * 86_400 + 86_398;

struct Rig {
    bus: PortBus,
    rtc: Arc<Rtc>,
    clock: Arc<FakeClock>,
    irq: Arc<FakeIrq>,
}

fn rig() -> Rig {
    let (clock, irq) = (FakeClock::new(), FakeIrq::new());
    clock.set_realtime(Duration::from_secs(BOOT) + Duration::from_millis(100));
    let memory = MemoryLayout {
        lowmem: 768 << 20,
        highmem: 2 << 30,
    };
    let rtc = Rtc::new(clock.clone(), irq.clone(), 0, &memory);
    let bus = PortBus::new();
    rtc.register(&bus).unwrap();
    Rig {
        bus,
        rtc,
        clock,
        irq,
    }
}

impl Rig {
    fn get(&self, register: u8) -> u8 {
        self.bus.write(0x70, IoSize::Byte, register.into()).unwrap();
        self.bus.read(0x71, IoSize::Byte).unwrap() as u8
    }
    fn set(&self, register: u8, value: u8) {
        self.bus.write(0x70, IoSize::Byte, register.into()).unwrap();
        self.bus.write(0x71, IoSize::Byte, value.into()).unwrap();
    }
    /// Century, year, month, day, hours, minutes, seconds.
    fn time(&self) -> [u8; 7] {
        [0x32, 9, 8, 7, 4, 2, 0].map(|register| self.get(register))
    }
    fn pass(&self, millis: u64) {
        self.clock.advance(Duration::from_millis(millis));
        self.rtc.tick();
    }
}

#[test]
fn time_of_day_in_every_format() {
    let rig = rig();
    assert_eq!(rig.time(), [0x20, 0x12, 0x04, 0x10, 0x23, 0x59, 0x58]);
    assert_eq!(rig.get(6), 3, "Tuesday");
    rig.set(0x0b, 0x06);
    assert_eq!(rig.time(), [20, 12, 4, 10, 23, 59, 58]);
    rig.set(0x0b, 0x00);
    assert_eq!(rig.time()[4], 0x91, "11 PM");
    rig.pass(2000);
    assert_eq!(rig.time(), [0x20, 0x12, 0x04, 0x11, 0x12, 0x00, 0x00]);
    assert_eq!(rig.get(6), 4);
    rig.set(0x0b, 0x02);
    assert_eq!(rig.time()[4], 0x00);
}

#[test]
fn the_offset_moves_the_clock() {
    let (clock, irq) = (FakeClock::new(), FakeIrq::new());
    let memory = MemoryLayout {
        lowmem: 1 << 20,
        highmem: 0,
    };
    let bus = PortBus::new();
    Rtc::new(clock, irq, -3600, &memory).register(&bus).unwrap();
    bus.write(0x70, IoSize::Byte, 4).unwrap();
    assert_eq!(bus.read(0x71, IoSize::Byte), Ok(0x23));
    assert_eq!(base_offset(RtcBase::Utc), 0);
    assert!(base_offset(RtcBase::LocalTime).abs() <= 15 * 3600);
}

#[test]
fn update_in_progress() {
    let rig = rig();
    assert_eq!(rig.get(0x0a), 0x26);
    rig.clock.advance(Duration::from_micros(899_800));
    assert_eq!(rig.get(0x0a), 0xa6);
    rig.clock.advance(Duration::from_micros(200));
    assert_eq!(rig.get(0x0a), 0x26);
    assert_eq!(rig.get(0x0d), 0x80);
}

#[test]
fn the_guest_sets_the_time() {
    let rig = rig();
    rig.set(0x0b, 0x82);
    rig.pass(5000);
    assert_eq!(rig.time()[6], 0x58, "frozen");
    for (register, value) in [(0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23)] {
        rig.set(register, value);
    }
    rig.set(0x0b, 0x02);
    assert_eq!(rig.time(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]);
    rig.pass(1900);
    assert_eq!(rig.time(), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
    // As Linux does: the divider held in reset, the next update half a second after it.
    rig.set(0x0a, 0x76);
    rig.set(0, 0x30);
    rig.pass(3000);
    rig.set(0x0a, 0x26);
    assert_eq!(rig.time()[6], 0x30);
    rig.pass(499);
    assert_eq!(rig.time()[6], 0x30);
    rig.pass(1);
    assert_eq!(rig.time()[6], 0x31);
    // A single register of a running clock.
    rig.set(2, 0x45);
    assert_eq!(rig.time()[4..], [0x00, 0x45, 0x31]);
}

#[test]
fn update_interrupt() {
    let rig = rig();
    rig.set(0x0b, 0x12);
    assert!(!rig.irq.level());
    rig.pass(900);
    assert!(rig.irq.level());
    assert_eq!(
        rig.get(0x0c),
        0x90 | 0x40,
        "the periodic flag rises without its enable"
    );
    assert!(!rig.irq.level());
    assert_eq!(rig.get(0x0c), 0);
    rig.pass(1000);
    assert!(rig.irq.level());
    rig.set(0x0b, 0x82);
    assert!(!rig.irq.level(), "SET takes the enable away");
    assert_eq!(rig.get(0x0b), 0x82);
}

#[test]
fn alarm_interrupt() {
    let rig = rig();
    for (register, value) in [(5, 0xff), (3, 0x00), (1, 0x05)] {
        rig.set(register, value);
    }
    rig.set(0x0b, 0x22);
    rig.pass(6_800);
    assert!(!rig.irq.level());
    rig.pass(100);
    assert!(rig.irq.level());
    assert_eq!(rig.get(0x0c) & 0xa0, 0xa0);
    rig.pass(3_600_000);
    assert!(rig.irq.level(), "every hour");
    rig.get(0x0c);
    rig.set(1, 0x61);
    rig.pass(100_000_000);
    assert!(!rig.irq.level(), "never");
}

#[test]
fn periodic_interrupt() {
    let rig = rig();
    rig.set(0x0a, 0x2f);
    rig.get(0x0c);
    rig.set(0x0b, 0x42);
    for _ in 0..4 {
        rig.pass(500);
        assert!(rig.irq.level(), "2 Hz");
        assert_eq!(rig.get(0x0c) & 0xc0, 0xc0);
    }
    rig.set(0x0a, 0x20);
    rig.pass(1000);
    assert!(!rig.irq.level(), "rate 0 is none");
}

#[test]
fn interrupts_come_by_themselves() {
    use super::super::clock::HostClock;
    let (mevent, irq) = (Mevent::start().unwrap(), FakeIrq::new());
    let memory = MemoryLayout {
        lowmem: 1 << 20,
        highmem: 0,
    };
    let rtc = Rtc::new(Arc::new(HostClock), irq.clone(), 0, &memory);
    rtc.attach_timer(&mevent).unwrap();
    rtc.write(0x70, IoSize::Byte, 0x0b);
    rtc.write(0x71, IoSize::Byte, 0x42);
    rtc.write(0x70, IoSize::Byte, 0x0c);
    let start = std::time::Instant::now();
    while irq.raised() < 10 {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(1));
        rtc.read(0x71, IoSize::Byte);
    }
}

#[test]
fn non_volatile_bytes() {
    let rig = rig();
    let word = |at| u16::from_le_bytes([rig.get(at), rig.get(at + 1)]);
    assert_eq!(word(0x15), 640);
    assert_eq!(word(0x17), 0xffff);
    assert_eq!(word(0x30), 0xffff);
    assert_eq!(word(0x34), (768 - 16) * 16);
    assert_eq!(
        [rig.get(0x5b), rig.get(0x5c), rig.get(0x5d)],
        [0x00, 0x80, 0x00]
    );
    rig.set(0x0f, 0x0a);
    assert_eq!(rig.get(0x8f), 0x0a, "the NMI bit is no part of the index");
    assert_eq!(rig.bus.read(0x70, IoSize::Byte), Ok(0xff));
}
