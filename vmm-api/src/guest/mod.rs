//! What a guest's kernel says of itself, read from its memory: names of its functions, messages,
//! processes, why it panicked. No agent in the guest has a part in it, so it works on a guest that
//! runs, is paused, or has died, and on a stored one.
//!
//! [`View`] reads memory as one vCPU sees it. [`Kernel::find`] tells which kernel it is and where its
//! names are: Linux carries them with it (kallsyms), of others there is the file that was loaded.
//! [`linux`] and [`freebsd`] know the rest, [`backtrace`](backtrace()) follows stacks.
//!
//! All of it may be lies: whatever is read is bounded in size and steps, and a structure that makes
//! no sense is an error that says where it stopped making sense.

pub mod backtrace;
pub mod freebsd;
mod kernel;
pub mod linux;
pub mod report;
pub mod symbols;
#[cfg(test)]
mod testing;
mod view;

pub use backtrace::{Frame, backtrace};
pub use kernel::{Kernel, Message, Process, kernel_view};
pub use report::Report;
pub use symbols::{Function, SymbolError, Symbols};
pub use view::View;

use crate::pagewalk::WalkError;

/// Why something cannot be told of a guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Nothing known is in memory.
    #[error(
        "no kernel that is known here is in memory: it is neither Linux with its symbols (CONFIG_KALLSYMS) nor a file with symbols, which --symbols can name"
    )]
    Unknown,
    /// A symbol that is needed is not there.
    #[error("the kernel does not tell where its {0} is{hint}", hint = match .1 {
        true => ": it was built without CONFIG_KALLSYMS_ALL",
        false => "",
    })]
    NoSymbol(&'static str, bool),
    /// No structure's shape is known.
    #[error(
        "the kernel does not tell what its structures are made of: it was built without CONFIG_DEBUG_INFO_BTF"
    )]
    NoTypes,
    /// A structure's shape is not known.
    #[error(
        "the kernel does not tell how its struct {0} is made up: it was built without CONFIG_DEBUG_INFO_BTF, or is another than is known here"
    )]
    NoType(String),
    /// A kernel without types tells this neither for dumps.
    #[error(
        "the kernel was built without CONFIG_DEBUG_INFO_BTF, and its vmcoreinfo does not give {0}"
    )]
    NotTold(String),
    /// A structure makes no sense.
    #[error("{0}")]
    Damaged(String),
    /// Memory cannot be read.
    #[error(transparent)]
    Walk(#[from] WalkError),
}
