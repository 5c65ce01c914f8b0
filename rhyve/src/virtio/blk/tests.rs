//! The device against a driver without a guest: what it answers, and what it leaves alone.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use super::config::{feature, space};
use super::device::Blk;
use super::{MAX_DISCARD_SECTORS, QUEUE_SIZE};
use crate::block::engine::Engine;
use crate::block::{self, Backend, BlockError, Extent, Info};
use crate::config::BlockSpec;
use crate::testing::{Buffer, FakeInterrupts, GuestDriver, RawDescriptor, Sent};
use crate::virtio::{VirtioDevice, feature as common};

mod properties;

const SIZE: usize = 1 << 18;
const SECTORS: u64 = SIZE as u64 / 512;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const BARRIER: u32 = 1 << 31;

/// A disk in a temporary file, its driver, and the device between them.
struct Rig {
    dir: TempDir,
    device: Arc<Blk>,
    driver: GuestDriver,
    interrupts: Arc<FakeInterrupts>,
}

impl Rig {
    fn new(options: &str) -> Self {
        Self::with_features(options, common::VERSION_1 | u64::MAX >> 40)
    }

    fn with_features(options: &str, features: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(SIZE as u64).unwrap();
        let spec: BlockSpec = format!("{}{options}", path.display()).parse().unwrap();
        let backend = block::open(&spec).unwrap();
        Self::of(dir, &spec, backend, features)
    }

    fn of(dir: TempDir, spec: &BlockSpec, backend: Arc<dyn Backend>, features: u64) -> Self {
        let device = Blk::new(spec, backend, 1).unwrap();
        let driver = GuestDriver::new(QUEUE_SIZE).in_any_order();
        let interrupts = FakeInterrupts::new();
        let offered = device.features() | common::VERSION_1;
        let activation = driver.activation(features & offered, interrupts.clone());
        device.activate(activation).unwrap();
        Self {
            dir,
            device,
            driver,
            interrupts,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn content(&self) -> Vec<u8> {
        fs::read(self.path()).unwrap()
    }

    /// Sends it, and gives back the bytes that were written and the status.
    fn ask(&mut self, kind: u32, sector: u64, out: &[u8], room: u32) -> (Vec<u8>, u8) {
        let mut buffers = vec![Buffer::Readable(header(kind, sector))];
        if !out.is_empty() {
            buffers.push(Buffer::Readable(out.to_vec()));
        }
        if room > 0 {
            buffers.push(Buffer::Writable(room));
        }
        buffers.push(Buffer::Writable(1));
        let sent = self.driver.send(&buffers);
        self.settle(&sent)
    }

    fn settle(&mut self, sent: &Sent) -> (Vec<u8>, u8) {
        self.driver.kick();
        let (head, written) = self.driver.wait_used();
        assert_eq!(head, sent.head);
        let mut received = self.driver.received(sent);
        assert_eq!(written as usize, received.len());
        let status = received.pop().unwrap();
        (received, status)
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0xee; 4]); // priority: nobody's
    header.extend(sector.to_le_bytes());
    header
}

fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut segment = sector.to_le_bytes().to_vec();
    segment.extend(count.to_le_bytes());
    segment.extend(flags.to_le_bytes());
    segment
}

