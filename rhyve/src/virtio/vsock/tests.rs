use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::packet::*;
use super::*;
use crate::testing::{Buffer, FakeInterrupts, GuestDriver, RawDescriptor, Sent};

const CID: u32 = 7;

/// A device, and a guest that has no programs but the test.
struct Rig {
    device: Arc<Vsock>,
    dir: TempDir,
    receive: GuestDriver,
    transmit: GuestDriver,
    room: Vec<Sent>,
    file: SocketFile,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let spec = VsockSpec {
            cid: CID,
            path: dir.path().join("vsock"),
        };
        let (device, file) = Vsock::new(&spec).unwrap();
        let receive = GuestDriver::new(64);
        let transmit = GuestDriver::at(receive.memory().clone(), 1 << 20, 64);
        let interrupts = FakeInterrupts::new();
        let activation = Activation {
            memory: receive.memory().clone(),
            features: 0,
            queues: vec![
                receive.virtqueue(0, interrupts.clone()),
                transmit.virtqueue(1, interrupts.clone()),
            ],
            interrupts,
        };
        device.activate(activation).unwrap();
        Self {
            device,
            dir,
            receive,
            transmit,
            room: Vec::new(),
            file,
        }
    }

    fn give(&mut self, count: usize) {
        for _ in 0..count {
            let sent = self.receive.send(&[Buffer::Writable(44 + 1000)]);
            self.room.push(sent);
        }
        self.receive.kick();
    }

    fn say(&mut self, op: u16, ports: Ports, change: impl FnOnce(&mut Header), data: &[u8]) {
        let mut header = Header {
            src_cid: CID.into(),
            dst_cid: HOST,
            src_port: ports.guest,
            dst_port: ports.host,
            len: data.len() as u32,
            kind: STREAM,
            op,
            buf_alloc: 4096,
            ..Header::default()
        };
        change(&mut header);
        let bytes = [&header.bytes(), data].concat();
        let sent = self.transmit.send(&[Buffer::Readable(bytes)]);
        self.transmit.kick();
        assert_eq!(self.transmit.wait_used().0, sent.head);
    }

    fn hear(&mut self) -> (Header, Vec<u8>) {
        let (head, written) = self.receive.wait_used();
        let at = self.room.iter().position(|sent| sent.head == head).unwrap();
        let mut bytes = self.receive.received(&self.room.remove(at));
        bytes.truncate(written as usize);
        let data = bytes.split_off(44);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let header = Header {
            src_cid: u64::from(word(0)),
            dst_cid: u64::from(word(8)),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: word(28) as u16,
            op: (word(28) >> 16) as u16,
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        };
        assert_eq!(header.len as usize, data.len());
        assert_eq!((header.src_cid, header.dst_cid), (HOST, CID.into()));
        (header, data)
    }

    /// A program of the host that is connected to port 5 of the guest.
    fn connected(&mut self) -> (UnixStream, Ports) {
        self.give(8);
        let mut stream = UnixStream::connect(self.device.listener.path()).unwrap();
        let patience = Some(Duration::from_secs(10));
        stream.set_read_timeout(patience).unwrap();
        stream.write_all(b"CONNECT 5\nearly").unwrap();
        let (request, _) = self.hear();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, 5));
        assert_eq!(request.buf_alloc, connection::ROOM);
        let ports = Ports {
            host: request.src_port,
            guest: 5,
        };
        self.say(op::RESPONSE, ports, |_| {}, b"");
        let expected = format!("OK {}\n", ports.host);
        let mut line = vec![0; expected.len()];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(line, expected.as_bytes());
        assert_eq!(self.hear().1, b"early");
        (stream, ports)
    }

    fn counted(&self, name: &str) -> u64 {
        let counters = self.device.inspect().counters;
        counters.iter().find(|(n, _)| *n == name).unwrap().1
    }
}

#[test]
fn a_program_of_the_host_talks_with_the_guest_until_both_are_done() {
    let mut rig = Rig::new();
    let (mut stream, ports) = rig.connected();
    rig.say(op::RW, ports, |_| {}, b"from the guest");
    let mut text = [0; 14];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"from the guest");
    // No more than the guest has room for, and the rest when it has.
    stream.write_all(&[1; 5000]).unwrap();
    let mut got = 0;
    while got < 4096 - 5 {
        got += rig.hear().1.len();
        rig.give(1);
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((got, rig.receive.used()), (4096 - 5, None));
    rig.say(
        op::CREDIT_UPDATE,
        ports,
        |header| header.fwd_cnt = 4096,
        b"",
    );
    while got < 5000 {
        got += rig.hear().1.len();
    }
    rig.say(
        op::CREDIT_REQUEST,
        ports,
        |header| header.fwd_cnt = 5005,
        b"",
    );
    let (update, _) = rig.hear();
    assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, 14));
    // Half of it ends, then the other.
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let (end, _) = rig.hear();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, NO_SEND));
    rig.say(op::RW, ports, |_| {}, b"last");
    rig.say(op::SHUTDOWN, ports, |header| header.flags = 3, b"");
    let mut last = String::new();
    stream.read_to_string(&mut last).unwrap();
    assert_eq!(last, "last");
    assert_eq!(rig.hear().0.op, op::RST);
    assert_eq!(rig.device.inspect().properties[2].1, "0 connections");
}

