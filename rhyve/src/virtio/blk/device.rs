//! The device: configuration, and a worker for each queue its driver has set up.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_api::state::{DeviceState, StateError, WrittenDisk};

use super::config::{self, feature};
use super::inspect;
use super::worker::{Work, Worker};
use crate::block::engine::Engine;
use crate::block::{Backend, BlockError, Info};
use crate::config::BlockSpec;
use crate::lifecycle::{self, Lifecycle};
use crate::virtio::{
    Activation, DeviceError, Inspection, QueueReset, VirtioDevice, Virtqueue, device_id,
};
use crate::virtio::{Interrupts, feature as common};

/// Bytes of a disk's serial number, padded with NULs.
pub(super) const ID_LEN: usize = 20;

/// What a disk has done, for whoever looks from outside.
#[derive(Debug, Default)]
pub struct Counters {
    /// Reads that succeeded.
    pub reads: AtomicU64,
    /// Bytes of them.
    pub bytes_read: AtomicU64,
    /// Writes that succeeded.
    pub writes: AtomicU64,
    /// Bytes of them.
    pub bytes_written: AtomicU64,
    /// Flushes that succeeded.
    pub flushes: AtomicU64,
    /// Discards and write-zeroes that succeeded.
    pub discards: AtomicU64,
    /// Requests the host could not serve.
    pub host_errors: AtomicU64,
    /// Requests that were none, or asked for what is not there.
    pub bad_requests: AtomicU64,
}

/// What the device and its workers share.
pub(super) struct Shared {
    pub backend: Arc<dyn Backend>,
    pub id: [u8; ID_LEN],
    /// What the log calls it.
    pub label: String,
    /// Writes may complete before they are stable (5.2.6.2).
    pub writeback: AtomicBool,
    /// The driver is a legacy one.
    pub legacy: AtomicBool,
    pub counters: Counters,
}

/// A disk.
pub struct Blk {
    shared: Arc<Shared>,
    engine: Engine,
    image: Option<WrittenDisk>,
    queue_sizes: Vec<u16>,
    /// Held while the size changes and while the configuration is read.
    generation: Mutex<u8>,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    workers: Vec<Worker>,
    /// While it is frozen.
    frozen: Vec<Virtqueue>,
    interrupts: Option<Arc<dyn Interrupts>>,
}

impl Blk {
    /// A disk whose sectors are in `backend`, with this many queues.
    ///
    /// # Errors
    /// The engine that is asked for cannot be had.
    pub fn new(
        spec: &BlockSpec,
        backend: Arc<dyn Backend>,
        queues: u16,
    ) -> Result<Arc<Self>, BlockError> {
        let engine = Engine::choose(spec, &*backend)?;
        let info = backend.info();
        Ok(Arc::new(Self {
            shared: Arc::new(Shared {
                backend,
                id: id(spec),
                label: spec.path.display().to_string(),
                writeback: AtomicBool::new(true),
                legacy: AtomicBool::new(false),
                counters: Counters::default(),
            }),
            engine,
            image: spec.written((info.logical, info.physical)),
            queue_sizes: vec![config::QUEUE_SIZE; queues.into()],
            generation: Mutex::default(),
            running: Mutex::default(),
        }))
    }

    /// Who moves its bytes.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Its image, if the guest may write to it.
    pub fn image(&self) -> Option<&WrittenDisk> {
        self.image.as_ref()
    }

    /// What it has done so far.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// What the disk is.
    pub fn info(&self) -> Info {
        self.shared.backend.info()
    }

    /// Makes the disk larger, or without a size as large as its image has become, and tells the
    /// driver. Returns its bytes.
    ///
    /// # Errors
    /// Those of [`Backend::resize`]; the disk is as large as before then.
    pub fn resize(&self, capacity: Option<u64>) -> io::Result<u64> {
        {
            let mut generation = self.generation();
            self.shared.backend.resize(capacity)?;
            *generation = generation.wrapping_add(1);
        }
        if let Some(interrupts) = &self.running().interrupts {
            interrupts.signal_config();
        }
        Ok(self.info().capacity)
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn generation(&self) -> MutexGuard<'_, u8> {
        self.generation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn queues(&self) -> u16 {
        u16::try_from(self.queue_sizes.len()).unwrap_or(u16::MAX)
    }

    fn start(&self, running: &mut Running, queue: Virtqueue) -> Result<(), DeviceError> {
        let Some(interrupts) = running.interrupts.clone() else {
            return Ok(());
        };
        let work = Work {
            shared: self.shared.clone(),
            engine: self.engine,
            queue,
            interrupts,
        };
        let worker = Worker::start(work).map_err(|source| DeviceError {
            action: "start a disk's thread",
            source,
        })?;
        running.workers.push(worker);
        Ok(())
    }
}

impl VirtioDevice for Blk {
    fn name(&self) -> &'static str {
        "virtio-blk"
    }

    fn id(&self) -> u16 {
        device_id::BLOCK
    }

