//! virtio-rnd: the host's random numbers for the guest (5.4).
//!
//! It reads /dev/urandom straight into the driver's buffers, so that a file system of guest memory
//! that is full is an error of that read and not a signal.

use std::fs::File;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use vm_memory::{GuestMemoryMmap, ReadVolatile};

use vmm_api::state::{DeviceState, StateError};

use super::{
    Activation, Chain, DeviceError, Inspection, QueueReset, VirtioDevice, Virtqueue, device_id,
    kicks,
};
use crate::lifecycle::{self, Lifecycle};
use crate::mevent::{Mevent, Source, Timer};

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
    state: Mutex<State>,
    frozen: AtomicBool,
    requests: AtomicU64,
    bytes: AtomicU64,
    /// How often requests had to wait for the rate.
    waits: AtomicU64,
    errors: AtomicU64,
    me: Weak<Self>,
}

struct State {
    /// Bytes the guest may have now, if there is a limit. It outlives resets, or a driver would get
    /// around the limit by them.
    budget: Option<Budget>,
    running: Option<Running>,
}

struct Running {
    queue: Virtqueue,
    /// Wakes requests that wait for the rate.
    timer: Option<Timer>,
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
            state: Mutex::new(State {
                budget: rate.map(Budget::new),
                running: None,
            }),
            frozen: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            waits: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            me: me.clone(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves what is there, on the event thread.
    fn serve(&self) {
        let mut state = self.lock();
        let State { budget, running } = &mut *state;
        let Some(Running { queue, timer, .. }) = running.as_mut() else {
            return;
        };
        if self.frozen.load(SeqCst) {
            return;
        }
        let _ = queue.kick().read();
        queue.disable_kicks();
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = queue.pop() else { break };
            let wanted = chain.writable_len().min(MOST);
            if let (Some(budget), Some(timer)) = (&mut *budget, &*timer)
                && let Err(wait) = budget.spend(wanted)
            {
                queue.give_back(1);
                queue.signal();
                self.waits.fetch_add(1, Relaxed);
                timer.arm(wait);
                return;
            }
            let most = budget.as_ref().map_or(MOST, Budget::most);
            let written = self.fill(queue.memory(), &chain, wanted.min(most));
            queue.add_used(chain.head(), written);
            self.requests.fetch_add(1, Relaxed);
            self.bytes.fetch_add(written.into(), Relaxed);
        }
        queue.signal();
        if queue.enable_kicks() {
            kicks::again(queue);
        }
    }

    /// Fills the first bytes of a request, and says how many.
    fn fill(&self, memory: &GuestMemoryMmap, chain: &Chain, most: u32) -> u32 {
        let mut source = &self.source;
        let mut written = 0;
        for mut slice in chain.writer(memory).slices(most) {
            match source.read_exact_volatile(&mut slice) {
                Ok(()) => written += slice.len() as u32,
                Err(error) => {
                    // Guest memory on a full file system fails each time: once is enough.
                    if self.errors.fetch_add(1, Relaxed) == 0 {
                        tracing::warn!(target: "rhyve::virtio::rnd", "/dev/urandom: {error}");
                    }
                    break;
                }
            }
        }
        written
    }

    fn timer(&self) -> Result<Timer, DeviceError> {
        let me = self.me.clone();
        let timer = self.mevent.timer("virtio-rnd rate", move || {
            if let Some(me) = me.upgrade() {
                me.serve();
            }
        });
        timer.map_err(|source| DeviceError {
            action: "make a timer",
            source,
        })
    }
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
        activation
            .take(0)
            .map_or(Ok(()), |queue| self.start_queue(queue))
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        Some(self)
    }

    fn reset(&self) {
        self.stop_queue(0);
    }

    fn queue_reset(&self) -> Option<&dyn QueueReset> {
        Some(self)
    }

    fn inspect(&self) -> Inspection {
        let rate = self.rate.map_or("none".into(), |r| format!("{r} bytes/s"));
        Inspection {
            properties: vec![("source", "/dev/urandom".into()), ("limit", rate)],
            counters: vec![
                ("requests", self.requests.load(Relaxed)),
                ("bytes", self.bytes.load(Relaxed)),
                ("waits for the limit", self.waits.load(Relaxed)),
                ("host errors", self.errors.load(Relaxed)),
            ],
        }
    }
}

impl QueueReset for Rnd {
    fn stop_queue(&self, _: u16) {
        // The event thread serves with this lock held.
        self.lock().running = None;
    }

    fn start_queue(&self, queue: Virtqueue) -> Result<(), DeviceError> {
        let timer = self.rate.map(|_| self.timer()).transpose()?;
        let mut state = self.lock();
        let kick = kicks::on_kick(&self.mevent, "virtio-rnd", &queue, &self.me, Self::serve)?;
        state.running = Some(Running {
            queue,
            timer,
            _kick: kick,
        });
        Ok(())
    }
}

impl Lifecycle for Rnd {
    fn freeze(&self) {
        let running = self.lock();
        self.frozen.store(true, SeqCst);
        // The event thread serves with the lock held, all that it takes.
        drop(running);
    }

    fn thaw(&self) {
        self.frozen.store(false, SeqCst);
        if let Some(running) = &self.lock().running {
            let _ = running.queue.kick().write(1);
        }
    }

    fn save(&self) -> Result<DeviceState, String> {
        lifecycle::save(self.name(), 1, &())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        lifecycle::load(self.name(), 1, state)
    }
}