#[test]
fn a_connection_outlives_resets_of_single_queues() {
    let mut rig = Rig::new();
    let (mut stream, ports) = rig.connected();
    let device = rig.device.clone();
    let reset = device.queue_reset().unwrap();
    let all = [RECEIVE, TRANSMIT, EVENTS];
    all.iter().for_each(|index| reset.stop_queue(*index));
    stream.write_all(b"meanwhile").unwrap();
    rig.transmit.send(&[Buffer::Readable(vec![0; 44])]);
    rig.transmit.kick();
    rig.receive.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((rig.receive.used(), rig.transmit.used()), (None, None));

    let memory = rig.receive.memory().clone();
    rig.receive = GuestDriver::at(memory.clone(), 0x1_0000, 64);
    rig.transmit = GuestDriver::at(memory, 1 << 20, 64);
    rig.room.clear();
    for (index, driver) in [(RECEIVE, &rig.receive), (TRANSMIT, &rig.transmit)] {
        let queue = driver.virtqueue(index, FakeInterrupts::new());
        reset.start_queue(queue).unwrap();
    }
    rig.give(4);
    assert_eq!(rig.hear().1, b"meanwhile");
    rig.say(op::RW, ports, |_| {}, b"afterwards");
    let mut text = [0; 10];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"afterwards");
    rig.device.reset();
}

#[test]
fn another_process_tells_the_guest_that_its_connections_are_no_more() {
    let mut rig = Rig::new();
    let (_stream, ports) = rig.connected();
    rig.device.freeze();
    let state = rig.device.save().unwrap();
    let spec = VsockSpec {
        cid: CID,
        path: rig.dir.path().join("again"),
    };
    let (device, _file) = Vsock::new(&spec).unwrap();
    device.restore(&state).unwrap();
    let interrupts = FakeInterrupts::new();
    let mut events = GuestDriver::at(rig.receive.memory().clone(), 2 << 20, 8);
    let activation = Activation {
        memory: rig.receive.memory().clone(),
        features: 0,
        queues: vec![
            rig.receive.resumed(0, interrupts.clone()),
            rig.transmit.resumed(1, interrupts.clone()),
            events.virtqueue(2, interrupts.clone()),
        ],
        interrupts,
    };
    device.activate(activation).unwrap();
    rig.device = device;
    // It waits for the driver's buffer, and takes one only.
    let told = events.send(&[Buffer::Writable(4)]);
    events.send(&[Buffer::Writable(4)]);
    events.kick();
    assert_eq!(events.wait_used(), (told.head, 4));
    assert_eq!(events.received(&told), [0; 4]);
    rig.give(4);
    rig.say(op::RW, ports, |_| {}, b"to nobody");
    assert_eq!(rig.hear().0.op, op::RST);
    assert_eq!(events.used(), None);
}

#[test]
fn connections_outlive_a_snapshot() {
    let mut rig = Rig::new();
    let (mut stream, ports) = rig.connected();
    rig.device.freeze();
    rig.device.save().unwrap();
    stream.write_all(b"meanwhile").unwrap();
    let mut late = UnixStream::connect(rig.device.listener.path()).unwrap();
    late.write_all(b"CONNECT 6\n").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.receive.used(), None);
    rig.device.thaw();
    let mut heard = [rig.hear(), rig.hear()];
    heard.sort_by_key(|(header, _)| header.op);
    assert_eq!((heard[0].0.op, heard[0].0.dst_port), (op::REQUEST, 6));
    assert_eq!(heard[1].1, b"meanwhile");
    rig.say(op::RW, ports, |_| {}, b"answer");
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

#[test]
fn the_guest_reaches_programs_that_listen_and_no_others() {
    let mut rig = Rig::new();
    rig.give(8);
    let listener = UnixListener::bind(rig.dir.path().join("vsock_80")).unwrap();
    let ports = Ports { host: 80, guest: 9 };
    rig.say(op::REQUEST, ports, |_| {}, b"");
    assert_eq!(rig.hear().0.op, op::RESPONSE);
    let (mut program, _) = listener.accept().unwrap();
    program.write_all(b"welcome").unwrap();
    assert_eq!(rig.hear().1, b"welcome");
    drop(program);
    let (end, _) = rig.hear();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, NO_SEND | NO_RECEIVE));
    let nobody = Ports { host: 81, guest: 9 };
    rig.say(op::REQUEST, nobody, |_| {}, b"");
    let (refused, _) = rig.hear();
    assert_eq!((refused.op, refused.src_port), (op::RST, 81));
    assert_eq!(rig.counted("refused"), 1);
}

