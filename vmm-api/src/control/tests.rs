//! Client and server against each other, and each against garbage.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::proto::{Answer, Call, Outcome, REQUEST_MAX, Reply, Request, decode, encode};
use super::server::{CLIENTS_MAX, answer};
use super::*;
use crate::memory::MemoryLayout;
use crate::regs::{Access, Reg, SegReg};
use crate::root::Root;
use crate::vm::{LockedVm, Vm};

const SOON: Duration = Duration::from_millis(100);

/// A machine of two vCPUs without a hypervisor.
#[derive(Default)]
struct Fake {
    vcpus: Mutex<[Registers; 2]>,
    paused: AtomicBool,
    said: Mutex<Vec<String>>,
    hang: Mutex<()>,
}

impl Fake {
    fn say(&self, what: &str) -> Result<(), Refusal> {
        self.said.lock().unwrap().push(what.into());
        Ok(())
    }
}

impl ControlTarget for Fake {
    fn status(&self) -> Status {
        let phase = match self.paused.load(Ordering::Relaxed) {
            true => RunPhase::Paused,
            false => RunPhase::Running,
        };
        Status {
            phase,
            vcpus: 2,
            uptime_ms: 1234,
            memory: MemoryLayout {
                lowmem: 1 << 20,
                highmem: 0,
            },
        }
    }

    fn registers(&self, vcpu: u32) -> Result<Registers, Refusal> {
        let vcpus = self.vcpus.lock().unwrap();
        let found = vcpus.get(vcpu as usize).cloned();
        found.ok_or(Refusal::NoSuchVcpu { vcpu, vcpus: 2 })
    }

    fn update(&self, vcpu: u32, changes: &[Change]) -> Result<(), Refusal> {
        let changed = Change::apply_all(changes, &self.registers(vcpu)?)?;
        self.vcpus.lock().unwrap()[vcpu as usize] = changed;
        Ok(())
    }

    fn vcpu_stats(&self, _: u32) -> Result<VcpuStats, Refusal> {
        let exits = [("io".to_owned(), 7)].into();
        Ok(VcpuStats {
            exits,
            ..VcpuStats::default()
        })
    }

    fn vm_stats(&self) -> Result<VmStats, Refusal> {
        Ok(VmStats::default())
    }

