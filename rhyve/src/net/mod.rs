//! What a network card is plugged into.
//!
//! A device does not know backends, and a backend does not know devices. Between them are frames: a
//! device takes a [`Port`] for each pair of its queues, on the threads that work on these, and
//! receives and sends one frame a call, straight into and out of guest memory. In front of a frame
//! is a header if [`Info::header`] says so: that of virtio 5.1.6, which Linux's tap has as well, so
//! that what one side leaves for the other to do (checksums, segments) passes through untouched.
//!
//! ```text
//!  virtio::net --VolatileSlices--> Port --writev--> tap | socket | user's end of a socket pair
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::VolatileSlice;

use crate::config::{NetBackend, NetSpec};
use crate::unix_socket::SocketFile;

mod ifreq;
pub mod pcap;
pub mod socket;
pub mod tap;
#[cfg(test)]
mod tests;
pub mod user;

bitflags::bitflags! {
    /// What one side of a wire may leave for the other to do.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u8 {
        /// Checksums of TCP and UDP.
        const CSUM = 1;
        /// Segments of TCP over IPv4.
        const TSO4 = 1 << 1;
        /// Segments of TCP over IPv6.
        const TSO6 = 1 << 2;
        /// Segments of TCP with explicit congestion notification.
        const ECN = 1 << 3;
        /// Segments of UDP.
        const USO = 1 << 4;
    }
}

/// What a backend is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// What the log and `vmmctl` call it.
    pub label: String,
    /// There is a header in front of each frame.
    pub header: bool,
    /// What may be left to the other side. Nothing without headers.
    pub offloads: Offloads,
}

/// What to wait for until a port has a frame, or can take one.
#[derive(Debug, Default)]
pub struct Wait {
    /// Readable when there is a frame, writable when there is room for one; none if nothing comes
    /// before `timeout`.
    pub fd: Option<Arc<OwnedFd>>,
    /// When to look again in any case.
    pub timeout: Option<Duration>,
}

/// One way in and out of a backend. Its threads call it at the same time.
pub trait Port: Send + Sync {
    /// What to wait for.
    fn wait(&self) -> Wait;

    /// Takes the next frame. What there is no room for is lost; the caller leaves room for the
    /// largest frame, and for one byte more.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; another error if the backend is gone for good.
    fn receive(&self, into: &[VolatileSlice<'_>]) -> io::Result<usize>;

    /// Has [`Port::receive`] wait until there is a frame, or no more: one system call instead of two for a
    /// frame that is waited for. Whoever ends it has to interrupt the call as well. False if it cannot wait.
    fn wait_in_receive(&self, wait: bool) -> bool {
        let _ = wait;
        false
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room now; `InvalidInput` for a frame that cannot be sent; another
    /// error if the backend is gone for good.
    fn send(&self, from: &[VolatileSlice<'_>]) -> io::Result<()>;
}

/// The host's side of a network card.
pub trait Backend: Send + Sync {
    /// What it is. Constant.
    fn info(&self) -> &Info;

    /// The port of a pair of queues, if it has as many.
    fn port(&self, pair: u16) -> Option<Arc<dyn Port>>;

    /// Says how long headers are, 10 or 12 bytes, and what the guest does for the host.
    ///
    /// # Errors
    /// The host does not take it.
    fn configure(&self, header: usize, offloads: Offloads) -> io::Result<()> {
        let _ = (header, offloads);
        Ok(())
    }

    /// Says that only the first `pairs` of ports are used.
    ///
    /// # Errors
    /// The host does not take it.
    fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        let _ = pairs;
        Ok(())
    }
}

/// Why a backend cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A step of making a tap interface failed.
    #[error("tap {name}: cannot {action}{}", hint(.source))]
    Tap {
        /// The interface.
        name: String,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// It cannot be plugged in.
    #[error("tap {name}: cannot plug it into the bridge {bridge}{}", bridge_hint(.source))]
    Bridge {
        /// The interface.
        name: String,
        /// The bridge.
        bridge: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A descriptor that is none of a tap interface.
    #[error("descriptor {fd} is no tap interface (IFF_TAP): open it by TUNSETIFF before")]
    NotTap {
        /// The number.
        fd: i32,
        /// The system's answer.
        source: io::Error,
    },
    /// A socket cannot be had.
    #[error("{}: cannot {action}", .path.display())]
    Socket {
        /// Its place.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The file for what passes cannot be made.
    #[error("pcap={}", .path.display())]
    Pcap {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The `user` network cannot be started.
    #[error("user network: cannot {action}")]
    User {
        /// What was tried.
        action: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// What helps against an error of a tap interface.
fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            " (that takes CAP_NET_ADMIN: have it made for this user by `ip tuntap add`, or use the \
             backend `user`)"
        }
        io::ErrorKind::NotFound => " (load the module tun)",
        io::ErrorKind::ResourceBusy => " (another program has it)",
        io::ErrorKind::InvalidInput => {
            " (it is no tap interface, or it was made for another number of queues: see `ip tuntap`)"
        }
        _ => "",
    }
}

/// What helps against an error of a bridge.
fn bridge_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            " (that takes CAP_NET_ADMIN: have the tap made and plugged in by `ip tuntap add` and `ip \
             link set ... master`)"
        }
        io::ErrorKind::ResourceBusy => " (it is in another)",
        _ if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => " (that is no bridge)",
        _ => "",
    }
}

/// Opens what a card is plugged into, and says where it can be found if that is to go with the machine.
///
/// # Errors
/// [`NetError`].
pub fn open(spec: &NetSpec) -> Result<(Arc<dyn Backend>, Option<SocketFile>), NetError> {
    let queues = spec.queues.get();
    let mut file = None;
    let backend: Arc<dyn Backend> = match &spec.backend {
        NetBackend::Tap { name, bridge } => {
            let tap = tap::Tap::open(name.as_deref(), queues)?;
            tap.bring_up(spec.mtu, bridge.as_deref())?;
            Arc::new(tap)
        }
        NetBackend::Fds(fds) => Arc::new(tap::Tap::inherit(fds)?),
        NetBackend::User(user) => Arc::new(user::User::start(user, spec.mtu)?),
        NetBackend::Listen(path) => {
            let (socket, place) = socket::Socket::listen(path)?;
            file = Some(place);
            Arc::new(socket)
        }
        NetBackend::Connect(path) => Arc::new(socket::Socket::connect(path)?),
    };
    let Some(path) = &spec.pcap else {
        return Ok((backend, file));
    };
    let error = |source| NetError::Pcap {
        path: path.clone(),
        source,
    };
    let record = pcap::create(path).map_err(error)?;
    Ok((Arc::new(pcap::Recorded::new(backend, record)), file))
}
