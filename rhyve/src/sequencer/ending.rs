//! How the machine ends: the first cause wins, every vCPU is held, the main thread is told.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vmm_api::state::{Phase, StopReason};

use super::Mailbox;
use crate::suspend::{SuspendHow, SuspendSink};

/// Exit status of an error, and of everything else that is not the guest's own end.
pub const EXIT_ERROR: u8 = 4;

/// Why the machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// The reason, as it is stored.
    pub reason: StopReason,
    /// What more there is to say, in one line.
    pub detail: Option<String>,
    /// What a developer wants to see of it: registers and code, in several lines.
    pub report: Option<String>,
    /// Where the report of the guest is, if one was written.
    pub written: Option<PathBuf>,
    /// rhyve's exit status.
    pub status: u8,
}

impl Cause {
    /// The monitor cannot go on.
    pub fn error(detail: impl Into<String>) -> Self {
        Self {
            reason: StopReason::Error,
            detail: Some(detail.into()),
            report: None,
            written: None,
            status: EXIT_ERROR,
        }
    }

    /// Stopped from outside, which is a power-off for whoever started rhyve.
    pub fn stopped(by: impl Into<String>) -> Self {
        Self {
            reason: StopReason::Stopped,
            detail: Some(by.into()),
            report: None,
            written: None,
            status: 1,
        }
    }

    /// Stopped in the middle, to be run again: for whoever started rhyve, a power-off.
    pub fn suspended() -> Self {
        Self::stopped("suspended")
    }

    /// All there is to say, in one line.
    pub fn words(&self) -> String {
        let reason = self.reason.words();
        match &self.detail {
            Some(detail) => format!("{reason}: {detail}"),
            None => reason.to_owned(),
        }
    }

    /// The phase to be stored.
    pub fn phase(&self) -> Phase {
        Phase::Stopped {
            reason: self.reason,
            detail: self.detail.clone(),
        }
    }
}

impl From<SuspendHow> for Cause {
    fn from(how: SuspendHow) -> Self {
        let (reason, status) = match how {
            SuspendHow::Reset => (StopReason::Reset, 0),
            SuspendHow::PowerOff => (StopReason::PowerOff, 1),
            SuspendHow::Halt => (StopReason::Halt, 2),
            SuspendHow::TripleFault => (StopReason::TripleFault, 3),
            // As QEMU's isa-debug-exit has it, so that test kernels need no other.
            SuspendHow::DebugExit(value) => (StopReason::DebugExit, value << 1 | 1),
            SuspendHow::Stop => return Self::stopped("console escape"),
        };
        let detail = match how {
            SuspendHow::DebugExit(value) => Some(format!("value {value:#x}")),
            _ => None,
        };
        Self {
            reason,
            detail,
            report: None,
            written: None,
            status,
        }
    }
}

/// Collects the cause of the end.
pub struct Ending {
    cause: OnceLock<Cause>,
    vcpus: Vec<Arc<Mailbox>>,
    event: EventFd,
}

impl Ending {
    /// For a machine with these vCPUs.
    ///
    /// # Errors
    ///
    /// No event descriptor can be had.
    pub fn new(vcpus: Vec<Arc<Mailbox>>) -> std::io::Result<Arc<Self>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_flags(flags)?;
        Ok(Arc::new(Self {
            cause: OnceLock::new(),
            vcpus,
            event,
        }))
    }

    /// Ends the machine for this cause, unless it is ending already.
    pub fn end(&self, cause: Cause) {
        if self.cause.set(cause).is_ok() {
            self.vcpus.iter().for_each(|vcpu| vcpu.hold());
            // Nobody reads the counter down before it overflows, so this cannot fail.
            let _ = self.event.write(1);
        }
    }

    /// Why the machine ended, if it has.
    pub fn cause(&self) -> Option<&Cause> {
        self.cause.get()
    }
}

/// Readable once there is a cause.
impl AsFd for Ending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl SuspendSink for Ending {
    fn suspend(&self, how: SuspendHow) {
        self.end(how.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cause_wins() {
        let ending = Ending::new(vec![Arc::default()]).unwrap();
        assert_eq!(ending.cause(), None);
        ending.suspend(SuspendHow::TripleFault);
        ending.suspend(SuspendHow::PowerOff);
        let cause = ending.cause().unwrap();
        assert_eq!((cause.reason, cause.status), (StopReason::TripleFault, 3));
    }

    #[test]
    fn statuses_are_bhyves() {
        let status = |how: SuspendHow| Cause::from(how).status;
        assert_eq!(status(SuspendHow::Reset), 0);
        assert_eq!(status(SuspendHow::PowerOff), 1);
        assert_eq!(status(SuspendHow::Halt), 2);
        assert_eq!(status(SuspendHow::TripleFault), 3);
        assert_eq!(Cause::error("x").status, 4);
        assert_eq!(status(SuspendHow::DebugExit(0x10)), 0x21);
    }
}
