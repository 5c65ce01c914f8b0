//! How a virtual machine comes to an end: bhyve's `vm_suspend`.

use std::fmt;

/// Why the machine is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SuspendHow {
    /// The guest asked for a reset: 0xFE to port 0x64, or the reset register 0xcf9.
    Reset,
    /// The guest switched itself off: ACPI S5.
    PowerOff,
    /// Every virtual CPU halts with interrupts off, so that nothing can ever happen again.
    Halt,
    /// A virtual CPU shut down after a triple fault.
    TripleFault,
    /// The guest wrote this byte to the isa-debug-exit port.
    DebugExit(u8),
    /// The user left the console by its escape sequence.
    Stop,
}

impl fmt::Display for SuspendHow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset => f.write_str("reset"),
            Self::PowerOff => f.write_str("poweroff"),
            Self::Halt => f.write_str("halt"),
            Self::TripleFault => f.write_str("triplefault"),
            Self::DebugExit(value) => write!(f, "debugexit {value:#04x}"),
            Self::Stop => f.write_str("stop"),
        }
    }
}

/// Where a request to end the machine goes.
///
/// `suspend` only posts the request: it never blocks, never runs device code, and may be called from
/// a virtual CPU's thread inside a port handler as well as from any other thread, with a device's
/// lock held. The first request wins; later ones are ignored by whoever implements this.
pub trait SuspendSink: Send + Sync {
    /// Asks for the machine's end.
    fn suspend(&self, how: SuspendHow);
}
