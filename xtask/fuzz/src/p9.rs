//! virtio-9p: requests of 9P2000.L to a share of a directory, beside which there is something that is
//! not the guest's.
//!
//! An input is a list of requests: type, length of what follows, and that. Size and tag are put in
//! front by the target, mostly right.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use rhyve::config::ShareSpec;
use rhyve::virtio::p9::P9;
use rhyve::virtio::{Activation, Interrupts, Rings, VirtioDevice, Virtqueue};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RAM: usize = 256 << 10;
const RINGS: u64 = 0x4000;
const SIZE: u16 = 16;
const REQUEST: u64 = 0x1_0000;
const ANSWER: u64 = 0x2_0000;
/// Room for an answer.
const ROOM: u32 = 64 << 10;
/// More would only be slow.
const MOST: usize = 24;
const SECRET: &[u8] = b"not the guest's";

struct Deaf;

impl Interrupts for Deaf {
    fn signal_queue(&self, _: u16) {}
    fn signal_config(&self) {}
    fn needs_reset(&self) {}
}

struct Rig {
    device: Arc<P9>,
    memory: GuestMemoryMmap,
    kick: Arc<EventFd>,
    asked: u16,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let share = dir.path().join("share");
        fs::create_dir_all(share.join("sub/deep")).expect("a directory");
        fs::write(share.join("file"), "contents").expect("a file");
        fs::write(dir.path().join("secret"), SECRET).expect("a file");
        symlink("../secret", share.join("out")).expect("a link");
        symlink("/", share.join("sub/root")).expect("a link");
        let spec = format!("tag={}", share.display());
        let device = P9::new(&ShareSpec::parse(&spec).expect("a share")).expect("a device");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]);
        let memory: GuestMemoryMmap = memory.expect("memory");
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let kick = Arc::new(EventFd::from_flags(flags).expect("a descriptor"));
        let rings = Rings {
            size: SIZE,
            descriptors: RINGS,
            available: RINGS + 0x1000,
            used: RINGS + 0x2000,
            event_index: false,
        };
        let queue = Virtqueue::new(0, rings, memory.clone(), kick.clone(), Arc::new(Deaf));
        let activation = Activation {
            memory: memory.clone(),
            features: 1 << 32 | 1,
            queues: vec![queue.expect("rings in RAM")],
            interrupts: Arc::new(Deaf),
        };
        device.activate(activation).expect("descriptors");
        Self {
            device,
            memory,
            kick,
            asked: 0,
            dir,
        }
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        let written = self.memory.write_slice(bytes, GuestAddress(gpa));
        written.expect("RAM");
    }

    /// Asks, and returns the answer's type.
    fn ask(&mut self, kind: u8, body: &[u8]) -> u8 {
        let wrong = u32::from(kind & 0x80);
        let size = (body.len() as u32 + 7).wrapping_add(wrong * u32::from(kind));
        let message = [&size.to_le_bytes()[..], &[kind & 0x7f, 7, 0], body].concat();
        self.write(REQUEST, &message);
        let words = |address: u64, len: u32, flags: u32| {
            [address as u32, 0, len, flags].map(u32::to_le_bytes)
        };
        let readable = words(REQUEST, message.len() as u32, 1 | 1 << 16);
        self.write(RINGS, readable.as_flattened());
        self.write(RINGS + 16, words(ANSWER, ROOM, 2).as_flattened());
        self.write(RINGS + 0x1004 + 2 * u64::from(self.asked % SIZE), &[0, 0]);
        self.asked = self.asked.wrapping_add(1);
        self.write(RINGS + 0x1002, &self.asked.to_le_bytes());
        let _ = self.kick.write(1);
        let deadline = Instant::now() + Duration::from_secs(4);
        loop {
            let used: u16 = self
                .memory
                .load(
                    GuestAddress(RINGS + 0x2002),
                    std::sync::atomic::Ordering::Acquire,
                )
                .expect("RAM");
            if used == self.asked {
                break;
            }
            assert!(Instant::now() < deadline, "no answer to {kind}");
            let mut fds = [PollFd::new(self.kick.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::ZERO);
            std::thread::yield_now();
        }
        let slot = u64::from(self.asked.wrapping_sub(1) % SIZE);
        let written = GuestAddress(RINGS + 0x2004 + 8 * slot + 4);
        let written: u32 = self.memory.read_obj(written).expect("RAM");
        let answer: [u8; 7] = self.memory.read_obj(GuestAddress(ANSWER)).expect("RAM");
        let [a, b, c, d, answered, tag @ ..] = answer;
        assert_eq!(u32::from_le_bytes([a, b, c, d]), written);
        assert_eq!(tag, [7, 0]);
        assert!((7..=ROOM).contains(&written));
        answered
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.device.reset();
    }
}

