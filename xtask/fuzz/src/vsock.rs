//! virtio-vsock: packets of a guest out of its mind, and programs of the host that come and go.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use rhyve::config::VsockSpec;
use rhyve::unix_socket::SocketFile;
use rhyve::virtio::VirtioDevice;
use rhyve::virtio::vsock::Vsock;

use crate::queues::{self, Subject, input};

const CID: u32 = 3;
/// The port of the host at which somebody listens.
const PORT: u32 = 80;
/// The first that programs of the host get when they connect.
const FIRST_PORT: u32 = 1 << 30;
/// Programs at a time.
const MOST: usize = 8;

struct Rig {
    device: Arc<Vsock>,
    _file: SocketFile,
    listener: UnixListener,
    programs: RefCell<Vec<UnixStream>>,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("v");
        let listener = UnixListener::bind(dir.path().join(format!("v_{PORT}")));
        let listener = listener.expect("a socket");
        listener.set_nonblocking(true).expect("a socket's flag");
        let (device, file) = Vsock::new(&VsockSpec { cid: CID, path }).expect("a device");
        Self {
            device,
            _file: file,
            listener,
            programs: RefCell::default(),
            dir,
        }
    }

    fn add(&self, stream: UnixStream) {
        let mut programs = self.programs.borrow_mut();
        if programs.len() < MOST && stream.set_nonblocking(true).is_ok() {
            programs.push(stream);
        }
    }
}

impl Subject for Rig {
    fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    /// A packet: what for, between which ports, length, flags, and what room there is.
    fn request(&self, [op, ports, len, flags, room]: [u8; 5]) -> Vec<u8> {
        let host = match ports >> 4 & 3 {
            0 => PORT,
            other => FIRST_PORT + u32::from(other) - 1,
        };
        let taken = if flags & 0x80 == 0 {
            0
        } else {
            u32::from(len) << 24
        };
        [
            &u64::from(CID).to_le_bytes()[..],
            &2u64.to_le_bytes(),
            &u32::from(ports & 3).to_le_bytes(),
            &host.to_le_bytes(),
            &u32::from(len).to_le_bytes(),
            &1u16.to_le_bytes(),
            &u16::from(op).to_le_bytes(),
            &u32::from(flags & 3).to_le_bytes(),
            &(u32::from(room) << 8).to_le_bytes(),
            &taken.to_le_bytes(),
            &[0x5a; 255],
        ]
        .concat()
    }

    fn outside(&self, what: u8, bytes: [u8; 4]) {
        let mut programs = self.programs.borrow_mut();
        let which = usize::from(what >> 3);
        match what & 7 {
            0 => {
                drop(programs);
                if let Ok(mut stream) = UnixStream::connect(self.dir.path().join("v")) {
                    let line = format!("CONNECT {}\n", bytes[0] & 3);
                    let _ = stream.write_all(line.as_bytes());
                    self.add(stream);
                }
            }
            1 => {
                drop(programs);
                if let Ok((stream, _)) = self.listener.accept() {
                    self.add(stream);
                }
            }
            2 | 3 => {
                if let Some(stream) = programs.get_mut(which) {
                    let _ = stream.write(&bytes.repeat(64));
                }
            }
            4 => {
                if let Some(stream) = programs.get_mut(which) {
                    let _ = stream.read(&mut [0; 4096]);
                }
            }
            5 => {
                if let Some(stream) = programs.get_mut(which) {
                    let _ = stream.shutdown(std::net::Shutdown::Write);
                }
            }
            _ if which < programs.len() => _ = programs.swap_remove(which),
            _ => {}
        }
    }
}

/// Takes the steps; true if there was one.
///
/// # Panics
///
/// The device was broken by its driver.
pub fn check(input: &[u8]) -> bool {
    queues::drive(&Rig::new(), input)
}

/// A guest that connects to a program, talks and ends; and one that is asked.
pub fn seeds() -> Vec<Vec<u8>> {
    let buffers = [
        [0, 0, 0, 2, 0, 2, 0, 0],
        [0, 1, 1, 2, 0, 2, 0, 0],
        [0, 2, 2, 2, 0, 2, 0, 0],
        [0, 3, 3, 2, 0, 2, 0, 0],
        [8, 0, 4, 0, 0, 1, 2, 3],
        // Where packets are, of 44 bytes and of 64 more.
        [0x10, 0, 8, 0, 44, 0, 0, 0],
        [0x10, 1, 9, 0, 108, 0, 0, 0],
        [0x10, 2, 10, 0, 44, 0, 0, 0],
        [0x10, 3, 11, 0, 44, 0, 0, 0],
    ];
    let connects = [
        [5, 8, 1, 1, 0, 0, 1, 0],
        [0x18, 0, 1, 0, 0, 0, 0, 0],
        [0x1b, 1, 0, 0, 0, 0, 0, 0],
        [5, 9, 5, 1, 64, 0, 1, 0],
        [0x18, 1, 2, 0, 1, 0, 0, 0],
        [0x1b, 2, 0, 0, 1, 2, 3, 4],
        [5, 10, 6, 1, 0, 0, 1, 0],
        [0x18, 2, 3, 0, 2, 0, 0, 0],
        [5, 11, 4, 1, 0, 3, 1, 0],
        [0x18, 3, 4, 0, 3, 0, 0, 0],
    ];
    let asked = [
        [0x1b, 0, 0, 0, 1, 0, 0, 0],
        [5, 8, 2, 0x11, 0, 0, 1, 0],
        [0x18, 0, 1, 0, 0, 0, 0, 0],
        [0x1b, 2, 0, 0, 1, 2, 3, 4],
        [0x1d; 8],
        [0x1b, 6, 0, 0, 0, 0, 0, 0],
        [0x1f; 8],
    ];
    let seed = |steps: &[_]| input(1 << 32 | 1, &[&buffers, steps].concat());
    vec![seed(&connects), seed(&asked)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_taken() {
        assert!(seeds().iter().all(|seed| check(seed)));
        assert!(!check(&[]));
        // Nothing stays: there are not this many descriptors.
        assert_eq!((0..200).filter(|_| check(&seeds()[1])).count(), 200);
    }

    #[test]
    fn the_driver_is_understood() {
        let rig = Rig::new();
        assert!(queues::drive(&rig, &seeds()[0]));
        let counters = rig.device.inspect().counters;
        let counted = |name: &str| counters.iter().find(|(n, _)| *n == name).unwrap().1;
        assert_eq!(
            [
                "connections",
                "packets from the guest",
                "bytes from the guest",
                "bad packets"
            ]
            .map(counted),
            [1, 4, 64, 0]
        );
    }
}
