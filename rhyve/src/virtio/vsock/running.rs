//! The device while its guest drives it: what the guest's packets and the host's programs come to.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::Relaxed;

use vm_memory::{ReadVolatile, VolatileMemoryError};
use vmm_api::scatter::Slices;

use super::connection::{Connection, Phase};
use super::host::{Greeting, Heard};
use super::packet::{HEADER, HOST, Header, NO_RECEIVE, NO_SEND, Ports, STREAM, op};
use super::{FIRST_PORT, MOST_PENDING, RECEIVE, TRANSMIT, Vsock};
use crate::mevent::{Ready, Source};
use crate::virtio::{Chain, Reader, Virtqueue, kicks};

/// Connections at a time.
const MOST_CONNECTIONS: usize = 1023;
/// Programs that have connected and not said what they want.
const MOST_GREETINGS: usize = 64;
/// Packets in a row for one connection.
const BURST: usize = 16;
/// The most bytes of a packet to the guest.
const MOST_DATA: u32 = 64 << 10;

/// Packets, connections and programs, from one reset to the next.
pub(super) struct Running {
    pub(super) receive: Option<Virtqueue>,
    pub(super) transmit: Option<Virtqueue>,
    pub(super) connections: HashMap<Ports, Connection>,
    pub(super) greetings: BTreeMap<u64, (Greeting, Source)>,
    pub(super) next_greeting: u64,
    pub(super) next_port: u32,
    /// Packets without data for the guest.
    pub(super) pending: VecDeque<Header>,
    /// A buffer of the guest's that was taken and not used.
    pub(super) spare: Option<Chain>,
    /// The guest is to hear on this queue that its connections are no more.
    pub(super) events: Option<Virtqueue>,
    pub(super) moved: bool,
    pub(super) frozen: bool,
    pub(super) accept: Source,
    pub(super) kicks: BTreeMap<u16, Source>,
}

impl Running {
    /// Has the queue with this number be that, or none.
    pub(super) fn set_queue(&mut self, number: u16, queue: Option<Virtqueue>) {
        match number {
            RECEIVE => (self.receive, self.spare) = (queue, None),
            TRANSMIT => self.transmit = queue,
            _ => self.events = queue,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.spare.is_some() || self.receive.as_ref().is_some_and(Virtqueue::has_requests)
    }

    /// Reads what the guest sends.
    pub(super) fn take_packets(&mut self, device: &Vsock) {
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
    pub(super) fn ready(&mut self, device: &Vsock, ports: Ports, ready: Ready) {
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
    pub(super) fn send_pending(&mut self, device: &Vsock) {
        let Some(queue) = &mut self.receive else {
            return;
        };
        let _ = queue.kick().read();
        for _ in 0..queue.size() {
            let Some(packet) = self.pending.front() else {
                break;
            };
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
    pub(super) fn accept(&mut self, device: &Vsock) {
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
fn read(stream: &UnixStream, into: Slices<'_>) -> io::Result<u32> {
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
