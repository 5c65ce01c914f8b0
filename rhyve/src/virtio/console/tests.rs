use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{Buffer, FakeInterrupts, GuestDriver, RawDescriptor, Sent};

/// A device with two ports, `console` and `agent`, and a driver of its six queues.
struct Rig {
    device: Arc<VirtioConsole>,
    wires: [Arc<Console>; 2],
    drivers: Vec<GuestDriver>,
    /// Buffers for control messages.
    room: Vec<Sent>,
}

impl Rig {
    fn device() -> (Arc<VirtioConsole>, [Arc<Console>; 2]) {
        let wires = [Console::new(), Console::new()];
        let ports = ["console", "agent"].into_iter().zip(&wires);
        let ports = ports.map(|(name, wire)| Port {
            name: name.into(),
            console: name == "console",
            place: "here".into(),
            wire: wire.clone(),
        });
        let device = VirtioConsole::new(Mevent::start().unwrap(), ports.collect());
        assert_eq!(device.queue_sizes().len(), 6);
        (device, wires)
    }

    fn new(features: u64) -> Self {
        let (device, wires) = Self::device();
        let memory = GuestDriver::new(1).memory().clone();
        let drivers = (0..6).map(|n| GuestDriver::at(memory.clone(), (n + 1) << 19, 16));
        let drivers: Vec<_> = drivers.collect();
        let interrupts = FakeInterrupts::new();
        let queues = (0..).zip(&drivers);
        let queues = queues.map(|(n, driver)| driver.virtqueue(n, interrupts.clone()));
        let activation = Activation {
            memory,
            features,
            queues: queues.collect(),
            interrupts,
        };
        device.activate(activation).unwrap();
        Self {
            device,
            wires,
            drivers,
            room: Vec::new(),
        }
    }

    /// A driver that has readied both ports, told of what it was told.
    fn ready() -> (Self, Vec<Vec<u8>>) {
        let mut rig = Self::new(feature::MULTIPORT);
        rig.buffers(12);
        rig.say(Message::new(u32::MAX, event::DEVICE_READY, 1));
        rig.say(Message::new(0, event::PORT_READY, 1));
        rig.say(Message::new(1, event::PORT_READY, 1));
        let told = rig.hear(7);
        (rig, told)
    }

    fn buffers(&mut self, count: usize) {
        let queue = &mut self.drivers[usize::from(CONTROL_RECEIVE)];
        let sent = (0..count).map(|_| queue.send(&[Buffer::Writable(32)]));
        self.room.extend(sent);
        queue.kick();
    }

    fn say(&mut self, message: Message) {
        let queue = &mut self.drivers[usize::from(CONTROL_TRANSMIT)];
        let sent = queue.send(&[Buffer::Readable(message.bytes())]);
        queue.kick();
        assert_eq!(queue.wait_used(), (sent.head, 0));
    }

    fn hear(&mut self, count: usize) -> Vec<Vec<u8>> {
        let queue = &mut self.drivers[usize::from(CONTROL_RECEIVE)];
        let heard = (0..count).map(|_| {
            let (head, written) = queue.wait_used();
            let at = self.room.iter().position(|sent| sent.head == head).unwrap();
            let mut bytes = queue.received(&self.room.remove(at));
            bytes.truncate(written as usize);
            bytes
        });
        heard.collect()
    }

    fn write(&mut self, queue: usize, text: &[u8]) -> u16 {
        let sent = self.drivers[queue].send(&[Buffer::Readable(text.to_vec())]);
        self.drivers[queue].kick();
        sent.head
    }

    fn drain(&self, port: usize, wanted: usize) -> Vec<u8> {
        let mut got = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(10);
        while got.len() < wanted {
            assert!(Instant::now() < deadline, "{} of {wanted}", got.len());
            let mut piece = [0; 1000];
            let count = self.wires[port].peek_output(&mut piece);
            self.wires[port].consume_output(count);
            got.extend(&piece[..count]);
            self.wires[port].notify_guest();
        }
        got
    }
}

