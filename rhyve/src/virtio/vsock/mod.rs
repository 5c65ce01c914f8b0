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
mod saved;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_memory::{ReadVolatile, VolatileMemoryError};

use self::connection::{Connection, Phase};
use self::host::{Greeting, Heard, Listener};
use self::packet::{HEADER, HOST, Header, NO_RECEIVE, NO_SEND, Ports, STREAM, op};
use super::{
    Activation, Chain, DeviceError, Inspection, QueueReset, Reader, VirtioDevice, Virtqueue,
    device_id, feature, kicks,
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
/// Connections at a time.
const MOST_CONNECTIONS: usize = 1023;
/// Programs that have connected and not said what they want.
const MOST_GREETINGS: usize = 64;
/// Answers that wait for buffers, before the guest's packets are left unread.
const MOST_PENDING: usize = 256;
/// Packets in a row for one connection.
const BURST: usize = 16;
/// The most bytes of a packet to the guest.
const MOST_DATA: u32 = 64 << 10;
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

struct Running {
    receive: Option<Virtqueue>,
    transmit: Option<Virtqueue>,
    connections: HashMap<Ports, Connection>,
    greetings: BTreeMap<u64, (Greeting, Source)>,
    next_greeting: u64,
    next_port: u32,
    /// Packets without data for the guest.
    pending: VecDeque<Header>,
    /// A buffer of the guest's that was taken and not used.
    spare: Option<Chain>,
    /// The guest is to hear on this queue that its connections are no more.
    events: Option<Virtqueue>,
    moved: bool,
    frozen: bool,
    accept: Source,
    kicks: BTreeMap<u16, Source>,
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

impl Running {
    /// Has the queue with this number be that, or none.
    fn set_queue(&mut self, number: u16, queue: Option<Virtqueue>) {
        match number {
            RECEIVE => (self.receive, self.spare) = (queue, None),
            TRANSMIT => self.transmit = queue,
            _ => self.events = queue,
        }
    }

    fn has_room(&self) -> bool {
        self.spare.is_some() || self.receive.as_ref().is_some_and(Virtqueue::has_requests)
    }

    /// Reads what the guest sends.
    fn take_packets(&mut self, device: &Vsock) {
        let Some(mut queue) = self.transmit.take() else {
            return;
        };
        let _ = queue.kick().read();
        queue.disable_kicks();
        for _ in 0..queue.size() {
            if self.pending.len() >= MOST_PENDING {
                break;
            }
            let Some(chain) = queue.pop() else { break };
            device.counters.packets_in.fetch_add(1, Relaxed);
            let mut reader = chain.reader(queue.memory());
            match Header::read(&mut reader) {
                Some(header) => self.take(device, &header, reader),
                None => _ = device.counters.bad.fetch_add(1, Relaxed),
            }
            queue.add_used(chain.head(), 0);
        }
        queue.signal();
        // Whoever called looks for more.
        let _ = queue.enable_kicks();
        self.transmit = Some(queue);
    }

    /// Does what a packet says.
    fn take(&mut self, device: &Vsock, header: &Header, data: Reader<'_, '_>) {
        let ports = header.ports();
        let ours = header.src_cid == u64::from(device.cid)
            && header.dst_cid == HOST
            && header.kind == STREAM
            && header.len <= data.remaining();
        if !ours {
            device.counters.bad.fetch_add(1, Relaxed);
            self.connections.remove(&ports);
            if header.op != op::RST {
                let answer = Header::to_guest(device.cid, ports, op::RST);
                self.pending.push_back(Header {
                    kind: header.kind,
                    ..answer
                });
            }
            return;
        }
        if header.op == op::REQUEST {
            return self.request(device, header);
        }
        let Some(connection) = self.connections.get_mut(&ports) else {
            if header.op != op::RST {
                self.reset(device, ports);
            }
            return;
        };
        connection.heard(header);
        match (header.op, connection.phase) {
            (op::RESPONSE, Phase::Asked) => {
                connection.phase = Phase::Open;
                let line = format!("OK {}\n", ports.host);
                if (&connection.stream).write_all(line.as_bytes()).is_err() {
                    self.reset(device, ports);
                }
            }
            (op::RST, phase) => {
                if phase == Phase::Asked {
                    let refused = b"ERR the guest refuses: nobody listens there\n";
                    let _ = (&connection.stream).write_all(refused);
                    device.counters.refused.fetch_add(1, Relaxed);
                }
                self.connections.remove(&ports);
            }
            (op::RW, Phase::Open) => {
                if connection.peer_shut & NO_SEND != 0 || !push(connection, header.len, data) {
                    device.counters.bad.fetch_add(1, Relaxed);
                    return self.reset(device, ports);
                }
                let bytes = u64::from(header.len);
                device.counters.bytes_in.fetch_add(bytes, Relaxed);
                self.flush(device, ports);
            }
            (op::SHUTDOWN, Phase::Open) => {
                connection.peer_shut |= header.flags & (NO_RECEIVE | NO_SEND);
                self.flush(device, ports);
            }
            (op::CREDIT_UPDATE, _) => {}
            (op::CREDIT_REQUEST, _) => self.answer(device, ports, op::CREDIT_UPDATE),
            _ => {
                device.counters.bad.fetch_add(1, Relaxed);
                return self.reset(device, ports);
            }
        }
        self.wait(ports);
    }

    /// The guest wants a port of the host.
    fn request(&mut self, device: &Vsock, header: &Header) {
        let ports = header.ports();
        let room = self.connections.len() < MOST_CONNECTIONS;
        if !room || self.connections.contains_key(&ports) {
            device.counters.refused.fetch_add(1, Relaxed);
            return self.reset(device, ports);
        }
        let stream = device.listener.dial(ports.host);
        match stream.and_then(|stream| device.connection(ports, stream, Phase::Open)) {
            Ok(mut connection) => {
                connection.heard(header);
                self.connections.insert(ports, connection);
                self.answer(device, ports, op::RESPONSE);
                self.wait(ports);
            }
            Err(error) => {
                let port = ports.host;
                tracing::info!(target: "rhyve::virtio::vsock", "port {port}: {error}");
                device.counters.refused.fetch_add(1, Relaxed);
                self.reset(device, ports);
            }
        }
    }

    /// Hands a program the guest's bytes, and sees what comes of it.
    fn flush(&mut self, device: &Vsock, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        match connection.flush() {
            Ok(_) if connection.is_done() => self.reset(device, ports),
            Ok(true) => self.answer(device, ports, op::CREDIT_UPDATE),
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(target: "rhyve::virtio::vsock", "{ports:?}: {error}");
                self.reset(device, ports);
            }
        }
    }

    /// A program's socket is ready.
    fn ready(&mut self, device: &Vsock, ports: Ports, ready: Ready) {
        self.flush(device, ports);
        for _ in 0..BURST {
            let wants = |connection: &&mut Connection| connection.wants_input();
            let Some(connection) = self.connections.get_mut(&ports).filter(wants) else {
                break;
            };
            let Some(queue) = &mut self.receive else {
                break;
            };
            let Some(chain) = self.spare.take().or_else(|| queue.pop()) else {
                if queue.enable_kicks() {
                    kicks::again(queue);
                }
                break;
            };
            let room = chain.writable_len().saturating_sub(HEADER);
            if room == 0 {
                device.counters.bad.fetch_add(1, Relaxed);
                queue.add_used(chain.head(), 0);
                continue;
            }
            let most = room.min(connection.credit()).min(MOST_DATA);
            let mut writer = chain.writer(queue.memory());
            let mut header = writer.clone();
            writer.skip(HEADER);
            match read(&connection.stream, writer.slices(most)) {
                Ok(0) => {
                    self.spare = Some(chain);
                    self.end(device, ports, ready.contains(Ready::HANGUP));
                }
                Ok(count) => {
                    let mut packet = Header::to_guest(device.cid, ports, op::RW);
                    packet.len = count;
                    connection.spend(count);
                    connection.tell(&mut packet);
                    header.write(&packet.bytes());
                    queue.add_used(chain.head(), HEADER.saturating_add(count));
                    device.counters.packets_out.fetch_add(1, Relaxed);
                    device.counters.bytes_out.fetch_add(count.into(), Relaxed);
                }
                Err(error) => {
                    self.spare = Some(chain);
                    if error.kind() != ErrorKind::WouldBlock {
                        self.reset(device, ports);
                    }
                    break;
                }
            }
        }
        if let Some(queue) = &mut self.receive {
            queue.signal();
        }
        self.wait(ports);
    }

    /// The program sends no more, and if it is `gone` takes no more either.
    fn end(&mut self, device: &Vsock, ports: Ports, gone: bool) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        let mut packet = Header::to_guest(device.cid, ports, op::SHUTDOWN);
        packet.flags = NO_SEND | if gone { NO_RECEIVE } else { 0 };
        connection.tell(&mut packet);
        connection.ended = true;
        self.pending.push_back(packet);
        if gone {
            self.connections.remove(&ports);
        }
    }

    /// Waits for what can go on with a connection.
    fn wait(&mut self, ports: Ports) {
        let room = self.has_room();
        if let Some(connection) = self.connections.get(&ports) {
            connection.wait(room);
        }
    }

    /// Ends a connection, or says that there is none.
    fn reset(&mut self, device: &Vsock, ports: Ports) {
        self.connections.remove(&ports);
        self.pending
            .push_back(Header::to_guest(device.cid, ports, op::RST));
    }

    /// Sends a packet that needs no more words.
    fn answer(&mut self, device: &Vsock, ports: Ports, op: u16) {
        let mut packet = Header::to_guest(device.cid, ports, op);
        if let Some(connection) = self.connections.get_mut(&ports) {
            connection.tell(&mut packet);
        }
        self.pending.push_back(packet);
    }

    /// Hands out answers, as far as the guest has buffers.
    fn send_pending(&mut self, device: &Vsock) {
        let Some(queue) = &mut self.receive else {
            return;
        };
        let _ = queue.kick().read();
        while let Some(packet) = self.pending.front() {
            let Some(chain) = self.spare.take().or_else(|| queue.pop()) else {
                break;
            };
            if chain.writable_len() < HEADER {
                device.counters.bad.fetch_add(1, Relaxed);
                queue.add_used(chain.head(), 0);
                continue;
            }
            chain.writer(queue.memory()).write(&packet.bytes());
            queue.add_used(chain.head(), HEADER);
            device.counters.packets_out.fetch_add(1, Relaxed);
            self.pending.pop_front();
        }
        queue.signal();
        if queue.enable_kicks() && !self.pending.is_empty() {
            kicks::again(queue);
        }
    }

    /// Lets a program of the host in.
    fn accept(&mut self, device: &Vsock) {
        let stream = match device.listener.accept() {
            Ok(stream) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => {
                tracing::warn!(target: "rhyve::virtio::vsock", "accept: {error}");
                // Out of descriptors: the program stays there, so do not spin.
                std::thread::sleep(std::time::Duration::from_millis(10));
                return;
            }
        };
        if self.greetings.len() >= MOST_GREETINGS {
            // Whoever has said nothing for longest.
            self.greetings.pop_first();
        }
        let number = self.next_greeting;
        self.next_greeting += 1;
        let source = device.source(&stream, Ready::READ, move |me, running, _| {
            running.greet(me, number);
        });
        if let Ok(source) = source {
            self.greetings
                .insert(number, (Greeting::new(stream), source));
        }
    }

    /// A program says what it wants.
    fn greet(&mut self, device: &Vsock, number: u64) {
        let Some((greeting, _)) = self.greetings.get_mut(&number) else {
            return;
        };
        let heard = greeting.read();
        if heard == Heard::Part {
            return;
        }
        let Some((Greeting { stream, .. }, _)) = self.greetings.remove(&number) else {
            return;
        };
        let refuse = |why: &str| {
            device.counters.refused.fetch_add(1, Relaxed);
            let _ = (&stream).write_all(format!("ERR {why}\n").as_bytes());
        };
        let Heard::Port(guest) = heard else {
            return refuse("write CONNECT and a port in one line, as in CONNECT 1024");
        };
        if self.connections.len() >= MOST_CONNECTIONS {
            return refuse("there are too many connections");
        }
        let ports = self.free(guest);
        match stream
            .try_clone()
            .and_then(|stream| device.connection(ports, stream, Phase::Asked))
        {
            Ok(connection) => {
                self.connections.insert(ports, connection);
                self.answer(device, ports, op::REQUEST);
            }
            Err(error) => refuse(&error.to_string()),
        }
    }

    /// A port of the host that has no connection to this port of the guest.
    fn free(&mut self, guest: u32) -> Ports {
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_PORT);
            let ports = Ports { host, guest };
            // There are fewer connections than ports.
            if !self.connections.contains_key(&ports) {
                return ports;
            }
        }
    }
}

/// Takes a packet's data; false if there is no room for it.
fn push(connection: &mut Connection, len: u32, mut data: Reader<'_, '_>) -> bool {
    let mut bytes = [0; 4096];
    let mut left = len as usize;
    if len > connection.room() {
        return false;
    }
    while left != 0 {
        let piece = bytes.get_mut(..left.min(4096)).unwrap_or_default();
        let count = data.read(piece);
        let piece = piece.get(..count).unwrap_or_default();
        if count == 0 || connection.push(piece).is_err() {
            return false;
        }
        left -= count;
    }
    true
}

/// Reads what is there straight into the guest's buffers; 0 at the end.
fn read(stream: &UnixStream, into: Vec<vm_memory::VolatileSlice<'_>>) -> io::Result<u32> {
    let mut fd = stream.as_fd();
    let mut total = 0;
    for mut slice in into {
        let len = slice.len();
        match fd.read_volatile(&mut slice) {
            Ok(count) => {
                total += count as u32;
                if count < len {
                    break;
                }
            }
            Err(_) if total != 0 => break,
            Err(VolatileMemoryError::IOError(error)) => return Err(error),
            Err(error) => return Err(io::Error::other(error)),
        }
    }
    Ok(total)
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
