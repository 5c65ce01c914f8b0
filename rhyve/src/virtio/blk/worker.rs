//! The thread that works on one queue: takes requests, has them served, answers.

use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::device::Shared;
use super::request::{Action, BlkRequest, Rules, Status};
use crate::block::engine::{self, Engine};
use crate::block::{Channel, Operation, Token, total_len};
use crate::virtio::{Chain, Interrupts, Virtqueue};

/// What a worker needs.
pub(super) struct Work {
    pub shared: Arc<Shared>,
    pub engine: Engine,
    pub queue: Virtqueue,
    pub interrupts: Arc<dyn Interrupts>,
}

/// A running worker; its drop waits for the request it has under way, and forgets the others.
pub(super) struct Worker {
    queue: u16,
    stop: Arc<Stop>,
    /// Returns its queue if it was asked to leave nothing unanswered.
    thread: Option<JoinHandle<Option<Virtqueue>>>,
}

struct Stop {
    /// Looked at between requests.
    asked: AtomicBool,
    /// What is under way is answered first.
    answer: AtomicBool,
    /// Ends a wait.
    event: EventFd,
}

impl Worker {
    /// Starts the thread.
    pub fn start(work: Work) -> io::Result<Self> {
        let stop = Arc::new(Stop {
            asked: AtomicBool::new(false),
            answer: AtomicBool::new(false),
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        });
        let queue = work.queue.index();
        let asked = stop.clone();
        let thread = crate::thread::builder(format!("blk-{queue}")).spawn(move || {
            let (label, interrupts) = (work.shared.label.clone(), work.interrupts.clone());
            catch_unwind(AssertUnwindSafe(|| work.run(&asked))).unwrap_or_else(|_| {
                tracing::error!(target: "rhyve::virtio::blk", "{label}: queue {queue} panicked");
                interrupts.needs_reset();
                None
            })
        })?;
        Ok(Self {
            queue,
            stop,
            thread: Some(thread),
        })
    }

    /// Which queue it works on.
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// Ends it with everything answered that it has taken; the queue, for another worker.
    pub fn finish(mut self) -> Option<Virtqueue> {
        self.stop.answer.store(true, Ordering::Release);
        self.end()
    }

    fn end(&mut self) -> Option<Virtqueue> {
        self.stop.asked.store(true, Ordering::Release);
        // It fails only if the counter is full of wake-ups already.
        let _ = self.stop.event.write(1);
        // A panic was caught, and told, on the thread itself.
        self.thread.take()?.join().ok().flatten()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}

impl Work {
    fn run(self, stop: &Stop) -> Option<Virtqueue> {
        let memory = self.queue.memory().clone();
        let mut channel = engine::channel(self.shared.backend.clone(), self.engine, &memory);
        let mut queue = Serving {
            shared: &self.shared,
            queue: self.queue,
            memory: &memory,
            under_way: Vec::new(),
        };
        let stopped = || stop.asked.load(Ordering::Acquire);
        while !stopped() {
            queue.queue.disable_kicks();
            while !stopped()
                && let Some(chain) = queue.queue.pop()
            {
                queue.take(&chain, &mut *channel);
                queue.collect(&mut *channel);
            }
            channel.kick();
            queue.collect(&mut *channel);
            if !queue.queue.enable_kicks() {
                wait(&queue.queue, stop, &*channel);
            }
        }
        let answer = stop.answer.load(Ordering::Acquire);
        while answer && queue.under_way.iter().any(Option::is_some) {
            wait_for(&*channel);
            queue.collect(&mut *channel);
        }
        // The channel goes first, and waits: what is under way uses guest memory.
        drop(channel);
        answer.then_some(queue.queue)
    }
}

/// Waits for a kick, for something to collect, or for the end.
fn wait(queue: &Virtqueue, stop: &Stop, channel: &dyn Channel<'_>) {
    let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let mut fds = vec![readable(queue.as_fd()), readable(stop.event.as_fd())];
    fds.extend(channel.ready().map(readable));
    // Whatever it returns: the caller looks at everything.
    let _ = poll(&mut fds, PollTimeout::NONE);
    // Takes the news, if there is any.
    let _ = queue.kick().read();
}

/// Waits for something to collect.
fn wait_for(channel: &dyn Channel<'_>) {
    if let Some(ready) = channel.ready() {
        // Whatever it returns: the caller looks.
        let _ = poll(
            &mut [PollFd::new(ready, PollFlags::POLLIN)],
            PollTimeout::NONE,
        );
    }
}

/// A request under way.
struct UnderWay<'m> {
    head: u16,
    writable: u32,
    status: VolatileSlice<'m>,
    kind: Kind,
}

