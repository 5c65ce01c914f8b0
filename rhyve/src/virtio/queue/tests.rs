//! A queue against drivers good and bad.

use super::*;
use crate::testing::{Buffer, FakeInterrupts, GuestDriver, RawDescriptor};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

fn rig(driver: &GuestDriver) -> (Virtqueue, Arc<FakeInterrupts>) {
    let interrupts = FakeInterrupts::new();
    (driver.virtqueue(0, interrupts.clone()), interrupts)
}

fn request() -> [Buffer; 3] {
    [
        Buffer::Readable(b"ab".to_vec()),
        Buffer::Readable(b"cde".to_vec()),
        Buffer::Writable(4),
    ]
}

fn exchange(driver: &mut GuestDriver, indirect: bool) {
    let (mut queue, interrupts) = rig(driver);
    assert_eq!(queue.pop(), None);
    let sent = if indirect {
        driver.send_indirect(&request())
    } else {
        driver.send(&request())
    };
    let chain = queue.pop().unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (2, 1));
    assert_eq!((chain.readable_len(), chain.writable_len()), (5, 4));
    let mut reader = chain.reader(driver.memory());
    assert_eq!(reader.read_obj::<u32>(), Some(u32::from_le_bytes(*b"abcd")));
    assert_eq!(reader.remaining(), 1);
    assert_eq!(reader.read_obj::<u32>(), None);
    let mut writer = chain.writer(driver.memory());
    assert_eq!(writer.skip(1), 1);
    assert!(writer.write_obj(0x1234u16));
    let mut status = writer.clone();
    assert_eq!(writer.write(b"xy"), 1);
    assert!(!status.write_obj(0u16));
    queue.add_used(chain.head(), 4);
    queue.signal();
    queue.signal();
    assert_eq!(interrupts.queues(), [0]);
    assert_eq!(driver.used(), Some((sent.head, 4)));
    assert_eq!(driver.received(&sent), [0xaa, 0x34, 0x12, 0]);
}

#[test]
fn requests_come_out_and_answers_go_in() {
    exchange(&mut GuestDriver::new(4), false);
    exchange(&mut GuestDriver::new(4), true);
    exchange(&mut GuestDriver::new(4).with_event_index(), false);
}

#[test]
fn slices_are_the_drivers_memory() {
    let mut driver = GuestDriver::new(4);
    let (mut queue, _) = rig(&driver);
    driver.send(&request());
    let chain = queue.pop().unwrap();
    let mut reader = chain.reader(driver.memory());
    reader.skip(1);
    let lens = |slices: vmm_api::scatter::Slices<'_>| -> Vec<usize> {
        slices.iter().map(|slice| slice.len()).collect()
    };
    assert_eq!(lens(reader.slices(3)), [1, 2]);
    assert_eq!(lens(reader.slices(9)), [1]);
    assert_eq!(lens(chain.writer(driver.memory()).slices(u32::MAX)), [4]);
}

#[test]
fn a_driver_says_which_interrupts_it_wants() {
    let mut driver = GuestDriver::new(8);
    let (mut queue, interrupts) = rig(&driver);
    driver.set_no_interrupt(true);
    driver.send(&request());
    assert!(!queue.serve(|_, _| 0));
    assert!(interrupts.queues().is_empty());
    assert_eq!(queue.counters().requests.load(Ordering::Relaxed), 1);

    let mut driver = GuestDriver::new(8).with_event_index();
    let (mut queue, interrupts) = rig(&driver);
    driver.set_used_event(1);
    for told in [0, 1, 1] {
        driver.send(&[Buffer::Writable(1)]);
        assert!(!queue.serve(|_, _| 0));
        assert_eq!(interrupts.queues().len(), told);
    }
    assert_eq!(driver.available_event(), 3);
}

#[test]
fn the_last_answer_alone_is_told_later() {
    let mut driver = GuestDriver::new(8).with_event_index();
    let (mut queue, interrupts) = rig(&driver);
    let mut answer = |driver: &mut GuestDriver| {
        driver.send(&[Buffer::Writable(1)]);
        let chain = queue.pop().unwrap();
        queue.add_used(chain.head(), 0);
        queue.signal_lazily();
        (queue.has_untold(), interrupts.queues().len())
    };
    // It waits for the first one, and is not told.
    assert_eq!(answer(&mut driver), (true, 0));
    // It has found that, and waits for the next: the first is no news any more.
    driver.set_used_event(1);
    assert_eq!(answer(&mut driver), (true, 0));
    // It still waits, and there are two.
    assert_eq!(answer(&mut driver), (false, 1));
    // It does not care.
    driver.set_used_event(7);
    assert_eq!(answer(&mut driver), (false, 1));
    // Later has come.
    driver.set_used_event(4);
    assert_eq!(answer(&mut driver), (true, 1));
    queue.signal();
    queue.signal();
    assert_eq!(interrupts.queues().len(), 2);

    // Without event index nothing says what it has found.
    let mut driver = GuestDriver::new(8);
    let (mut queue, interrupts) = rig(&driver);
    driver.send(&[Buffer::Writable(1)]);
    let chain = queue.pop().unwrap();
    queue.add_used(chain.head(), 0);
    queue.signal_lazily();
    assert!(!queue.has_untold());
    assert_eq!(interrupts.queues(), [0]);
}

