//! The thread: the network's one host besides the guest, and what it forwards.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet,
};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpCidr, IpListenEndpoint};

use super::connection::Connection;
use super::dhcp;
use super::frames::Frames;
use crate::config::{Forward, GATEWAY, UserSpec};
use crate::net::NetError;

/// Our address on the Ethernet: locally administered.
const MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 10, 0, 2, 2]);
/// Connections at a time; each has two buffers of this many bytes.
const MOST: usize = 128;
const BUFFER: usize = 64 << 10;
/// Frames that are taken before others have their turn.
const TURN: usize = 64;
/// A guest that does not answer for so long has gone; it is asked now and then.
const GONE: Duration = Duration::from_secs(60);
const ASK: Duration = Duration::from_secs(20);
/// Ports from which connections to the guest come.
const PORTS: std::ops::RangeInclusive<u16> = 49_152..=65_535;

/// The network's state.
pub(super) struct Stack {
    frames: Frames,
    interface: Interface,
    sockets: SocketSet<'static>,
    dhcp: SocketHandle,
    mtu: u16,
    /// Where the host is listened at, and where these connections go.
    from_host: Vec<(TcpListener, SocketAddrV4)>,
    /// Where the guest is listened at, by which socket, and where these connections go.
    from_guest: Vec<(Forward, SocketHandle)>,
    connections: Vec<Connection>,
    next_port: u16,
}

