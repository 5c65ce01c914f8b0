//! What its driver sets up and commands, and what becomes of it from outside.

use super::*;

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
}