#[test]
fn refusals_reach_the_program_that_asked() {
    let mut rig = Rig::new();
    rig.give(8);
    let path = rig.device.listener.path().to_owned();
    let ask = |line: &[u8]| {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(line).unwrap();
        stream
    };
    for line in [
        &b"GET / HTTP/1.1\r\n"[..],
        b"CONNECT 4294967296\n",
        &[b'x'; 40],
    ] {
        let mut said = String::new();
        // What was not read makes the end a reset.
        let _ = ask(line).read_to_string(&mut said);
        assert!(said.starts_with("ERR write CONNECT"), "{said}");
    }
    let mut stream = ask(b"CONN");
    stream.write_all(b"ECT 6\n").unwrap();
    let (request, _) = rig.hear();
    let ports = Ports {
        host: request.src_port,
        guest: 6,
    };
    rig.say(op::RST, ports, |_| {}, b"");
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("ERR the guest refuses"), "{said}");
    let spec = VsockSpec { cid: CID, path };
    assert!(Vsock::new(&spec).is_err(), "in use");
    drop(rig.file);
    assert!(!spec.path.exists());
}

#[test]
fn a_guest_that_breaks_the_rules_loses_the_connection() {
    let breaks: [fn(&mut Rig, Ports); 5] = [
        // More than there is room for: the program reads nothing.
        |rig, ports| {
            let end = Instant::now() + Duration::from_secs(10);
            while rig.counted("bad packets") == 0 && Instant::now() < end {
                rig.say(op::RW, ports, |_| {}, &[0; 60_000]);
            }
        },
        // Fewer bytes than it says.
        |rig, ports| rig.say(op::RW, ports, |header| header.len = 9, b"eight..."),
        |rig, ports| rig.say(99, ports, |_| {}, b""),
        |rig, ports| rig.say(op::RW, ports, |header| header.kind = 2, b"x"),
        |rig, ports| rig.say(op::RESPONSE, ports, |_| {}, b""),
    ];
    for broken in breaks {
        let mut rig = Rig::new();
        let (_stream, ports) = rig.connected();
        rig.give(8);
        broken(&mut rig, ports);
        let reset = std::iter::from_fn(|| Some(rig.hear().0)).find(|h| h.op == op::RST);
        assert_eq!(reset.map(|header| header.src_port), Some(ports.host));
        assert!(rig.counted("bad packets") > 0);
        assert_eq!(rig.device.inspect().properties[2].1, "0 connections");
    }
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let mut rig = Rig::new();
    let ports = Ports { host: 1, guest: 1 };
    let header = Header {
        src_cid: CID.into(),
        dst_cid: HOST,
        src_port: ports.guest,
        dst_port: ports.host,
        kind: STREAM,
        op: op::RW,
        ..Header::default()
    };
    let mut taken = 0;
    for _ in 0..1000 {
        rig.transmit.send(&[Buffer::Readable(header.bytes())]);
        rig.transmit.kick();
        let end = Instant::now() + Duration::from_millis(200);
        let mut used = None;
        while used.is_none() && Instant::now() < end {
            used = rig.transmit.used();
        }
        if used.is_none() {
            break;
        }
        taken += 1;
    }
    assert_eq!(taken, MOST_PENDING);
    rig.give(60);
    rig.transmit.wait_used();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn anything_is_survived(
        packets in prop::collection::vec((0u16..9, any::<[u32; 6]>(), prop::collection::vec(any::<u8>(), 0..64)), 1..16)
    ) {
        let mut rig = Rig::new();
        let (_stream, ports) = rig.connected();
        for (number, (op, raw, data)) in packets.into_iter().enumerate() {
            let header = Header {
                src_cid: if raw[0] & 7 == 0 { raw[0].into() } else { CID.into() },
                dst_cid: HOST,
                src_port: if raw[1] & 3 == 0 { raw[1] } else { ports.guest },
                dst_port: if raw[1] & 3 == 0 { raw[1] } else { ports.host },
                len: if raw[2] & 3 == 0 { raw[2] } else { data.len() as u32 },
                kind: if raw[2] & 12 == 0 { 2 } else { 1 },
                op,
                flags: raw[3],
                buf_alloc: raw[4],
                fwd_cnt: raw[5],
            };
            let at = GuestAddress(0x3e_0000);
            let bytes = [header.bytes(), data].concat();
            rig.transmit.memory().write_slice(&bytes, at).unwrap();
            let descriptor = RawDescriptor {
                address: at.0,
                len: if raw[3] & 7 == 0 { raw[3] >> 8 } else { bytes.len() as u32 },
                flags: if raw[4] & 7 == 0 { 3 } else { 0 },
                next: number as u16 & 63,
            };
            rig.transmit.set_descriptor(number as u16, descriptor);
            rig.transmit.make_available(number as u16);
            rig.transmit.kick();
        }
        rig.device.inspect();
        rig.device.reset();
    }
}
