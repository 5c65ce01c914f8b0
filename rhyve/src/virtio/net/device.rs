//! The device: configuration, link, and two threads for each pair of queues its driver has set up.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use vmm_api::state::{DeviceState, StateError};

use super::config::{self, feature};
use super::control::{self, Command};
use super::filter::Filter;
use super::shared::{Counters, Shared};
use super::worker::{Work, Worker};
use super::{inspect, receive, transmit};
use crate::config::MacAddress;
use crate::lifecycle::{self, Lifecycle};
use crate::mevent::{Mevent, Source};
use crate::net::Backend;
use crate::virtio::{
    Activation, DeviceError, Inspection, Interrupts, QueueReset, VirtioDevice, Virtqueue,
    device_id, feature as common, kicks,
};

/// A network card.
pub struct Net {
    shared: Arc<Shared>,
    mevent: Arc<Mevent>,
    /// The address it has after a reset.
    mac: MacAddress,
    mtu: Option<u16>,
    pairs: u16,
    queue_sizes: Vec<u16>,
    running: Mutex<Running>,
    me: Weak<Self>,
}

#[derive(Default)]
struct Running {
    interrupts: Option<Arc<dyn Interrupts>>,
    features: u64,
    /// What the driver does for the host, by features' bits.
    offloads: u64,
    workers: Vec<Worker>,
    control: Option<(Virtqueue, Source)>,
    /// While it is frozen.
    frozen: Vec<Virtqueue>,
    /// From where another process's card goes on when it is activated.
    resumed: Option<Saved>,
}

impl Net {
    /// A card with this address at `backend`, with this many pairs of queues.
    pub fn new(
        mevent: Arc<Mevent>,
        backend: Arc<dyn Backend>,
        mac: MacAddress,
        mtu: Option<u16>,
        pairs: u16,
    ) -> Arc<Self> {
        let mut queue_sizes = vec![config::QUEUE_SIZE; 2 * usize::from(pairs)];
        queue_sizes.push(config::CONTROL_SIZE);
        Arc::new_cyclic(|me| Self {
            shared: Arc::new(Shared::new(backend, mac, pairs)),
            mevent,
            mac,
            mtu,
            pairs,
            queue_sizes,
            running: Mutex::default(),
            me: me.clone(),
        })
    }

    /// Plugs its cable in, or out; the driver hears of it.
    pub fn set_link(&self, up: bool) {
        if self.shared.plugged.swap(up, Relaxed) != up {
            self.shared.config_changed();
            // Who waits for room at the backend, or for frames.
            self.running().workers.iter().for_each(Worker::wake);
        }
    }

    /// What it has done so far.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to serve a queue.
    fn start(&self, running: &mut Running, queue: Virtqueue) -> Result<(), DeviceError> {
        let multi = running.features & feature::MQ != 0;
        let pairs = if multi { self.pairs } else { 1 };
        let (index, pair) = (queue.index(), queue.index() / 2);
        if index == 2 * pairs {
            // Without a feature that needs it, nobody may use it.
            if running.features & feature::CTRL_VQ != 0 {
                let serve = Self::serve_control;
                let kick = kicks::on_kick(&self.mevent, "virtio-net", &queue, &self.me, serve)?;
                running.control = Some((queue, kick));
            }
            return Ok(());
        }
        let port = self.shared.backend.port(pair).filter(|_| pair < pairs);
        let (Some(port), Some(interrupts)) = (port, running.interrupts.clone()) else {
            return Ok(());
        };
        let mergeable = running.features & feature::MRG_RXBUF != 0;
        let work = Work {
            shared: self.shared.clone(),
            queue,
            port,
            pair,
            header: header(running.features),
            mergeable,
            interrupts,
        };
        let worker = if index % 2 == 0 {
            Worker::start("net-rx", work, receive::run)
        } else {
            Worker::start("net-tx", work, transmit::run)
        };
        running.workers.push(worker.map_err(|source| DeviceError {
            action: "start a network card's thread",
            source,
        })?);
        Ok(())
    }

