//! One TCP connection of the host and one of the guest, with bytes carried between them.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt,
};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, State};

/// Both.
pub(super) struct Connection {
    /// The guest's.
    pub handle: SocketHandle,
    stream: TcpStream,
    /// The host's has not come about yet.
    connecting: bool,
    host_ended: bool,
    guest_ended: bool,
    /// One of them failed.
    broken: bool,
}

impl Connection {
    /// With a connection that was taken from the host.
    ///
    /// # Errors
    /// The system's.
    pub fn taken(stream: TcpStream, handle: SocketHandle) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self::new(stream, handle, false))
    }

    /// With a new connection to an address of the host.
    ///
    /// # Errors
    /// The system's.
    pub fn begun(to: SocketAddrV4, handle: SocketHandle) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let new: OwnedFd = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
        match connect(new.as_raw_fd(), &SockaddrIn::from(to)) {
            Ok(()) | Err(Errno::EINPROGRESS) => Ok(Self::new(new.into(), handle, true)),
            Err(errno) => Err(errno.into()),
        }
    }

    fn new(stream: TcpStream, handle: SocketHandle, connecting: bool) -> Self {
        // Each side's own packets say what is urgent.
        let _ = stream.set_nodelay(true);
        Self {
            handle,
            stream,
            connecting,
            host_ended: false,
            guest_ended: false,
            broken: false,
        }
    }

    /// What the host's side waits for, given the guest's.
    pub fn interest(&self, guest: &Socket<'_>) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(
            PollFlags::POLLIN,
            !self.connecting && !self.host_ended && guest.can_send(),
        );
        flags.set(PollFlags::POLLOUT, self.connecting || guest.can_recv());
        flags
    }

    /// Carries what there is; false when both have ended, or one in disorder.
    pub fn carry(&mut self, guest: &mut Socket<'_>) -> bool {
        if !self.connecting || self.connected(guest) {
            let carried = self.for_host(guest).and_then(|()| self.for_guest(guest));
            if carried.is_err() {
                self.broken = true;
                guest.abort();
            }
        }
        // It has an end as long as there is something to be said to it, as a reset.
        let said = guest.state() == State::TimeWait || guest.remote_endpoint().is_none();
        let over = !guest.is_active() && (self.broken || !guest.can_recv()) && said;
        if over && !(self.host_ended && self.guest_ended) {
            // What ended in disorder there is to do so here: a reset instead of an end.
            let now = nix::libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            let _ = setsockopt(&self.stream, sockopt::Linger, &now);
        }
        !over
    }

    /// Whether the host's connection has come about; if it cannot, the guest's is reset.
    fn connected(&mut self, guest: &mut Socket<'_>) -> bool {
        match self.stream.take_error() {
            // Until it is there, it has no peer.
            Ok(None) => self.connecting = self.stream.peer_addr().is_err(),
            _ => guest.abort(),
        }
        !self.connecting
    }

    fn for_host(&mut self, guest: &mut Socket<'_>) -> io::Result<()> {
        while guest.can_recv() {
            let written = guest.recv(|bytes| match self.stream.write(bytes) {
                Ok(count) => (count, Ok(count)),
                Err(error) => (0, Err(error)),
            });
            match written.map_err(io::Error::other)? {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        let ended = matches!(
            guest.state(),
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait
        );
        if ended && !guest.can_recv() && !self.guest_ended {
            self.guest_ended = true;
            self.stream.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    fn for_guest(&mut self, guest: &mut Socket<'_>) -> io::Result<()> {
        while !self.host_ended && guest.can_send() {
            let read = guest.send(|room| match self.stream.read(room) {
                Ok(count) => (count, Ok(count)),
                Err(error) => (0, Err(error)),
            });
            match read.map_err(io::Error::other)? {
                Ok(0) => {
                    self.host_ended = true;
                    guest.close();
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
