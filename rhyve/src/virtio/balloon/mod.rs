//! virtio-balloon: memory that a guest lends back to its host (5.5).
//!
//! ```text
//!  vmmctl --set-balloon --> target in the configuration --> driver takes pages from its kernel
//!  inflate queue:   page numbers --> runs of pages --> Reclaim: a hole in the memory file
//!  deflate queue:   page numbers --> counted; a touched page is there again, full of zeros
//!  reporting queue: ranges the guest does not use --> holes, too; nothing is asked for
//!  stats queue:     one buffer, which stays here until somebody looks: then it goes back, and comes
//!                   again with new numbers
//! ```
//!
//! A guest can give away only what is its own: page numbers that are not RAM are counted and passed
//! over.

mod saved;
mod stats;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;

use self::stats::Stats;
use super::{
    Activation, Chain, DeviceError, Inspection, Interrupts, QueueReset, VirtioDevice, Virtqueue,
    device_id, feature as common, kicks,
};
use crate::lifecycle::Lifecycle;
use crate::mevent::{Mevent, Source};

/// Bytes of a balloon's page, whatever the guest's are (5.5.6).
const PAGE: u64 = 4096;
/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 128;
/// Page numbers of one request that are looked at: four times what Linux sends (drivers/virtio/
/// virtio_balloon.c, VIRTIO_BALLOON_ARRAY_PFNS_MAX).
const MOST_PAGES: u32 = 1024;
/// Bytes of the configuration: the target, and what the driver has reached, in pages.
const CONFIG: usize = 8;
const ACTUAL: usize = 4;

/// Feature bits (5.5.3).
mod feature {
    pub const STATS_VQ: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const REPORTING: u64 = 1 << 5;

    pub const NAMES: &[(u64, &str)] = &[
        (1 << 0, "must-tell-host"),
        (STATS_VQ, "stats-vq"),
        (DEFLATE_ON_OOM, "deflate-on-oom"),
        (1 << 3, "free-page-hint"),
        (1 << 4, "page-poison"),
        (REPORTING, "page-reporting"),
    ];
}

/// Whoever takes memory that the guest does not want.
pub trait Reclaim: Send + Sync {
    /// Gives `len` bytes at guest-physical `gpa` back to the host; when the guest touches them again
    /// they are there, and zero. Whole pages of RAM, or an error.
    ///
    /// # Errors
    /// They are not RAM, or the host's file system cannot do it.
    fn release(&self, gpa: u64, len: u64) -> io::Result<()>;
}

impl Reclaim for vmm_api::memory::GuestRam {
    fn release(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.punch(gpa, len).map_err(io::Error::other)
    }
}

/// The device.
pub struct Balloon {
    mevent: Arc<Mevent>,
    reclaim: Arc<dyn Reclaim>,
    /// Pages of RAM: the most the target can be.
    most: u32,
    reporting: bool,
    /// Pages the guest is asked for.
    target: AtomicU32,
    /// Pages the driver says it has given.
    actual: AtomicU32,
    counters: Counters,
    state: Mutex<State>,
    /// New statistics have come.
    told: Condvar,
    me: Weak<Self>,
}

#[derive(Default)]
struct Counters {
    inflated: AtomicU64,
    deflated: AtomicU64,
    /// Bytes.
    reported: AtomicU64,
    bad: AtomicU64,
    errors: AtomicU64,
}

#[derive(Default)]
struct State {
    running: Option<Running>,
    stats: Stats,
    frozen: bool,
}

struct Running {
    interrupts: Arc<dyn Interrupts>,
    inflate: Option<Virtqueue>,
    deflate: Option<Virtqueue>,
    stats: Option<Virtqueue>,
    reporting: Option<Virtqueue>,
    /// The statistics' buffer, which the driver waits for.
    stats_buffer: Option<u16>,
    /// The queues' numbers, in the order of [`Running::queues`].
    numbers: [Option<u16>; 4],
    kicks: BTreeMap<u16, Source>,
}

impl Running {
    fn queues(&mut self) -> [&mut Option<Virtqueue>; 4] {
        [
            &mut self.inflate,
            &mut self.deflate,
            &mut self.stats,
            &mut self.reporting,
        ]
    }

    /// Where the queue with this number is.
    fn place(&mut self, number: u16) -> Option<&mut Option<Virtqueue>> {
        let mut numbers = self.numbers.iter();
        let at = numbers.position(|known| *known == Some(number))?;
        self.queues().into_iter().nth(at)
    }
}

