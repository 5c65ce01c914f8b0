//! A network of the guest's own that takes no privileges.
//!
//! ```text
//!  card <--frames--> Port <--socket pair--> Stack (a thread; smoltcp) <--TCP--> the host
//! ```
//!
//! On it are the guest, which gets 10.0.2.15 by DHCP, and this process as 10.0.2.2, which answers ARP
//! and pings. TCP connections pass where they are forwarded: by `hostfwd` from an address of the host
//! to the guest, by `guestfwd` from 10.0.2.2 to an address the host reaches. Each is ended here and
//! begun anew on the other side, with its bytes carried between. There is no way to anything else, and
//! so no router and no name server in DHCP's answer.
//!
//! smoltcp rather than a program like passt: that gives a guest all of the host's network, whose
//! parts would have to be forbidden one by one, and is one more thing to install, start and outlive.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockFlag, SockType, setsockopt, shutdown, socketpair, sockopt,
};
use vm_memory::VolatileSlice;
use vmm_api::scatter;

use super::{Backend, Info, NetError, Port, Wait};
use crate::config::UserSpec;

mod connection;
mod dhcp;
mod frames;
mod stack;
#[cfg(test)]
mod tests;

use stack::Stack;

/// Bytes of frames under way to the guest, about: two windows of a connection.
const QUEUED: usize = 256 << 10;

/// The network; its drop ends it.
pub struct User {
    info: Info,
    port: Arc<Near>,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

/// The card's end.
struct Near(Arc<OwnedFd>);

/// What ends the thread.
struct Stop {
    asked: AtomicBool,
    event: EventFd,
}

impl User {
    /// Starts it, with frames of this many bytes behind their header.
    ///
    /// # Errors
    /// [`NetError::User`]: an address of the host cannot be listened at.
    pub fn start(spec: &UserSpec, mtu: Option<u16>) -> Result<Self, NetError> {
        let error = |action: &str| {
            let action = action.to_owned();
            move |source: io::Error| NetError::User { action, source }
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (near, far) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(|errno| error("make a socket pair")(errno.into()))?;
        // The system takes less if it has to.
        let _ = setsockopt(&far, sockopt::SndBuf, &QUEUED);
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| error("make an event")(errno.into()))?;
        let stop = Arc::new(Stop {
            asked: AtomicBool::new(false),
            event,
        });
        let mut stack = Stack::new(spec, far, mtu.unwrap_or(1500))?;
        let asked = stop.clone();
        let thread = crate::thread::builder("net-user")
            .spawn(move || {
                let run = || stack.run(&asked.event, || asked.asked.load(Ordering::Acquire));
                if catch_unwind(AssertUnwindSafe(run)).is_err() {
                    // The card sees that its other end has gone.
                    tracing::error!(target: "rhyve::net", "the user network panicked");
                }
            })
            .map_err(error("start its thread"))?;
        Ok(Self {
            info: Info {
                label: "user".into(),
                ..Info::default()
            },
            port: Arc::new(Near(Arc::new(near))),
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.stop.asked.store(true, Ordering::Release);
        // It fails only if the counter is full of wake-ups already.
        let _ = self.stop.event.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic was caught, and told, on the thread itself.
            let _ = thread.join();
        }
        let _ = shutdown(self.port.0.as_raw_fd(), Shutdown::Both);
    }
}

impl Backend for User {
    fn info(&self) -> &Info {
        &self.info
    }

    fn port(&self, pair: u16) -> Option<Arc<dyn Port>> {
        (pair == 0).then(|| self.port.clone() as Arc<dyn Port>)
    }
}

impl Port for Near {
    fn wait(&self) -> Wait {
        Wait {
            fd: Some(self.0.clone()),
            timeout: None,
        }
    }

    fn receive(&self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        match scatter::receive(&self.0, into)? {
            // There are no empty frames: it is the end.
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            len => Ok(len),
        }
    }

    fn send(&self, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        match scatter::send(&self.0, from) {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(nix::libc::EMSGSIZE) => {
                Err(io::ErrorKind::InvalidInput.into())
            }
            Err(error) => Err(error),
        }
    }
}
