//! Any virtio device's queues, and a driver out of its mind; the device's own kind of request, and
//! its host's side, are a [`Subject`]'s.
//!
//! An input is the features that the driver takes, and a list of steps of eight bytes.

use std::cell::Cell;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use rhyve::virtio::{Activation, Interrupts, Position, Rings, VirtioDevice, Virtqueue};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of guest memory.
pub const RAM: u64 = 1 << 20;
/// Bytes of a step.
pub const STEP: usize = 8;
/// More would only be slow.
const MAX_STEPS: usize = 64;
/// Descriptors of each queue, whose rings begin at a multiple of this; buffers come behind them.
pub(crate) const SIZE: u16 = 16;
const RINGS: u64 = 0x4000;
const BUFFERS: u64 = 0x4_0000;
const BUFFER: u64 = 0x400;
/// How long a device may take to see what is there.
const PATIENCE: Duration = Duration::from_millis(500);

/// A device and what is around it.
pub trait Subject {
    /// The device.
    fn device(&self) -> &dyn VirtioDevice;

    /// A request of its kind, of five bytes.
    fn request(&self, from: [u8; 5]) -> Vec<u8>;

    /// Something happens on the host.
    fn outside(&self, what: u8, bytes: [u8; 4]);

    /// Waits until the device has done what it has begun: it works with a lock held that this takes.
    fn settle(&self) {
        let _ = self.device().inspect();
    }
}

/// Nobody listens.
struct Deaf;

impl Interrupts for Deaf {
    fn signal_queue(&self, _: u16) {}
    fn signal_config(&self) {}
    fn needs_reset(&self) {}
}

/// Activates a device with a queue for each of `kicks`, of [`SIZE`] descriptors, whose rings begin
/// at multiples of `spacing`.
///
/// # Panics
///
/// The host is out of descriptors or threads.
pub(crate) fn activate(
    device: &dyn VirtioDevice,
    memory: &GuestMemoryMmap,
    features: u64,
    kicks: &[Arc<EventFd>],
    spacing: u64,
) {
    let queues = (0..).zip(kicks).map(|(index, kick)| {
        let base = spacing * (u64::from(index) + 1);
        let rings = Rings {
            size: SIZE,
            descriptors: base,
            available: base + 0x1000,
            used: base + 0x2000,
            event_index: features & 1 << 29 != 0,
        };
        let mut queue = Virtqueue::new(index, rings, memory.clone(), kick.clone(), Arc::new(Deaf))
            .expect("rings in RAM");
        queue.resume_at(Position::default());
        queue
    });
    let activation = Activation {
        memory: memory.clone(),
        features,
        queues: queues.collect(),
        interrupts: Arc::new(Deaf),
    };
    device.activate(activation).expect("descriptors, threads");
}

/// The driver of a subject's device.
pub struct Driver<'a> {
    subject: &'a dyn Subject,
    memory: GuestMemoryMmap,
    kicks: Vec<Arc<EventFd>>,
    features: u64,
    /// Queues that were waited for in vain, a bit each: nobody serves them.
    deserted: Cell<u64>,
}

impl<'a> Driver<'a> {
    /// Activates the device with all its queues and those of the features that it has.
    ///
    /// # Panics
    ///
    /// The host is out of descriptors or memory.
    pub fn new(subject: &'a dyn Subject, wanted: u64) -> Self {
        let device = subject.device();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let kick = |_| Arc::new(EventFd::from_flags(flags).expect("a descriptor"));
        let this = Self {
            features: wanted & (device.features() | device.ring_features() | 1 << 32),
            kicks: device.queue_sizes().iter().map(kick).collect(),
            subject,
            memory: memory.expect("memory"),
            deserted: Cell::new(0),
        };
        this.activate();
        this
    }

    fn activate(&self) {
        activate(
            self.subject.device(),
            &self.memory,
            self.features,
            &self.kicks,
            RINGS,
        );
    }

    /// Queues that nobody serves, a bit each.
    #[cfg(test)]
    pub(crate) fn deserted(&self) -> u64 {
        self.deserted.get()
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        // Beyond RAM there is nothing.
        let _ = self.memory.write_slice(bytes, GuestAddress(gpa));
    }