impl Stack {
    /// # Errors
    /// An address of the host cannot be listened at.
    pub fn new(spec: &UserSpec, socket: OwnedFd, mtu: u16) -> Result<Self, NetError> {
        let listen = |forward: &Forward| {
            let made = TcpListener::bind(forward.from).and_then(|listener| {
                listener.set_nonblocking(true)?;
                Ok((listener, forward.to))
            });
            made.map_err(|source| NetError::User {
                action: format!("listen at {} for hostfwd", forward.from),
                source,
            })
        };
        let from_host = spec.hostfwd.iter().map(listen);
        let from_host = from_host.collect::<Result<Vec<_>, _>>()?;
        let mut frames = Frames::new(socket, mtu);
        let mut config = Config::new(MAC.into());
        config.random_seed = RandomState::new().hash_one(mtu);
        let mut interface = Interface::new(config, &mut frames, Instant::now());
        interface.update_ip_addrs(|addresses| {
            // There is room for one.
            let _ = addresses.push(IpCidr::new(GATEWAY.into(), 24));
        });
        let mut sockets = SocketSet::new(Vec::new());
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 6000]);
        let mut server = udp::Socket::new(buffer(), buffer());
        // It is open for the first time, at a port.
        let _ = server.bind(dhcp::SERVER_PORT);
        let dhcp = sockets.add(server);
        let mut stack = Self {
            frames,
            interface,
            sockets,
            dhcp,
            mtu,
            from_host,
            from_guest: Vec::new(),
            connections: Vec::new(),
            next_port: *PORTS.start(),
        };
        for forward in &spec.guestfwd {
            let handle = stack.listen(forward);
            stack.from_guest.push((*forward, handle));
        }
        Ok(stack)
    }

    /// Serves until it is to stop, or the card has gone.
    pub fn run(&mut self, event: &EventFd, stopped: impl Fn() -> bool) {
        while !stopped() && !self.frames.ended() {
            let more = self.ingress();
            self.serve_dhcp();
            self.accept();
            self.taken_by_guest();
            let Self {
                connections,
                sockets,
                ..
            } = self;
            connections.retain_mut(|connection| {
                let goes_on = connection.carry(sockets.get_mut(connection.handle));
                if !goes_on {
                    sockets.remove(connection.handle);
                }
                goes_on
            });
            let now = Instant::now();
            self.interface.poll_maintenance(now);
            let (frames, sockets) = (&mut self.frames, &mut self.sockets);
            for _ in 0..TURN {
                if self.interface.poll_egress(now, frames, sockets) == PollResult::None {
                    break;
                }
            }
            if !more {
                self.wait(event);
            }
        }
    }

    /// Takes frames; true if there are more.
    fn ingress(&mut self) -> bool {
        for _ in 0..TURN {
            let now = Instant::now();
            let (frames, sockets) = (&mut self.frames, &mut self.sockets);
            let taken = self.interface.poll_ingress_single(now, frames, sockets);
            if matches!(taken, PollIngressSingleResult::None) {
                return false;
            }
        }
        true
    }

    fn serve_dhcp(&mut self) {
        let socket: &mut udp::Socket<'_> = self.sockets.get_mut(self.dhcp);
        while let Ok((message, _)) = socket.recv() {
            // A client without an address hears broadcasts, and one with an address as well.
            let answer = dhcp::answer(message, self.mtu);
            let to = (Ipv4Addr::BROADCAST, dhcp::CLIENT_PORT);
            if let Some(answer) = answer {
                // Without room it is lost, and asked for again.
                let _ = socket.send_slice(&answer, to);
            }
        }
    }

    fn socket(&mut self) -> tcp::Socket<'static> {
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_timeout(Some(GONE));
        socket.set_keep_alive(Some(ASK));
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        socket
    }

    /// Waits for a connection of the guest.
    fn listen(&mut self, forward: &Forward) -> SocketHandle {
        let mut socket = self.socket();
        let at = IpListenEndpoint {
            addr: Some((*forward.from.ip()).into()),
            port: forward.from.port(),
        };
        // A new socket, and a port that is none but 0.
        let _ = socket.listen(at);
        self.sockets.add(socket)
    }

    /// Takes connections that the host has made.
    fn accept(&mut self) {
        for at in 0..self.from_host.len() {
            while self.connections.len() < MOST
                && let Some((listener, to)) = self.from_host.get(at)
                && let Ok((stream, _)) = listener.accept()
            {
                let to = *to;
                let port = self.free_port();
                let mut socket = self.socket();
                let from = (GATEWAY, port);
                if socket.connect(self.interface.context(), to, from).is_err() {
                    continue;
                }
                let handle = self.sockets.add(socket);
                match Connection::taken(stream, handle) {
                    Ok(connection) => self.connections.push(connection),
                    Err(_) => drop(self.sockets.remove(handle)),
                }
            }
        }
    }

    fn free_port(&mut self) -> u16 {
        // There are more ports than connections.
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(*PORTS.start());
            let taken = self.connections.iter().any(|connection| {
                let socket: &tcp::Socket<'_> = self.sockets.get(connection.handle);
                socket.local_endpoint().is_some_and(|end| end.port == port)
            });
            if !taken {
                return port;
            }
        }
    }

    /// Continues connections that the guest has made.
    fn taken_by_guest(&mut self) {
        for at in 0..self.from_guest.len() {
            let Some(&(forward, handle)) = self.from_guest.get(at) else {
                return;
            };
            let socket: &mut tcp::Socket<'_> = self.sockets.get_mut(handle);
            if socket.is_listening() {
                continue;
            }
            let begun = if socket.is_active() && self.connections.len() < MOST {
                Connection::begun(forward.to, handle)
            } else {
                Err(io::ErrorKind::ConnectionRefused.into())
            };
            match begun {
                Ok(connection) => self.connections.push(connection),
                Err(_) => {
                    socket.abort();
                    let (now, frames) = (Instant::now(), &mut self.frames);
                    self.interface.poll_egress(now, frames, &mut self.sockets);
                    self.sockets.remove(handle);
                }
            }
            let next = self.listen(&forward);
            if let Some(place) = self.from_guest.get_mut(at) {
                place.1 = next;
            }
        }
    }

    /// Waits until something is to be done.
    fn wait(&mut self, event: &EventFd) {
        let full = self.frames.flush();
        let mut timeout = self.interface.poll_delay(Instant::now(), &self.sockets);
        let mut card = PollFlags::POLLIN;
        if full {
            // The clock is for what could be sent then.
            card = PollFlags::POLLOUT;
            timeout = None;
        }
        let mut fds = vec![
            PollFd::new(event.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.frames.as_fd(), card),
        ];
        if self.connections.len() < MOST {
            let listeners = self.from_host.iter();
            fds.extend(listeners.map(|(fd, _)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        }
        for connection in &self.connections {
            let flags = connection.interest(self.sockets.get(connection.handle));
            // Else its end would be told again and again.
            if !flags.is_empty() {
                fds.push(PollFd::new(connection.as_fd(), flags));
            }
        }
        let timeout = timeout.map_or(PollTimeout::NONE, |wait| {
            // Up: a wait of less than a millisecond would be none.
            let milliseconds = wait.total_micros().div_ceil(1000);
            PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX)
        });
        // Whatever it returns: everything is looked at.
        let _ = poll(&mut fds, timeout);
    }
}
