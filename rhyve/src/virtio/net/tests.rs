use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::VolatileSlice;
use vmm_api::scatter;

use super::config::feature::*;
use super::*;
use crate::config::MacAddress;
use crate::lifecycle::Lifecycle;
use crate::mevent::Mevent;
use crate::net::{Backend, Info, Offloads, Port, Wait};
use crate::testing::{Buffer, FakeInterrupts, GuestDriver, RawDescriptor, Sent};
use crate::virtio::{Activation, VirtioDevice, feature as common};

const MAC: MacAddress = MacAddress([0, 0xa0, 0x98, 1, 2, 3]);

/// A backend whose other end is the test's: a socket pair for each pair of queues.
struct Wire {
    info: Info,
    ends: Vec<Arc<OwnedFd>>,
    calls: Mutex<Vec<String>>,
}

struct WirePort(Arc<OwnedFd>);

impl Port for WirePort {
    fn wait(&self) -> Wait {
        Wait {
            fd: Some(self.0.clone()),
            timeout: None,
        }
    }

    fn receive(&self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        scatter::receive(&self.0, into)
    }

    fn send(&self, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        scatter::send(&self.0, from).map(|_| ())
    }
}

impl Backend for Wire {
    fn info(&self) -> &Info {
        &self.info
    }

    fn port(&self, pair: u16) -> Option<Arc<dyn Port>> {
        let end = self.ends.get(usize::from(pair))?;
        Some(Arc::new(WirePort(end.clone())))
    }

    fn configure(&self, header: usize, offloads: Offloads) -> io::Result<()> {
        let call = format!("{header} {:#x}", offloads.bits());
        self.calls.lock().unwrap().push(call);
        Ok(())
    }

    fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        self.calls.lock().unwrap().push(format!("pairs {pairs}"));
        Ok(())
    }
}

/// A card, its driver, and the far ends of its wires.
struct Rig {
    device: Arc<Net>,
    wire: Arc<Wire>,
    far: Vec<UnixDatagram>,
    drivers: Vec<GuestDriver>,
    interrupts: Arc<FakeInterrupts>,
    features: u64,
    room: Vec<Sent>,
}

impl Rig {
    fn idle(header: bool, pairs: u16, features: u64) -> Self {
        let (mut ends, mut far) = (Vec::new(), Vec::new());
        for _ in 0..pairs {
            let (near, other) = UnixDatagram::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            other
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            ends.push(Arc::new(OwnedFd::from(near)));
            far.push(other);
        }
        let offloads = if header {
            Offloads::all()
        } else {
            Offloads::empty()
        };
        let wire = Arc::new(Wire {
            info: Info {
                label: "wire".into(),
                header,
                offloads,
            },
            ends,
            calls: Mutex::default(),
        });
        let mevent = Mevent::start().unwrap();
        let device = Net::new(mevent, wire.clone(), MAC, Some(1400), pairs);
        let memory = GuestDriver::new(1).memory().clone();
        let queues = 0..device.queue_sizes().len() as u64;
        let drivers = queues.map(|n| GuestDriver::at(memory.clone(), (n + 1) << 18, 32));
        Self {
            drivers: drivers.collect(),
            device,
            wire,
            far,
            interrupts: FakeInterrupts::new(),
            features,
            room: Vec::new(),
        }
    }

    fn new(header: bool, pairs: u16, features: u64) -> Self {
        let rig = Self::idle(header, pairs, features);
        rig.activate(|_| {});
        rig
    }

    fn activate(&self, prepare: impl Fn(&mut crate::virtio::Virtqueue)) {
        let queues = (0..).zip(&self.drivers).map(|(n, driver)| {
            let mut queue = driver.virtqueue(n, self.interrupts.clone());
            prepare(&mut queue);
            queue
        });
        let activation = Activation {
            memory: self.drivers[0].memory().clone(),
            features: self.features,
            queues: queues.collect(),
            interrupts: self.interrupts.clone(),
        };
        self.device.activate(activation).unwrap();
    }