#[test]
fn every_request_does_what_it_says() {
    let mut rig = Rig::new(",ser=THE-DISK");
    let data: Vec<u8> = (0..1536).map(|i| (i % 251) as u8).collect();
    assert_eq!(rig.ask(OUT, 3, &data, 0), (vec![], OK));
    assert_eq!(rig.ask(FLUSH, 0, &[], 0), (vec![], OK));
    assert_eq!(rig.content()[1536..3072], data);
    assert_eq!(rig.ask(IN, 3, &[], 1536), (data.clone(), OK));
    let zeroes = segment(4, 1, 1);
    assert_eq!(rig.ask(WRITE_ZEROES, 0, &zeroes, 0), (vec![], OK));
    assert_eq!(rig.content()[2048..2560], [0; 512]);
    let two = [segment(3, 1, 0), segment(5, 1, 0)].concat();
    assert_eq!(rig.ask(DISCARD, 0, &two, 0), (vec![], OK));
    assert!(rig.content().iter().all(|byte| *byte == 0));
    let (id, status) = rig.ask(GET_ID, 0, &[], 20);
    assert_eq!(
        (id.as_slice(), status),
        (&b"THE-DISK\0\0\0\0\0\0\0\0\0\0\0\0"[..], OK)
    );
    assert_eq!(rig.ask(GET_ID, 0, &[], 3), (b"THE".to_vec(), OK));
    let counters = rig.device.counters();
    let counts = [
        &counters.reads,
        &counters.writes,
        &counters.flushes,
        &counters.discards,
    ];
    assert_eq!(counts.map(|counter| counter.load(Relaxed)), [1, 1, 1, 2]);
    assert_eq!(counters.bytes_read.load(Relaxed), 1536);
    assert_eq!(counters.bad_requests.load(Relaxed), 0);
    assert!(!rig.interrupts.queues().is_empty());
}

#[test]
fn what_is_not_possible_is_an_error_of_the_request() {
    let mut rig = Rig::new("");
    for (kind, sector, out, room, expected) in [
        (IN, SECTORS, 0, 512, IOERR),         // behind the end
        (IN, SECTORS - 1, 0, 1024, IOERR),    // across the end
        (IN, u64::MAX, 0, 512, IOERR),        // overflows
        (IN, u64::MAX / 512, 0, 1024, IOERR), // overflows with its length
        (IN, 0, 0, 511, IOERR),               // no whole sectors
        (OUT, 0, 513, 0, IOERR),
        (OUT, SECTORS, 512, 0, IOERR),
        (IN, 0, 0, 0, OK),                 // nothing at all
        (2, 0, 0, 0, UNSUPP),              // SCSI command
        (14, 0, 16, 0, UNSUPP),            // secure erase is not offered
        (IN | BARRIER, 0, 0, 512, UNSUPP), // a legacy driver's flag
        (u32::MAX, 0, 0, 512, UNSUPP),
        (DISCARD, 0, 0, 0, IOERR),
        (DISCARD, 0, 15, 0, IOERR),
        (WRITE_ZEROES, 0, 32, 0, IOERR), // one segment at a time
    ] {
        let (_, status) = rig.ask(kind, sector, &vec![0; out], room);
        assert_eq!(
            status, expected,
            "{kind:#x} at {sector:#x}: {out} out, {room} in"
        );
    }
    for (kind, segment, expected) in [
        (DISCARD, segment(0, 1, 1), UNSUPP), // unmap is write-zeroes' flag
        (DISCARD, segment(0, 1, 2), UNSUPP),
        (DISCARD, segment(0, MAX_DISCARD_SECTORS + 1, 0), IOERR),
        (DISCARD, segment(SECTORS - 1, 2, 0), IOERR),
        (WRITE_ZEROES, segment(0, 1, 4), UNSUPP),
        (WRITE_ZEROES, segment(0, u32::MAX, 0), IOERR),
        (WRITE_ZEROES, segment(u64::MAX, 1, 0), IOERR),
        (WRITE_ZEROES, segment(0, 0, 0), OK),
    ] {
        assert_eq!(
            rig.ask(kind, 0, &segment, 0).1,
            expected,
            "{kind} {segment:x?}"
        );
    }
    assert_eq!(rig.device.counters().host_errors.load(Relaxed), 0);
    assert!(!rig.interrupts.needs_reset_is_set());
}