    /// Kicks, and waits until the device has looked; once only for a device that does not.
    fn kick(&self, queue: usize) {
        let kick = &self.kicks[queue];
        let _ = kick.write(1);
        let begun = std::time::Instant::now();
        let one = 1 << (queue % 64);
        while self.deserted.get() & one == 0 {
            let mut fds = [PollFd::new(kick.as_fd(), PollFlags::POLLIN)];
            let waiting = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready != 0);
            if !waiting {
                break;
            }
            if begun.elapsed() > PATIENCE {
                self.deserted.set(self.deserted.get() | one);
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        self.subject.settle();
    }

    /// Takes one step.
    ///
    /// # Panics
    ///
    /// The device was broken by its driver.
    pub fn step(&self, step: [u8; STEP]) {
        let [op, a, b, c, value @ ..] = step;
        let queue = usize::from(op >> 4) % self.kicks.len().max(1);
        let base = RINGS * (queue as u64 + 1);
        let device = self.subject.device();
        match op & 0xf {
            // A descriptor: which, where, flags and next, length.
            0..=2 => {
                let address = BUFFERS + u64::from(b) * BUFFER;
                let value = u32::from_le_bytes(value) & 0x1_ffff;
                let next = u32::from(c & 7) | u32::from(c >> 3) << 16;
                let words = [address as u32, 0, value, next].map(u32::to_le_bytes);
                self.write(base + 16 * u64::from(a), words.as_flattened());
            }
            // The same, of any kind.
            3 => self.write(base + 8 * u64::from(a), &step[2..]),
            // Bytes of a buffer.
            4 => self.write(
                BUFFERS + u64::from(a) * BUFFER + u64::from(b) * 4,
                &step[3..],
            ),
            // A request of the device's own kind in a buffer.
            5..=7 => {
                let request = self.subject.request([b, c, value[0], value[1], value[2]]);
                self.write(BUFFERS + u64::from(a) * BUFFER, &request);
            }
            // Requests: as many, from this place of the ring on, of these descriptors.
            8..=10 => {
                for (slot, head) in (u64::from(a)..).zip(value.iter().map(|head| head % 17)) {
                    let at = base + 0x1004 + 2 * (slot % u64::from(SIZE));
                    self.write(at, &u16::from(head).to_le_bytes());
                }
                self.write(base + 0x1002, &u16::from(b).to_le_bytes());
                self.kick(queue);
            }
            11 | 12 => {
                self.subject.outside(a, value);
                self.kick(queue);
            }
            13 => {
                if let Some(lifecycle) = device.lifecycle() {
                    lifecycle.freeze();
                    let _ = lifecycle.save();
                    lifecycle.thaw();
                }
            }
            14 => {
                let mut space = [0; 16];
                device.config_write(a.into(), &value);
                device.config_read(b.into(), &mut space);
            }
            _ => {
                let state = device.lifecycle().map(|lifecycle| {
                    lifecycle.freeze();
                    let state = lifecycle.save();
                    lifecycle.thaw();
                    (lifecycle, state)
                });
                device.reset();
                // Another process's device would be like this one.
                if let Some((lifecycle, Ok(state))) = state {
                    assert!(lifecycle.restore(&state).is_ok(), "{state:?}");
                }
                for queue in 1..=self.kicks.len() as u64 {
                    self.write(RINGS * queue + 0x1000, &[0; 4]);
                }
                self.activate();
            }
        }
    }
}

impl Drop for Driver<'_> {
    fn drop(&mut self) {
        self.subject.device().reset();
    }
}

/// Has a driver of the subject take the input's steps; true if there was one.
///
/// # Panics
///
/// The device was broken by its driver.
pub fn drive(subject: &dyn Subject, input: &[u8]) -> bool {
    let Some((features, steps)) = input.split_first_chunk::<8>() else {
        return false;
    };
    let driver = Driver::new(subject, u64::from_le_bytes(*features));
    for step in steps.chunks_exact(STEP).take(MAX_STEPS) {
        if let Ok(step) = step.try_into() {
            driver.step(step);
        }
    }
    steps.len() >= STEP
}

/// An input of these features and steps.
pub fn input(features: u64, steps: &[[u8; STEP]]) -> Vec<u8> {
    [&features.to_le_bytes()[..], steps.as_flattened()].concat()
}
