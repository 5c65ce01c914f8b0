//! What a vCPU's thread is asked to do between two entries into the guest.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use vmm_api::kvm::{Kick, KvmVcpu};

type Query = Box<dyn FnOnce(&mut KvmVcpu) + Send>;

/// How long a vCPU may take to leave the guest before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(5);

/// Notes to one vCPU's thread.
///
/// A sender writes its note, then kicks; the vCPU clears the kick, then reads the notes: no note is
/// ever missed. The lock is not held while a query runs.
#[derive(Default)]
pub struct Mailbox {
    notes: Mutex<Notes>,
    changed: Condvar,
    /// There may be notes: what the run loop looks at without taking the lock.
    posted: AtomicBool,
    kick: OnceLock<Kick>,
    bound: OnceLock<Instant>,
}

#[derive(Default)]
struct Notes {
    queries: VecDeque<Query>,
    hold: bool,
    quit: bool,
    /// The thread is out of the guest and waits.
    held: bool,
    /// The thread has ended.
    gone: bool,
}

/// What a vCPU's thread does after it has read its notes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Enter the guest.
    Run,
    /// End.
    Quit,
}

impl Mailbox {
    /// The vCPU's thread is ready to be kicked.
    pub fn bind(&self, kick: Kick) {
        // A second bind cannot happen: a vCPU has one thread for its whole life.
        let _ = self.kick.set(kick);
        let _ = self.bound.set(Instant::now());
    }

    /// When the vCPU's thread was ready to enter the guest for the first time.
    pub fn bound(&self) -> Option<Instant> {
        self.bound.get().copied()
    }

    /// Whether the run loop should look into its notes.
    pub fn posted(&self) -> bool {
        self.posted.load(Ordering::Acquire)
    }

    /// Does what the notes say, in the vCPU's thread; returns when there is nothing left to do.
    pub fn serve(&self, vcpu: &mut KvmVcpu) -> Next {
        let mut notes = self.lock();
        loop {
            while let Some(query) = notes.queries.pop_front() {
                drop(notes);
                query(vcpu);
                notes = self.lock();
            }
            if notes.quit {
                return Next::Quit;
            }
            notes.held = notes.hold;
            if !notes.hold {
                self.posted.store(false, Ordering::Release);
                return Next::Run;
            }
            self.changed.notify_all();
            notes = self
                .changed
                .wait(notes)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The vCPU's thread ends: nobody needs to wait for it any more.
    pub fn leave(&self) {
        let mut notes = self.lock();
        notes.gone = true;
        notes.queries.clear();
        self.changed.notify_all();
    }

    /// Runs `query` on the vCPU's thread, with its registers consistent, and waits for the result.
    /// None if the thread is gone or does not come out of the guest.
    pub fn ask<T: Send + 'static>(
        &self,
        query: impl FnOnce(&mut KvmVcpu) -> T + Send + 'static,
    ) -> Option<T> {
        let (send, receive) = mpsc::sync_channel(1);
        let posted = self.note(|notes| {
            if !notes.gone {
                notes.queries.push_back(Box::new(move |vcpu| {
                    // An asker that lost its patience is no longer there.
                    let _ = send.send(query(vcpu));
                }));
            }
            !notes.gone
        });
        if posted {
            receive.recv_timeout(PATIENCE).ok()
        } else {
            None
        }
    }

    /// Asks the vCPU to stay out of the guest until [`Mailbox::release`].
    pub fn hold(&self) {
        self.note(|notes| notes.hold = true);
    }

    /// Whether it was asked to stay out.
    pub fn is_on_hold(&self) -> bool {
        self.lock().hold
    }

    /// Waits until the vCPU is out of the guest; false if it does not come.
    pub fn wait_held(&self) -> bool {
        let end = Instant::now() + PATIENCE;
        let mut notes = self.lock();
        while !notes.held && !notes.gone {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(notes, left);
            notes = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Lets a held vCPU run again.
    pub fn release(&self) {
        self.note(|notes| notes.hold = false);
    }

    /// Ends the vCPU's thread.
    pub fn quit(&self) {
        self.note(|notes| notes.quit = true);
    }

    fn note<T>(&self, write: impl FnOnce(&mut Notes) -> T) -> T {
        let mut notes = self.lock();
        let result = write(&mut notes);
        self.posted.store(true, Ordering::Release);
        self.changed.notify_all();
        let inside = !notes.held;
        drop(notes);
        if let Some(kick) = self.kick.get().filter(|_| inside) {
            kick.kick();
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