#[test]
fn a_chain_without_a_status_is_dropped_and_counted() {
    let mut rig = Rig::new("");
    rig.driver.send(&[
        Buffer::Readable(header(OUT, 0)),
        Buffer::Readable(vec![1; 512]),
    ]);
    rig.driver.kick();
    assert_eq!(rig.driver.wait_used().1, 0);
    // A header that is cut has one: the last byte.
    let sent = rig
        .driver
        .send(&[Buffer::Readable(vec![0; 15]), Buffer::Writable(9)]);
    assert_eq!(rig.settle(&sent), (vec![0xaa; 8], IOERR));
    let sent = rig.driver.send(&[Buffer::Writable(1)]);
    assert_eq!(rig.settle(&sent), (vec![], IOERR));
    assert_eq!(rig.device.counters().bad_requests.load(Relaxed), 3);
    assert!(rig.content().iter().all(|byte| *byte == 0));
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut rig = Rig::new(",ro");
    assert_eq!(rig.device.features() & feature::RO, feature::RO);
    assert_eq!(rig.ask(OUT, 0, &[1; 512], 0).1, IOERR);
    assert_eq!(rig.ask(WRITE_ZEROES, 0, &segment(0, 1, 0), 0).1, IOERR);
    assert_eq!(rig.ask(DISCARD, 0, &segment(0, 1, 0), 0).1, UNSUPP);
    assert_eq!(rig.ask(IN, 0, &[], 512), (vec![0; 512], OK));
    assert_eq!(rig.ask(FLUSH, 0, &[], 0).1, OK);
}

#[test]
fn a_legacy_driver_of_2012_has_its_barriers_and_no_flushes() {
    // The seed's: SEG_MAX alone.
    let mut rig = Rig::with_features("", feature::SEG_MAX);
    let mut byte = [9];
    rig.device.config_read(32, &mut byte);
    assert_eq!(byte, [0], "without flushes each write is stable");
    assert_eq!(rig.ask(OUT | BARRIER, 1, &[5; 512], 0).1, OK);
    assert_eq!(rig.ask(IN | BARRIER, 1, &[], 512), (vec![5; 512], OK));
    assert_eq!(rig.ask(5, 0, &[], 0).1, OK);
}

#[test]
fn an_error_of_the_host_is_one_of_the_guest() {
    let mut rig = Rig::new("");
    File::options()
        .write(true)
        .open(rig.path())
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert_eq!(rig.ask(IN, 0, &[], 4096), (vec![0; 4096], OK));
    assert_eq!(rig.ask(IN, 8, &[], 512).1, IOERR);
    assert_eq!(rig.device.counters().host_errors.load(Relaxed), 1);
    assert_eq!(rig.ask(IN, 7, &[], 512).1, OK, "the disk lives");
}

/// Keeps what it is asked, and fails what it is told to fail.
struct Recorder {
    calls: Mutex<Vec<String>>,
    fail: Option<i32>,
}

impl Recorder {
    fn call(&self, text: String) -> io::Result<()> {
        self.calls.lock().unwrap().push(text);
        self.fail
            .map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }
}

impl Backend for Recorder {
    fn info(&self) -> Info {
        Info {
            capacity: SIZE as u64,
            logical: 512,
            physical: 512,
            read_only: false,
            discard: true,
        }
    }

    fn read(&self, offset: u64, _to: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.call(format!("read {offset}"))
    }