#[test]
fn kicks_are_asked_for_without_losing_a_request() {
    let mut driver = GuestDriver::new(8);
    let (mut queue, _) = rig(&driver);
    queue.disable_kicks();
    assert!(driver.no_notify());
    driver.send(&request());
    assert!(queue.enable_kicks(), "there is one already");
    assert!(!driver.no_notify());
    assert!(queue.has_requests());
}

#[test]
fn a_queue_serves_no_more_than_its_size_at_once() {
    let mut driver = GuestDriver::new(2);
    let (mut queue, _) = rig(&driver);
    driver.send(&[Buffer::Writable(1)]);
    let mut served = 0;
    let more = queue.serve(|_, chain| {
        served += 1;
        // A driver that adds the same request while the device looks.
        driver.make_available(chain.head());
        0
    });
    assert!(more && served == 2);
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let driver = GuestDriver::new(8);
    let good = driver.rings();
    let refused = |change: &dyn Fn(&mut Rings)| {
        let mut rings = good;
        change(&mut rings);
        let (memory, kick) = (driver.memory().clone(), driver.kick_fd().clone());
        Virtqueue::new(3, rings, memory, kick, FakeInterrupts::new()).is_err()
    };
    assert!(!refused(&|_| {}));
    for size in [0, 3, 0x8001, u16::MAX] {
        assert!(refused(&|rings| rings.size = size), "{size}");
    }
    for at in [1, 8, 4 << 20, (4 << 20) - 16, u64::MAX - 15] {
        assert!(refused(&|rings| rings.descriptors = at), "{at:#x}");
    }
    for at in [0, 1, 4 << 20, u64::MAX - 1] {
        assert!(refused(&|rings| rings.available = at), "{at:#x}");
    }
    for at in [2, (4 << 20) - 4, u64::MAX - 3] {
        assert!(refused(&|rings| rings.used = at), "{at:#x}");
    }
}

/// Whether a queue with these descriptors, the first of them available, breaks.
fn breaks(descriptors: &[(u64, u32, u16, u16)], table: &[(u64, u32, u16, u16)]) -> bool {
    let mut driver = GuestDriver::new(8);
    let (mut queue, interrupts) = rig(&driver);
    let raw = |&(address, len, flags, next): &(u64, u32, u16, u16)| RawDescriptor {
        address,
        len,
        flags,
        next,
    };
    for (i, descriptor) in (0..).zip(descriptors) {
        driver.set_descriptor(i, raw(descriptor));
    }
    for (i, descriptor) in (0..).zip(table) {
        driver.write_descriptor(0x2000, i, raw(descriptor));
    }
    driver.make_available(0);
    let popped = queue.pop();
    assert_eq!(popped.is_none(), queue.is_broken());
    assert_eq!(interrupts.needs_reset_is_set(), queue.is_broken());
    if queue.is_broken() {
        driver.send(&request());
        assert_eq!(queue.pop(), None);
        queue.add_used(0, 0);
        queue.signal();
        assert_eq!((driver.used(), interrupts.queues()), (None, vec![]));
    }
    queue.is_broken()
}

#[test]
fn chains_that_make_no_sense_break_the_queue() {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    assert!(!breaks(&[(0x1000, 1, 0, 9)], &[]));
    assert!(!breaks(&[(0x1000, 1, NEXT, 1), (0x1000, 0, WRITE, 0)], &[]));
    assert!(breaks(&[(0x1000, 1, NEXT, 0)], &[]), "a loop");
    assert!(breaks(&[(0x1000, 1, NEXT, 8)], &[]), "next is not there");
    assert!(breaks(&[(4 << 20, 1, 0, 0)], &[]), "not RAM");
    assert!(breaks(&[((4 << 20) - 1, 2, WRITE, 0)], &[]), "out of RAM");
    assert!(breaks(&[(u64::MAX, 2, 0, 0)], &[]), "wraps");
    let order = [(0x1000, 1, NEXT | WRITE, 1), (0x1000, 1, 0, 0)];
    assert!(breaks(&order, &[]), "readable behind writable");
    let much = [(0, 1 << 21, NEXT, 1), (0, u32::MAX, 0, 0)];
    assert!(breaks(&much, &[]), "more than 32 bits");

    let indirect = [(0x2000, 32, INDIRECT, 0)];
    assert!(!breaks(
        &indirect,
        &[(0x1000, 1, NEXT, 1), (0x1000, 1, 0, 0)]
    ));
    assert!(breaks(&indirect, &[(0x2000, 32, INDIRECT, 0)]), "nested");
    assert!(breaks(&indirect, &[(0x1000, 1, NEXT, 2)]), "beyond");
    assert!(breaks(&[(0x2000, 31, INDIRECT, 0)], &[]), "half a one");
    assert!(breaks(&[(0x2000, 0, INDIRECT, 0)], &[]), "empty");
    assert!(breaks(&[(4 << 20, 32, INDIRECT, 0)], &[]), "not RAM");
    let chain: Vec<_> = (1..=1025)
        .map(|i| (0x1000, 1, u16::from(i < 1025), i))
        .collect();
    assert!(breaks(&[(0x2000, 1025 * 16, INDIRECT, 0)], &chain), "long");
    assert!(!breaks(
        &[(0x2000, 1024 * 16, INDIRECT, 0)],
        &chain[1..]
            .iter()
            .map(|&(a, l, f, n)| (a, l, f, n - 1))
            .collect::<Vec<_>>()
    ));
}

