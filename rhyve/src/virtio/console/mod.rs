//! virtio-console: serial ports without a UART (5.3).
//!
//! ```text
//!  transmit queue --> Port::transmit --> Console (the wire) --> terminal, socket, file
//!  receive queue  <-- Port::receive  <-- Console            <--
//!  control queues: which ports there are, their names, who has them open, the terminal's size
//! ```
//!
//! Each port is a wire as a serial port's: flow control is by room, so a reader that is slow loses
//! nothing. A port whose name begins with `console` is one that the guest logs in on (Linux: hvc0);
//! any other is a plain pair of streams (/dev/virtio-ports/NAME), and input for it waits until a
//! program of the guest opens it. All is done on the event thread.

mod control;
mod port;
mod saved;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use self::control::{Message, event};
pub use self::port::Port;
use self::port::PortState;
use self::saved::Saved;
use super::{
    Activation, DeviceError, Inspection, Interrupts, QueueReset, VirtioDevice, Virtqueue,
    device_id, feature as common, kicks,
};
use crate::console::{Console, GuestEnd};
use crate::lifecycle::Lifecycle;
use crate::mevent::{Mevent, Source};

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 64;
/// The queues before the second port's.
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;
/// Bytes of the configuration: columns, rows, number of ports, emergency write.
const CONFIG: usize = 12;
const EMERGENCY: usize = 8;
/// Messages for the driver that wait for buffers, before its own are left unread.
const MOST_PENDING: usize = 64;

/// Feature bits (5.3.3).
mod feature {
    pub const SIZE: u64 = 1 << 0;
    pub const MULTIPORT: u64 = 1 << 1;
    pub const EMERG_WRITE: u64 = 1 << 2;

    pub const NAMES: &[(u64, &str)] = &[
        (SIZE, "size"),
        (MULTIPORT, "multiport"),
        (EMERG_WRITE, "emerg-write"),
    ];
}

/// What was counted.
#[derive(Default)]
struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
    control: AtomicU64,
    bad: AtomicU64,
}

/// The device.
pub struct VirtioConsole {
    mevent: Arc<Mevent>,
    ports: Vec<Port>,
    queue_sizes: Vec<u16>,
    counters: Counters,
    generation: AtomicU8,
    state: Mutex<State>,
    me: Weak<Self>,
}

#[derive(Default)]
struct State {
    running: Option<Running>,
    frozen: bool,
    /// From where another process's device goes on when it is activated.
    resumed: Option<Saved>,
}

struct Running {
    interrupts: Arc<dyn Interrupts>,
    multiport: bool,
    ports: Vec<PortState>,
    control_receive: Option<Virtqueue>,
    control_transmit: Option<Virtqueue>,
    /// For the driver.
    pending: VecDeque<Message>,
    kicks: BTreeMap<u16, Source>,
}