impl Balloon {
    /// A balloon in `memory` bytes of RAM, which `reclaim` gives back; with `reporting`, also what
    /// the guest does not use by itself.
    pub fn new(
        mevent: Arc<Mevent>,
        reclaim: Arc<dyn Reclaim>,
        memory: u64,
        reporting: bool,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            mevent,
            reclaim,
            most: u32::try_from(memory / PAGE).unwrap_or(u32::MAX),
            reporting,
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            counters: Counters::default(),
            state: Mutex::default(),
            told: Condvar::new(),
            me: me.clone(),
        })
    }

    /// Asks the guest for this many bytes in all, rounded down to pages and to what RAM there is;
    /// how soon, and whether, it gives them is the driver's affair. Returns what it was asked for.
    pub fn set_target(&self, bytes: u64) -> u64 {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        let pages = pages.min(self.most);
        let state = self.lock();
        self.target.store(pages, Relaxed);
        if let Some(running) = &state.running {
            running.interrupts.signal_config();
        }
        u64::from(pages) * PAGE
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves all queues, on the event thread.
    fn serve(&self) {
        let mut state = self.lock();
        let State {
            running,
            stats,
            frozen,
        } = &mut *state;
        let Some(running) = running else { return };
        for queue in running.queues().into_iter().flatten() {
            let _ = queue.kick().read();
        }
        if *frozen {
            return;
        }
        let more = |queue: &Virtqueue, more: bool| {
            if more {
                kicks::again(queue);
            }
        };
        if let Some(queue) = &mut running.inflate {
            let left = queue.serve(|memory, chain| self.inflate(memory, chain));
            more(queue, left);
        }
        if let Some(queue) = &mut running.deflate {
            let left = queue.serve(|_, chain| {
                let pages = u64::from(chain.readable_len() / 4);
                self.counters.deflated.fetch_add(pages, Relaxed);
                0
            });
            more(queue, left);
        }
        if let Some(queue) = &mut running.reporting {
            let left = queue.serve(|_, chain| self.report(chain));
            more(queue, left);
        }
        if let Some(queue) = &mut running.stats {
            // Others are to have their turn, whatever the driver sends.
            for _ in 0..queue.size() {
                let Some(chain) = queue.pop() else { break };
                stats.update(chain.reader(queue.memory()));
                // One is enough; a driver that sends more gets the older one back.
                if let Some(head) = running.stats_buffer.replace(chain.head()) {
                    queue.add_used(head, 0);
                    queue.signal();
                }
                self.told.notify_all();
            }
            let left = queue.enable_kicks();
            more(queue, left);
        }
    }

    /// Takes the pages whose numbers are in a request, in runs.
    fn inflate(&self, memory: &GuestMemoryMmap, chain: &Chain) -> u32 {
        let mut reader = chain.reader(memory);
        if chain.readable_len() / 4 > MOST_PAGES || !chain.readable_len().is_multiple_of(4) {
            self.counters.bad.fetch_add(1, Relaxed);
            return 0;
        }
        let numbers = std::iter::from_fn(|| reader.read_obj::<u32>());
        let mut numbers: Vec<u32> = numbers.map(u32::from_le).collect();
        numbers.sort_unstable();
        numbers.dedup();
        for run in numbers.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let Some(&first) = run.first() else { continue };
            let pages = run.len() as u64;
            match self.reclaim.release(u64::from(first) * PAGE, pages * PAGE) {
                Ok(()) => _ = self.counters.inflated.fetch_add(pages, Relaxed),
                Err(_) if run.len() > 1 => {
                    // One of them may not be RAM: that one is the driver's fault, not the others.
                    run.iter().for_each(|&page| self.take(page));
                }
                Err(error) => self.complain(&error),
            }
        }
        0
    }

    fn take(&self, page: u32) {
        match self.reclaim.release(u64::from(page) * PAGE, PAGE) {
            Ok(()) => _ = self.counters.inflated.fetch_add(1, Relaxed),
            Err(error) => self.complain(&error),
        }
    }

    /// Takes what the guest says it does not use: a request's buffers are it (5.5.6.7).
    fn report(&self, chain: &Chain) -> u32 {
        for segment in chain.writable() {
            // Whole pages only: what is beside them is in use.
            let start = segment.address.0.next_multiple_of(PAGE);
            let end = (segment.address.0 + u64::from(segment.len)) / PAGE * PAGE;
            if start >= end {
                self.counters.bad.fetch_add(1, Relaxed);
                continue;
            }
            match self.reclaim.release(start, end - start) {
                Ok(()) => _ = self.counters.reported.fetch_add(end - start, Relaxed),
                Err(error) => self.complain(&error),
            }
        }
        0
    }

    fn complain(&self, error: &io::Error) {
        let count = self.counters.errors.fetch_add(1, Relaxed) + 1;
        // A driver may send nonsense as fast as it can.
        if count.is_power_of_two() {
            tracing::warn!(target: "rhyve::virtio::balloon", "{error} (error {count})");
        }
    }

    /// Has the driver send new statistics, and waits a moment for them.
    fn refresh(&self) -> Stats {
        const PATIENCE: Duration = Duration::from_millis(50);
        let mut state = self.lock();
        let before = state.stats.updates();
        let asked = state.running.as_mut().is_some_and(|running| {
            let (queue, buffer) = (running.stats.as_mut(), running.stats_buffer.take());
            let Some((queue, head)) = queue.zip(buffer) else {
                return false;
            };
            queue.add_used(head, 0);
            queue.signal();
            true
        });
        let deadline = Instant::now() + PATIENCE;
        while asked && state.stats.updates() == before {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.told.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.stats.clone()
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &'static str {
        "virtio-balloon"
    }

    fn id(&self) -> u16 {
        device_id::BALLOON
    }

    fn features(&self) -> u64 {
        // Without PAGE_POISON a Linux that fills free pages with something does not report them.
        let reporting = if self.reporting {
            feature::REPORTING
        } else {
            0
        };
        feature::STATS_VQ | feature::DEFLATE_ON_OOM | reporting | common::IN_ORDER
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 4]
    }

    fn config_size(&self) -> usize {
        CONFIG
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let [target, actual] = [&self.target, &self.actual].map(|n| n.load(Relaxed).to_le_bytes());
        let space = target.iter().chain(&actual);
        for (to, from) in data.iter_mut().zip(space.skip(offset)) {
            *to = *from;
        }
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let mut actual = self.actual.load(Relaxed).to_le_bytes();
        for (at, &byte) in (offset..CONFIG).zip(data) {
            let to = at.checked_sub(ACTUAL).and_then(|at| actual.get_mut(at));
            to.into_iter().for_each(|to| *to = byte);
        }
        self.actual.store(u32::from_le_bytes(actual), Relaxed);
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        // Queues that are not negotiated have no number (Linux and QEMU agree on that).
        let mut next = 2;
        let mut optional = |feature| {
            let there = activation.has(feature);
            let number = next;
            next += u16::from(there);
            there.then_some(number)
        };
        let numbers = [
            Some(0),
            Some(1),
            optional(feature::STATS_VQ),
            optional(feature::REPORTING),
        ];
        self.lock().running = Some(Running {
            interrupts: activation.interrupts,
            inflate: None,
            deflate: None,
            stats: None,
            reporting: None,
            stats_buffer: None,
            numbers,
            kicks: BTreeMap::new(),
        });
        let mut queues = activation.queues.into_iter();
        let started = queues.try_for_each(|queue| self.start_queue(queue));
        if started.is_err() {
            self.lock().running = None;
        }
        started
    }

    fn reset(&self) {
        // The event thread serves with this lock held.
        let mut state = self.lock();
        state.running = None;
        state.stats = Stats::default();
        // A driver that is gone holds nothing back: its pages are any guest's again.
        self.actual.store(0, Relaxed);
    }

    fn feature_names(&self) -> &'static [(u64, &'static str)] {
        feature::NAMES
    }

    fn queue_reset(&self) -> Option<&dyn QueueReset> {
        Some(self)
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        Some(self)
    }

    fn inspect(&self) -> Inspection {
        let mib = |pages: &AtomicU32| {
            let bytes = u64::from(pages.load(Relaxed)) * PAGE;
            vmm_api::memory::MemSize(bytes).to_string()
        };
        let mut properties = vec![("target", mib(&self.target)), ("actual", mib(&self.actual))];
        properties.extend(self.refresh().shown());
        let Counters {
            inflated,
            deflated,
            reported,
            bad,
            errors,
        } = &self.counters;
        Inspection {
            properties,
            counters: vec![
                ("pages inflated", inflated.load(Relaxed)),
                ("pages deflated", deflated.load(Relaxed)),
                ("bytes reported", reported.load(Relaxed)),
                ("bad requests", bad.load(Relaxed)),
                ("errors", errors.load(Relaxed)),
            ],
        }
    }
}

impl QueueReset for Balloon {
    fn stop_queue(&self, index: u16) {
        // The event thread serves with this lock held.
        let mut state = self.lock();
        let Some(running) = &mut state.running else {
            return;
        };
        running.kicks.remove(&index);
        if let Some(place) = running.place(index) {
            *place = None;
        }
        if running.stats.is_none() {
            running.stats_buffer = None;
        }
    }

    fn start_queue(&self, queue: Virtqueue) -> Result<(), DeviceError> {
        let mut state = self.lock();
        // A queue that was not negotiated is nobody's.
        let Some(running) = &mut state.running else {
            return Ok(());
        };
        let index = queue.index();
        let Some(place) = running.place(index) else {
            return Ok(());
        };
        let kick = kicks::on_kick(
            &self.mevent,
            "virtio-balloon",
            &queue,
            &self.me,
            Self::serve,
        )?;
        *place = Some(queue);
        running.kicks.insert(index, kick);
        Ok(())
    }
}