    fn features(&self) -> u64 {
        config::features(&self.info(), self.queues())
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config_size(&self) -> usize {
        config::LEN
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let _generation = self.generation();
        let writeback = self.shared.writeback.load(Ordering::SeqCst);
        let space = config::space(&self.info(), self.queues(), writeback);
        for (to, from) in data.iter_mut().zip(space.iter().skip(offset)) {
            *to = *from;
        }
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let byte = config::WRITEBACK.checked_sub(offset);
        if let Some(byte) = byte.and_then(|at| data.get(at)) {
            self.shared.writeback.store(byte & 1 != 0, Ordering::SeqCst);
        }
    }

    fn config_generation(&self) -> u8 {
        *self.generation()
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        // Without FLUSH nobody would ask for what was written to be made stable. A driver that has
        // CONFIG_WCE as well may say otherwise later (5.2.5.1, 5.2.6.2).
        if !activation.has(feature::FLUSH) {
            self.shared.writeback.store(false, Ordering::SeqCst);
        }
        let legacy = !activation.has(common::VERSION_1);
        self.shared.legacy.store(legacy, Ordering::SeqCst);
        let mut running = self.running();
        running.interrupts = Some(activation.interrupts);
        for queue in activation.queues {
            if let Err(error) = self.start(&mut running, queue) {
                *running = Running::default();
                return Err(error);
            }
        }
        Ok(())
    }

    fn reset(&self) {
        // Each worker's drop waits for what it has under way.
        let running = std::mem::take(&mut *self.running());
        let ran = !running.workers.is_empty();
        drop(running);
        // A guest that ends does so by a reset: what it wrote is not to depend on what comes next.
        if ran && let Err(error) = self.shared.backend.flush() {
            tracing::error!(target: "rhyve::virtio::blk", "{}: flush: {error}", self.shared.label);
        }
        self.shared.writeback.store(true, Ordering::SeqCst);
    }

    fn feature_names(&self) -> &'static [(u64, &'static str)] {
        inspect::FEATURES
    }

    fn inspect(&self) -> Inspection {
        inspect::inspection(&self.shared, self.engine)
    }

    fn queue_reset(&self) -> Option<&dyn QueueReset> {
        Some(self)
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        Some(self)
    }
}

/// What a disk has beyond its queues.
#[derive(Serialize, Deserialize)]
struct Saved {
    /// A disk of another size is another disk.
    capacity: u64,
    writeback: bool,
    generation: u8,
}

impl Lifecycle for Blk {
    fn freeze(&self) {
        let mut running = self.running();
        let workers = std::mem::take(&mut running.workers);
        let queues = workers.into_iter().filter_map(Worker::finish);
        running.frozen.extend(queues);
        drop(running);
        // What was answered is on the disk, whatever becomes of the host before it goes on.
        if let Err(error) = self.shared.backend.flush() {
            tracing::error!(target: "rhyve::virtio::blk", "{}: flush: {error}", self.shared.label);
        }
    }

    fn thaw(&self) {
        let mut running = self.running();
        for queue in std::mem::take(&mut running.frozen) {
            // What came meanwhile.
            let _ = queue.kick().write(1);
            if let Err(error) = self.start(&mut running, queue) {
                let error = crate::chain(&error);
                tracing::error!(target: "rhyve::virtio::blk", "{}: {error}", self.shared.label);
                if let Some(interrupts) = &running.interrupts {
                    interrupts.needs_reset();
                }
            }
        }
    }

    fn save(&self) -> Result<DeviceState, String> {
        if self.shared.backend.is_fleeting() {
            let label = &self.shared.label;
            return Err(format!(
                "what was written to {label} is in memory and ends with this process, as `snapshot` \
                 says: leave that out"
            ));
        }
        let saved = Saved {
            capacity: self.info().capacity,
            writeback: self.shared.writeback.load(Ordering::SeqCst),
            generation: *self.generation(),
        };
        lifecycle::save(self.name(), 1, &saved)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Saved = lifecycle::load(self.name(), 1, state)?;
        let now = self.info().capacity;
        if saved.capacity != now {
            return Err(StateError::Value(format!(
                "{}: the disk had {} bytes, this one has {now}",
                self.shared.label, saved.capacity
            )));
        }
        self.shared
            .writeback
            .store(saved.writeback, Ordering::SeqCst);
        *self.generation() = saved.generation;
        Ok(())
    }
}

impl QueueReset for Blk {
    fn stop_queue(&self, index: u16) {
        let mut running = self.running();
        let stopped = running
            .workers
            .extract_if(.., |worker| worker.queue() == index);
        stopped.for_each(drop);
    }

    fn start_queue(&self, queue: Virtqueue) -> Result<(), DeviceError> {
        self.start(&mut self.running(), queue)
    }
}

/// The serial number as a driver reads it.
fn id(spec: &BlockSpec) -> [u8; ID_LEN] {
    let text = spec.serial();
    let mut id = [0; ID_LEN];
    for (to, from) in id.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    id
}
