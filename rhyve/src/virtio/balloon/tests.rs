use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use vm_memory::Bytes;
use vm_memory::GuestAddress;

use super::*;
use crate::testing::{Buffer, FakeInterrupts, GuestDriver, RawDescriptor};
use crate::virtio::Rings;

const MEMORY: u64 = 4 << 20;

/// Remembers what it was given; what is not RAM is refused.
#[derive(Default)]
struct Given(Mutex<Vec<(u64, u64)>>);

impl Reclaim for Given {
    fn release(&self, gpa: u64, len: u64) -> io::Result<()> {
        if gpa.checked_add(len).is_none_or(|end| end > MEMORY) {
            return Err(io::Error::other("not RAM"));
        }
        self.0.lock().unwrap().push((gpa, len));
        Ok(())
    }
}

struct Rig {
    balloon: Arc<Balloon>,
    given: Arc<Given>,
    interrupts: Arc<FakeInterrupts>,
    /// Inflate, deflate, stats, reporting.
    drivers: [GuestDriver; 4],
}

impl Rig {
    fn new() -> Self {
        let given = Arc::<Given>::default();
        let balloon = Balloon::new(Mevent::start().unwrap(), given.clone(), MEMORY, true);
        let first = GuestDriver::new(16);
        let memory = first.memory().clone();
        let others = [1, 2, 3].map(|n| GuestDriver::at(memory.clone(), n << 20, 16));
        let [second, third, fourth] = others;
        let rig = Self {
            balloon,
            given,
            interrupts: FakeInterrupts::new(),
            drivers: [first, second, third, fourth],
        };
        rig.activate(rig.balloon.features());
        rig
    }

    fn activate(&self, features: u64) {
        let queues = (0..).zip(&self.drivers);
        let queues = queues.map(|(n, driver)| driver.virtqueue(n, self.interrupts.clone()));
        let activation = Activation {
            memory: self.drivers[0].memory().clone(),
            features,
            queues: queues.collect(),
            interrupts: self.interrupts.clone(),
        };
        self.balloon.activate(activation).unwrap();
    }

    fn ask(&mut self, queue: usize, buffers: &[Buffer]) {
        let driver = &mut self.drivers[queue];
        let sent = driver.send(buffers);
        driver.kick();
        assert_eq!(driver.wait_used(), (sent.head, 0));
    }

    fn counted(&self, name: &str) -> u64 {
        let counters = self.balloon.inspect().counters;
        counters.iter().find(|(n, _)| *n == name).unwrap().1
    }
}

fn numbers(pages: &[u32]) -> Buffer {
    Buffer::Readable(pages.iter().flat_map(|page| page.to_le_bytes()).collect())
}

#[test]
fn pages_are_given_in_runs_and_taken_back() {
    let mut rig = Rig::new();
    assert_eq!(rig.balloon.set_target(1 << 20), 1 << 20);
    assert_eq!(rig.balloon.set_target(u64::MAX), MEMORY);
    assert_eq!(rig.interrupts.config_changes(), 2);
    let mut config = [0; 8];
    rig.balloon.config_read(0, &mut config);
    assert_eq!(config, [0, 4, 0, 0, 0, 0, 0, 0]);
    rig.balloon.config_write(0, &[9, 9, 9, 9, 4, 0, 0, 0, 7]);
    rig.balloon.config_read(0, &mut config);
    assert_eq!(config, [0, 4, 0, 0, 4, 0, 0, 0]);

    rig.ask(0, &[numbers(&[9, 8, 7]), numbers(&[7, 100])]);
    let given = rig.given.0.lock().unwrap().clone();
    assert_eq!(given, [(7 << 12, 3 << 12), (100 << 12, 1 << 12)]);
    rig.ask(1, &[numbers(&[8, 9])]);
    assert_eq!(
        (rig.counted("pages inflated"), rig.counted("pages deflated")),
        (4, 2)
    );
    rig.balloon.reset();
    assert_eq!(rig.balloon.inspect().properties[1].1, "0");
}

#[test]
fn single_queues_are_reset_and_come_back() {
    let mut rig = Rig::new();
    let balloon = rig.balloon.clone();
    let reset = balloon.queue_reset().unwrap();
    // The statistics' buffer is the device's, and is not given back to a ring that is gone.
    rig.drivers[2].send(&[Buffer::Readable(vec![0; 10])]);
    rig.drivers[2].kick();
    let taken = || {
        rig.balloon
            .lock()
            .running
            .as_ref()
            .unwrap()
            .stats_buffer
            .is_some()
    };
    while !taken() {
        std::thread::yield_now();
    }
    for index in [0, 2] {
        reset.stop_queue(index);
        let driver = &mut rig.drivers[usize::from(index)];
        driver.send(&[numbers(&[1])]);
        driver.kick();
    }
    rig.balloon.inspect();
    assert_eq!((rig.drivers[0].used(), rig.drivers[2].used()), (None, None));
    for index in [0, 2u16] {
        let (memory, base) = (
            rig.drivers[1].memory().clone(),
            0x1_0000 + (u64::from(index) << 20),
        );
        let driver = GuestDriver::at(memory, base, 16);
        reset
            .start_queue(driver.virtqueue(index, rig.interrupts.clone()))
            .unwrap();
        rig.drivers[usize::from(index)] = driver;
    }
    rig.ask(0, &[numbers(&[5])]);
    assert_eq!(rig.given.0.lock().unwrap()[..], [(5 << 12, 1 << 12)]);
    rig.drivers[2].send(&[Buffer::Readable(vec![0; 10])]);
    rig.drivers[2].kick();
    // Whoever looks gives it back.
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while rig.drivers[2].used().is_none() {
        assert!(std::time::Instant::now() < end);
        rig.balloon.inspect();
    }
    reset.stop_queue(9);
    rig.balloon.reset();
}