    fn pause(&self) -> Result<(), Refusal> {
        self.paused.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn resume(&self) -> Result<(), Refusal> {
        self.paused.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn stop(&self) -> Result<(), Refusal> {
        self.say("stop")
    }

    fn reset(&self) -> Result<(), Refusal> {
        self.say("reset")
    }

    fn power_button(&self) -> Result<(), Refusal> {
        drop(self.hang.lock());
        self.say("power button")
    }

    fn nmi(&self, vcpu: u32) -> Result<(), Refusal> {
        self.say(&format!("nmi {vcpu}"))
    }
}

struct Bench {
    vm: LockedVm,
    fake: Arc<Fake>,
    server: Server,
    _dir: tempfile::TempDir,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let root = Root::open_at(&dir.path().join("root")).unwrap();
    let vm = Vm::create(&root, &"guest0".parse().unwrap(), "rhyve").unwrap();
    let fake = Arc::new(Fake::default());
    let server = Server::start_with(&vm, fake.clone(), "rhyve", "0.0.0", SOON).unwrap();
    Bench {
        vm,
        fake,
        server,
        _dir: dir,
    }
}

/// A client that says what it likes.
fn rude(bench: &Bench) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(bench.vm.control_path()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    BufReader::new(stream)
}

fn hear(client: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    client.read_line(&mut line).unwrap();
    line
}

fn refusal(line: &str) -> (Option<u64>, Refusal) {
    match decode::<Answer>(line.trim_end().as_bytes()).unwrap() {
        Answer {
            id,
            result: Outcome::Error(refusal),
        } => (id, refusal),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_request_reaches_the_machine() {
    let bench = bench();
    let mut client = Client::connect(&bench.vm).unwrap();
    assert_eq!((client.hello().vcpus, &*client.hello().vm), (2, "guest0"));
    assert_eq!(client.status().unwrap().phase, RunPhase::Running);
    client.pause().unwrap();
    assert_eq!(client.status().unwrap().phase, RunPhase::Paused);
    client.resume().unwrap();
    let set = |reg, value| Change::Register { reg, value };
    client
        .update(1, vec![set(Reg::Rip, 0xfff0), set(Reg::Rax, u64::MAX)])
        .unwrap();
    let registers = client.registers(1).unwrap();
    assert_eq!((registers.rip, registers.rax), (0xfff0, u64::MAX));
    assert_eq!(client.vcpu_stats(0).unwrap().exits["io"], 7);
    assert_eq!(client.vm_stats().unwrap(), VmStats::default());
    client.nmi(1).unwrap();
    client.power_button().unwrap();
    client.reset().unwrap();
    client.stop().unwrap();
    let said = bench.fake.said.lock().unwrap().join(", ");
    assert_eq!(said, "nmi 1, power button, reset, stop");
    bench.server.stop(&bench.vm).unwrap();
    assert!(matches!(client.status(), Err(ClientError::Closed(_))));
    let absent = Client::connect(&bench.vm).unwrap_err();
    assert!(matches!(absent, ClientError::Absent(_)), "{absent}");
}

#[test]
fn changes_are_made_all_or_none() {
    let bench = bench();
    let mut client = Client::connect(&bench.vm).unwrap();
    let good = Change::Register {
        reg: Reg::Rip,
        value: 1,
    };
    let bad = Change::Descriptor {
        seg: SegReg::Gdtr,
        base: 0,
        limit: 0x1_0000,
        access: Access(0),
    };
    let error = client.update(0, vec![good, bad]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "guest0: limit 0x10000 of gdtr does not fit in 16 bits"
    );
    assert_eq!(client.registers(0).unwrap().rip, 0);
    let error = client.registers(2).unwrap_err();
    assert_eq!(
        error.to_string(),
        "guest0: there is no vCPU 2: the VM has 2, numbered from 0"
    );
}

#[test]
fn the_socket_is_private_and_replaces_a_stale_one() {
    let bench = bench();
    let path = bench.vm.control_path();
    let mode = path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let Bench {
        vm,
        fake,
        server,
        _dir,
    } = bench;
    // Dropped without stop(), as a kill would: the socket stays.
    drop(server);
    assert!(path.exists());
    assert!(matches!(Client::connect(&vm), Err(ClientError::Absent(_))));
    let server = Server::start(&vm, fake, "rhyve", "0.0.0").unwrap();
    Client::connect(&vm).unwrap().status().unwrap();
    server.stop(&vm).unwrap();
    assert!(!path.exists());
}

#[test]
fn a_garbage_line_gets_one_error_and_the_next_is_served() {
    let bench = bench();
    let mut client = rude(&bench);
    assert!(hear(&mut client).starts_with(r#"{"protocol":1,"program":"rhyve""#));
    for (line, number) in [
        ("garbage", None),
        ("", None),
        ("{}", None),
        ("[[[[", None),
        (r#"{"id":3,"request":"dance"}"#, Some(3)),
        (r#"{"id":-1,"request":"status"}"#, None),
        (r#"{"id":4,"request":{"registers":{"vcpu":-1}}}"#, Some(4)),
    ] {
        writeln!(client.get_mut(), "{line}").unwrap();
        let (id, refusal) = refusal(&hear(&mut client));
        assert_eq!(id, number, "{line}");
        assert!(matches!(refusal, Refusal::Malformed(_)), "{refusal}");
    }
    client
        .get_mut()
        .write_all(b"\xff\xfe\n{\"id\":9,\"request\":\"status\"}\n")
        .unwrap();
    assert!(matches!(
        refusal(&hear(&mut client)),
        (None, Refusal::Malformed(_))
    ));
    assert!(hear(&mut client).starts_with(r#"{"id":9,"result":{"ok":{"status":{"#));
}

#[test]
fn a_line_too_long_is_the_last_one() {
    let bench = bench();
    let mut client = rude(&bench);
    hear(&mut client);
    // The server closes in the middle of it.
    let _ = client.get_mut().write_all(&vec![b'x'; 4 * REQUEST_MAX]);
    assert_eq!(refusal(&hear(&mut client)), (None, Refusal::TooLong));
    let mut rest = Vec::new();
    let end = client.read_to_end(&mut rest);
    assert!(end.is_err() || rest.is_empty());
    Client::connect(&bench.vm).unwrap().status().unwrap();
}

#[test]
fn the_seventeenth_client_is_told_so() {
    let bench = bench();
    let mut clients: Vec<_> = (0..CLIENTS_MAX)
        .map(|_| Client::connect(&bench.vm).unwrap())
        .collect();
    let error = Client::connect(&bench.vm).unwrap_err();
    assert!(error.to_string().contains("16 programs"), "{error}");
    clients.pop();
    // The server notices the free place in its next turn.
    clients[0].status().unwrap();
    Client::connect(&bench.vm).unwrap().status().unwrap();
}

#[test]
fn half_a_line_is_not_waited_for_but_silence_is() {
    let bench = bench();
    let mut silent = Client::connect(&bench.vm).unwrap();
    let mut half = rude(&bench);
    hear(&mut half);
    half.get_mut().write_all(b"{\"id\":1,").unwrap();
    assert_eq!(hear(&mut half), "", "dropped");
    std::thread::sleep(2 * SOON);
    silent.status().unwrap();
}

#[test]
fn who_floods_and_does_not_listen_disturbs_nobody() {
    let bench = bench();
    let mut flood = rude(&bench);
    hear(&mut flood);
    let line = encode(&Call {
        id: 1,
        request: Request::Registers { vcpu: 0 },
    });
    flood.get_mut().set_nonblocking(true).unwrap();
    let lines = line.repeat(1000);
    while flood.get_mut().write(&lines).is_ok() {}
    let mut client = Client::connect(&bench.vm).unwrap();
    for _ in 0..100 {
        client.registers(1).unwrap();
    }
    std::thread::sleep(2 * SOON);
    assert!(
        flood.get_mut().write(&lines).is_err(),
        "dropped, or still full"
    );
    client.registers(1).unwrap();
}

#[test]
fn a_machine_that_hangs_does_not_hold_the_end_up() {
    let bench = bench();
    let fake = bench.fake.clone();
    let held = fake.hang.lock().unwrap();
    let mut client = rude(&bench);
    hear(&mut client);
    writeln!(client.get_mut(), r#"{{"id":1,"request":"power-button"}}"#).unwrap();
    std::thread::sleep(SOON);
    let begin = Instant::now();
    bench.server.stop(&bench.vm).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(4));
    drop(held);
    assert!(
        hear(&mut client).contains("done"),
        "what was done is still said"
    );
}

/// A client whose server says `text` and no more, whether or not it stays.
fn greet(text: &[u8], stays: bool) -> Result<(Client, Option<UnixStream>), ClientError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (&theirs).write_all(text).unwrap();
    let theirs = stays.then_some(theirs);
    Client::greet(ours, "guest0".parse().unwrap(), SOON).map(|c| (c, theirs))
}

const HELLO: &str =
    r#"{"protocol":1,"program":"rhyve","version":"9","pid":1,"vm":"guest0","vcpus":1,"new":[]}"#;

#[test]
fn the_client_says_what_is_wrong_with_its_server() {
    let text = |text: &str, stays| match greet(text.as_bytes(), stays) {
        Ok((mut client, _theirs)) => client.status().unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    assert_eq!(
        text(
            "{\"protocol\":2,\"program\":\"rhyve\",\"version\":\"9\"}\n",
            true
        ),
        "guest0 is run by rhyve 9, whose control protocol is version 2, not 1: use the vmmctl that came with it"
    );
    let silent = "guest0 does not answer: its rhyve is stopped or hangs";
    assert_eq!(text("", true), silent);
    assert_eq!(text("{\"protocol\"", true), silent);
    assert_eq!(text(&format!("{HELLO}\n"), true), silent);
    let closed = "guest0 ended in the middle of the conversation";
    assert_eq!(text("", false), closed);
    assert_eq!(text(&format!("{HELLO}\n"), false), closed);
    let strange = "guest0: its control socket says what vmmctl does not understand: ";
    assert!(text("SSH-2.0\n", false).starts_with(strange));
    assert!(text(&format!("{HELLO}\n!\n"), true).starts_with(strange));
    let other = encode(&Answer {
        id: Some(7),
        result: Outcome::Ok(Reply::Done),
    });
    let other = String::from_utf8(other).unwrap();
    assert!(text(&format!("{HELLO}\n{other}"), true).ends_with("answer Some(7) to request 1"));
}

fn change() -> impl Strategy<Value = Change> {
    let regs: Vec<Reg> = Reg::all().collect();
    prop_oneof![
        (prop::sample::select(regs), any::<u64>())
            .prop_map(|(reg, value)| Change::Register { reg, value }),
        (
            prop::sample::select(&SegReg::ALL[..]),
            any::<u64>(),
            any::<u32>(),
            any::<u32>()
        )
            .prop_map(|(seg, base, limit, access)| Change::Descriptor {
                seg,
                base,
                limit,
                access: Access(access)
            }),
    ]
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(id: u64, vcpu: u32, changes in prop::collection::vec(change(), 0..4)) {
        let call = Call { id, request: Request::Update { vcpu, changes } };
        let line = encode(&call);
        prop_assert_eq!(line.iter().filter(|&&b| b == b'\n').count(), 1);
        prop_assert_eq!(decode::<Call>(&line).unwrap(), call);
    }

    #[test]
    fn any_line_gets_one_answer(line in prop::collection::vec(any::<u8>(), 0..200)) {
        let reply = encode(&answer(&Fake::default(), &line));
        prop_assert!(decode::<Answer>(&reply).is_ok());
    }

    #[test]
    fn any_change_to_a_good_line_gets_one_answer(at: prop::sample::Index, byte: u8, change in change()) {
        let mut line = encode(&Call { id: 1, request: Request::Update { vcpu: 0, changes: vec![change] } });
        let at = at.index(line.len());
        line[at] = byte;
        let reply = encode(&answer(&Fake::default(), &line));
        prop_assert!(decode::<Answer>(&reply).is_ok());
    }

    #[test]
    fn whatever_a_server_says_is_an_answer_or_an_error(
        hello in any::<bool>(),
        said in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let prefix = if hello { format!("{HELLO}\n") } else { String::new() };
        let text = [prefix.as_bytes(), &said].concat();
        if let Ok((mut client, _)) = greet(&text, false) {
            prop_assert!(client.status().is_err());
        }
    }
}
