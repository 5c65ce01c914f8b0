//! The host's side: a socket to connect to, and sockets that are connected to.
//!
//! A program of the host that wants port P of the guest connects to PATH, writes `CONNECT P\n`, and
//! reads `OK N\n`, where N is the port it has itself, or `ERR reason\n`; then the stream is the
//! guest's. A program that wants to be port P of the host listens at `PATH_P`. (Firecracker,
//! docs/vsock.md, has the same, without reasons.)

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, socket,
};

use crate::unix_socket::{self, SocketFile};

/// The longest first line: the word, a port and the end.
const LINE: usize = 32;

/// The socket to connect to.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Binds to `path`, taking the place of a socket nobody listens on any more.
    ///
    /// # Errors
    /// It cannot be made, or is somebody else's.
    pub fn bind(path: &Path) -> io::Result<(Self, SocketFile)> {
        let (socket, file) = unix_socket::bind(path)?;
        let path = path.to_owned();
        Ok((Self { socket, path }, file))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// To wait for.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        Ok(self.socket.try_clone()?.into())
    }

    /// The next program that has connected.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] if there is none.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.socket.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Connects to the program that is this port of the host.
    ///
    /// # Errors
    /// There is none, or it takes nobody.
    pub fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // Non-blocking, it fails where nobody accepts, instead of holding up everybody.
        connect(socket.as_raw_fd(), &UnixAddr::new(Path::new(&path))?)?;
        Ok(UnixStream::from(socket))
    }
}

/// A program that has connected and says what it wants.
pub struct Greeting {
    pub stream: UnixStream,
    line: Vec<u8>,
}

/// What became of a greeting.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// Not all of it is there.
    Part,
    /// The port that is wanted.
    Port(u32),
    /// No greeting, or nobody.
    Nonsense,
}

impl Greeting {
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: Vec::new(),
        }
    }

    /// Reads on, no further than the line's end: what is behind it is the guest's.
    pub fn read(&mut self) -> Heard {
        let mut piece = [0; LINE];
        let fd = self.stream.as_raw_fd();
        let room = LINE.saturating_sub(self.line.len());
        let seen = match recv(
            fd,
            piece.get_mut(..room).unwrap_or_default(),
            MsgFlags::MSG_PEEK,
        ) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Heard::Part,
            Err(_) | Ok(0) => return Heard::Nonsense,
            Ok(seen) => seen,
        };
        let new = piece.get(..seen).unwrap_or_default();
        let end = new.iter().position(|&byte| byte == b'\n');
        let take = end.map_or(seen, |end| end + 1);
        self.line.extend(new.iter().take(take));
        if recv(
            fd,
            piece.get_mut(..take).unwrap_or_default(),
            MsgFlags::empty(),
        ) != Ok(take)
        {
            return Heard::Nonsense;
        }
        if end.is_none() {
            return if self.line.len() < LINE {
                Heard::Part
            } else {
                Heard::Nonsense
            };
        }
        let text = std::str::from_utf8(&self.line).unwrap_or_default();
        let port = text.trim_end().strip_prefix("CONNECT ");
        match port.and_then(|port| port.parse().ok()) {
            Some(port) => Heard::Port(port),
            None => Heard::Nonsense,
        }
    }
}