#[test]
fn ports_are_added_named_and_opened() {
    let (mut rig, told) = Rig::ready();
    let message = |id, event, value| Message::new(id, event, value);
    let expected = [
        message(0, event::PORT_ADD, 1),
        message(1, event::PORT_ADD, 1),
        message(0, event::CONSOLE_PORT, 1),
        message(0, event::PORT_NAME, 1).with(b"console"),
        message(0, event::PORT_OPEN, 0),
        message(1, event::PORT_NAME, 1).with(b"agent"),
        message(1, event::PORT_OPEN, 0),
    ];
    assert_eq!(told, expected.map(|message| message.bytes()));

    // Somebody comes with a terminal of 100 columns and 40 rows.
    assert!(rig.wires[0].set_host(true, Some((100, 40))));
    rig.wires[0].notify_guest();
    let told = rig.hear(2);
    assert_eq!(told[0], message(0, event::PORT_OPEN, 1).bytes());
    assert_eq!(told[1], [0, 0, 0, 0, 5, 0, 0, 0, 100, 0, 40, 0]);
    let mut config = [0; 12];
    rig.device.config_read(0, &mut config);
    assert_eq!(config, [100, 0, 40, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    rig.device.reset();
}

#[test]
fn bytes_go_both_ways_and_input_waits_for_a_reader() {
    let (mut rig, _) = Rig::ready();
    // More than a wire holds, in one request: it stalls, and nothing is lost.
    let text: Vec<u8> = (0..10_000u32).map(|n| (n % 251) as u8).collect();
    let head = rig.write(5, &text);
    assert_eq!(rig.drain(1, text.len()), text);
    assert_eq!(rig.drivers[5].wait_used(), (head, 0));

    let room = rig.drivers[4].send(&[Buffer::Writable(16)]);
    rig.drivers[4].kick();
    rig.wires[1].push_input(b"early");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.drivers[4].used(), None, "nobody has opened it");
    rig.say(Message::new(1, event::PORT_OPEN, 1));
    assert_eq!(rig.drivers[4].wait_used(), (room.head, 5));
    assert_eq!(&rig.drivers[4].received(&room)[..5], b"early");
    let ports = rig.device.inspect().properties[0].1.clone();
    assert_eq!(
        ports,
        "console at here (host closed, guest closed); agent at here (host closed, guest open)"
    );
    let counters = rig.device.inspect().counters;
    assert_eq!(
        counters[..2],
        [("bytes from the guest", 10_000), ("bytes to the guest", 5)]
    );
}

#[test]
fn single_queues_are_reset_and_come_back() {
    let (mut rig, _) = Rig::ready();
    rig.say(Message::new(1, event::PORT_OPEN, 1));
    // A request that is half out is forgotten with its queue.
    let text = [b'x'; 10_000];
    rig.write(5, &text);
    let deadline = Instant::now() + Duration::from_secs(10);
    while rig.wires[1].send_room() != 0 {
        assert!(Instant::now() < deadline);
    }
    let device = rig.device.clone();
    let reset = device.queue_reset().unwrap();
    let stopped = [CONTROL_RECEIVE, CONTROL_TRANSMIT, 4, 5];
    stopped.iter().for_each(|index| reset.stop_queue(*index));
    rig.drivers[4].send(&[Buffer::Writable(16)]);
    rig.wires[1].push_input(b"early");
    for index in [4, 5] {
        rig.drivers[index].kick();
    }
    rig.wires[1].set_host(true, None);
    rig.wires[1].notify_guest();
    let out = rig.drain(1, 1).len();
    assert!(out < text.len(), "{out}");
    std::thread::sleep(Duration::from_millis(20));
    let answers = stopped.map(|index| rig.drivers[usize::from(index)].used());
    assert_eq!(answers, [None; 4]);

    rig.room.clear();
    for index in stopped {
        let (at, memory) = (usize::from(index), rig.drivers[0].memory().clone());
        let driver = GuestDriver::at(memory, (u64::from(index) + 1) << 19, 16);
        let queue = driver.virtqueue(index, FakeInterrupts::new());
        reset.start_queue(queue).unwrap();
        rig.drivers[at] = driver;
    }
    let room = rig.drivers[4].send(&[Buffer::Writable(16)]);
    rig.drivers[4].kick();
    assert_eq!(
        rig.drivers[4].wait_used(),
        (room.head, 5),
        "what came meanwhile"
    );
    let head = rig.write(5, b"more");
    assert_eq!(rig.drivers[5].wait_used(), (head, 0));
    let mut rest = Vec::new();
    while !rest.ends_with(b"more") {
        rest.extend(rig.drain(1, 1));
    }
    let all = out + rest.len();
    assert!(all < text.len(), "{all}");
    rig.buffers(1);
    let told = rig.hear(1);
    assert_eq!(told[0], Message::new(1, event::PORT_OPEN, 1).bytes());
    rig.say(Message::new(1, event::PORT_OPEN, 0));
    reset.stop_queue(99);
    rig.device.reset();
}

#[test]
fn without_control_there_is_one_open_port() {
    let mut rig = Rig::new(feature::SIZE);
    rig.write(1, b"boot");
    assert_eq!(rig.drain(0, 4), b"boot");
    let room = rig.drivers[0].send(&[Buffer::Writable(2), Buffer::Writable(8)]);
    rig.drivers[0].kick();
    rig.wires[0].push_input(b"abc");
    assert_eq!(rig.drivers[0].wait_used(), (room.head, 3));
    rig.device.config_write(EMERGENCY, b"!\0\0\0");
    assert_eq!(rig.drain(0, 1), b"!");
    let before = rig.device.config_generation();
    rig.wires[0].set_host(true, Some((1, 2)));
    rig.wires[0].notify_guest();
    assert_eq!(rig.device.config_generation(), before + 1);
}

#[test]
fn another_process_goes_on_in_the_midst_of_a_request() {
    let (mut rig, _) = Rig::ready();
    rig.say(Message::new(1, event::PORT_OPEN, 1));
    rig.wires[0].push_input(b"early");
    let text: Vec<u8> = (0..10_000u32).map(|n| (n % 251) as u8).collect();
    let head = rig.write(5, &text);
    let deadline = Instant::now() + Duration::from_secs(10);
    while rig.wires[1].send_room() != 0 {
        assert!(Instant::now() < deadline);
    }
    rig.device.freeze();
    let state = rig.device.save().unwrap();
    let mut first = vec![0; 10_000];
    let count = rig.wires[1].peek_output(&mut first);
    first.truncate(count);
    assert!((1..10_000).contains(&count), "{count}");

    let (device, wires) = Rig::device();
    device.restore(&state).unwrap();
    let interrupts = FakeInterrupts::new();
    let queues = (0..).zip(&rig.drivers);
    let queues = queues.map(|(n, driver)| driver.resumed(n, interrupts.clone()));
    let activation = Activation {
        memory: rig.drivers[0].memory().clone(),
        features: feature::MULTIPORT,
        queues: queues.collect(),
        interrupts,
    };
    device.activate(activation).unwrap();
    (rig.device, rig.wires) = (device, wires);
    let rest = rig.drain(1, text.len() - count);
    assert_eq!([first, rest].concat(), text);
    assert_eq!(rig.drivers[5].wait_used(), (head, 0));
    // Somebody is there now; nothing that was told is told again.
    rig.wires[1].set_host(true, None);
    rig.wires[1].notify_guest();
    let told = rig.hear(1);
    assert_eq!(told[0], Message::new(1, event::PORT_OPEN, 1).bytes());
    let room = rig.drivers[0].send(&[Buffer::Writable(16)]);
    rig.say(Message::new(0, event::PORT_OPEN, 1));
    assert_eq!(rig.drivers[0].wait_used(), (room.head, 5));
    assert_eq!(&rig.drivers[0].received(&room)[..5], b"early");

    // A snapshot: the same device goes on.
    rig.device.freeze();
    let head = rig.write(5, b"more");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.drivers[5].used(), None);
    rig.device.thaw();
    assert_eq!(rig.drivers[5].wait_used(), (head, 0));
    let one = VirtioConsole::new(Mevent::start().unwrap(), Vec::new());
    assert!(one.restore(&state).is_err());
}

