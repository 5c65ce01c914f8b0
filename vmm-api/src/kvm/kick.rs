//! Getting a vCPU's thread out of the guest, without a race.
//!
//! A signal alone can arrive just before KVM_RUN and be lost. Its handler therefore sets
//! `kvm_run.immediate_exit`, which KVM looks at on entry: a signal before KVM_RUN makes it return
//! at once, one during it interrupts it. Who kicks first notes down what the vCPU is to do, then
//! kicks; who runs clears `immediate_exit` first, then looks for notes.

use std::cell::Cell;
use std::ptr;
use std::sync::Once;

use nix::libc;

thread_local! {
    /// This thread's `kvm_run.immediate_exit`; null on threads that run no vCPU.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int) {
    IMMEDIATE_EXIT.with(|cell| {
        let flag = cell.get();
        if !flag.is_null() {
            // SAFETY: `arm` stored the address of a byte in this thread's mapped kvm_run page and
            // `disarm` clears it before the page is unmapped; only this thread and the kernel on
            // its behalf touch the byte.
            unsafe { flag.write_volatile(1) };
        }
    });
}

fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// A way to interrupt one thread from any other.
#[derive(Clone, Copy, Debug)]
pub struct Kick {
    tid: libc::pid_t,
}

impl Kick {
    /// For the calling thread, which runs no vCPU: a kick ends a system call in which it waits (EINTR), and
    /// does nothing to it otherwise.
    pub fn this_thread() -> Self {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // SAFETY: the handler only writes through a thread-local pointer, which is
            // async-signal-safe; all-zero is a valid sigaction with no flags and an empty mask.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_kick as *const () as libc::sighandler_t;
                libc::sigaction(signal(), &action, ptr::null_mut());
            }
        });
        Self {
            tid: nix::unistd::gettid().as_raw(),
        }
    }

    /// Makes a vCPU's KVM_RUN return [`crate::exit::VmExit::Interrupted`] now, or the next time.
    pub fn kick(&self) {
        // SAFETY: tgkill takes plain numbers. A thread that has ended in the meantime is ESRCH; the
        // thread group is our own, so no other process can be hit.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.tid, signal()) };
    }
}

/// Readies the calling thread to be kicked out of the vCPU whose `immediate_exit` this is.
///
/// # Safety
///
/// `immediate_exit` stays valid until this thread calls [`disarm`] or ends.
pub(super) unsafe fn arm(immediate_exit: *mut u8) -> Kick {
    IMMEDIATE_EXIT.with(|cell| cell.set(immediate_exit));
    Kick::this_thread()
}

/// The calling thread runs no vCPU any more.
pub(super) fn disarm() {
    IMMEDIATE_EXIT.with(|cell| cell.set(ptr::null_mut()));
}
