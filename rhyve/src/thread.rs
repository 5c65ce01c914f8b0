//! How rhyve makes its threads.

use std::io;
use std::thread::Builder;

use nix::libc;

/// Stacks of std's 2 MiB become a huge page each, resident whole, where the host makes those always.
const STACK: usize = 512 << 10;

/// The builder of a thread with this name.
pub fn builder(name: impl Into<String>) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK)
}

/// Has this thread never take a processor from another one that is at work (SCHED_BATCH, sched(7)), or, if
/// not `patient`, as any thread (SCHED_OTHER). What wakes a patient one goes on, and so there is more to do
/// at once when its turn comes: when the other one waits, at the latest when its share is used up.
///
/// # Errors
/// The system refuses.
pub fn be_patient(patient: bool) -> io::Result<()> {
    let policy = if patient {
        libc::SCHED_BATCH
    } else {
        libc::SCHED_OTHER
    };
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads one sched_param; 0 is this thread.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_patient_thread_is_one() {
        // SAFETY: no memory is involved; 0 is this thread.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let before = policy();
        let change = move || -> io::Result<_> {
            be_patient(true)?;
            let patient = policy();
            be_patient(false)?;
            Ok((patient, policy()))
        };
        let thread = builder("patient").spawn(change).unwrap();
        let inside = thread.join().unwrap().unwrap();
        assert_eq!(inside, (libc::SCHED_BATCH, libc::SCHED_OTHER));
        assert_eq!(policy(), before);
    }
}