impl VirtioConsole {
    /// A device with these ports, the first of which is all that a driver without MULTIPORT sees.
    pub fn new(mevent: Arc<Mevent>, ports: Vec<Port>) -> Arc<Self> {
        Arc::new_cyclic(|me: &Weak<Self>| {
            for port in &ports {
                port.wire.connect_guest(me.clone());
            }
            // Two for each port, and two for control behind the first port's.
            let queues = 2 * ports.len() + 2;
            Self {
                mevent,
                ports,
                queue_sizes: vec![QUEUE_SIZE; queues],
                counters: Counters::default(),
                generation: AtomicU8::new(0),
                state: Mutex::default(),
                me: me.clone(),
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn on_kick(&self, queue: &Virtqueue) -> Result<Source, DeviceError> {
        kicks::on_kick(&self.mevent, "virtio-console", queue, &self.me, Self::serve)
    }

    fn first(&self) -> Option<&Arc<Console>> {
        self.ports.first().map(|port| &port.wire)
    }

    /// Looks at everything, on the event thread.
    fn serve(&self) {
        let mut state = self.lock();
        let frozen = state.frozen;
        let Some(running) = state.running.as_mut() else {
            return;
        };
        if frozen {
            // Thawing looks for what they are about.
            running.queues().for_each(|q| _ = q.kick().read());
            return;
        }
        running.control_in(self);
        running.news(self);
        let full = running.pending.len() >= MOST_PENDING;
        running.control_out();
        if full && running.pending.len() < MOST_PENDING {
            // There may be messages that were left unread.
            running.control_transmit.iter().for_each(kicks::again);
        }
        for (port, state) in self.ports.iter().zip(&mut running.ports) {
            state.transmit(port, &self.counters);
            state.receive(port, &self.counters);
        }
    }
}

impl Running {
    fn queues(&self) -> impl Iterator<Item = &Virtqueue> {
        let control = self.control_receive.iter().chain(&self.control_transmit);
        control.chain(self.ports.iter().flat_map(PortState::queues))
    }

    /// Has the queue with this number be that, or none.
    fn set_queue(&mut self, number: u16, queue: Option<Virtqueue>) {
        match number {
            CONTROL_RECEIVE => self.control_receive = queue,
            CONTROL_TRANSMIT => self.control_transmit = queue,
            _ => {
                // Control stands behind the first port's queues.
                let port = usize::from(number.saturating_sub(CONTROL_RECEIVE) / 2);
                if let Some(port) = self.ports.get_mut(port) {
                    port.set_queue(number.is_multiple_of(2), queue);
                }
            }
        }
    }

    /// Reads what the driver says.
    fn control_in(&mut self, device: &VirtioConsole) {
        let Some(mut queue) = self.control_transmit.take() else {
            return;
        };
        let _ = queue.kick().read();
        for _ in 0..queue.size() {
            // Else a driver that reads nothing would have us remember everything.
            if self.pending.len() >= MOST_PENDING {
                break;
            }
            let Some(chain) = queue.pop() else { break };
            let message = Message::read(chain.reader(queue.memory()));
            queue.add_used(chain.head(), 0);
            let understood = message.is_some_and(|message| self.take(device, &message));
            let counters = &device.counters;
            let count = if understood {
                &counters.control
            } else {
                &counters.bad
            };
            count.fetch_add(1, Relaxed);
        }
        queue.signal();
        // What is left is read when the driver has taken what waits for it.
        if queue.enable_kicks() && self.pending.len() < MOST_PENDING {
            kicks::again(&queue);
        }
        self.control_transmit = Some(queue);
    }

    /// Does what a message says; false if it is none.
    fn take(&mut self, device: &VirtioConsole, message: &Message) -> bool {
        if message.event == event::DEVICE_READY {
            if message.value == 1 {
                let ports = (0..).zip(&self.ports);
                let added = ports.map(|(id, _)| Message::new(id, event::PORT_ADD, 1));
                self.pending.extend(added);
            }
            return true;
        }
        let index = usize::try_from(message.id).unwrap_or(usize::MAX);
        let port = device.ports.get(index).zip(self.ports.get_mut(index));
        let Some((port, state)) = port else {
            return false;
        };
        match message.event {
            event::PORT_READY if message.value == 1 => {
                state.ready = true;
                if port.console {
                    let console = Message::new(message.id, event::CONSOLE_PORT, 1);
                    self.pending.push_back(console);
                }
                let name = Message::new(message.id, event::PORT_NAME, 1);
                self.pending.push_back(name.with(port.name.as_bytes()));
                // Who is there, and how large the terminal is, is news now.
                (state.told_open, state.told_size) = (None, None);
            }
            // It could not be added.
            event::PORT_READY => state.ready = false,
            event::PORT_OPEN => state.open = message.value != 0,
            _ => return false,
        }
        true
    }

    /// Tells the driver what has changed at the host's ends.
    fn news(&mut self, device: &VirtioConsole) {
        if !self.multiport {
            if let (Some(port), Some(state)) = (device.ports.first(), self.ports.first_mut()) {
                let size = port.wire.size();
                if state.told_size != size {
                    state.told_size = size;
                    device.generation.fetch_add(1, Relaxed);
                    self.interrupts.signal_config();
                }
            }
            return;
        }
        let ports = device.ports.iter().zip(&mut self.ports);
        for (id, (port, state)) in (0..).zip(ports) {
            if !state.ready || self.pending.len() >= MOST_PENDING {
                continue;
            }
            let attended = port.wire.is_attended();
            if state.told_open != Some(attended) {
                state.told_open = Some(attended);
                let open = Message::new(id, event::PORT_OPEN, attended.into());
                self.pending.push_back(open);
            }
            let size = port.wire.size().filter(|_| port.console);
            if state.told_size != size {
                state.told_size = size;
                self.pending
                    .extend(size.map(|size| Message::resize(id, size)));
            }
        }
    }

    /// Hands out what waits, as far as there are buffers.
    fn control_out(&mut self) {
        let Some(queue) = &mut self.control_receive else {
            return;
        };
        let _ = queue.kick().read();
        while let Some(message) = self.pending.front() {
            let Some(chain) = queue.pop() else { break };
            let mut writer = chain.writer(queue.memory());
            writer.write(&message.bytes());
            queue.add_used(chain.head(), writer.done());
            self.pending.pop_front();
        }
        queue.signal();
        if queue.enable_kicks() && !self.pending.is_empty() {
            kicks::again(queue);
        }
    }
}

impl GuestEnd for VirtioConsole {
    fn console_event(&self) {
        self.serve();
    }
}

impl VirtioDevice for VirtioConsole {
    fn name(&self) -> &'static str {
        "virtio-console"
    }

    fn id(&self) -> u16 {
        device_id::CONSOLE
    }

    fn features(&self) -> u64 {
        feature::SIZE | feature::MULTIPORT | feature::EMERG_WRITE | common::IN_ORDER
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config_size(&self) -> usize {
        CONFIG
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let size = self.first().and_then(|wire| wire.size());
        let (columns, rows) = size.unwrap_or((80, 25));
        let ports = u32::try_from(self.ports.len()).unwrap_or(u32::MAX);
        let space = [
            &columns.to_le_bytes()[..],
            &rows.to_le_bytes(),
            &ports.to_le_bytes(),
            &[0; 4],
        ];
        for (to, from) in data.iter_mut().zip(space.concat().iter().skip(offset)) {
            *to = *from;
        }
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        // A driver that has no queues yet, or no longer: one byte at a time (5.3.5).
        let byte = EMERGENCY.checked_sub(offset).and_then(|at| data.get(at));
        if let (Some(&byte), Some(wire)) = (byte, self.first()) {
            wire.send(byte);
        }
    }

    fn config_generation(&self) -> u8 {
        self.generation.load(Relaxed)
    }

    fn activate(&self, mut activation: Activation) -> Result<(), DeviceError> {
        let multiport = activation.has(feature::MULTIPORT);
        let mut state = self.lock();
        let kicks = activation
            .queues
            .iter()
            .map(|queue| Ok((queue.index(), self.on_kick(queue)?)));
        let kicks = kicks.collect::<Result<_, DeviceError>>()?;
        let mut ports = Vec::new();
        for number in (0u16..).take(self.ports.len()) {
            // Control stands behind the first port's queues.
            let first = if number == 0 { 0 } else { 2 * number + 2 };
            let (receive, transmit) = (activation.take(first), activation.take(first + 1));
            // Without control there is the first port only, and it is open.
            let there = !multiport && number == 0;
            ports.push(PortState::new(receive, transmit, there));
        }
        let pending = match state.resumed.take() {
            Some(saved) => saved.resume(&mut ports),
            None => VecDeque::new(),
        };
        state.running = Some(Running {
            interrupts: activation.interrupts.clone(),
            multiport,
            ports,
            control_receive: activation.take(CONTROL_RECEIVE),
            control_transmit: activation.take(CONTROL_TRANSMIT),
            pending,
            kicks,
        });
        Ok(())
    }

    fn reset(&self) {
        // The event thread serves with this lock held.
        self.lock().running = None;
    }

    fn queue_reset(&self) -> Option<&dyn QueueReset> {
        Some(self)
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        Some(self)
    }

    fn feature_names(&self) -> &'static [(u64, &'static str)] {
        feature::NAMES
    }

    fn inspect(&self) -> Inspection {
        let state = self.lock();
        let states = state.running.iter().flat_map(|running| &running.ports);
        let open: Vec<bool> = states.map(|state| state.open).collect();
        drop(state);
        let ports = self.ports.iter().enumerate().map(|(index, port)| {
            let guest = open.get(index).copied().unwrap_or(false);
            port.describe(guest)
        });
        let count = |counter: &AtomicU64| counter.load(Relaxed);
        Inspection {
            properties: vec![("ports", ports.collect::<Vec<_>>().join("; "))],
            counters: vec![
                ("bytes from the guest", count(&self.counters.sent)),
                ("bytes to the guest", count(&self.counters.received)),
                ("control messages", count(&self.counters.control)),
                ("bad requests", count(&self.counters.bad)),
            ],
        }
    }
}

impl QueueReset for VirtioConsole {
    fn stop_queue(&self, index: u16) {
        // The event thread serves with this lock held.
        if let Some(running) = &mut self.lock().running {
            running.kicks.remove(&index);
            running.set_queue(index, None);
        }
    }

    fn start_queue(&self, queue: Virtqueue) -> Result<(), DeviceError> {
        if let Some(running) = &mut self.lock().running {
            let index = queue.index();
            running.kicks.insert(index, self.on_kick(&queue)?);
            running.set_queue(index, Some(queue));
        }
        Ok(())
    }
}