#[test]
fn what_is_not_ram_is_counted_and_the_rest_taken() {
    let mut rig = Rig::new();
    let last = (MEMORY >> 12) as u32 - 1;
    rig.ask(0, &[numbers(&[last, last + 1, u32::MAX, 0])]);
    let given = rig.given.0.lock().unwrap().clone();
    assert_eq!(given, [(0, 1 << 12), (MEMORY - PAGE, PAGE)]);
    assert_eq!(rig.counted("errors"), 2);
    rig.ask(0, &[Buffer::Readable(vec![1, 2, 3])]);
    rig.ask(0, &[Buffer::Readable(vec![0; 4 * 1025])]);
    rig.ask(0, &[Buffer::Writable(64)]);
    assert_eq!(
        (rig.counted("bad requests"), rig.counted("pages inflated")),
        (2, 2)
    );
}

#[test]
fn reports_give_whole_pages_only() {
    let mut rig = Rig::new();
    let driver = &mut rig.drivers[3];
    let mut report = |address, len| {
        let descriptor = RawDescriptor {
            address,
            len,
            flags: 2,
            next: 0,
        };
        driver.set_descriptor(0, descriptor);
        driver.make_available(0);
        driver.kick();
        assert_eq!(driver.wait_used(), (0, 0));
    };
    report(0x10_0000, 0x20_0000);
    report(0x1800, 0x3000);
    report(0x1001, 0x1000);
    let given = rig.given.0.lock().unwrap().clone();
    assert_eq!(given, [(0x10_0000, 0x20_0000), (0x2000, 0x2000)]);
    assert_eq!(
        (rig.counted("bytes reported"), rig.counted("bad requests")),
        (0x20_2000, 1)
    );
}

#[test]
fn statistics_are_asked_for_when_somebody_looks() {
    let mut rig = Rig::new();
    let stat = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let first = [stat(4, 1000), stat(5, u64::MAX), stat(99, 1), vec![4]].concat();
    let buffer = rig.drivers[2].send(&[Buffer::Readable(first)]);
    rig.drivers[2].kick();
    let balloon = rig.balloon.clone();
    let shown = move |free: &str| {
        let properties = balloon.inspect().properties;
        properties
            .iter()
            .any(|(name, value)| *name == "guest free" && value == free)
    };
    // Nobody answers: what is known is told all the same.
    let deadline = Instant::now() + Duration::from_secs(10);
    while !shown("1000") {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(rig.drivers[2].wait_used(), (buffer.head, 0));
    let answer = std::thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !shown("2000") {
            assert!(Instant::now() < deadline);
        }
    });
    rig.drivers[2].send(&[Buffer::Readable(stat(4, 2000))]);
    rig.drivers[2].kick();
    answer.join().unwrap();
}

/// A driver of the statistics that sends the next whenever an older one comes back, for ever.
struct Talker {
    memory: GuestMemoryMmap,
    rings: Rings,
    goes_on: AtomicBool,
}

impl Talker {
    fn send(&self) {
        let at = GuestAddress(self.rings.available + 2);
        let index: u16 = self.memory.load(at, Ordering::Acquire).unwrap();
        let next = index.wrapping_add(1);
        self.memory.store(next, at, Ordering::Release).unwrap();
    }
}

impl Interrupts for Talker {
    fn signal_queue(&self, _: u16) {
        if self.goes_on.load(Ordering::Relaxed) {
            self.send();
        }
    }

    fn signal_config(&self) {}

    fn needs_reset(&self) {
        panic!("nothing is wrong");
    }
}

