//! virtio-vsock: streams between programs of the guest and programs of the host (5.10).
//!
//! ```text
//!  transmit queue --> Header::read --> Running::take --> Connection (a buffer) --> unix socket
//!  receive queue  <-- data, as far as there is credit <-- unix socket
//!                 <-- answers (Running::pending)
//!  PATH: a program of the host asks for a port of the guest; PATH_P: one that is port P of the host
//! ```
//!
//! Nothing is kept without a bound: the guest's bytes up to what it was told there is room for, its
//! packets as long as their answers find buffers. A guest that breaks the rules loses the connection
//! concerned. It has a thread of its own, for there may be many connections.

mod connection;
mod host;
mod packet;
mod running;
mod saved;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use self::connection::{Connection, Phase};
use self::host::Listener;
use self::packet::Ports;
use self::running::Running;
use super::{
    Activation, DeviceError, Inspection, QueueReset, VirtioDevice, Virtqueue, device_id, feature,
    kicks,
};
use crate::config::VsockSpec;
use crate::lifecycle::Lifecycle;
use crate::mevent::{Mevent, Ready, Source};
use crate::unix_socket::SocketFile;

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
/// The queues.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENTS: u16 = 2;
/// Answers that wait for buffers, before the guest's packets are left unread.
const MOST_PENDING: usize = 256;
/// The first port that programs of the host get, above those that programs choose.
const FIRST_PORT: u32 = 1 << 30;

/// What was counted.
#[derive(Default)]
struct Counters {
    connections: AtomicU64,
    refused: AtomicU64,
    packets_in: AtomicU64,
    packets_out: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    bad: AtomicU64,
}

/// The device.
pub struct Vsock {
    cid: u32,
    mevent: Arc<Mevent>,
    listener: Listener,
    counters: Counters,
    /// It goes on from another process's, which had connections that are no more.
    moved: AtomicBool,
    running: Mutex<Option<Running>>,
    me: Weak<Self>,
}

