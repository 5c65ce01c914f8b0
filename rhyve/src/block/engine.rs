//! How a queue's requests reach a backend: its channel.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::Arc;

use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use vm_memory::GuestMemoryMmap;
use vmm_api::uring::Ring;

use super::uring::Uring;
use super::{Backend, BlockError, Channel, Operation, Request, Token};
use crate::config::{AioEngine, BlockSpec};

/// Who moves the bytes, once that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The queue's own thread.
    Threads,
    /// The kernel, asked through io_uring.
    IoUring,
}

impl Engine {
    /// What the log calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::IoUring => "io_uring",
        }
    }

    /// What `spec` asks for, or what serves `backend` best on this host.
    ///
    /// # Errors
    /// io_uring is asked for and cannot be had.
    pub fn choose(spec: &BlockSpec, backend: &dyn Backend) -> Result<Self, BlockError> {
        if spec.engine == AioEngine::Threads {
            return Ok(Self::Threads);
        }
        let demanded = spec.engine == AioEngine::IoUring;
        let file = match backend.plain() {
            Some(plain) => plain.file,
            None if demanded => return Err(BlockError::NotPlain(spec.path.clone())),
            None => return Ok(Self::Threads),
        };
        // Only whether there may be one: each queue makes its own.
        let tried = file
            .try_clone()
            .and_then(|file| Ring::new(1, file.into(), GuestMemoryMmap::new()));
        match tried {
            Err(source) if demanded => {
                Err(BlockError::io("use io_uring for it", &spec.path)(source))
            }
            Err(_) => Ok(Self::Threads),
            // There is nothing to wait for in a file in memory: copying at once is faster.
            Ok(_) if !demanded && in_memory(file) => Ok(Self::Threads),
            Ok(_) => Ok(Self::IoUring),
        }
    }
}

/// Whether a file's bytes are in memory. Those of a device are not, though its node is (devtmpfs).
pub(super) fn in_memory(file: &File) -> bool {
    let regular = file.metadata().is_ok_and(|file| file.is_file());
    regular && fstatfs(file).is_ok_and(|kind| kind.filesystem_type() == TMPFS_MAGIC)
}

/// This thread's way to `backend`, for requests whose buffers are in `memory`.
pub fn channel<'m>(
    backend: Arc<dyn Backend>,
    engine: Engine,
    memory: &'m GuestMemoryMmap,
) -> Box<dyn Channel<'m> + 'm> {
    if engine == Engine::IoUring {
        match Uring::new(backend.clone(), memory) {
            Ok(uring) => return Box::new(uring),
            Err(error) => tracing::warn!(target: "rhyve::block", "io_uring, now: {error}"),
        }
    }
    Box::new(Inline::new(backend))
}

/// Serves each request on the caller's thread before `submit` returns.
pub struct Inline {
    backend: Arc<dyn Backend>,
    done: VecDeque<(Token, io::Result<()>)>,
}

impl Inline {
    /// A channel to `backend`.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self {
            backend,
            done: VecDeque::new(),
        }
    }

    pub(super) fn finish(&mut self, token: Token, result: io::Result<()>) {
        self.done.push_back((token, result));
    }
}

impl<'m> Channel<'m> for Inline {
    fn submit(&mut self, token: Token, request: Request<'m>) {
        let result = perform(&*self.backend, &request);
        self.finish(token, result);
    }

    fn complete(&mut self) -> Option<(Token, io::Result<()>)> {
        self.done.pop_front()
    }
}

/// Has `backend` serve one request.
pub fn perform(backend: &dyn Backend, request: &Request<'_>) -> io::Result<()> {
    match &request.operation {
        Operation::Read(offset, to) => backend.read(*offset, to),
        Operation::Write(offset, from) => backend.write(*offset, from, request.durable),
        Operation::Flush => backend.flush(),
        Operation::Discard(extents) => {
            extents
                .iter()
                .try_for_each(|extent| backend.discard(*extent))?;
            settle(backend, request)
        }
        Operation::WriteZeroes(extents) => {
            extents.iter().try_for_each(|(extent, may_discard)| {
                backend.write_zeroes(*extent, *may_discard)
            })?;
            settle(backend, request)
        }
    }
}

fn settle(backend: &dyn Backend, request: &Request<'_>) -> io::Result<()> {
    if request.durable {
        backend.flush()
    } else {
        Ok(())
    }
}