    fn write(&self, offset: u64, _: &[VolatileSlice<'_>], durable: bool) -> io::Result<()> {
        self.call(format!(
            "write {offset}{}",
            if durable { " durably" } else { "" }
        ))
    }

    fn flush(&self) -> io::Result<()> {
        self.call("flush".into())
    }

    fn discard(&self, extent: Extent) -> io::Result<()> {
        self.call(format!("discard {}+{}", extent.offset, extent.len))
    }

    fn write_zeroes(&self, extent: Extent, may_discard: bool) -> io::Result<()> {
        self.call(format!(
            "zero {}+{} {may_discard}",
            extent.offset, extent.len
        ))
    }
}

fn recording(fail: Option<i32>, features: u64) -> (Rig, Arc<Recorder>) {
    let recorder = Arc::new(Recorder {
        calls: Mutex::default(),
        fail,
    });
    let spec: BlockSpec = "disk".parse().unwrap();
    let rig = Rig::of(
        tempfile::tempdir().unwrap(),
        &spec,
        recorder.clone(),
        features,
    );
    (rig, recorder)
}

#[test]
fn a_full_disk_and_a_broken_one_are_io_errors_for_every_change() {
    use nix::libc::{EIO, ENOSPC};
    for errno in [EIO, ENOSPC] {
        let (mut rig, _) = recording(Some(errno), u64::MAX);
        assert_eq!(
            rig.device.engine(),
            Engine::Threads,
            "a backend without a file"
        );
        assert_eq!(rig.ask(OUT, 0, &[1; 512], 0).1, IOERR);
        assert_eq!(rig.ask(IN, 0, &[], 512).1, IOERR);
        assert_eq!(rig.ask(FLUSH, 0, &[], 0).1, IOERR);
        assert_eq!(rig.ask(DISCARD, 0, &segment(0, 1, 0), 0).1, IOERR);
        assert_eq!(rig.ask(WRITE_ZEROES, 0, &segment(0, 1, 0), 0).1, IOERR);
        assert_eq!(rig.device.counters().host_errors.load(Relaxed), 5);
        assert!(!rig.interrupts.needs_reset_is_set());
    }
}

#[test]
fn writes_are_durable_when_nobody_flushes() {
    let changes = |rig: &mut Rig| {
        rig.ask(OUT, 1, &[1; 512], 0);
        rig.ask(WRITE_ZEROES, 0, &segment(2, 1, 1), 0);
    };
    let (mut rig, recorder) = recording(None, u64::MAX);
    changes(&mut rig);
    // The driver turns the cache off, and on again.
    rig.device.config_write(32, &[0]);
    changes(&mut rig);
    rig.device.config_write(30, &[0xff; 4]);
    changes(&mut rig);
    let plain = ["write 512", "zero 1024+512 true"].map(String::from);
    let durable = ["write 512 durably", "zero 1024+512 true", "flush"].map(String::from);
    let expected = [&plain[..], &durable, &plain].concat();
    assert_eq!(*recorder.calls.lock().unwrap(), expected);

    let (mut rig, recorder) = recording(None, !feature::FLUSH);
    changes(&mut rig);
    assert_eq!(*recorder.calls.lock().unwrap(), durable);
}

#[test]
fn a_reset_ends_the_work_and_a_driver_may_begin_again() {
    let mut rig = Rig::new("");
    assert_eq!(rig.ask(OUT, 0, &[1; 512], 0).1, OK);
    rig.device.reset();
    rig.device.reset();
    rig.driver
        .send(&[Buffer::Readable(header(IN, 0)), Buffer::Writable(513)]);
    rig.driver.kick();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(
        rig.driver.used(),
        None,
        "a device that was reset answers nothing"
    );
    rig.driver = GuestDriver::new(QUEUE_SIZE).in_any_order();
    // What is there before activation is found without a kick.
    let sent = rig
        .driver
        .send(&[Buffer::Readable(header(IN, 0)), Buffer::Writable(513)]);
    let activation = rig
        .driver
        .activation(common::VERSION_1, rig.interrupts.clone());
    rig.device.activate(activation).unwrap();
    rig.driver.wait_used();
    assert_eq!(rig.driver.received(&sent)[..512], [1; 512]);
}

/// Both engines, the second where this host has it.
#[test]
fn many_requests_are_under_way_and_each_has_its_own_answer() {
    for options in [",aio=threads", "", ",nocache"] {
        let mut rig = Rig::new(options);
        for round in 0..20u64 {
            let write = |sector: u64| {
                [
                    Buffer::Readable(header(OUT, sector)),
                    Buffer::Readable(vec![(round + sector) as u8; 512]),
                    Buffer::Writable(1),
                ]
            };
            (0..40).for_each(|sector| drop(rig.driver.send(&write(sector))));
            let beyond = rig.driver.send(&write(SECTORS));
            let flush = [Buffer::Readable(header(FLUSH, 0)), Buffer::Writable(1)];
            rig.driver.send(&flush);
            rig.driver.kick();
            (0..42).for_each(|_| assert_eq!(rig.driver.wait_used().1, 1));
            assert_eq!(rig.driver.received(&beyond), [IOERR]);
            let content = rig.content();
            let sectors = (0..40).zip(content.chunks(512));
            for (sector, found) in sectors {
                assert!(found.iter().all(|byte| *byte == (round + sector) as u8));
            }
        }
        assert_eq!(rig.device.counters().writes.load(Relaxed), 800);
        assert_eq!(rig.device.counters().flushes.load(Relaxed), 20);
    }
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    for options in [",aio=threads", ""] {
        for _ in 0..50 {
            let mut rig = Rig::new(options);
            let sent: Vec<_> = (0..60)
                .map(|i| {
                    let header = Buffer::Readable(header(IN, i));
                    rig.driver
                        .send(&[header, Buffer::Writable(8192), Buffer::Writable(1)])
                })
                .collect();
            rig.driver.kick();
            rig.device.reset();
            let look = || -> Vec<_> { sent.iter().map(|s| rig.driver.received(s)).collect() };
            let then = look();
            std::thread::sleep(std::time::Duration::from_millis(1));
            assert!(then == look(), "memory changed after the reset");
        }
    }
}

#[test]
fn what_has_no_file_of_its_own_has_no_io_uring() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(SIZE as u64).unwrap();
    let text = format!("{},snapshot,aio=io_uring", path.display());
    let spec: BlockSpec = text.parse().unwrap();
    let refused = Blk::new(&spec, block::open(&spec).unwrap(), 1)
        .err()
        .unwrap();
    assert!(matches!(refused, BlockError::NotPlain(_)), "{refused}");
}

