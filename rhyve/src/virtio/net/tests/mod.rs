//! A card against drivers good and bad: its rig.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use proptest::prelude::*;
use vm_memory::VolatileSlice;
use vmm_api::scatter;

use super::config::feature::*;
use super::*;
use crate::config::MacAddress;
use crate::lifecycle::Lifecycle;
use crate::mevent::Mevent;
use crate::net::{Backend, Info, Offloads, Port, Wait};
use crate::testing::{Buffer, FakeInterrupts, GuestDriver, RawDescriptor, Sent};
use crate::virtio::{Activation, VirtioDevice, feature as common};

mod device;
mod frames;
mod waits;

const MAC: MacAddress = MacAddress([0, 0xa0, 0x98, 1, 2, 3]);

/// A backend whose other end is the test's: a socket pair for each pair of queues.
struct Wire {
    info: Info,
    ends: Vec<Arc<OwnedFd>>,
    calls: Mutex<Vec<String>>,
    /// Its receive can wait.
    waits: AtomicBool,
}

struct WirePort {
    end: Arc<OwnedFd>,
    waits: bool,
}

impl Port for WirePort {
    fn wait(&self) -> Wait {
        Wait {
            fd: Some(self.end.clone()),
            timeout: None,
        }
    }

    fn receive(&self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        scatter::receive(&self.end, into)
    }

    fn wait_in_receive(&self, wait: bool) -> bool {
        let flags = if wait {
            OFlag::empty()
        } else {
            OFlag::O_NONBLOCK
        };
        self.waits && fcntl(&self.end, FcntlArg::F_SETFL(flags)).is_ok()
    }

    fn send(&self, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        scatter::send(&self.end, from).map(|_| ())
    }
}

impl Backend for Wire {
    fn info(&self) -> &Info {
        &self.info
    }

    fn port(&self, pair: u16) -> Option<Arc<dyn Port>> {
        let end = self.ends.get(usize::from(pair))?.clone();
        let waits = self.waits.load(Relaxed);
        Some(Arc::new(WirePort { end, waits }))
    }

    fn configure(&self, header: usize, offloads: Offloads) -> io::Result<()> {
        let call = format!("{header} {:#x}", offloads.bits());
        self.calls.lock().unwrap().push(call);
        Ok(())
    }

    fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        self.calls.lock().unwrap().push(format!("pairs {pairs}"));
        Ok(())
    }
}

/// A card, its driver, and the far ends of its wires.
struct Rig {
    device: Arc<Net>,
    wire: Arc<Wire>,
    far: Vec<UnixDatagram>,
    drivers: Vec<GuestDriver>,
    interrupts: Arc<FakeInterrupts>,
    features: u64,
    room: Vec<Sent>,
}

impl Rig {
    fn idle(header: bool, pairs: u16, features: u64) -> Self {
        let (mut ends, mut far) = (Vec::new(), Vec::new());
        for _ in 0..pairs {
            let (near, other) = UnixDatagram::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            other
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            ends.push(Arc::new(OwnedFd::from(near)));
            far.push(other);
        }
        let offloads = if header {
            Offloads::all()
        } else {
            Offloads::empty()
        };
        let wire = Arc::new(Wire {
            info: Info {
                label: "wire".into(),
                header,
                offloads,
            },
            ends,
            calls: Mutex::default(),
            waits: AtomicBool::new(false),
        });
        let mevent = Mevent::start().unwrap();
        let device = Net::new(mevent, wire.clone(), MAC, Some(1400), pairs);
        let memory = GuestDriver::new(1).memory().clone();
        let queues = 0..device.queue_sizes().len() as u64;
        let drivers = queues.map(|n| GuestDriver::at(memory.clone(), (n + 1) << 18, 32));
        Self {
            drivers: drivers.collect(),
            device,
            wire,
            far,
            interrupts: FakeInterrupts::new(),
            features,
            room: Vec::new(),
        }
    }

    fn new(header: bool, pairs: u16, features: u64) -> Self {
        let rig = Self::idle(header, pairs, features);
        rig.activate(|_| {});
        rig
    }

    /// Before it is activated: this queue's driver says what it has found.
    fn use_event_index(&mut self, queue: usize) {
        let driver = self.drivers.remove(queue).with_event_index();
        self.drivers.insert(queue, driver);
    }

    fn activate(&self, prepare: impl Fn(&mut crate::virtio::Virtqueue)) {
        let queues = (0..).zip(&self.drivers).map(|(n, driver)| {
            let mut queue = driver.virtqueue(n, self.interrupts.clone());
            prepare(&mut queue);
            queue
        });
        let activation = Activation {
            memory: self.drivers[0].memory().clone(),
            features: self.features,
            queues: queues.collect(),
            interrupts: self.interrupts.clone(),
        };
        self.device.activate(activation).unwrap();
    }

    /// A card at a wire without headers, for a driver of today.
    fn plain() -> Self {
        Self::new(
            false,
            1,
            common::VERSION_1 | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR | CTRL_VLAN,
        )
    }

    fn buffers(&mut self, queue: usize, lens: &[u32]) {
        let driver = &mut self.drivers[queue];
        let sent = lens
            .iter()
            .map(|len| driver.send(&[Buffer::Writable(*len)]));
        self.room.extend(sent);
        driver.kick();
    }

    /// The next buffer that the driver gets back, with what is in it.
    fn received(&mut self, queue: usize) -> Vec<u8> {
        let driver = &mut self.drivers[queue];
        let (head, written) = driver.wait_used();
        let at = self.room.iter().position(|sent| sent.head == head).unwrap();
        let mut bytes = driver.received(&self.room.remove(at));
        bytes.truncate(written as usize);
        bytes
    }

    /// Sends header and frame as the driver would, and waits until they are answered.
    fn send(&mut self, queue: usize, parts: &[&[u8]]) {
        let parts: Vec<_> = parts.iter().map(|p| Buffer::Readable(p.to_vec())).collect();
        let sent = self.drivers[queue].send(&parts);
        self.drivers[queue].kick();
        assert_eq!(self.drivers[queue].wait_used(), (sent.head, 0));
    }

    fn heard(&self, pair: usize) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let len = self.far[pair].recv(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    /// A command on the control queue, and its answer.
    fn command(&mut self, queue: usize, bytes: &[u8]) -> u8 {
        let driver = &mut self.drivers[queue];
        let sent = driver.send(&[Buffer::Readable(bytes.to_vec()), Buffer::Writable(1)]);
        driver.kick();
        assert_eq!(driver.wait_used(), (sent.head, 1));
        driver.received(&sent)[0]
    }

    fn count(&self, name: &str) -> u64 {
        let counters = self.device.inspect().counters;
        let found = counters.iter().find(|(known, _)| *known == name);
        found.unwrap_or_else(|| panic!("{name}")).1
    }

    fn until(&self, what: &str, so: impl Fn(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !so(self) {
            assert!(Instant::now() < end, "{what}: {:?}", self.device.inspect());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn config(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        self.device.config_read(0, &mut bytes);
        bytes
    }
}

/// A frame to this address with as many bytes behind the type.
fn frame(to: [u8; 6], len: usize) -> Vec<u8> {
    let data = (0..len).map(|n| (n % 251) as u8);
    [&to[..], &[2, 0, 0, 0, 0, 9, 8, 0]]
        .concat()
        .into_iter()
        .chain(data)
        .collect()
}