/// Makes the requests; true if each was understood.
///
/// # Panics
///
/// There is a request without a right answer, or something was done beside the directory.
pub fn check(input: &[u8]) -> bool {
    let mut rig = Rig::new();
    let (mut rest, mut understood, mut asked) = (input, true, 0);
    while let [kind, len, more @ ..] = rest {
        let (body, behind) = more.split_at(usize::from(*len).min(more.len()));
        understood &= rig.ask(*kind, body) == (kind & 0x7f) + 1;
        rest = behind;
        asked += 1;
        if asked == MOST {
            break;
        }
    }
    if let Some(lifecycle) = rig.device.lifecycle() {
        lifecycle.freeze();
        if let Ok(state) = lifecycle.save() {
            assert!(lifecycle.restore(&state).is_ok(), "{state:?}");
        }
        lifecycle.thaw();
    }
    let dir = rig.dir.path();
    assert!(fs::read(dir.join("secret")).is_ok_and(|found| found == SECRET));
    assert!(fs::read_dir(dir).is_ok_and(|entries| entries.count() == 2));
    understood && asked != 0
}

/// A request with its length.
fn request(kind: u8, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    [&[kind, body.len() as u8][..], &body].concat()
}

/// Sessions that do something of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let word = |n: u32| n.to_le_bytes();
    let name = |text: &str| [&(text.len() as u16).to_le_bytes()[..], text.as_bytes()].concat();
    let long = |n: u64| n.to_le_bytes();
    let walk = |from: u32, to: u32, names: &[&str]| {
        let count = (names.len() as u16).to_le_bytes();
        let names: Vec<Vec<u8>> = names.iter().map(|text| name(text)).collect();
        request(110, &[&word(from), &word(to), &count, &names.concat()])
    };
    let start = [
        request(100, &[&word(8192), &name("9P2000.L")]),
        request(
            104,
            &[&word(0), &word(u32::MAX), &name(""), &name(""), &word(0)],
        ),
    ]
    .concat();
    let reads = [
        walk(0, 1, &["file"]),
        request(24, &[&word(1), &long(0x7ff)]),
        request(12, &[&word(1), &word(2)]),
        request(116, &[&word(1), &long(0), &word(100)]),
        request(118, &[&word(1), &long(4), &word(2), b"xy"]),
        request(50, &[&word(1), &word(0)]),
        request(
            52,
            &[
                &word(1),
                &[1],
                &word(0),
                &long(0),
                &long(9),
                &word(1),
                &name("g"),
            ],
        ),
        request(120, &[&word(1)]),
        walk(0, 2, &["out"]),
        request(22, &[&word(2)]),
        request(8, &[&word(0)]),
    ]
    .concat();
    let makes = [
        walk(0, 1, &["sub"]),
        walk(0, 2, &["sub"]),
        request(12, &[&word(2), &word(0)]),
        request(40, &[&word(2), &long(0), &word(4096)]),
        request(72, &[&word(1), &name("new"), &word(0o755), &word(0)]),
        request(16, &[&word(1), &name("link"), &name("../.."), &word(0)]),
        request(
            18,
            &[
                &word(1),
                &name("fifo"),
                &word(0o010_644),
                &word(0),
                &word(0),
                &word(0),
            ],
        ),
        request(74, &[&word(1), &name("new"), &word(0), &name("newer")]),
        request(76, &[&word(0), &name("newer"), &word(0x200)]),
        walk(0, 3, &["file"]),
        request(70, &[&word(1), &word(3), &name("hard")]),
        request(
            26,
            &[
                &word(3),
                &word(0x19),
                &word(0o600),
                &word(0),
                &word(0),
                &long(3),
                &[0; 32],
            ],
        ),
        request(
            14,
            &[
                &word(1),
                &name("made"),
                &word(0o102),
                &word(0o644),
                &word(0),
            ],
        ),
    ]
    .concat();
    vec![
        [&start[..], &reads].concat(),
        [&start[..], &makes].concat(),
        walk(0, 1, &["..", "secret"]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_taken() {
        let taken: Vec<bool> = seeds().iter().map(|seed| check(seed)).collect();
        assert_eq!(taken, [true, true, false]);
        assert!(!check(&[]));
        // Nothing stays: there are not this many descriptors.
        assert_eq!((0..200).filter(|_| check(&seeds()[1])).count(), 200);
    }
}