    /// A card at a wire without headers, for a driver of today.
    fn plain() -> Self {
        Self::new(
            false,
            1,
            common::VERSION_1 | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR | CTRL_VLAN,
        )
    }

    fn buffers(&mut self, queue: usize, lens: &[u32]) {
        let driver = &mut self.drivers[queue];
        let sent = lens
            .iter()
            .map(|len| driver.send(&[Buffer::Writable(*len)]));
        self.room.extend(sent);
        driver.kick();
    }

    /// The next buffer that the driver gets back, with what is in it.
    fn received(&mut self, queue: usize) -> Vec<u8> {
        let driver = &mut self.drivers[queue];
        let (head, written) = driver.wait_used();
        let at = self.room.iter().position(|sent| sent.head == head).unwrap();
        let mut bytes = driver.received(&self.room.remove(at));
        bytes.truncate(written as usize);
        bytes
    }

    /// Sends header and frame as the driver would, and waits until they are answered.
    fn send(&mut self, queue: usize, parts: &[&[u8]]) {
        let parts: Vec<_> = parts.iter().map(|p| Buffer::Readable(p.to_vec())).collect();
        let sent = self.drivers[queue].send(&parts);
        self.drivers[queue].kick();
        assert_eq!(self.drivers[queue].wait_used(), (sent.head, 0));
    }