#[test]
fn a_disk_grows_under_its_driver() {
    let mut rig = Rig::new("");
    let capacity = |rig: &Rig| {
        let mut bytes = [0; 8];
        rig.device.config_read(0, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    let generation = rig.device.config_generation();
    assert_eq!(rig.ask(IN, SECTORS, &[], 512).1, IOERR);
    assert_eq!(
        rig.device.resize(Some(2 * SIZE as u64)).unwrap(),
        2 * SIZE as u64
    );
    assert_eq!(capacity(&rig), 2 * SECTORS);
    assert_eq!(rig.interrupts.config_changes(), 1);
    assert_ne!(rig.device.config_generation(), generation);
    assert_eq!(rig.ask(OUT, 2 * SECTORS - 1, &[1; 512], 0).1, OK);
    // The host made it larger by itself.
    let file = File::options().write(true).open(rig.path()).unwrap();
    file.set_len(3 * SIZE as u64 + 100).unwrap();
    assert_eq!(rig.device.resize(None).unwrap(), 3 * SIZE as u64);
    assert_eq!(rig.ask(IN, 3 * SECTORS - 1, &[], 512), (vec![0; 512], OK));
    for wrong in [SIZE as u64, 4 * SIZE as u64 + 1] {
        let refused = rig.device.resize(Some(wrong)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
    assert_eq!(capacity(&rig), 3 * SECTORS);
    let snapshot = Rig::new(",snapshot").device.resize(None).unwrap_err();
    assert_eq!(snapshot.kind(), io::ErrorKind::Unsupported);
}

/// A disk whose size has changed for a while before `resize` returns.
struct Growing {
    size: AtomicU64,
    grown: Barrier,
}

impl Backend for Growing {
    fn info(&self) -> Info {
        Info {
            capacity: self.size.load(Relaxed),
            logical: 512,
            physical: 512,
            read_only: true,
            discard: false,
        }
    }

    fn resize(&self, capacity: Option<u64>) -> io::Result<()> {
        self.size.store(capacity.unwrap(), Relaxed);
        self.grown.wait();
        std::thread::sleep(Duration::from_millis(50));
        Ok(())
    }

    fn read(&self, _: u64, _: &[VolatileSlice<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, _: u64, _: &[VolatileSlice<'_>], _: bool) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _: Extent) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: Extent, _: bool) -> io::Result<()> {
        Ok(())
    }
}

/// Or a driver, which reads 64 bits in two halves, would take two halves for one (2.5.1).
#[test]
fn a_new_size_comes_with_a_new_generation() {
    let (size, grown) = (AtomicU64::new(SIZE as u64), Barrier::new(2));
    let backend = Arc::new(Growing { size, grown });
    let disk = Blk::new(&"disk".parse().unwrap(), backend.clone(), 1).unwrap();
    let before = disk.config_generation();
    std::thread::scope(|scope| {
        scope.spawn(|| disk.resize(Some(SIZE as u64 * 2)).unwrap());
        backend.grown.wait();
        let mut sectors = [0; 8];
        disk.config_read(0, &mut sectors);
        assert_eq!(u64::from_le_bytes(sectors), 2 * SECTORS);
        assert_ne!(disk.config_generation(), before);
    });
}

#[test]
fn single_queues_stop_and_start() {
    let mut rig = Rig::new("");
    let queues = rig.device.queue_reset().unwrap();
    queues.stop_queue(7);
    queues.stop_queue(0);
    rig.driver = GuestDriver::new(QUEUE_SIZE).in_any_order();
    let queue = rig.driver.virtqueue(0, rig.interrupts.clone());
    queues.start_queue(queue).unwrap();
    assert_eq!(rig.ask(IN, 0, &[], 512).1, OK);
}

#[test]
fn queues_work_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(SIZE as u64).unwrap();
    let spec: BlockSpec = path.display().to_string().parse().unwrap();
    let device = Blk::new(&spec, block::open(&spec).unwrap(), 4).unwrap();
    assert_eq!(device.queue_sizes(), [QUEUE_SIZE; 4]);
    assert_eq!(device.features() & feature::MQ, feature::MQ);
    let interrupts = FakeInterrupts::new();
    let mut drivers: Vec<_> = (0..4)
        .map(|_| GuestDriver::new(QUEUE_SIZE).in_any_order())
        .collect();
    let mut activation = drivers[0].activation(common::VERSION_1, interrupts.clone());
    for index in 1..4 {
        let queue = drivers[usize::from(index)].virtqueue(index, interrupts.clone());
        activation.queues.push(queue);
    }
    device.activate(activation).unwrap();
    for (i, driver) in (0u8..).zip(&mut drivers) {
        for sector in 0..16 {
            driver.send(&[
                Buffer::Readable(header(OUT, u64::from(i) * 16 + sector)),
                Buffer::Readable(vec![i + 1; 512]),
                Buffer::Writable(1),
            ]);
        }
        driver.kick();
    }
    for driver in &mut drivers {
        (0..16).for_each(|_| assert_eq!(driver.wait_used().1, 1));
    }
    let content = fs::read(&path).unwrap();
    for (i, part) in (1u8..=4).zip(content.chunks(16 * 512)) {
        assert!(part.iter().all(|byte| *byte == i));
    }
}

#[test]
fn the_configuration_is_read_in_any_piece_and_one_byte_is_written() {
    let rig = Rig::new("");
    let whole = space(&rig.device.info(), 1, true);
    assert_eq!(rig.device.config_size(), whole.len());
    for offset in 0..70 {
        for len in 0..9 {
            let mut data = vec![0xcc; len];
            rig.device.config_read(offset, &mut data);
            let mut expected = vec![0xcc; len];
            for (to, from) in expected.iter_mut().zip(whole.iter().skip(offset)) {
                *to = *from;
            }
            assert_eq!(data, expected);
        }
    }
    for offset in (0..32).chain(33..80) {
        rig.device.config_write(offset, &[0]);
    }
    let mut data = [0; 60];
    rig.device.config_read(0, &mut data);
    assert_eq!(data, whole);
}
