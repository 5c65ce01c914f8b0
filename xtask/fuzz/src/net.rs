//! A network card's queues, and a driver out of its mind: rings, buffers, commands, and frames that
//! come meanwhile.
//!
//! An input is the features that the driver takes, and a list of steps of eight bytes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use rhyve::config::MacAddress;
use rhyve::lifecycle::Lifecycle;
use rhyve::mevent::Mevent;
use rhyve::net::{Backend, Info, Offloads, Port, Wait};
use rhyve::virtio::VirtioDevice;
use rhyve::virtio::net::Net;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, VolatileSlice};

use crate::queues::{SIZE, activate};

const RAM: u64 = 1 << 20;
const STEP: usize = 8;
/// More would only be slow.
const MAX_STEPS: usize = 64;
/// Descriptors of each queue, whose rings begin at a multiple of 64 KiB; buffers come behind them.
const RINGS: u64 = 0x1_0000;
const BUFFERS: u32 = 0x6_0000;
/// Two pairs, and control.
const QUEUES: u16 = 5;
/// How long the card's threads get after a kick.
const MOMENT: Duration = Duration::from_micros(200);

/// A backend that holds its card to what it is promised. What is sent comes back.
struct Mirror {
    info: Info,
    frames: Mutex<VecDeque<Vec<u8>>>,
    event: Arc<std::os::fd::OwnedFd>,
    count: EventFd,
}

impl Mirror {
    fn new() -> Self {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE;
        let count = EventFd::from_flags(flags).expect("a descriptor");
        Self {
            info: Info {
                label: "mirror".into(),
                header: true,
                offloads: Offloads::all(),
            },
            frames: Mutex::default(),
            event: Arc::new(count.as_fd().try_clone_to_owned().expect("a descriptor")),
            count,
        }
    }

    fn frames(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, frame: Vec<u8>) {
        let mut frames = self.frames();
        if frames.len() < 64 {
            frames.push_back(frame);
            let _ = self.count.write(1);
        }
    }
}

struct End(Arc<Mirror>);

impl Port for End {
    fn wait(&self) -> Wait {
        Wait {
            fd: Some(self.0.event.clone()),
            timeout: None,
        }
    }

    fn receive(&self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        assert!(into.len() <= 1024, "more than a call takes");
        let frame = self.0.frames().pop_front();
        let frame = frame.ok_or(io::ErrorKind::WouldBlock)?;
        let _ = self.0.count.read();
        let mut rest = &frame[..];
        for slice in into {
            let now = rest.len().min(slice.len());
            slice.copy_from(&rest[..now]);
            rest = &rest[now..];
        }
        Ok(frame.len() - rest.len())
    }

    fn send(&self, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        let total: usize = from.iter().map(VolatileSlice::len).sum();
        assert!(total >= 10 + 14, "a header and a frame");
        let mut frame = vec![0; total.min(70_000)];
        let mut rest = &mut frame[..];
        for slice in from {
            let copied = slice.copy_to(rest);
            rest = &mut rest[copied..];
        }
        self.0.add(frame);
        Ok(())
    }
}

struct Socket(Arc<Mirror>);

impl Backend for Socket {
    fn info(&self) -> &Info {
        &self.0.info
    }

    fn port(&self, pair: u16) -> Option<Arc<dyn Port>> {
        (pair < 2).then(|| Arc::new(End(self.0.clone())) as Arc<dyn Port>)
    }

    fn configure(&self, header: usize, _: Offloads) -> io::Result<()> {
        assert!([10, 12].contains(&header));
        Ok(())
    }

    fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        assert!((1..=2).contains(&pairs));
        Ok(())
    }
}

/// The card, its backend and its memory.
struct Rig {
    card: Arc<Net>,
    mirror: Arc<Mirror>,
    memory: GuestMemoryMmap,
    kicks: Vec<Arc<EventFd>>,
    features: u64,
}