/// What is counted when it is done, with its bytes.
#[derive(Clone, Copy)]
enum Kind {
    Read(u64),
    Write(u64),
    Flush,
    Discard,
}

struct Serving<'s, 'm> {
    shared: &'s Shared,
    queue: Virtqueue,
    memory: &'m GuestMemoryMmap,
    /// Indexed by token; never more than the queue has descriptors.
    under_way: Vec<Option<UnderWay<'m>>>,
}

impl<'m> Serving<'_, 'm> {
    /// Takes a chain: submits it, or answers it.
    fn take(&mut self, chain: &Chain, channel: &mut (dyn Channel<'m> + 'm)) {
        let shared = self.shared;
        let rules = Rules {
            info: shared.backend.info(),
            legacy: shared.legacy.load(Ordering::Relaxed),
            durable: !shared.writeback.load(Ordering::Relaxed),
        };
        let Some(request) = BlkRequest::parse(self.memory, chain, &rules) else {
            add(&shared.counters.bad_requests, 1);
            self.queue.add_used(chain.head(), 0);
            self.queue.signal();
            return;
        };
        let request_status = match request.action {
            Ok(Action::Image(image)) => {
                let under_way = UnderWay {
                    head: request.head,
                    writable: request.writable,
                    status: request.status,
                    kind: kind(&image.operation),
                };
                let token = self.keep(under_way);
                channel.submit(token, image);
                return;
            }
            Ok(Action::Identify(into)) => {
                let mut rest = shared.id.as_slice();
                for slice in into {
                    let (now, later) = rest.split_at(slice.len().min(rest.len()));
                    slice.copy_from(now);
                    rest = later;
                }
                Status::Ok
            }
            Err(status) => {
                add(&shared.counters.bad_requests, 1);
                status
            }
        };
        self.answer(
            request.head,
            request.writable,
            &request.status,
            request_status,
        );
    }

    /// Answers what has completed.
    fn collect(&mut self, channel: &mut (dyn Channel<'m> + 'm)) {
        while let Some((token, result)) = channel.complete() {
            let slot = usize::try_from(token).ok();
            let slot = slot.and_then(|slot| self.under_way.get_mut(slot));
            let Some(done) = slot.and_then(Option::take) else {
                continue;
            };
            let status = match result {
                Ok(()) => {
                    self.count(done.kind);
                    Status::Ok
                }
                Err(error) => {
                    self.complain(&error, done.kind);
                    Status::IoErr
                }
            };
            self.answer(done.head, done.writable, &done.status, status);
        }
    }

    fn keep(&mut self, under_way: UnderWay<'m>) -> Token {
        let free = self.under_way.iter().position(Option::is_none);
        let slot = free.unwrap_or(self.under_way.len());
        match self.under_way.get_mut(slot) {
            Some(place) => *place = Some(under_way),
            None => self.under_way.push(Some(under_way)),
        }
        slot as Token
    }

    fn answer(&mut self, head: u16, writable: u32, to: &VolatileSlice<'_>, status: Status) {
        to.copy_from(&[status as u8]);
        self.queue.add_used(head, writable);
        // At once: with event index the driver hears of it only if it has nothing to do.
        self.queue.signal();
    }

    fn count(&self, kind: Kind) {
        let counters = &self.shared.counters;
        match kind {
            Kind::Read(bytes) => {
                add(&counters.reads, 1);
                add(&counters.bytes_read, bytes);
            }
            Kind::Write(bytes) => {
                add(&counters.writes, 1);
                add(&counters.bytes_written, bytes);
            }
            Kind::Flush => add(&counters.flushes, 1),
            Kind::Discard => add(&counters.discards, 1),
        }
    }

    fn complain(&self, error: &io::Error, kind: Kind) {
        let before = self
            .shared
            .counters
            .host_errors
            .fetch_add(1, Ordering::Relaxed);
        // A full disk fails every write: the log gets the first, second, fourth, eighth.
        if (before + 1).is_power_of_two() {
            let what = match kind {
                Kind::Read(_) => "read",
                Kind::Write(_) => "write",
                Kind::Flush => "flush",
                Kind::Discard => "discard",
            };
            let (label, count) = (&self.shared.label, before + 1);
            tracing::warn!(target: "rhyve::virtio::blk", "{label}: {what}: {error} (error {count})");
        }
    }
}

fn kind(operation: &Operation<'_>) -> Kind {
    match operation {
        Operation::Read(_, to) => Kind::Read(total_len(to)),
        Operation::Write(_, from) => Kind::Write(total_len(from)),
        Operation::Flush => Kind::Flush,
        Operation::Discard(_) | Operation::WriteZeroes(_) => Kind::Discard,
    }
}

fn add(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
