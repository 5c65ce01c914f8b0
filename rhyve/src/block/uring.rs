//! A channel through io_uring: reads, writes and flushes are under way while the queue's thread
//! takes the next request.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::{GuestMemoryMmap, VolatileSlice};
use vmm_api::uring::{Ring, Transfer};

use super::engine::{Inline, perform};
use super::{Backend, Channel, Operation, Request, Token, total_len};

/// Transfers the kernel is told of at a time.
const DEPTH: u32 = 128;

/// Serves what a file alone can serve through its ring, and all else at once.
pub struct Uring {
    // First, for it is dropped first: that waits for what is under way.
    ring: Ring,
    alignment: usize,
    backend: Arc<dyn Backend>,
    inline: Inline,
}

impl Uring {
    /// A channel to `backend`, if that is a plain file.
    ///
    /// # Errors
    /// It is none, or the host has no io_uring for this process.
    pub fn new(backend: Arc<dyn Backend>, memory: &GuestMemoryMmap) -> io::Result<Self> {
        let plain = backend.plain().ok_or(io::ErrorKind::Unsupported)?;
        let alignment = plain.alignment;
        let file = plain.file.as_fd().try_clone_to_owned()?;
        Ok(Self {
            ring: Ring::new(DEPTH, file, memory.clone())?,
            alignment,
            inline: Inline::new(backend.clone()),
            backend,
        })
    }

    fn suits(&self, offset: u64, slices: &[VolatileSlice<'_>]) -> bool {
        // A write of nothing is none, and a flush has no buffers.
        total_len(slices) > 0
            && offset.is_multiple_of(self.alignment as u64)
            && slices.iter().all(|slice| {
                slice.ptr_guard().as_ptr().align_offset(self.alignment) == 0
                    && slice.len().is_multiple_of(self.alignment)
            })
    }

    fn push(&mut self, token: Token, request: &Request<'_>) -> io::Result<()> {
        let transfer = match &request.operation {
            Operation::Read(offset, to) if self.suits(*offset, to) => Transfer::Read(*offset, to),
            Operation::Write(offset, from) if self.suits(*offset, from) => {
                if request.durable {
                    Transfer::WriteDurably(*offset, from)
                } else {
                    Transfer::Write(*offset, from)
                }
            }
            Operation::Flush => Transfer::Sync,
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        self.ring.push(token, transfer)
    }
}

impl<'m> Channel<'m> for Uring {
    fn submit(&mut self, token: Token, request: Request<'m>) {
        if request.barrier {
            self.ring.drain();
            self.inline.finish(token, perform(&*self.backend, &request));
        } else if self.push(token, &request).is_err() {
            // Whatever the reason, the backend itself may do it.
            self.inline.finish(token, perform(&*self.backend, &request));
        }
    }

    fn kick(&mut self) {
        if self.ring.submit().is_err() {
            // The kernel lacks something: with less under way it may have it.
            self.ring.drain();
        }
    }

    fn complete(&mut self) -> Option<(Token, io::Result<()>)> {
        let done = <Inline as Channel<'m>>::complete(&mut self.inline);
        done.or_else(|| self.ring.pop())
    }

    fn ready(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ring.as_fd())
    }
}
