//! How a queue's requests reach a backend: its channel.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::{Backend, Channel, Operation, Request, Token};
use crate::config::AioEngine;

/// This thread's way to `backend`.
pub fn channel<'m>(backend: Arc<dyn Backend>, _engine: AioEngine) -> Box<dyn Channel<'m> + 'm> {
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
}

impl<'m> Channel<'m> for Inline {
    fn submit(&mut self, token: Token, request: Request<'m>) {
        let result = perform(&*self.backend, &request);
        self.done.push_back((token, result));
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