#[test]
fn nonsense_is_counted_and_messages_for_nobody_do_not_pile_up() {
    let mut rig = Rig::new(feature::MULTIPORT);
    rig.say(Message::new(2, event::PORT_READY, 1));
    rig.say(Message::new(0, event::PORT_NAME, 1));
    rig.say(Message::new(0, 99, 1));
    assert_eq!(rig.device.inspect().counters[3].1, 3);
    // Nobody reads: at some point the device stops listening.
    let queue = &mut rig.drivers[usize::from(CONTROL_TRANSMIT)];
    let mut answered = 0;
    for _ in 0..100 {
        let message = Message::new(0, event::DEVICE_READY, 1);
        if queue.send(&[Buffer::Readable(message.bytes())]).head == u16::MAX {
            break;
        }
        queue.kick();
        let deadline = Instant::now() + Duration::from_millis(100);
        let mut used = None;
        while used.is_none() && Instant::now() < deadline {
            used = queue.used();
        }
        if used.is_none() {
            break;
        }
        answered += 1;
    }
    assert!((20..64).contains(&answered), "{answered}");
    // Once somebody reads, it goes on.
    for _ in 0..8 {
        rig.buffers(8);
        rig.hear(8);
    }
    rig.drivers[usize::from(CONTROL_TRANSMIT)].wait_used();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn anything_is_survived(
        requests in prop::collection::vec((0usize..6, any::<[u16; 4]>(), prop::collection::vec(any::<u8>(), 0..64)), 1..12)
    ) {
        let mut rig = Rig::new(feature::MULTIPORT);
        for (queue, raw, bytes) in requests {
            let driver = &mut rig.drivers[queue];
            let at = GuestAddress(0x3f_0000);
            driver.memory().write_slice(&bytes, at).unwrap();
            let descriptor = RawDescriptor {
                address: if raw[0] & 1 == 0 { at.0 } else { u64::from(raw[0]) << 8 },
                len: if raw[1] & 1 == 0 { bytes.len() as u32 } else { u32::from(raw[1]) << 8 },
                flags: raw[2] & 7,
                next: raw[3] & 15,
            };
            driver.set_descriptor(raw[3] & 15, descriptor);
            driver.make_available(raw[3] & 15);
            driver.kick();
            rig.wires[1].push_input(&bytes);
        }
        rig.device.reset();
        rig.device.inspect();
    }
}