    /// Tells the backend what the driver does for it, and how many pairs it uses.
    fn configure(&self, running: &Running) {
        let offloads = config::guest_offloads(running.offloads);
        let backend = &self.shared.backend;
        if let Err(error) = backend.configure(header(running.features), offloads) {
            self.shared.complain(0, "say what the guest does", &error);
        }
    }

    /// Has `pairs` of queues used, and no others.
    fn set_pairs(&self, pairs: u16, running: &Running) {
        let active = &self.shared.active_pairs;
        // Nobody looks at a queue that the backend has closed.
        active.fetch_min(pairs, Relaxed);
        if let Err(error) = self.shared.backend.set_pairs(pairs) {
            self.shared.complain(0, "choose queues", &error);
        }
        active.store(pairs, Relaxed);
        running.workers.iter().for_each(Worker::wake);
    }

    /// Serves the control queue, on the event thread.
    fn serve_control(&self) {
        let mut running = self.running();
        let Some((mut queue, kick)) = running.control.take() else {
            return;
        };
        let _ = queue.kick().read();
        let more = queue.serve(|memory, chain| {
            let command = Command::parse(memory, chain);
            let done = command.is_some_and(|command| self.obey(&mut running, command));
            let counters = &self.shared.counters;
            counters.commands.fetch_add(1, Relaxed);
            if !done {
                counters.bad_requests.fetch_add(1, Relaxed);
            }
            let mut answer = chain.writer(memory);
            answer.write(&[if done { control::OK } else { control::ERR }]);
            answer.done()
        });
        if more {
            kicks::again(&queue);
        }
        running.control = Some((queue, kick));
    }

    /// Does what the driver commands; false if it may not, or if it makes no sense.
    fn obey(&self, running: &mut Running, command: Command) -> bool {
        if running.features & command.feature() == 0 {
            return false;
        }
        let mut receive = self.shared.receive();
        let (filter, mac) = &mut *receive;
        match command {
            Command::Receive(switch, on) => switch.set(filter, on),
            Command::Table { unicast, multicast } => {
                (filter.unicast, filter.multicast) = (unicast, multicast);
            }
            Command::Address(address) if address.is_unicast() => *mac = address,
            Command::Address(_) => return false,
            Command::Vlan(vlan, passes) => return filter.set_vlan(vlan, passes),
            Command::Pairs(pairs) if (1..=self.pairs).contains(&pairs) => {
                drop(receive);
                self.set_pairs(pairs, running);
            }
            Command::Pairs(_) => return false,
            Command::Offloads(bits) => {
                let allowed = running.features & config::all_guest_offloads();
                if bits & !allowed != 0 {
                    return false;
                }
                drop(receive);
                running.offloads = bits;
                self.configure(running);
            }
        }
        true
    }
}

