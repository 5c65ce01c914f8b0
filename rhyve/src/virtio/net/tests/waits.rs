//! A receive thread that waits in its port, and not for the bell.

use super::frames::MANY;
use super::*;

/// A card whose port's receive can wait.
fn rig() -> Rig {
    let rig = Rig::idle(false, 1, common::VERSION_1 | CTRL_VQ | CTRL_RX);
    rig.wire.waits.store(true, Relaxed);
    rig.activate(|_| {});
    rig
}

impl Rig {
    /// Receives frames one at a time until the thread waits in the port for the next.
    fn lone_frames(&mut self) {
        let waits = |rig: &Rig| {
            let flags = fcntl(&rig.wire.ends[0], FcntlArg::F_GETFL).unwrap();
            !OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK)
        };
        self.buffers(0, &[128; 2]);
        let end = Instant::now() + Duration::from_secs(10);
        while !waits(self) {
            assert!(Instant::now() < end, "it waits elsewhere");
            self.one(40);
        }
        self.one(41);
    }

    fn one(&mut self, len: usize) {
        self.far[0].send(&frame(MAC.0, len)).unwrap();
        assert_eq!(self.received(0).len(), 12 + 14 + len);
        self.buffers(0, &[128]);
        // It is waited for.
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn it_hears_whatever_happens() {
    let mut rig = rig();
    for _ in 0..3 {
        rig.lone_frames();
        rig.device.set_link(false);
        let counts = |rig: &Rig| (rig.count("frames received"), rig.count("receive drops"));
        let before = counts(&rig);
        // The first may still pass: the thread may have looked at the link just before.
        for sent in 1..=2 {
            rig.far[0].send(&frame(MAC.0, 50)).unwrap();
            rig.until("a drop", |rig| {
                let now = counts(rig);
                now.0 + now.1 == before.0 + before.1 + sent
            });
        }
        assert!(counts(&rig).1 > before.1);
        for _ in before.0..counts(&rig).0 {
            assert_eq!(rig.received(0).len(), 12 + 14 + 50);
        }
        rig.device.set_link(true);
        rig.lone_frames();
        rig.device.freeze();
        rig.far[0].send(&frame(MAC.0, 51)).unwrap();
        rig.device.thaw();
        assert_eq!(rig.received(0).len(), 12 + 14 + 51);
        rig.lone_frames();
        let reset = rig.device.clone();
        reset.queue_reset().unwrap().stop_queue(0);
        rig.room.clear();
        let memory = rig.drivers[0].memory().clone();
        rig.drivers[0] = GuestDriver::at(memory, 1 << 18, 32);
        let queue = rig.drivers[0].virtqueue(0, rig.interrupts.clone());
        reset.queue_reset().unwrap().start_queue(queue).unwrap();
    }
    rig.lone_frames();
    rig.device.reset();
}

#[test]
fn a_question_is_told_as_sent_if_no_answer_comes() {
    let mut rig = Rig::idle(false, 1, common::VERSION_1);
    rig.use_event_index(1);
    rig.wire.waits.store(true, Relaxed);
    rig.activate(|_| {});
    rig.lone_frames();
    let told = |rig: &Rig| {
        let queues = rig.interrupts.queues();
        queues.into_iter().filter(|queue| *queue == 1).count()
    };
    for found in 0..MANY as u16 {
        rig.drivers[1].set_used_event(found);
        rig.send(1, &[&[0; 12], &frame([0xff; 6], 50)]);
        rig.heard(0);
        rig.one(42);
    }
    let before = told(&rig);
    rig.drivers[1].set_used_event(MANY as u16);
    rig.send(1, &[&[0; 12], &frame([0xff; 6], 50)]);
    rig.until("the last one is told", |rig| told(rig) > before);
    rig.device.reset();
}

#[test]
fn many_frames_after_lone_ones_are_all_received() {
    let mut rig = rig();
    rig.lone_frames();
    rig.buffers(0, &[128; 20]);
    for round in 0..40 {
        for len in 0..5 {
            rig.far[0].send(&frame(MAC.0, 60 + len)).unwrap();
        }
        for len in 0..5 {
            assert_eq!(rig.received(0).len(), 12 + 14 + 60 + len, "{round}");
            rig.buffers(0, &[128]);
        }
    }
    rig.lone_frames();
    rig.device.reset();
}

#[test]
fn a_backend_that_goes_away_is_found_by_the_wait() {
    let mut rig = rig();
    rig.lone_frames();
    rig.far.clear();
    rig.send(1, &[&[0; 12], &frame(MAC.0, 60)]);
    rig.until("the link is down", |rig| rig.config()[6] == 0);
    rig.device.reset();
}
