//! The debug server's session: packets of a debugger out of its mind, to a machine of two vCPUs that
//! steps and runs into breakpoints as it is told, but executes nothing.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rhyve::gdb::registers::VcpuRegisters;
use rhyve::gdb::session::{Event, Leaving, Wire, serve};
use rhyve::gdb::target::{GuestTarget, Inferior, InferiorError};
use rhyve::gdb::{Debugger, Stop};
use rhyve::sequencer::Mailbox;
use vmm_api::kvm::{DebugControl, PointKind};
use vmm_api::memory::{GuestRam, MemSize, MemoryLayout};

const VCPUS: usize = 2;
const MEMORY: u64 = 4 << 20;
/// Where page tables are that map the first 2 MiB where they are, and the last 2 MiB of addresses there.
const TABLES: u64 = 0x1000;
/// Stops of one session: a debugger that steps on its own wish has as many as it has packets.
const STOPS: u32 = 64;
/// What is all over the memory that is mapped, but for the tables.
const NOP: u8 = 0x90;

struct Machine<'a> {
    ram: &'a GuestRam,
    registers: RefCell<Vec<VcpuRegisters>>,
    armed: RefCell<Vec<DebugControl>>,
    runs: RefCell<BTreeSet<u32>>,
    stops: Cell<u32>,
}

impl<'a> Machine<'a> {
    fn new(ram: &'a GuestRam) -> Self {
        let mut registers = VcpuRegisters::default();
        let system = &mut registers.system;
        (system.cr0, system.cr4, system.efer) = (0x8000_0001, 0x20, 0x500);
        (system.cr3, system.rip, system.rsp) = (TABLES, 0x8000, 0x9000);
        Self {
            ram,
            registers: RefCell::new(vec![registers; VCPUS]),
            armed: RefCell::new(vec![DebugControl::default(); VCPUS]),
            runs: RefCell::default(),
            stops: Cell::new(0),
        }
    }

    /// What a vCPU that runs comes to next.
    fn next(&self) -> Option<Stop> {
        if self.stops.replace(self.stops.get() + 1) >= STOPS {
            return None;
        }
        let armed = self.armed.borrow();
        self.runs.borrow().iter().find_map(|&vcpu| {
            let control = armed.get(vcpu as usize)?;
            let mut registers = self.registers.borrow_mut();
            let rip = &mut registers.get_mut(vcpu as usize)?.system.rip;
            let (exception, dr6) = if control.step {
                *rip = rip.wrapping_add(1);
                (1, 1 << 14)
            } else if let Some((n, point)) = (0..)
                .zip(control.points)
                .find_map(|(n, point)| Some((n, point?)))
            {
                if point.kind == PointKind::Execute {
                    *rip = point.address;
                }
                (1, 1 << n)
            } else if control.software {
                (3, 0)
            } else {
                return None;
            };
            Some(Stop {
                vcpu,
                exception,
                pc: *rip,
                dr6,
            })
        })
    }

    fn at<T>(&self, vcpu: u32, all: &RefCell<Vec<T>>) -> Result<usize, InferiorError> {
        let index = vcpu as usize;
        if index < all.borrow().len() {
            return Ok(index);
        }
        Err(InferiorError(format!("there is no vCPU {vcpu}")))
    }
}

impl Inferior for &Machine<'_> {
    fn vcpus(&self) -> u32 {
        VCPUS as u32
    }

    fn can_stop(&self) -> bool {
        true
    }

    fn ram(&self) -> &GuestRam {
        self.ram
    }

    fn registers(&self, vcpu: u32) -> Result<VcpuRegisters, InferiorError> {
        let index = self.at(vcpu, &self.registers)?;
        Ok(self.registers.borrow()[index].clone())
    }

    fn change(&self, vcpu: u32, wanted: &VcpuRegisters) -> Result<(), InferiorError> {
        let index = self.at(vcpu, &self.registers)?;
        let changed = self.registers.borrow_mut()[index].change(wanted);
        changed.map_err(|error| InferiorError(error.to_string()))
    }

    fn arm(&self, vcpu: u32, control: &DebugControl) -> Result<(), InferiorError> {
        let index = self.at(vcpu, &self.armed)?;
        self.armed.borrow_mut()[index] = *control;
        Ok(())
    }

    fn pass_on(&self, vcpu: u32, _: u32, _: &DebugControl) -> Result<(), InferiorError> {
        self.at(vcpu, &self.armed)?;
        // The guest's handler of it runs on.
        self.runs.borrow_mut().insert(vcpu);
        Ok(())
    }

    fn hold(&self) -> Result<(), InferiorError> {
        self.runs.borrow_mut().clear();
        Ok(())
    }

    fn release(&self, vcpus: &BTreeSet<u32>) -> Result<(), InferiorError> {
        assert!(vcpus.iter().all(|vcpu| *vcpu < self.vcpus()), "{vcpus:?}");
        self.runs.borrow_mut().clone_from(vcpus);
        Ok(())
    }
}

