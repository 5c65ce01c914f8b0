//! A wire to another rhyve: a unix socket that keeps frames apart (SOCK_SEQPACKET).
//!
//! Frames pass as they are on an Ethernet, without headers. One end listens, one connects; whichever
//! comes first waits for the other, and if one goes, the other waits again. What is sent without
//! anybody at the other end is lost, as on a wire; so is what an end that is there has no room for, if
//! that lasts: a machine that is paused does not hold up the other.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use vm_memory::VolatileSlice;
use vmm_api::scatter;

use super::{Backend, Info, NetError, Port, Wait, ifreq};
use crate::unix_socket::SocketFile;

/// How long a connecting end, or one that waits for room, waits before it tries again.
const AGAIN: Duration = Duration::from_millis(200);
/// How long frames wait for room at the other end, from the first that finds none.
const PATIENCE: Duration = Duration::from_secs(1);

const CONNECT: &str = "connect there";

/// One end of a wire.
pub struct Socket {
    info: Info,
    end: Arc<End>,
}

struct End {
    path: PathBuf,
    listener: Option<Arc<OwnedFd>>,
    peer: Mutex<Option<Arc<OwnedFd>>>,
    /// Since when there is no room at the other end.
    full: Mutex<Option<Instant>>,
}

impl Socket {
    /// The end that waits at `path`, as long as that is there.
    ///
    /// # Errors
    /// [`NetError::Socket`]. A socket there at which nobody listens any more is replaced.
    pub fn listen(path: &Path) -> Result<(Self, SocketFile), NetError> {
        let error = |action| fault(path, action);
        let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
        if is_socket && try_connect(path).err() == Some(Errno::ECONNREFUSED) {
            // Whatever comes of it: bind says.
            let _ = fs::remove_file(path);
        }
        let listener = new_socket().map_err(error("make a socket"))?;
        let address = UnixAddr::new(path).map_err(error("use that path"))?;
        bind(listener.as_raw_fd(), &address).map_err(error("listen there"))?;
        let file = SocketFile::of(path);
        let user_only = fs::Permissions::from_mode(0o600);
        fs::set_permissions(path, user_only).map_err(|source| NetError::Socket {
            path: path.to_owned(),
            action: "set its mode",
            source,
        })?;
        listen(&listener, Backlog::new(1).unwrap_or(Backlog::MAXCONN))
            .map_err(error("listen there"))?;
        let socket = Self::new(path, Some(Arc::new(listener)), None, "listening");
        Ok((socket, file))
    }

    /// The end that connects to `path`, as soon as somebody listens there.
    ///
    /// # Errors
    /// [`NetError::Socket`]: what is there will never be the other end.
    pub fn connect(path: &Path) -> Result<Self, NetError> {
        UnixAddr::new(path).map_err(fault(path, "use that path"))?;
        let there = fs::metadata(path).is_ok_and(|file| !file.file_type().is_socket());
        let peer = match try_connect(path) {
            Ok(peer) => Some(peer),
            Err(Errno::ECONNREFUSED) if there => return Err(fault(path, CONNECT)(Errno::ENOTSOCK)),
            // It has not come yet, has gone, or has another end.
            Err(Errno::ENOENT | Errno::ECONNREFUSED | Errno::EAGAIN) => None,
            Err(errno) => return Err(fault(path, CONNECT)(errno)),
        };
        Ok(Self::new(path, None, peer, "connecting"))
    }

    fn new(path: &Path, listener: Option<Arc<OwnedFd>>, peer: Option<OwnedFd>, role: &str) -> Self {
        Self {
            info: Info {
                label: format!("socket {}, {role}", path.display()),
                ..Info::default()
            },
            end: Arc::new(End {
                path: path.to_owned(),
                listener,
                peer: Mutex::new(peer.map(Arc::new)),
                full: Mutex::default(),
            }),
        }
    }
}

fn fault(path: &Path, action: &'static str) -> impl FnOnce(Errno) -> NetError {
    let path = path.to_owned();
    move |errno| NetError::Socket {
        path,
        action,
        source: errno.into(),
    }
}

fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

fn try_connect(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = new_socket()?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

impl Backend for Socket {
    fn info(&self) -> &Info {
        &self.info
    }

    fn port(&self, pair: u16) -> Option<Arc<dyn Port>> {
        (pair == 0).then(|| self.end.clone() as Arc<dyn Port>)
    }
}

impl End {
    fn peer(&self) -> MutexGuard<'_, Option<Arc<OwnedFd>>> {
        self.peer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The other end, if it is there now.
    fn reach(&self) -> Option<Arc<OwnedFd>> {
        let mut peer = self.peer();
        if peer.is_none() {
            let reached = match &self.listener {
                Some(listener) => ifreq::accept(listener).ok(),
                None => try_connect(&self.path).ok(),
            };
            if reached.is_some() {
                tracing::info!(target: "rhyve::net", "{}: connected", self.path.display());
            }
            *peer = reached.map(Arc::new);
        }
        peer.clone()
    }

    fn full(&self) -> MutexGuard<'_, Option<Instant>> {
        self.full.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets an end that has gone.
    fn lost(&self, gone: &Arc<OwnedFd>) {
        let mut peer = self.peer();
        if peer.as_ref().is_some_and(|peer| Arc::ptr_eq(peer, gone)) {
            tracing::info!(target: "rhyve::net", "{}: disconnected", self.path.display());
            *peer = None;
        }
    }
}

impl Port for End {
    fn wait(&self) -> Wait {
        let fd = self.peer().clone();
        let tries = fd.is_none() && self.listener.is_none() || self.full().is_some();
        let timeout = tries.then_some(AGAIN);
        Wait {
            fd: fd.or_else(|| self.listener.clone()),
            timeout,
        }
    }

    fn receive(&self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let peer = self.reach().ok_or(io::ErrorKind::WouldBlock)?;
        match scatter::receive(&peer, into) {
            // There are no empty frames: it is the end.
            Ok(0) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
            Err(_) => {}
            Ok(len) => return Ok(len),
        }
        self.lost(&peer);
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn send(&self, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        let peer = self.peer().clone();
        let sent = peer.map_or(Ok(0), |peer| scatter::send(&peer, from));
        let mut full = self.full();
        let Err(error) = sent else {
            *full = None;
            return Ok(());
        };
        if error.kind() == io::ErrorKind::WouldBlock {
            let since = *full.get_or_insert_with(Instant::now);
            return if since.elapsed() < PATIENCE {
                Err(error)
            } else {
                Ok(())
            };
        }
        *full = None;
        match error.raw_os_error().map(Errno::from_raw) {
            // Whoever receives sees that it has gone.
            Some(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => Ok(()),
            Some(Errno::EMSGSIZE) => Err(io::ErrorKind::InvalidInput.into()),
            _ => Err(error),
        }
    }
}
