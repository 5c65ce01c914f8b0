//! How rhyve makes its threads.

use std::thread::Builder;

/// Stacks of std's 2 MiB become a huge page each, resident whole, where the host makes those always.
const STACK: usize = 512 << 10;

/// The builder of a thread with this name.
pub fn builder(name: impl Into<String>) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK)
}