impl Rig {
    fn new(mevent: &Arc<Mevent>, wanted: u64) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]);
        let mirror = Arc::new(Mirror::new());
        let backend = Arc::new(Socket(mirror.clone()));
        let mac = MacAddress([0, 0xa0, 0x98, 1, 2, 3]);
        let card = Net::new(mevent.clone(), backend, mac, None, 2);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let kick = |_| Arc::new(EventFd::from_flags(flags).expect("a descriptor"));
        let rig = Self {
            features: wanted & (card.features() | card.ring_features() | 1 << 32),
            card,
            mirror,
            memory: memory.expect("memory"),
            kicks: (0..QUEUES).map(kick).collect(),
        };
        rig.activate();
        rig
    }

    fn activate(&self) {
        activate(&*self.card, &self.memory, self.features, &self.kicks, RINGS);
    }

    fn step(&self, step: [u8; STEP]) {
        let [op, a, b, c, value @ ..] = step;
        let value = u32::from_le_bytes(value);
        let queue = u16::from(op >> 4) % QUEUES;
        let base = RINGS * (u64::from(queue) + 1);
        let write = |gpa: u64, bytes: &[u8]| {
            // Beyond RAM there is nothing.
            let _ = self.memory.write_slice(bytes, GuestAddress(gpa));
        };
        match op & 0xf {
            // A descriptor: which, where, flags and next, length.
            0..=3 => {
                let address = BUFFERS + u32::from(b) * 0x400;
                let words = [
                    address,
                    0,
                    value & 0x1_ffff,
                    u32::from(c & 7) | u32::from(c >> 3) << 16,
                ];
                write(
                    base + 16 * u64::from(a),
                    words.map(u32::to_le_bytes).as_flattened(),
                );
            }
            // The same, of any kind.
            4 => write(base + 8 * u64::from(a), &step[2..]),
            // Bytes of a buffer: a header, a command.
            5 | 6 => write(
                u64::from(BUFFERS) + u64::from(a) * 0x400 + u64::from(b),
                &step[3..],
            ),
            // Requests: as many, from this place of the ring on, of these descriptors.
            7..=9 => {
                for (slot, head) in (u64::from(a)..).zip(step[4..].iter().map(|head| head % 17)) {
                    let at = base + 0x1004 + 2 * (slot % u64::from(SIZE));
                    write(at, &u16::from(head).to_le_bytes());
                }
                write(base + 0x1002, &u16::from(b).to_le_bytes());
                let _ = self.kicks[usize::from(queue)].write(1);
                std::thread::sleep(MOMENT);
            }
            10 => {
                let _ = self.kicks[usize::from(queue)].write(1);
                std::thread::sleep(MOMENT);
            }
            11 => {
                let len = usize::from(u16::from_le_bytes([a, b])) + 1;
                self.mirror.add(vec![c; len]);
                std::thread::sleep(MOMENT);
            }
            12 => self.card.set_link(a & 1 != 0),
            13 => {
                self.card.freeze();
                let state = self.card.save().expect("a state");
                assert!(self.card.restore(&state).is_ok(), "{state:?}");
                self.card.thaw();
            }
            14 => {
                let mut space = [0; 16];
                self.card.config_write(a.into(), &step[4..]);
                self.card.config_read(b.into(), &mut space);
                let _ = self.card.inspect();
            }
            _ => {
                self.card.reset();
                for queue in 1..=u64::from(QUEUES) {
                    write(RINGS * queue + 0x1000, &[0; 4]);
                }
                self.activate();
            }
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.card.reset();
    }
}

/// Takes the steps; true if there was one.
///
/// # Panics
///
/// A backend was called as it is not to be.
pub fn check(input: &[u8]) -> bool {
    let Some((features, steps)) = input.split_first_chunk::<8>() else {
        return false;
    };
    let mevent = Mevent::start().expect("a thread");
    let rig = Rig::new(&mevent, u64::from_le_bytes(*features));
    for step in steps.chunks_exact(STEP).take(MAX_STEPS) {
        if let Ok(step) = step.try_into() {
            rig.step(step);
        }
    }
    steps.len() >= STEP
}

/// A frame that is sent and comes back, and commands.
pub fn seeds() -> Vec<Vec<u8>> {
    let features = (1_u64 << 32 | 0xff_ffff).to_le_bytes();
    // A buffer in descriptor 0 of queue 0; 60 bytes from descriptor 0 of queue 1.
    let steps: [[u8; STEP]; 6] = [
        [0, 0, 0, 2, 0, 8, 0, 0],
        [7, 0, 1, 0, 0, 0, 0, 0],
        // To the card itself.
        [5, 4, 12, 0, 0xa0, 0x98, 1, 2],
        [5, 4, 17, 3, 0, 0, 0, 0],
        [0x10, 0, 4, 0, 60, 0, 0, 0],
        [0x17, 0, 1, 0, 0, 0, 0, 0],
    ];
    // Promiscuous mode off: class, command and value in one descriptor, the answer in the next.
    let command: [[u8; STEP]; 4] = [
        [5, 8, 0, 0, 0, 0, 0, 0],
        [0x40, 0, 8, 9, 3, 0, 0, 0],
        [0x40, 1, 9, 2, 1, 0, 0, 0],
        [0x47, 0, 1, 0, 0, 0, 0, 0],
    ];
    let all = [&features[..], steps.as_flattened()].concat();
    let more = [&all[..], command.as_flattened(), &[13; 8], &[15; 8]].concat();
    vec![all, more]
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_seeds_are_taken() {
        assert!(seeds().iter().all(|seed| check(seed)));
        assert!(!check(&[]));
        // Nothing stays: there are not this many descriptors.
        assert_eq!((0..300).filter(|_| check(&seeds()[1])).count(), 300);
    }

    #[test]
    fn a_frame_comes_back_and_a_command_is_taken() {
        let mevent = Mevent::start().unwrap();
        let seed = &seeds()[1];
        let features = u64::from_le_bytes(seed[..8].try_into().unwrap());
        let rig = Rig::new(&mevent, features);
        let deadline = Instant::now() + Duration::from_secs(20);
        let steps = &seed[8..seed.len() - 16];
        for step in steps.chunks_exact(STEP) {
            rig.step(step.try_into().unwrap());
        }
        let counters = rig.card.counters();
        let wanted = [
            &counters.received,
            &counters.transmitted,
            &counters.commands,
        ];
        while wanted.map(|count| count.load(Relaxed)) != [1; 3] {
            assert!(Instant::now() < deadline, "{counters:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(counters.bad_requests.load(Relaxed), 0);
    }
}
