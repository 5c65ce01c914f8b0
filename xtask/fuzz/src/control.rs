//! The control protocol: a real server on a real socket, a client that sends what it likes, and one
//! that behaves and must not notice.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use vmm_api::control::proto::{Answer, Call, Outcome, REQUEST_MAX, Request, decode, encode};
use vmm_api::control::{Change, Client, ControlTarget, Hello, Refusal, RunPhase, Server, Status};
use vmm_api::memory::MemoryLayout;
use vmm_api::regs::{Access, Reg, Registers, SegReg};
use vmm_api::root::Root;
use vmm_api::stats::{VcpuStats, VmStats};
use vmm_api::vm::{LockedVm, Vm};

/// What a socket buffer takes at once, with room to spare: everything is sent before anything is
/// read.
const INPUT_MAX: usize = 96 << 10;

/// A server of a machine without a hypervisor, and its client that behaves.
pub struct Bench {
    vm: LockedVm,
    polite: Client,
    // Serves until it is dropped.
    _server: Server,
}

impl Bench {
    /// Makes a VM in `root` and serves its control socket.
    ///
    /// # Panics
    ///
    /// There is no room for a VM.
    pub fn new(root: &Root) -> Self {
        let name = "fuzz".parse().expect("this is a name");
        let vm = Vm::create(root, &name, "fuzz").expect("there is room for a VM");
        let target = Arc::new(Machine::default());
        let server = Server::start(&vm, target, "fuzz", "0").expect("it can be served");
        let polite = Client::connect(&vm).expect("it is served");
        Self {
            vm,
            polite,
            _server: server,
        }
    }

    /// Sends the bytes to the server and hangs up. True if they are requests, all of them.
    ///
    /// # Panics
    ///
    /// The server does not answer each line, by one line, in order; or no longer serves others.
    pub fn check(&mut self, bytes: &[u8]) -> bool {
        let bytes = &bytes[..bytes.len().min(INPUT_MAX)];
        let mut stream = UnixStream::connect(self.vm.control_path()).expect("it listens");
        let patience = Some(Duration::from_secs(4));
        stream.set_read_timeout(patience).expect("a time limit");
        // It may hang up before all is sent, if a line has no end.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answers = BufReader::new(stream).split(b'\n').map_while(Result::ok);
        let hello = answers.next().expect("a hello");
        decode::<Hello>(&hello).expect("a hello line");

        let mut good = true;
        let mut rest = bytes;
        loop {
            let end = rest.iter().position(|&byte| byte == b'\n');
            if end.unwrap_or(rest.len()) > REQUEST_MAX {
                let answer = answers.next().expect("an answer to a line without end");
                let answer: Answer = decode(&answer).expect("an answer");
                assert_eq!(answer.result, Outcome::Error(Refusal::TooLong));
                good = false;
                break;
            }
            let Some(end) = end else { break };
            let answer = answers.next().expect("an answer to each line");
            let answer: Answer = decode(&answer).expect("an answer");
            good &= verify(&rest[..end], &answer);
            rest = &rest[end + 1..];
        }
        assert_eq!(answers.next(), None, "an answer to nothing");
        self.polite.status().expect("the server goes on serving");
        good && !bytes.is_empty()
    }
}

/// Whether a line was a request; its answer must agree.
fn verify(line: &[u8], answer: &Answer) -> bool {
    let malformed = matches!(answer.result, Outcome::Error(Refusal::Malformed(_)));
    let Ok(call) = decode::<Call>(line) else {
        assert!(malformed, "{answer:?}");
        // What the number is found by is more lenient than what reads all of the line.
        if let (Some(id), Ok(value)) = (answer.id, serde_json::from_slice::<Value>(line)) {
            assert_eq!(value.get("id").and_then(Value::as_u64), Some(id));
        }
        return false;
    };
    assert!(!malformed, "{answer:?}");
    assert_eq!(answer.id, Some(call.id));
    let written = encode(&call);
    assert!(!written[..written.len() - 1].contains(&b'\n'));
    assert_eq!(decode::<Call>(&written).ok(), Some(call));
    true
}

/// Two vCPUs that hold registers and do nothing.
#[derive(Default)]
struct Machine(Mutex<[Registers; 2]>);

impl ControlTarget for Machine {
    fn status(&self) -> Status {
        Status {
            phase: RunPhase::Running,
            vcpus: 2,
            uptime_ms: 0,
            memory: MemoryLayout::default(),
        }
    }

    fn registers(&self, vcpu: u32) -> Result<Registers, Refusal> {
        let vcpus = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = vcpus.get(vcpu as usize).cloned();
        found.ok_or(Refusal::NoSuchVcpu { vcpu, vcpus: 2 })
    }

    fn update(&self, vcpu: u32, changes: &[Change]) -> Result<(), Refusal> {
        let before = self.registers(vcpu)?;
        // The registers go back to what they were, so that an input alone decides what comes of it.
        Change::apply_all(changes, &before)?;
        Ok(())
    }

    fn vcpu_stats(&self, vcpu: u32) -> Result<VcpuStats, Refusal> {
        self.registers(vcpu).map(|_| VcpuStats::default())
    }

    fn vm_stats(&self) -> Result<VmStats, Refusal> {
        Ok(VmStats::default())
    }

    fn pause(&self) -> Result<(), Refusal> {
        Ok(())
    }

    fn resume(&self) -> Result<(), Refusal> {
        Err(Refusal::Ending)
    }

    fn stop(&self) -> Result<(), Refusal> {
        Ok(())
    }

    fn reset(&self) -> Result<(), Refusal> {
        Ok(())
    }

    fn power_button(&self) -> Result<(), Refusal> {
        Err(Refusal::Unsupported("it has none".into()))
    }

    fn nmi(&self, vcpu: u32) -> Result<(), Refusal> {
        self.registers(vcpu).map(drop)
    }
}

/// Every request, each by itself and all behind one another.
pub fn seeds() -> Vec<Vec<u8>> {
    let changes = vec![
        Change::Register {
            reg: Reg::Rip,
            value: 0xfff0,
        },
        Change::Descriptor {
            seg: SegReg::Cs,
            base: 0xffff_0000,
            limit: 0xffff,
            access: Access(0x9b),
        },
    ];
    let requests = [
        Request::Status,
        Request::Registers { vcpu: 0 },
        Request::Update { vcpu: 1, changes },
        Request::VcpuStats { vcpu: 9 },
        Request::VmStats,
        Request::Exits { vcpu: 0 },
        Request::ResetStats,
        Request::Pause,
        Request::Resume,
        Request::Stop,
        Request::Reset,
        Request::PowerButton,
        Request::Nmi { vcpu: 1 },
        Request::Devices,
        Request::SetBalloon { bytes: 1 << 27 },
    ];
    let calls = requests.into_iter().zip(1..);
    let mut seeds: Vec<_> = calls
        .map(|(request, id)| encode(&Call { id, request }))
        .collect();
    seeds.push(seeds.concat());
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_answered_and_garbage_as_well() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut bench = Bench::new(&Root::open_at(&dir.path().join("root")).unwrap());
        for seed in seeds() {
            assert!(bench.check(&seed), "{}", String::from_utf8_lossy(&seed));
        }
        let endless = vec![b'x'; REQUEST_MAX + 1];
        for garbage in [&b""[..], b"\n\n", b"{\"id\":7}\n[", &endless] {
            assert!(!bench.check(garbage));
        }
    }
}
