//! What calls a card's thread, wherever it waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vmm_api::kvm::Kick;

use crate::net::Port;

/// What calls a thread from its wait.
pub(super) struct Bell {
    stop: AtomicBool,
    rung: AtomicBool,
    /// Readable when it has rung.
    event: EventFd,
    /// Where the thread does not hear it.
    away: Mutex<Option<Away>>,
}

/// A thread that waits in a port's receive.
struct Away {
    port: Arc<dyn Port>,
    thread: Kick,
}

impl Bell {
    /// # Errors
    /// The host is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            stop: AtomicBool::new(false),
            rung: AtomicBool::new(false),
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            away: Mutex::default(),
        })
    }

    /// Has the thread look at everything again.
    pub fn ring(&self) {
        // In this order: who hears the event takes the flag back, and who goes away later finds it.
        self.rung.store(true, Ordering::Release);
        // It fails only if the counter is full of rings already.
        let _ = self.event.write(1);
        if let Some(away) = &*self.away() {
            // What is interrupted must not wait again.
            away.port.wait_in_receive(false);
            away.thread.kick();
        }
    }

    /// Has it end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.ring();
    }

    /// Whether the thread is to end.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Whether it has rung since [`Bell::hear`].
    pub fn has_rung(&self) -> bool {
        self.rung.load(Ordering::Acquire)
    }

    /// The thread has heard it.
    pub fn hear(&self) {
        let _ = self.event.read();
        // With what was done before a ring that comes just now, which is heard with this one.
        self.rung.swap(false, Ordering::AcqRel);
    }

    /// From here on the calling thread may wait in this port's receive, which does not wait any more once it
    /// has rung; false if the port cannot. It may have rung before.
    pub fn go_away(&self, port: &Arc<dyn Port>) -> bool {
        let mut away = self.away();
        let goes = port.wait_in_receive(true);
        *away = goes.then(|| Away {
            port: port.clone(),
            thread: Kick::this_thread(),
        });
        goes
    }

    /// The port's receive does not wait any more.
    pub fn come_back(&self) {
        if let Some(away) = self.away().take() {
            away.port.wait_in_receive(false);
        }
    }

    fn away(&self) -> MutexGuard<'_, Option<Away>> {
        self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
