//! What is sent and received.

use super::*;

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
pub(super) const MANY: usize = 20;

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
    rig.use_event_index(1);
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
fn a_frame_that_went_is_told_while_the_next_finds_no_room() {
    let mut rig = Rig::idle(true, 1, common::VERSION_1);
    rig.use_event_index(1);
    rig.activate(|_| {});
    // The wire has room for one more.
    let bytes = [&[0; 12][..], &frame([0xff; 6], 50)].concat();
    let near = &rig.wire.ends[0];
    while nix::unistd::write(near, &bytes).is_ok() {}
    rig.heard(0);
    for _ in 0..2 {
        rig.drivers[1].send(&[Buffer::Readable(bytes.clone())]);
    }
    rig.drivers[1].kick();
    rig.until("the first is told", |rig| rig.interrupts.queues() == [1]);
    assert_eq!(rig.count("frames sent"), 1);
    rig.device.reset();
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

proptest! {
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