#[test]
fn an_index_that_jumps_breaks_the_queue() {
    for (head, index) in [(0, 9), (0, u16::MAX), (8, 1), (u16::MAX, 1)] {
        let mut driver = GuestDriver::new(8);
        let (mut queue, interrupts) = rig(&driver);
        driver.make_available(head);
        driver.set_available_index(index);
        assert_eq!(queue.pop(), None);
        assert!(interrupts.needs_reset_is_set());
    }
}

#[test]
fn no_more_requests_are_taken_than_descriptors_are_there() {
    let mut driver = GuestDriver::new(2);
    let (mut queue, _) = rig(&driver);
    let sent = driver.send(&[Buffer::Writable(1)]);
    for _ in 0..2 {
        assert!(queue.pop().is_some());
        driver.make_available(sent.head);
    }
    assert_eq!(queue.pop(), None);
    assert!(queue.is_broken());
}

proptest! {
    /// Whatever lies in the rings: no panic, no endless loop, nothing beyond RAM.
    #[test]
    fn garbage_is_survived(
        rings in proptest::collection::vec(any::<u8>(), 0..200),
        small in proptest::collection::vec((0u64..0x30_0000, 0u32..9000, 0u16..8, 0u16..9), 8),
        index in 0u16..9,
        event_index: bool,
    ) {
        let mut driver = GuestDriver::new(8);
        if event_index {
            driver = driver.with_event_index();
        }
        for (i, (address, len, flags, next)) in (0..).zip(small) {
            driver.set_descriptor(i, RawDescriptor { address, len, flags, next });
        }
        // The rings are anything; the table stays almost sensible.
        let at = GuestAddress(driver.rings().available);
        driver.memory().write_slice(&rings, at).unwrap();
        driver.set_available_index(index);
        let (mut queue, _) = rig(&driver);
        let mut turns = 0;
        while queue.serve(|memory, chain| {
            let mut bytes = vec![0; chain.readable_len() as usize];
            assert_eq!(chain.reader(memory).read(&mut bytes), bytes.len());
            let mut writer = chain.writer(memory);
            writer.write(&bytes);
            writer.done()
        }) && turns < 4 {
            turns += 1;
        }
    }
}

#[test]
fn answers_that_belong_together_are_seen_together() {
    let mut driver = GuestDriver::new(4).with_event_index();
    let (mut queue, interrupts) = rig(&driver);
    // Around the ring's end, and with one interrupt for all of a frame's buffers.
    for round in 0..6u16 {
        let sent: Vec<_> = (0..3)
            .map(|_| driver.send(&[Buffer::Writable(8)]))
            .collect();
        let heads: Vec<_> = (0..3).map(|_| queue.pop().unwrap().head()).collect();
        let answers: Vec<_> = heads.iter().copied().zip([8, 8, 3]).collect();
        driver.set_used_event((3 * round).wrapping_add(1));
        queue.add_used_together(&answers);
        queue.signal();
        for (sent, written) in sent.iter().zip([8, 8, 3]) {
            assert_eq!(driver.used(), Some((sent.head, written)));
        }
        assert_eq!(driver.used(), None);
        assert_eq!(interrupts.queues().len(), usize::from(round) + 1);
    }
    queue.add_used_together(&[]);
    assert_eq!(queue.counters().requests.load(Ordering::Relaxed), 18);
    assert_eq!(queue.counters().position().next_used, 18);
}

#[test]
fn what_was_popped_last_is_given_back() {
    let mut driver = GuestDriver::new(4);
    let (mut queue, _) = rig(&driver);
    let sent: Vec<_> = (0..3)
        .map(|_| driver.send(&[Buffer::Writable(8)]))
        .collect();
    let first = queue.pop().unwrap();
    let _ = (queue.pop().unwrap(), queue.pop().unwrap());
    queue.add_used(first.head(), 0);
    queue.give_back(2);
    let position = queue.counters().position();
    assert_eq!((position.next_avail, position.next_used), (1, 1));
    assert_eq!(queue.pop().unwrap().head(), sent[1].head);
    assert_eq!(queue.pop().unwrap().head(), sent[2].head);
    assert!(queue.pop().is_none());
    // No more than there was.
    queue.give_back(9);
    assert_eq!(queue.pop().unwrap().head(), sent[1].head);
}