    fn heard(&self, pair: usize) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let len = self.far[pair].recv(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    /// A command on the control queue, and its answer.
    fn command(&mut self, queue: usize, bytes: &[u8]) -> u8 {
        let driver = &mut self.drivers[queue];
        let sent = driver.send(&[Buffer::Readable(bytes.to_vec()), Buffer::Writable(1)]);
        driver.kick();
        assert_eq!(driver.wait_used(), (sent.head, 1));
        driver.received(&sent)[0]
    }

    fn count(&self, name: &str) -> u64 {
        let counters = self.device.inspect().counters;
        let found = counters.iter().find(|(known, _)| *known == name);
        found.unwrap_or_else(|| panic!("{name}")).1
    }

    fn until(&self, what: &str, so: impl Fn(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !so(self) {
            assert!(Instant::now() < end, "{what}: {:?}", self.device.inspect());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn config(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        self.device.config_read(0, &mut bytes);
        bytes
    }
}

/// A frame to this address with as many bytes behind the type.
fn frame(to: [u8; 6], len: usize) -> Vec<u8> {
    let data = (0..len).map(|n| (n % 251) as u8);
    [&to[..], &[2, 0, 0, 0, 0, 9, 8, 0]]
        .concat()
        .into_iter()
        .chain(data)
        .collect()
}

#[test]
fn frames_go_both_ways_behind_headers_of_either_length() {
    for (features, header) in [(0, 10), (common::VERSION_1, 12)] {
        let mut rig = Rig::new(false, 1, features);
        rig.buffers(0, &[2000, 2000]);
        let (there, back) = (frame(MAC.0, 100), frame([0xff; 6], 1400));
        rig.far[0].send(&there).unwrap();
        let got = rig.received(0);
        let (head, rest) = got.split_at(header);
        assert_eq!(rest, there);
        let one = if header == 12 { &[1, 0][..] } else { &[] };
        assert_eq!(head, [&[0; 10][..], one].concat());

        let head = vec![0; header];
        rig.send(1, &[&head, &back[..7], &back[7..]]);
        assert_eq!(rig.heard(0), back);
        // What the driver does with one buffer is the same.
        rig.send(1, &[&[&head[..], &back].concat()]);
        assert_eq!(rig.heard(0), back);
        assert_eq!(
            (rig.count("frames received"), rig.count("frames sent")),
            (1, 2)
        );
        assert_eq!(rig.count("bytes sent"), 2 * back.len() as u64);
        rig.device.reset();
    }
}

#[test]
fn a_large_frame_takes_several_buffers_and_its_header_passes() {
    let mut rig = Rig::new(
        true,
        1,
        common::VERSION_1 | MRG_RXBUF | GUEST_CSUM | GUEST_TSO4,
    );
    assert_eq!(rig.wire.calls.lock().unwrap()[0], "12 0x3");
    rig.buffers(0, &[1000, 1000, 100, 3000, 3000]);
    let large = frame(MAC.0, 2500);
    let header = [1, 1, 2, 0, 3, 0, 4, 0, 5, 0, 9, 9];
    rig.far[0].send(&[&header[..], &large].concat()).unwrap();
    let parts: Vec<_> = (0..4).map(|_| rig.received(0)).collect();
    assert_eq!(
        parts.iter().map(Vec::len).collect::<Vec<_>>(),
        [1000, 1000, 100, 426]
    );
    let whole = parts.concat();
    assert_eq!(whole[..12], [1, 1, 2, 0, 3, 0, 4, 0, 5, 0, 4, 0]);
    assert_eq!(whole[12..], large);
    rig.send(1, &[&header, &large]);
    assert_eq!(rig.heard(0), [&header[..], &large].concat());
    // The next has one buffer to go to.
    rig.far[0]
        .send(&[&header[..], &frame(MAC.0, 50)].concat())
        .unwrap();
    assert_eq!(rig.received(0).len(), 76);
    rig.device.reset();
}

/// So many small frames, one after the other, make a habit of it.
const MANY: usize = 20;

#[test]
fn a_large_frame_after_many_small_ones_arrives_whole() {
    for mergeable in [true, false] {
        let features = if mergeable { MRG_RXBUF } else { 0 };
        let mut rig = Rig::new(true, 1, common::VERSION_1 | features);
        let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        for drops in 0..2 {
            for round in 0..MANY {
                rig.buffers(0, &[100]);
                let small = [&header[..], &frame(MAC.0, round)].concat();
                rig.far[0].send(&small).unwrap();
                assert_eq!(rig.received(0), small);
            }
            let large = frame(MAC.0, 2500);
            rig.buffers(0, &[1000, 1000, 100, 3000]);
            rig.far[0].send(&[&header[..], &large].concat()).unwrap();
            if mergeable {
                let parts: Vec<_> = (0..4).map(|_| rig.received(0)).collect();
                let whole = parts.concat();
                assert_eq!(whole[10..12], [4, 0]);
                assert_eq!(whole[12..], large);
            } else {
                // It does not fit into the one that is its.
                rig.until("a drop", |rig| rig.count("receive drops") > drops);
                for len in [1000 - 26, 1000 - 26, 0, 2000] {
                    let next = [&header[..], &frame(MAC.0, len)].concat();
                    rig.far[0].send(&next).unwrap();
                    assert_eq!(rig.received(0), next);
                }
            }
        }
        rig.device.reset();
    }
}

#[test]
fn a_small_frame_that_is_alone_is_told_late_if_nothing_comes() {
    let mut rig = Rig::idle(true, 1, common::VERSION_1);
    let driver = rig.drivers.remove(1).with_event_index();
    rig.drivers.insert(1, driver);
    rig.activate(|_| {});
    let exchange = |rig: &mut Rig, found: u16| {
        rig.drivers[1].set_used_event(found);
        rig.send(1, &[&[0; 12], &frame([0xff; 6], 50)]);
        rig.heard(0);
    };
    // Many go, each of which finds the one before it, while a driver that is slow would have been told.
    for round in 0..MANY as u16 {
        exchange(&mut rig, round);
    }
    let told = |rig: &Rig| rig.interrupts.queues().len();
    rig.until("the last one is told", |rig| told(rig) > 0);
    // It is large: the driver may wait for the room.
    let before = told(&rig);
    rig.drivers[1].set_used_event(MANY as u16);
    rig.send(1, &[&[0; 12], &frame([0xff; 6], 4000)]);
    rig.until("a large one is told", |rig| told(rig) == before + 1);
    rig.device.reset();
    assert_eq!(told(&rig), before + 1);
}

#[test]
fn what_does_not_fit_is_dropped_and_counted() {
    let mut rig = Rig::new(false, 1, common::VERSION_1 | MRG_RXBUF);
    rig.buffers(0, &[100, 100]);
    rig.far[0].send(&frame(MAC.0, 300)).unwrap();
    rig.until("a drop", |rig| rig.count("receive drops") == 1);
    rig.far[0].send(&frame(MAC.0, 50)).unwrap();
    assert_eq!(rig.received(0).len(), 76);
    // It waits for room, and then passes.
    rig.far[0].send(&frame(MAC.0, 150)).unwrap();
    rig.buffers(0, &[100, 100]);
    let got = [rig.received(0), rig.received(0)].concat();
    assert_eq!(got[12..], frame(MAC.0, 150));
    rig.device.reset();
}

#[test]
fn buffers_that_are_none_are_answered_and_counted() {
    let mut rig = Rig::plain();
    let receive = &mut rig.drivers[0];
    receive.send(&[Buffer::Writable(12)]);
    receive.send(&[Buffer::Readable(vec![0; 20]), Buffer::Writable(2000)]);
    receive.kick();
    assert_eq!([receive.wait_used().1, receive.wait_used().1], [0, 0]);
    rig.send(1, &[&[0; 12]]);
    rig.send(1, &[&[0; 3]]);
    rig.send(1, &[&[0; 25]]);
    let transmit = &mut rig.drivers[1];
    transmit.send(&[Buffer::Readable(vec![0; 100]), Buffer::Writable(10)]);
    transmit.kick();
    assert_eq!(transmit.wait_used().1, 0);
    rig.until("all", |rig| rig.count("bad requests") == 6);
    assert_eq!(rig.count("frames sent"), 0);
    rig.send(1, &[&[0; 12], &frame(MAC.0, 0)]);
    assert_eq!(rig.heard(0).len(), 14);
    assert!(!rig.interrupts.needs_reset_is_set());
    rig.device.reset();
}

#[test]
fn a_buffer_of_no_use_goes_back_in_its_turn() {
    for features in [0, MRG_RXBUF] {
        let mut rig = Rig::new(false, 1, common::VERSION_1 | features);
        // It is behind one that waits for a frame: with mergeable buffers both are taken at once.
        rig.buffers(0, &[2000, 5, 2000]);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(rig.drivers[0].used(), None);
        for wanted in [112, 0, 112] {
            if wanted != 0 {
                rig.far[0].send(&frame(MAC.0, 86)).unwrap();
            }
            assert_eq!(rig.received(0).len(), wanted);
        }
        assert_eq!(rig.count("bad requests"), 1);
        rig.device.reset();
    }
}

#[test]
fn single_queues_are_reset_and_come_back() {
    let mut rig = Rig::plain();
    rig.buffers(0, &[2000; 4]);
    let device = rig.device.clone();
    let reset = device.queue_reset().unwrap();
    let all = [0u16, 1, 2];
    all.iter().for_each(|index| reset.stop_queue(*index));
    rig.far[0].send(&frame(MAC.0, 50)).unwrap();
    for driver in &mut rig.drivers[1..] {
        driver.send(&[Buffer::Readable(vec![0; 100]), Buffer::Writable(1)]);
        driver.kick();
    }
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.drivers.iter_mut().all(|driver| driver.used().is_none()));

    rig.room.clear();
    for index in all {
        let (at, memory) = (usize::from(index), rig.drivers[0].memory().clone());
        let driver = GuestDriver::at(memory, (u64::from(index) + 1) << 18, 32);
        let queue = driver.virtqueue(index, rig.interrupts.clone());
        reset.start_queue(queue).unwrap();
        rig.drivers[at] = driver;
    }
    rig.buffers(0, &[2000; 4]);
    assert_eq!(rig.received(0)[12..], frame(MAC.0, 50), "it waited");
    rig.send(1, &[&[0; 12], &frame([0xff; 6], 60)]);
    assert_eq!(rig.heard(0), frame([0xff; 6], 60));
    // VIRTIO_NET_CTRL_RX, promiscuous.
    assert_eq!(rig.command(2, &[0, 0, 1]), 0);
    reset.stop_queue(0);
    reset.stop_queue(0);
    rig.device.reset();
}

#[test]
fn a_driver_receives_what_it_asks_for() {
    let mut rig = Rig::plain();
    rig.buffers(0, &[2000; 8]);
    let (group, other) = ([1, 0, 0x5e, 0, 0, 1], [2, 0, 0, 0, 0, 7]);
    rig.far[0].send(&frame(other, 30)).unwrap();
    assert_eq!(rig.received(0).len(), 56, "everything, at first");
    assert_eq!(rig.command(2, &[0, 0, 0]), 0);
    for to in [other, group, MAC.0] {
        rig.far[0].send(&frame(to, 30)).unwrap();
    }
    assert_eq!(rig.received(0)[12..18], MAC.0);
    assert_eq!(rig.count("filtered"), 2);
    let table = [&[1, 0, 0, 0, 0, 0, 1, 0, 0, 0][..], &group].concat();
    assert_eq!(rig.command(2, &table), 0);
    assert_eq!(rig.command(2, &[&[1, 1][..], &other].concat()), 0);
    assert_eq!(rig.config()[..6], other);
    for to in [MAC.0, group, other] {
        rig.far[0].send(&frame(to, 30)).unwrap();
    }
    assert_eq!(rig.received(0)[12..18], group);
    assert_eq!(rig.received(0)[12..18], other);
    assert_eq!(rig.command(2, &[2, 0, 5, 0]), 0);
    let mut tagged = frame(other, 30);
    tagged[12..16].copy_from_slice(&[0x81, 0, 0, 6]);
    rig.far[0].send(&tagged).unwrap();
    tagged[15] = 5;
    rig.far[0].send(&tagged).unwrap();
    assert_eq!(rig.received(0)[12..], tagged);
    // After a reset it is as it was.
    rig.device.reset();
    assert_eq!(rig.config()[..6], MAC.0);
}

#[test]
fn commands_that_make_no_sense_are_errors() {
    let mut rig = Rig::plain();
    for bad in [
        &[][..],
        &[0],
        &[0, 0],
        &[0, 0, 1, 0],
        &[0, 6, 1],
        // Switches, pairs and offloads that were not negotiated.
        &[0, 2, 1],
        &[4, 0, 1, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 1, 0, 0, 0, 1, 2, 3],
        &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        &[1, 1, 1, 0, 0, 0, 0, 0],
        &[2, 0, 0, 0x10],
        &[7, 7, 7],
    ] {
        assert_eq!(rig.command(2, bad), 1, "{bad:?}");
    }
    assert_eq!(rig.count("bad requests"), 13);
    // Without a place for the answer, or with half a queue.
    let driver = &mut rig.drivers[2];
    let sent = driver.send(&[Buffer::Readable(vec![0, 0, 1])]);
    driver.kick();
    assert_eq!(driver.wait_used(), (sent.head, 0));
    rig.device.reset();
}

#[test]
fn a_cable_is_pulled_and_plugged_in() {
    let mut rig = Rig::plain();
    assert_eq!(rig.config()[6..], [1, 0, 1, 0, 0x78, 5]);
    rig.buffers(0, &[2000, 2000]);
    rig.device.set_link(false);
    rig.device.set_link(false);
    assert_eq!(rig.interrupts.config_changes(), 1);
    assert_eq!((rig.config()[6], rig.device.config_generation()), (0, 1));
    // The first may still pass: the thread may have looked at the link just before.
    let dropped = |rig: &Rig| rig.count("receive drops");
    for sent in 1..=2 {
        rig.far[0].send(&frame(MAC.0, 50)).unwrap();
        rig.until("a drop", |rig| {
            dropped(rig) + rig.count("frames received") == sent
        });
    }
    assert!(dropped(&rig) >= 1);
    rig.send(1, &[&[0; 12], &frame(MAC.0, 60)]);
    assert_eq!(rig.count("transmit drops"), 1);
    rig.device.set_link(true);
    for _ in dropped(&rig)..2 {
        assert_eq!(rig.received(0).len(), 76);
    }
    rig.far[0].send(&frame(MAC.0, 70)).unwrap();
    assert_eq!(rig.received(0).len(), 96);
    rig.send(1, &[&[0; 12], &frame(MAC.0, 80)]);
    assert_eq!(rig.heard(0).len(), 94);
    rig.device.reset();
}

#[test]
fn a_backend_that_goes_away_takes_the_link_down() {
    let mut rig = Rig::plain();
    rig.buffers(0, &[2000]);
    rig.far.clear();
    rig.send(1, &[&[0; 12], &frame(MAC.0, 60)]);
    rig.until("the link is down", |rig| rig.config()[6] == 0);
    assert_eq!(rig.interrupts.config_changes(), 1);
    rig.send(1, &[&[0; 12], &frame(MAC.0, 60)]);
    assert_eq!(rig.count("transmit drops"), 2);
    let properties = rig.device.inspect().properties;
    assert!(properties.contains(&("link", "down: its backend has gone".into())));
    assert!(!rig.interrupts.needs_reset_is_set());
    rig.device.reset();
}

#[test]
fn pairs_of_queues_are_used_when_the_driver_says_so() {
    let features = common::VERSION_1 | CTRL_VQ | MQ | CTRL_GUEST_OFFLOADS | GUEST_CSUM;
    let mut rig = Rig::new(true, 2, features);
    assert_eq!(*rig.wire.calls.lock().unwrap(), ["12 0x1", "pairs 1"]);
    rig.buffers(2, &[2000, 2000]);
    let bytes = [&[0; 12][..], &frame(MAC.0, 50)].concat();
    rig.far[1].send(&bytes).unwrap();
    for bad in [
        &[4, 0, 0, 0][..],
        &[4, 0, 3, 0],
        &[5, 0, 128, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(rig.command(4, bad), 1);
    }
    assert_eq!(rig.count("frames received"), 0);
    assert_eq!(rig.command(4, &[4, 0, 2, 0]), 0);
    assert_eq!(rig.received(2).len(), 76);
    rig.send(3, &[&bytes]);
    assert_eq!(rig.heard(1), bytes);
    assert_eq!(rig.command(4, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
    let calls = rig.wire.calls.lock().unwrap()[2..].join(", ");
    assert_eq!(calls, "pairs 2, 12 0x0");
    rig.device.reset();
    // Without the feature control comes behind the first pair.
    rig = Rig::new(true, 2, features & !MQ | CTRL_RX);
    assert_eq!(rig.command(2, &[0, 0, 1]), 0);
    rig.device.reset();
}

#[test]
fn a_card_goes_on_where_another_process_left_off() {
    let mut rig = Rig::plain();
    rig.buffers(0, &[2000; 4]);
    rig.command(2, &[0, 0, 0]);
    rig.command(2, &[&[1, 1][..], &[2, 0, 0, 0, 0, 7]].concat());
    rig.far[0].send(&frame([2, 0, 0, 0, 0, 7], 30)).unwrap();
    rig.received(0);
    rig.device.freeze();
    rig.far[0].send(&frame([2, 0, 0, 0, 0, 7], 31)).unwrap();
    let state = rig.device.save().unwrap();
    rig.device.thaw();
    assert_eq!(rig.received(0).len(), 12 + 45);
    assert_eq!(rig.command(2, &[0, 0, 0]), 0);

    let mut next = Rig::idle(false, 1, rig.features);
    next.device.restore(&state).unwrap();
    next.activate(|_| {});
    assert_eq!(next.config()[..7], [2, 0, 0, 0, 0, 7, 1]);
    next.buffers(0, &[2000; 2]);
    for to in [MAC.0, [2, 0, 0, 0, 0, 7]] {
        next.far[0].send(&frame(to, 30)).unwrap();
    }
    assert_eq!(next.received(0)[12..18], [2, 0, 0, 0, 0, 7]);
    let mut bad = state;
    bad.data["pairs"] = 2.into();
    assert!(next.device.restore(&bad).is_err());
    rig.device.reset();
    next.device.reset();
}

#[test]
fn a_frozen_card_has_answered_all_it_has_taken() {
    let mut rig = Rig::idle(false, 1, common::VERSION_1 | MRG_RXBUF);
    let counters = Mutex::new(Vec::new());
    rig.activate(|queue| counters.lock().unwrap().push(queue.counters().clone()));
    rig.buffers(0, &[2000; 5]);
    rig.far[0].send(&frame(MAC.0, 30)).unwrap();
    rig.received(0);
    rig.device.freeze();
    let position = counters.lock().unwrap()[0].position();
    assert_eq!((position.next_avail, position.next_used), (1, 1));
    rig.device.thaw();
    for _ in 0..4 {
        rig.far[0].send(&frame(MAC.0, 30)).unwrap();
        assert_eq!(rig.received(0).len(), 56);
    }
    rig.device.reset();
}

#[test]
fn a_broken_queue_asks_for_a_reset() {
    let mut rig = Rig::plain();
    let descriptor = RawDescriptor {
        address: 0xffff_ffff_0000,
        len: 4096,
        flags: 2,
        next: 0,
    };
    rig.drivers[0].set_descriptor(0, descriptor);
    rig.drivers[0].make_available(0);
    rig.drivers[0].kick();
    rig.until("broken", |rig| rig.interrupts.needs_reset_is_set());
    rig.device.reset();
    assert_eq!(rig.count("frames received"), 0);
}

#[test]
fn it_tells_of_itself() {
    let rig = Rig::plain();
    let told = rig.device.inspect();
    let said = |name| {
        let found = told.properties.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| value.as_str())
    };
    assert_eq!(said("backend"), Some("wire"));
    assert_eq!(said("mac"), Some("00:a0:98:01:02:03"));
    assert_eq!((said("link"), said("mtu")), (Some("up"), Some("1400")));
    assert_eq!(said("queue pairs"), Some("1 of 1"));
    assert_eq!(rig.device.counters().commands.load(Relaxed), 0);
    let unnamed = rig.device.features() & !inspect::FEATURES.iter().fold(0, |a, (b, _)| a | b);
    assert_eq!(unnamed, common::IN_ORDER);
    rig.device.reset();
}

proptest! {
    #[test]
    fn any_command_is_answered(commands: Vec<Vec<u8>>) {
        let all = CTRL_RX | CTRL_RX_EXTRA | CTRL_VLAN | CTRL_MAC_ADDR | MQ | CTRL_GUEST_OFFLOADS;
        let mut rig = Rig::new(true, 2, common::VERSION_1 | CTRL_VQ | all);
        for command in commands.iter().take(8) {
            prop_assert!(rig.command(4, command) <= 1);
        }
        rig.device.reset();
    }

    #[test]
    fn frames_of_any_size_arrive_whole_in_buffers_of_any_size(
        buffers in proptest::collection::vec(13..400u32, 1..30),
        len in 0..2000usize,
    ) {
        let mut rig = Rig::new(false, 1, common::VERSION_1 | MRG_RXBUF);
        rig.buffers(0, &buffers);
        let room: u32 = buffers.iter().sum();
        let sent = frame(MAC.0, len);
        rig.far[0].send(&sent).unwrap();
        if sent.len() + 12 > room as usize {
            rig.until("a drop", |rig| rig.count("receive drops") == 1);
        } else {
            let mut got = rig.received(0);
            while got.len() < sent.len() + 12 {
                got.extend(rig.received(0));
            }
            prop_assert_eq!(&got[12..], &sent[..]);
        }
        rig.device.reset();
    }
}
