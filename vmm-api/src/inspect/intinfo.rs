//! Events on their way into a vCPU, as libvmmapi's vm_get_intinfo names them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::state::VcpuEvents;

/// NMI's vector.
const NMI: u8 = 2;

/// What kind of event is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IntKind {
    /// An external interrupt.
    Extint,
    /// A non-maskable interrupt.
    Nmi,
    /// An exception.
    Exception,
    /// INT n.
    Swint,
}

/// One event on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntInfo {
    /// Its kind.
    pub kind: IntKind,
    /// Its vector.
    pub vector: u8,
    /// Its error code, if it pushes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<u32>,
}

impl IntInfo {
    /// What waits to be delivered: recognized, but not begun.
    pub fn pending(events: &VcpuEvents) -> Option<Self> {
        let nmi = events.nmi_pending.then_some(Self::nmi());
        exception(events, true).or(nmi)
    }

    /// What is being delivered: the next entry into the guest begins, or repeats, it.
    pub fn current(events: &VcpuEvents) -> Option<Self> {
        let nmi = events.nmi_injected.then_some(Self::nmi());
        let interrupt = events.interrupt.map(|vector| Self {
            kind: if events.interrupt_soft {
                IntKind::Swint
            } else {
                IntKind::Extint
            },
            vector,
            error: None,
        });
        exception(events, false).or(nmi).or(interrupt)
    }

    /// bhyve's VM_INTINFO_*: vector in bits 0-7, type 8-10, error code valid 11, valid 31, error
    /// code 32-63 (sys/amd64/include/vmm.h).
    pub fn bits(&self) -> u64 {
        let kind: u64 = match self.kind {
            IntKind::Extint => 0,
            IntKind::Nmi => 2,
            IntKind::Exception => 3,
            IntKind::Swint => 4,
        };
        let error = self.error.map_or(0, |code| u64::from(code) << 32 | 1 << 11);
        1 << 31 | error | kind << 8 | u64::from(self.vector)
    }

    fn nmi() -> Self {
        Self {
            kind: IntKind::Nmi,
            vector: NMI,
            error: None,
        }
    }
}

fn exception(events: &VcpuEvents, pending: bool) -> Option<IntInfo> {
    let vector = events
        .exception
        .filter(|_| events.exception_pending == pending)?;
    Some(IntInfo {
        kind: IntKind::Exception,
        vector,
        error: events.exception_error,
    })
}

impl fmt::Display for IntInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            IntKind::Extint => "extint",
            IntKind::Nmi => "nmi",
            IntKind::Exception => "exception",
            IntKind::Swint => "swint",
        };
        write!(f, "{kind} vector {}", self.vector)?;
        match self.error {
            Some(code) => write!(f, " errcode {code:#x}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_named_as_bhyve_names_them() {
        let mut events = VcpuEvents::default();
        assert_eq!(
            IntInfo::pending(&events).or(IntInfo::current(&events)),
            None
        );
        events.interrupt = Some(48);
        events.nmi_pending = true;
        let text = |info: Option<IntInfo>| info.map(|i| (i.to_string(), i.bits()));
        assert_eq!(
            text(IntInfo::current(&events)),
            Some(("extint vector 48".into(), 0x8000_0030))
        );
        assert_eq!(
            text(IntInfo::pending(&events)),
            Some(("nmi vector 2".into(), 0x8000_0202))
        );
        events.exception = Some(14);
        events.exception_error = Some(0x10);
        assert_eq!(
            text(IntInfo::current(&events)),
            Some(("exception vector 14 errcode 0x10".into(), 0x10_8000_0b0e))
        );
        events.exception_pending = true;
        assert_eq!(IntInfo::pending(&events).map(|i| i.vector), Some(14));
        events.interrupt_soft = true;
        assert_eq!(
            IntInfo::current(&events).map(|i| i.kind),
            Some(IntKind::Swint)
        );
    }
}
