//! virtio-rnd: the host's random numbers for the guest (5.4).
//!
//! It reads /dev/urandom straight into the driver's buffers, so that a file system of guest memory
//! that is full is an error of that read and not a signal.

use std::fs::File;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use vm_memory::{GuestMemoryMmap, ReadVolatile};

use super::{Activation, Chain, DeviceError, VirtioDevice, Virtqueue, device_id};
use crate::mevent::{Mevent, Ready, Source, Timer};

/// bhyve's queue (usr.sbin/bhyve/pci_virtio_rnd.c).
const QUEUE_SIZE: u16 = 64;
/// The most bytes for one request: a device may write fewer than there is room for, and the event
/// thread has other things to do.
const MOST: u32 = 4096;

/// The device.
pub struct Rnd {
    mevent: Arc<Mevent>,
    rate: Option<NonZeroU64>,
    source: File,
    running: Mutex<Option<Running>>,
    me: Weak<Self>,
}

struct Running {
    queue: Virtqueue,
    /// Bytes the guest may have now, if there is a limit.
    budget: Option<Budget>,
    _kick: Source,
}

impl Rnd {
    /// A source of at most `rate` bytes a second.
    ///
    /// # Errors
    /// The host has no /dev/urandom.
    pub fn new(mevent: Arc<Mevent>, rate: Option<NonZeroU64>) -> Result<Arc<Self>, DeviceError> {
        let source = File::open("/dev/urandom").map_err(|source| DeviceError {
            action: "open /dev/urandom",
            source,
        })?;
        Ok(Arc::new_cyclic(|me| Self {
            mevent,
            rate,
            source,
            running: Mutex::default(),
            me: me.clone(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves what is there, on the event thread.
    fn serve(&self) {
        let mut running = self.lock();
        let Some(Running { queue, budget, .. }) = running.as_mut() else {
            return;
        };
        let _ = queue.kick().read();
        let mut exhausted = false;
        queue.disable_kicks();
        for _ in 0..QUEUE_SIZE {
            let allowed = budget.as_mut().map_or(MOST, Budget::available);
            if allowed == 0 {
                exhausted = true;
                break;
            }
            let Some(chain) = queue.pop() else { break };
            let written = fill(&self.source, queue.memory(), &chain, allowed);
            if let Some(budget) = budget {
                budget.spend(written);
            }
            queue.add_used(chain.head(), written);
        }
        queue.signal();
        if exhausted {
            if let Some(budget) = budget {
                budget.timer.arm(budget.wait());
            }
        } else if queue.enable_kicks() {
            // Others on the event thread come first.
            let _ = queue.kick().write(1);
        }
    }

    fn timer(&self, rate: NonZeroU64) -> std::io::Result<Budget> {
        let me = self.me.clone();
        let timer = self.mevent.timer("virtio-rnd rate", move || {
            if let Some(me) = me.upgrade() {
                me.serve();
            }
        })?;
        Ok(Budget::new(rate, timer))
    }
}

/// Fills the first bytes of a request, and says how many.
fn fill(source: &File, memory: &GuestMemoryMmap, chain: &Chain, most: u32) -> u32 {
    let mut source = source;
    let mut written = 0;
    for mut slice in chain.writer(memory).slices(most) {
        match source.read_exact_volatile(&mut slice) {
            Ok(()) => written += slice.len() as u32,
            Err(error) => {
                tracing::warn!(target: "rhyve::virtio::rnd", "/dev/urandom: {error}");
                break;
            }
        }
    }
    written
}

impl VirtioDevice for Rnd {
    fn name(&self) -> &'static str {
        "virtio-rnd"
    }

    fn id(&self) -> u16 {
        device_id::ENTROPY
    }

    fn features(&self) -> u64 {
        super::feature::IN_ORDER
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn activate(&self, mut activation: Activation) -> Result<(), DeviceError> {
        let Some(queue) = activation.take(0) else {
            return Ok(());
        };
        let no_event = |source| DeviceError {
            action: "wait for the driver",
            source,
        };
        let budget = self.rate.map(|rate| self.timer(rate)).transpose();
        let kick = std::os::fd::AsFd::as_fd(&queue).try_clone_to_owned();
        let me = self.me.clone();
        let kick = self.mevent.add(
            "virtio-rnd",
            kick.map_err(no_event)?,
            Ready::READ,
            move |_| {
                if let Some(me) = me.upgrade() {
                    me.serve();
                }
            },
        );
        // There may be requests already.
        let _ = queue.kick().write(1);
        *self.lock() = Some(Running {
            queue,
            budget: budget.map_err(no_event)?,
            _kick: kick,
        });
        Ok(())
    }

    fn reset(&self) {
        // The event thread serves with this lock held.
        *self.lock() = None;
    }
}

/// Bytes that may be given out: what has come in at a steady rate, up to one second's.
struct Budget {
    rate: NonZeroU64,
    bytes: u64,
    since: Instant,
    timer: Timer,
}

impl Budget {
    fn new(rate: NonZeroU64, timer: Timer) -> Self {
        Self {
            rate,
            bytes: rate.get(),
            since: Instant::now(),
            timer,
        }
    }

    /// Bytes there are, for one request.
    fn available(&mut self) -> u32 {
        let now = Instant::now();
        let passed = now.duration_since(self.since).as_nanos();
        let earned = passed.saturating_mul(self.rate.get().into()) / 1_000_000_000;
        if earned != 0 {
            self.since = now;
            let earned = u64::try_from(earned).unwrap_or(u64::MAX);
            self.bytes = self.bytes.saturating_add(earned).min(self.rate.get());
        }
        u32::try_from(self.bytes).unwrap_or(u32::MAX).min(MOST)
    }

    fn spend(&mut self, bytes: u32) {
        self.bytes = self.bytes.saturating_sub(bytes.into());
    }

    /// How long until there is a byte, or what comes in a tenth of a second.
    fn wait(&self) -> Duration {
        Duration::from_secs_f64(1.0 / self.rate.get() as f64).max(Duration::from_millis(100))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Buffer, FakeInterrupts, GuestDriver};

    fn rig(rate: Option<u64>) -> (Arc<Rnd>, GuestDriver, Arc<FakeInterrupts>) {
        let mevent = Mevent::start().unwrap();
        let rnd = Rnd::new(mevent, rate.and_then(NonZeroU64::new)).unwrap();
        (rnd, GuestDriver::new(8), FakeInterrupts::new())
    }

    #[test]
    fn requests_are_filled_before_and_after_a_kick() {
        let (rnd, mut driver, interrupts) = rig(None);
        let first = driver.send(&[Buffer::Writable(64), Buffer::Writable(64)]);
        rnd.activate(driver.activation(0, interrupts.clone()))
            .unwrap();
        assert_eq!(driver.wait_used(), (first.head, 128));
        let bytes = driver.received(&first);
        assert!(bytes.iter().filter(|&&byte| byte != 0xaa).count() > 100);
        assert_ne!(bytes[..64], bytes[64..]);

        let large = driver.send(&[Buffer::Writable(10_000)]);
        driver.kick();
        assert_eq!(driver.wait_used(), (large.head, MOST));
        let none = driver.send(&[Buffer::Readable(vec![1])]);
        driver.kick();
        assert_eq!(driver.wait_used(), (none.head, 0));

        rnd.reset();
        rnd.reset();
        driver.send(&[Buffer::Writable(1)]);
        driver.kick();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(driver.used(), None);
        assert!(!interrupts.queues().is_empty());
    }

    #[test]
    fn a_rate_is_kept() {
        let (rnd, mut driver, interrupts) = rig(Some(1000));
        for _ in 0..3 {
            driver.send(&[Buffer::Writable(600)]);
        }
        let start = Instant::now();
        rnd.activate(driver.activation(0, interrupts)).unwrap();
        let (mut bytes, mut answers) = (0, 0);
        while answers < 3 {
            bytes += driver.wait_used().1;
            answers += 1;
        }
        // A second's worth was there; what came after it took its time.
        assert!((1000..=1800).contains(&bytes), "{bytes}");
        let over = Duration::from_millis(u64::from(bytes.saturating_sub(1000)));
        assert!(start.elapsed() + Duration::from_millis(5) >= over);
        rnd.reset();
    }
}