impl Vsock {
    /// A device whose guest has the context id and whose host has the socket that `spec` says, for as
    /// long as there is the socket's file.
    ///
    /// # Errors
    /// The socket or the thread cannot be made.
    pub fn new(spec: &VsockSpec) -> Result<(Arc<Self>, SocketFile), DeviceError> {
        let error = |action| move |source| DeviceError { action, source };
        let mevent = Mevent::start().map_err(error("start its thread"))?;
        let (listener, file) = Listener::bind(&spec.path).map_err(error("listen at its socket"))?;
        let device = Arc::new_cyclic(|me| Self {
            cid: spec.cid,
            mevent,
            listener,
            counters: Counters::default(),
            moved: AtomicBool::new(false),
            running: Mutex::default(),
            me: me.clone(),
        });
        Ok((device, file))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has something done on the event thread when `fd` is ready.
    fn source(
        &self,
        fd: &impl AsFd,
        interest: Ready,
        act: impl Fn(&Self, &mut Running, Ready) + Send + 'static,
    ) -> io::Result<Source> {
        let me = self.me.clone();
        let fd = fd.as_fd().try_clone_to_owned()?;
        let call = move |ready| {
            if let Some(me) = me.upgrade()
                && let Some(running) = me.lock().as_mut()
                && !running.frozen
            {
                act(&me, running, ready);
                running.send_pending(&me);
            }
        };
        Ok(self.mevent.add("virtio-vsock", fd, interest, call))
    }

    /// Looks at both queues.
    fn serve(&self) {
        let mut running = self.lock();
        let Some(running) = running.as_mut() else {
            return;
        };
        if running.frozen {
            let queues = running.receive.iter().chain(&running.transmit);
            queues.for_each(|queue| _ = queue.kick().read());
            return;
        }
        running.tell_moved();
        running.send_pending(self);
        running.take_packets(self);
        running.send_pending(self);
        if running.pending.len() < MOST_PENDING {
            let left = running.transmit.iter().filter(|queue| queue.has_requests());
            left.for_each(kicks::again);
        }
        let room = running.has_room();
        running.connections.values().for_each(|c| c.wait(room));
    }

    fn on_kick(&self, queue: &Virtqueue) -> Result<Source, DeviceError> {
        kicks::on_kick(&self.mevent, "virtio-vsock", queue, &self.me, Self::serve)
    }

    fn connection(&self, ports: Ports, stream: UnixStream, phase: Phase) -> io::Result<Connection> {
        let source = self.source(&stream, Ready::empty(), move |me, running, ready| {
            running.ready(me, ports, ready);
        })?;
        self.counters.connections.fetch_add(1, Relaxed);
        Ok(Connection::new(stream, source, phase))
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        "virtio-vsock"
    }

    fn id(&self) -> u16 {
        device_id::VSOCK
    }

    fn features(&self) -> u64 {
        // VIRTIO_VSOCK_F_STREAM (5.10.3).
        1 << 0 | feature::IN_ORDER
    }

    fn queue_sizes(&self) -> &[u16] {
        // The third is for events.
        &[QUEUE_SIZE; 3]
    }

    fn config_size(&self) -> usize {
        8
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let space = u64::from(self.cid).to_le_bytes();
        for (to, from) in data.iter_mut().zip(space.iter().skip(offset)) {
            *to = *from;
        }
    }

    fn activate(&self, mut activation: Activation) -> Result<(), DeviceError> {
        let error = |source| DeviceError {
            action: "wait for programs of the host",
            source,
        };
        let mut running = self.lock();
        let kicks = activation
            .queues
            .iter()
            .map(|queue| Ok((queue.index(), self.on_kick(queue)?)))
            .collect::<Result<_, DeviceError>>()?;
        let listener = self.listener.duplicate().map_err(error)?;
        let accept = self.source(&listener, Ready::READ, |me, running, _| running.accept(me));
        *running = Some(Running {
            receive: activation.take(RECEIVE),
            transmit: activation.take(TRANSMIT),
            connections: HashMap::new(),
            greetings: BTreeMap::new(),
            next_greeting: 0,
            next_port: FIRST_PORT,
            pending: VecDeque::new(),
            spare: None,
            events: activation.take(EVENTS),
            moved: self.moved.swap(false, Relaxed),
            frozen: false,
            accept: accept.map_err(error)?,
            kicks,
        });
        Ok(())
    }

    fn reset(&self) {
        // The event thread works with this lock held.
        *self.lock() = None;
    }

    fn queue_reset(&self) -> Option<&dyn QueueReset> {
        Some(self)
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        Some(self)
    }

    fn feature_names(&self) -> &'static [(u64, &'static str)] {
        &[
            (1 << 0, "stream"),
            (1 << 1, "seqpacket"),
            (1 << 2, "no-implied-stream"),
        ]
    }

    fn inspect(&self) -> Inspection {
        let open = self.lock().as_ref().map_or(0, |r| r.connections.len());
        let count = |counter: &AtomicU64| counter.load(Relaxed);
        let Counters {
            connections,
            refused,
            packets_in,
            packets_out,
            bytes_in,
            bytes_out,
            bad,
        } = &self.counters;
        Inspection {
            properties: vec![
                ("cid", self.cid.to_string()),
                ("socket", self.listener.path().display().to_string()),
                ("open", format!("{open} connections")),
            ],
            counters: vec![
                ("connections", count(connections)),
                ("refused", count(refused)),
                ("packets from the guest", count(packets_in)),
                ("packets to the guest", count(packets_out)),
                ("bytes from the guest", count(bytes_in)),
                ("bytes to the guest", count(bytes_out)),
                ("bad packets", count(bad)),
            ],
        }
    }
}

impl QueueReset for Vsock {
    fn stop_queue(&self, index: u16) {
        // The event thread works with this lock held.
        if let Some(running) = self.lock().as_mut() {
            running.kicks.remove(&index);
            running.set_queue(index, None);
        }
    }

    fn start_queue(&self, queue: Virtqueue) -> Result<(), DeviceError> {
        if let Some(running) = self.lock().as_mut() {
            let index = queue.index();
            running.kicks.insert(index, self.on_kick(&queue)?);
            running.set_queue(index, Some(queue));
        }
        Ok(())
    }
}