/// Bytes in front of a frame (5.1.6).
fn header(features: u64) -> usize {
    if features & (feature::MRG_RXBUF | common::VERSION_1) != 0 {
        12
    } else {
        10
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        "virtio-net"
    }

    fn id(&self) -> u16 {
        device_id::NET
    }

    fn features(&self) -> u64 {
        config::features(self.shared.backend.info(), self.pairs, self.mtu.is_some())
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config_size(&self) -> usize {
        config::LEN
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let mac = self.shared.receive().1;
        let space = config::space(mac, self.shared.is_up(), self.pairs, self.mtu);
        for (to, from) in data.iter_mut().zip(space.iter().skip(offset)) {
            *to = *from;
        }
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        // Drivers without a command for it write their address here (5.1.4), a byte at a time.
        if self.running().features & feature::CTRL_MAC_ADDR != 0 {
            return;
        }
        let mut receive = self.shared.receive();
        let places = receive.1.0.iter_mut().skip(offset);
        places.zip(data).for_each(|(to, from)| *to = *from);
    }

    fn config_generation(&self) -> u8 {
        self.shared.generation.load(Relaxed)
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        let mut running = self.running();
        running.interrupts = Some(activation.interrupts.clone());
        running.features = activation.features;
        running.offloads = activation.features & config::all_guest_offloads();
        let mut pairs = 1;
        let mut filter = Filter::new(activation.has(feature::CTRL_VLAN));
        if let Some(saved) = running.resumed.take() {
            running.offloads &= saved.offloads;
            pairs = saved.pairs;
            filter = saved.filter;
        }
        self.shared.receive().0 = filter;
        self.shared.connect(Some(activation.interrupts));
        self.configure(&running);
        self.set_pairs(pairs, &running);
        for queue in activation.queues {
            if let Err(error) = self.start(&mut running, queue) {
                *running = Running::default();
                return Err(error);
            }
        }
        Ok(())
    }

    fn reset(&self) {
        // Each worker's drop waits for its end.
        *self.running() = Running::default();
        self.shared.connect(None);
        self.shared.active_pairs.store(1, Relaxed);
        *self.shared.receive() = (Filter::new(false), self.mac);
    }

    fn feature_names(&self) -> &'static [(u64, &'static str)] {
        inspect::FEATURES
    }

    fn inspect(&self) -> Inspection {
        inspect::inspection(&self.shared, self.pairs, self.mtu)
    }

    fn queue_reset(&self) -> Option<&dyn QueueReset> {
        Some(self)
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        Some(self)
    }
}

impl QueueReset for Net {
    fn stop_queue(&self, index: u16) {
        let mut running = self.running();
        // A worker's drop waits for its end.
        running.workers.retain(|worker| worker.queue != index);
        running.control.take_if(|(queue, _)| queue.index() == index);
    }

    fn start_queue(&self, queue: Virtqueue) -> Result<(), DeviceError> {
        self.start(&mut self.running(), queue)
    }
}

/// What a card has beyond its queues.
#[derive(Serialize, Deserialize)]
struct Saved {
    mac: MacAddress,
    plugged: bool,
    generation: u8,
    offloads: u64,
    pairs: u16,
    filter: Filter,
}

impl Lifecycle for Net {
    fn freeze(&self) {
        let mut running = self.running();
        let workers = std::mem::take(&mut running.workers);
        let queues = workers.into_iter().filter_map(Worker::finish);
        running.frozen.extend(queues);
        let control = running.control.take();
        running.frozen.extend(control.map(|(queue, _)| queue));
    }

    fn thaw(&self) {
        let mut running = self.running();
        for queue in std::mem::take(&mut running.frozen) {
            // What came meanwhile.
            let _ = queue.kick().write(1);
            if let Err(error) = self.start(&mut running, queue) {
                let (label, error) = (self.shared.label(), crate::chain(&error));
                tracing::error!(target: "rhyve::virtio::net", "{label}: {error}");
                if let Some(interrupts) = &running.interrupts {
                    interrupts.needs_reset();
                }
            }
        }
    }

    fn save(&self) -> Result<DeviceState, String> {
        let running = self.running();
        let (filter, mac) = self.shared.receive().clone();
        let saved = Saved {
            mac,
            plugged: self.shared.plugged.load(Relaxed),
            generation: self.shared.generation.load(Relaxed),
            offloads: running.offloads,
            pairs: self.shared.active_pairs.load(Relaxed),
            filter,
        };
        lifecycle::save(self.name(), 1, &saved)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Saved = lifecycle::load(self.name(), 1, state)?;
        if !(1..=self.pairs).contains(&saved.pairs) || !saved.filter.is_sensible() {
            let (label, pairs) = (self.shared.label(), saved.pairs);
            let text = format!("{label}: {pairs} pairs of queues, or filters, that cannot be");
            return Err(StateError::Value(text));
        }
        self.shared.receive().1 = saved.mac;
        self.shared.plugged.store(saved.plugged, Relaxed);
        self.shared.generation.store(saved.generation, Relaxed);
        self.running().resumed = Some(saved);
        Ok(())
    }
}