#[test]
fn statistics_without_end_leave_time_for_others() {
    let mut rig = Rig::new();
    let driver = &mut rig.drivers[2];
    // Requests 0 and 1; whatever comes back is sent again in the same place of the ring.
    for _ in 0..2 {
        driver.send(&[Buffer::Readable(vec![0; 20])]);
    }
    let talker = Arc::new(Talker {
        memory: driver.memory().clone(),
        rings: driver.rings(),
        goes_on: AtomicBool::new(true),
    });
    for slot in 0..16 {
        let at = GuestAddress(talker.rings.available + 4 + 2 * slot);
        talker.memory.write_obj(slot as u16 % 2, at).unwrap();
    }
    let queue = driver.virtqueue(2, talker.clone());
    let balloon = rig.balloon.clone();
    balloon.stop_queue(2);
    balloon.start_queue(queue).unwrap();
    let sent = || -> u16 {
        let at = GuestAddress(talker.rings.available + 2);
        talker.memory.load(at, Ordering::Acquire).unwrap()
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while sent() < 100 {
        assert!(Instant::now() < deadline, "it talks");
    }
    let (done, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        balloon.set_target(0);
        // Nobody listens if it took too long.
        let _ = done.send(());
    });
    let in_time = told.recv_timeout(Duration::from_secs(5));
    talker.goes_on.store(false, Ordering::Relaxed);
    assert_eq!(in_time, Ok(()));
}

#[test]
fn another_process_asks_for_as_much_and_has_the_drivers_buffer_again() {
    let mut rig = Rig::new();
    rig.balloon.set_target(1 << 20);
    rig.balloon.config_write(ACTUAL, &[7, 0, 0, 0]);
    let stat = [&4u16.to_le_bytes()[..], &1000u64.to_le_bytes()].concat();
    let buffer = rig.drivers[2].send(&[Buffer::Readable(stat)]);
    rig.drivers[2].kick();
    let free = |balloon: &Balloon| {
        let deadline = Instant::now() + Duration::from_secs(10);
        let known = |(name, value): &(_, String)| *name == "guest free" && value == "1000";
        while !balloon.lock().stats.shown().any(|stat| known(&stat)) {
            assert!(Instant::now() < deadline);
        }
    };
    free(&rig.balloon);
    rig.balloon.freeze();
    let state = rig.balloon.save().unwrap();
    // It looks at nothing now.
    rig.drivers[1].send(&[numbers(&[8, 9])]);
    rig.drivers[1].kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.drivers[1].used(), None);
    rig.balloon.reset();

    let mevent = Mevent::start().unwrap();
    let small = Balloon::new(mevent.clone(), rig.given.clone(), PAGE, true);
    small.restore(&state).unwrap();
    assert_eq!(small.inspect().properties[0].1, "4K");
    let other = Balloon::new(mevent, rig.given.clone(), MEMORY, true);
    other.restore(&state).unwrap();
    let queues = (0..).zip(&rig.drivers);
    let queues = queues.map(|(n, driver)| driver.resumed(n, rig.interrupts.clone()));
    let activation = Activation {
        memory: rig.drivers[0].memory().clone(),
        features: other.features(),
        queues: queues.collect(),
        interrupts: rig.interrupts.clone(),
    };
    other.activate(activation).unwrap();
    rig.drivers[1].wait_used();
    let mut config = [0; 8];
    other.config_read(0, &mut config);
    assert_eq!(config, [0, 1, 0, 0, 7, 0, 0, 0]);
    free(&other);
    // The driver gets it back when somebody looks.
    other.inspect();
    assert_eq!(rig.drivers[2].wait_used(), (buffer.head, 0));
}

#[test]
fn queues_are_numbered_by_what_was_negotiated() {
    let mut rig = Rig::new();
    rig.balloon.reset();
    rig.drivers =
        [1, 2, 3, 3].map(|n| GuestDriver::at(rig.drivers[0].memory().clone(), n << 20, 16));
    rig.activate(feature::REPORTING);
    // The third is the reporting queue now.
    rig.drivers[2].send(&[Buffer::Writable(8192)]);
    rig.drivers[2].kick();
    rig.drivers[2].wait_used();
    assert!(rig.counted("bytes reported") > 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is in any queue: nothing that is not RAM is given away, and the device lives.
    #[test]
    fn anything_is_survived(
        requests in prop::collection::vec((0usize..4, any::<[u16; 4]>(), prop::collection::vec(any::<u8>(), 0..64)), 1..12)
    ) {
        let mut rig = Rig::new();
        for (queue, raw, bytes) in requests {
            let driver = &mut rig.drivers[queue];
            let memory = driver.memory().clone();
            let at = GuestAddress(0x3f_0000);
            memory.write_slice(&bytes, at).unwrap();
            let descriptor = RawDescriptor {
                address: if raw[0] & 1 == 0 { at.0 } else { u64::from(raw[0]) << 8 },
                len: if raw[1] & 1 == 0 { bytes.len() as u32 } else { u32::from(raw[1]) << 8 },
                flags: raw[2] & 7,
                next: raw[3] & 15,
            };
            driver.set_descriptor(raw[3] & 15, descriptor);
            driver.make_available(raw[3] & 15);
            driver.kick();
        }
        rig.balloon.inspect();
        rig.balloon.reset();
        for (gpa, len) in rig.given.0.lock().unwrap().iter() {
            prop_assert!(gpa % PAGE == 0 && len % PAGE == 0 && gpa + len <= MEMORY);
        }
    }
}