/// Bytes that may be given out: what has come in at a steady rate, up to one second's.
struct Budget {
    rate: NonZeroU64,
    bytes: u64,
    since: Instant,
}

impl Budget {
    fn new(rate: NonZeroU64) -> Self {
        Self {
            rate,
            bytes: rate.get(),
            since: Instant::now(),
        }
    }

    /// The most bytes for one request: a second's.
    fn most(&self) -> u32 {
        u32::try_from(self.rate.get()).unwrap_or(u32::MAX)
    }

    /// Takes the bytes for a request that wants so many, or says how long it is until they are there.
    /// None gets only a part of them: each answer takes an interrupt, and virtio_rng of Linux 6.1.192
    /// may wait for ever when it has got less than it has room for.
    fn spend(&mut self, wanted: u32) -> Result<(), Duration> {
        const SECOND: u128 = 1_000_000_000;
        let rate = u128::from(self.rate.get());
        let earned = self.since.elapsed().as_nanos().saturating_mul(rate) / SECOND;
        if earned >= rate {
            // What is more than a second's is lost.
            self.since = Instant::now();
            self.bytes = self.rate.get();
        } else {
            // Whole bytes, and the time they took: fractions are not lost, however often one asks.
            self.since += Duration::from_nanos((earned * SECOND / rate) as u64);
            let bytes = self.bytes.saturating_add(earned as u64);
            self.bytes = bytes.min(self.rate.get());
        }
        let wanted = u64::from(wanted.min(self.most()));
        match self.bytes.checked_sub(wanted) {
            Some(left) => {
                self.bytes = left;
                Ok(())
            }
            None => {
                let missing = u128::from(wanted - self.bytes);
                let wait = (missing * SECOND).div_ceil(rate);
                Err(Duration::from_nanos(wait as u64).max(Duration::from_millis(1)))
            }
        }
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
    fn its_queue_is_reset_and_comes_back() {
        let (rnd, mut driver, interrupts) = rig(None);
        rnd.activate(driver.activation(0, interrupts.clone()))
            .unwrap();
        let reset = rnd.queue_reset().unwrap();
        reset.stop_queue(0);
        driver.send(&[Buffer::Writable(64)]);
        driver.kick();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(driver.used(), None);
        let mut driver = GuestDriver::new(8);
        let first = driver.send(&[Buffer::Writable(64)]);
        reset.start_queue(driver.virtqueue(0, interrupts)).unwrap();
        assert_eq!(driver.wait_used(), (first.head, 64));
        rnd.reset();
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
        assert_eq!(bytes, 1800);
        let over = Duration::from_millis(u64::from(bytes.saturating_sub(1000)));
        assert!(start.elapsed() + Duration::from_millis(5) >= over);
        rnd.reset();
    }

    #[test]
    fn an_answer_waits_until_it_is_whole() {
        let (rnd, mut driver, interrupts) = rig(Some(1000));
        driver.send(&[Buffer::Writable(1000)]);
        let start = Instant::now();
        rnd.activate(driver.activation(0, interrupts)).unwrap();
        assert_eq!(driver.wait_used().1, 1000);
        for sent in [64, 164] {
            driver.send(&[Buffer::Writable(if sent == 64 { 64 } else { 100 })]);
            driver.kick();
            driver.wait_used();
            assert!(start.elapsed() >= Duration::from_millis(sent));
        }
        let bytes = ("bytes", 1164);
        assert!(rnd.inspect().counters.contains(&bytes));
        rnd.reset();
    }

    #[test]
    fn no_answer_is_empty() {
        let (rnd, mut driver, interrupts) = rig(Some(1));
        driver.send(&[Buffer::Writable(10)]);
        rnd.activate(driver.activation(0, interrupts.clone()))
            .unwrap();
        assert_eq!(driver.wait_used().1, 1);
        // From here on there is nothing for a second. The device looks as often as it can, for a
        // request that comes at any moment.
        let begun = Instant::now();
        for round in 0..500 {
            rnd.reset();
            let mut driver = GuestDriver::new(8);
            rnd.activate(driver.activation(0, interrupts.clone()))
                .unwrap();
            let kick = driver.kick_fd().clone();
            let kicking = std::thread::spawn(move || {
                for _ in 0..100 {
                    kick.write(1).unwrap();
                }
            });
            std::thread::sleep(Duration::from_micros(round % 50));
            driver.send(&[Buffer::Writable(10)]);
            kicking.join().unwrap();
            std::thread::sleep(Duration::from_micros(100));
            let answer = driver.used().map_or(1, |(_, written)| written);
            assert_ne!(answer, 0, "round {round}, {:?}", begun.elapsed());
        }
        rnd.reset();
    }

    #[test]
    fn a_reset_brings_no_new_bytes() {
        let (rnd, mut driver, interrupts) = rig(Some(4000));
        let start = Instant::now();
        let mut bytes = 0;
        for _ in 0..5 {
            driver.send(&[Buffer::Writable(2000)]);
            rnd.activate(driver.activation(0, interrupts.clone()))
                .unwrap();
            bytes += driver.wait_used().1;
            rnd.reset();
            driver = GuestDriver::new(8);
        }
        let allowed = 4000 + 4 * (start.elapsed().as_millis() as u32 + 1);
        assert!(bytes <= allowed, "{bytes} of {allowed}");
        let counters = rnd.inspect().counters;
        assert_eq!(counters[..2], [("requests", 5), ("bytes", bytes.into())]);
    }
}
