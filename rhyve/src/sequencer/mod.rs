//! The sequencer: one thread a vCPU that enters the guest, serves its exits and looks into its
//! mailbox; and how the machine comes to an end.
//!
//! ```text
//!  control, console, devices --> Mailbox (queries, hold, quit) --> vCPU thread --> PortBus
//!                            --> Ending (first cause wins)     --> main thread
//! ```

mod ending;
mod halt;
mod mailbox;
pub mod pinning;
mod stall;
mod vcpu;

pub use ending::{Cause, EXIT_ERROR, Ending};
pub use halt::{HaltWatch, cpu_clock};
pub use mailbox::{Mailbox, Next};
pub use stall::{Stall, StallWatch, Watched};
pub use vcpu::{ExitPolicy, Vcpu};