/// Memory as it is at the beginning of each session.
fn fill(ram: &GuestRam) {
    ram.write(0, &vec![NOP; 0x2_0000]).expect("RAM");
    ram.write(TABLES, &[0; 0x3000]).expect("RAM");
    for (gpa, entry) in [
        (TABLES, 0x2003u64),
        (TABLES + 0xff8, 0x2003),
        (0x2000, 0x3003),
        (0x2ff8, 0x3003),
        (0x3000, 0x83),
        (0x3ff8, 0x83),
    ] {
        ram.write(gpa, &entry.to_le_bytes()).expect("RAM");
    }
}

thread_local! {
    static RAM: GuestRam = {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(MEMORY).expect("its length");
        GuestRam::map(file, MemoryLayout::split(MemSize(MEMORY))).expect("memory")
    };
}

/// Feeds what a debugger sends to a session. Whether it was a debugger to the end.
///
/// # Panics
///
/// The session does, it answers with what is no packet, or breakpoints stay behind.
pub fn check(data: &[u8]) -> bool {
    RAM.with(|ram| {
        fill(ram);
        run(ram, data)
    })
}

fn run(ram: &GuestRam, data: &[u8]) -> bool {
    let machine = Machine::new(ram);
    let mailboxes = (0..VCPUS).map(|_| Arc::new(Mailbox::default())).collect();
    let debugger = Debugger::new(mailboxes).expect("an event");
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    // What is not read does not stop anybody: the answers to an input as long as this fit.
    ours.set_nonblocking(true).expect("a socket's flag");
    (&ours).write_all(data).expect("room for it all");
    ours.shutdown(Shutdown::Write).expect("a socket");
    let reader = std::thread::spawn(move || {
        ours.set_nonblocking(false).expect("a socket's flag");
        let mut answers = Vec::new();
        std::io::Read::read_to_end(&mut { ours }, &mut answers).expect("answers");
        answers
    });
    let mut target = GuestTarget::new(&machine);
    debugger.set_attached(true);
    target.hold().expect("nobody runs");
    let left = serve(Wire::Unix(theirs), &mut target, &debugger, |_, runs| {
        if runs && let Some(stop) = machine.next() {
            debugger.stopped(stop);
            return Ok(Event::Stopped);
        }
        Ok(Event::Bytes)
    });
    let answers = reader.join().expect("a reader");
    let known = |byte: &u8| matches!(byte, b'+' | b'-' | b'$');
    assert!(answers.first().is_none_or(known), "{answers:?}");

    target.hold().expect("nobody runs");
    target.disarm().expect("all of them answer");
    drop(target);
    let quiet = |control: &DebugControl| *control == DebugControl::default();
    assert!(
        machine.armed.borrow().iter().all(quiet),
        "something is armed"
    );
    // No packet but these writes memory.
    if !data.iter().any(|byte| matches!(byte, b'M' | b'X')) {
        let mut code = vec![0; 0x4000];
        ram.read(0x8000, &mut code).expect("RAM");
        assert!(code.iter().all(|byte| *byte == NOP), "a breakpoint stays");
    }
    left == Ok(Leaving::Gone) || left == Ok(Leaving::Kill)
}

/// A packet as it goes over the wire.
fn packet(text: &str) -> String {
    let sum = text.bytes().fold(0, u8::wrapping_add);
    format!("${text}#{sum:02x}")
}

/// What gdb says, packet by packet.
pub fn seeds() -> Vec<Vec<u8>> {
    let sessions: [&[&str]; 7] = [
        &[
            "qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+",
            "vCont?",
            "?",
        ],
        &[
            "qXfer:features:read:target.xml:0,ffb",
            "qfThreadInfo",
            "qsThreadInfo",
            "qThreadExtraInfo,p1.2",
            "Hgp1.1",
            "g",
        ],
        &["m8000,40", "M8000,2:ccc3", "m8000,2", "X8004,0:", "m0,ffff"],
        &[
            "Z0,8000,1",
            "m8000,4",
            "M7fff,3:010203",
            "z0,8000,1",
            "Z0,ffffffffffe08000,1",
            "vCont;c:p1.-1",
        ],
        &[
            "Z1,8010,1",
            "vCont;c:p1.-1",
            "vCont;s:p1.1;c:p1.-1",
            "vCont;s:p1.2",
            "z1,8010,1",
            "D;1",
        ],
        &[
            "Z2,8000,8",
            "Z4,8008,4",
            "Z3,8010,1",
            "Z2,8001,2",
            "vCont;c",
        ],
        &["vMustReplyEmpty", "QStartNoAckMode", "k"],
    ];
    let mut seeds: Vec<Vec<u8>> = sessions
        .iter()
        .map(|packets| {
            packets
                .iter()
                .map(|text| packet(text))
                .collect::<Vec<_>>()
                .join("+")
                .into_bytes()
        })
        .collect();
    seeds.push(b"+$?#3f\x03+$c#63\x03".to_vec());
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_of_gdbs_are_served() {
        for seed in seeds() {
            let text = String::from_utf8_lossy(&seed);
            assert!(check(&seed), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_that_a_debugger_says_breaks_it(
            packets in proptest::collection::vec("(m|M|Z[0-5]|z[0-5]|vCont;[cst]|g|G|P|p|H[gc]|q|Q|X|D|T)[0-9a-f,:;=.-]{0,20}", 0..8),
        ) {
            let packets: Vec<_> = packets.iter().map(|text| packet(text)).collect();
            check(packets.join("+").as_bytes());
        }
    }
}
