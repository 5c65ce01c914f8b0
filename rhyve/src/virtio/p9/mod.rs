//! virtio-9p: a directory of the host, shared with the guest by 9P2000.L, as Linux speaks it.
//!
//! ```text
//!  request --> wire::Parser --> Session --> Node, Descriptors --> openat2(2) and the like
//!  answer  <-- wire::Answer <--
//! ```
//!
//! A guest sees what is below the directory and nothing else: it gives names of one part each, and no
//! symbolic link is followed here. Files belong to whoever runs rhyve, with that user's rights; nobody
//! gets set-user-id bits or devices onto the host by way of it. What Linux can do without (extended
//! attributes, Trename, Tremove) is refused, and then Linux does without.
//!
//! It has a thread of its own, because files may be slow, and serves one request after the other.

mod node;
mod saved;
mod session;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_memory::GuestMemoryMmap;

use self::node::{Descriptors, Node};
use self::session::{MOST, Session, Share};
use super::{
    Activation, Chain, DeviceError, Inspection, QueueReset, VirtioDevice, Virtqueue, device_id,
    feature, kicks,
};
use crate::config::ShareSpec;
use crate::lifecycle::Lifecycle;
use crate::mevent::{Mevent, Source};

/// Descriptors of the queue: as many pages as Linux puts into a request.
const QUEUE_SIZE: u16 = 128;

/// Feature bits: there is a tag in the configuration.
const MOUNT_TAG: u64 = 1 << 0;

/// The device.
pub struct P9 {
    mevent: Arc<Mevent>,
    spec: ShareSpec,
    /// Length of the tag, and the tag.
    config: Vec<u8>,
    requests: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    /// Requests whose answer is an error, most often that there is no such file.
    errors: AtomicU64,
    bad: AtomicU64,
    state: Mutex<State>,
    me: Weak<Self>,
}

struct State {
    session: Session,
    running: Option<(Virtqueue, Source)>,
    frozen: bool,
}

impl P9 {
    /// A device that shares what `spec` says.
    ///
    /// # Errors
    /// There is no such directory, or the thread cannot be made.
    pub fn new(spec: &ShareSpec) -> Result<Arc<Self>, DeviceError> {
        let error = |action| move |source| DeviceError { action, source };
        raise_limit();
        let share = Share {
            root: Node::root(&spec.path).map_err(error("open the directory that is shared"))?,
            descriptors: Descriptors::open().map_err(error("open /proc/self/fd"))?,
            read_only: spec.read_only,
        };
        let mevent = Mevent::start().map_err(error("start its thread"))?;
        let len = u16::try_from(spec.tag.len()).unwrap_or(u16::MAX);
        let config = [&len.to_le_bytes(), spec.tag.as_bytes()].concat();
        Ok(Arc::new_cyclic(|me| Self {
            mevent,
            spec: spec.clone(),
            config,
            requests: AtomicU64::new(0),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            bad: AtomicU64::new(0),
            state: Mutex::new(State {
                session: Session::new(share),
                running: None,
                frozen: false,
            }),
            me: me.clone(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut state = self.lock();
        let State {
            session,
            running,
            frozen,
        } = &mut *state;
        let Some((queue, _)) = running else { return };
        let _ = queue.kick().read();
        if *frozen {
            return;
        }
        queue.disable_kicks();
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop() else { break };
            let written = self.answer(session, queue.memory(), &chain);
            queue.add_used(chain.head(), written);
            // At once: whoever waits for it waits for nothing else.
            queue.signal();
        }
        if queue.enable_kicks() {
            kicks::again(queue);
        }
    }

    fn answer(&self, session: &mut Session, memory: &GuestMemoryMmap, chain: &Chain) -> u32 {
        let mut reader = chain.reader(memory);
        // The size that the message itself says: what a driver gives may be longer, but no more than
        // was agreed on is looked at.
        let said: Option<u32> = reader.clone().read_obj().map(u32::from_le);
        let len = said.unwrap_or(0).min(MOST).min(reader.remaining());
        let mut message = vec![0; len as usize];
        let read = reader.read(&mut message);
        message.truncate(read);
        self.requests.fetch_add(1, Relaxed);
        self.bytes_in.fetch_add(read as u64, Relaxed);
        let Some(answer) = session.answer(&message, chain.writable_len()) else {
            self.bad.fetch_add(1, Relaxed);
            return 0;
        };
        if wire::is_error(&answer) {
            self.errors.fetch_add(1, Relaxed);
        }
        let mut writer = chain.writer(memory);
        writer.write(&answer);
        self.bytes_out.fetch_add(writer.done().into(), Relaxed);
        writer.done()
    }
}

/// Each file that a guest holds takes a descriptor: as many as the system lets us have.
fn raise_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let wanted = hard.min(32_768).max(soft);
        // Without it a guest is told that there are too many.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard);
    }
}

impl VirtioDevice for P9 {
    fn name(&self) -> &'static str {
        "virtio-9p"
    }

    fn id(&self) -> u16 {
        device_id::NINE_P
    }

    fn features(&self) -> u64 {
        MOUNT_TAG | feature::IN_ORDER
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config_size(&self) -> usize {
        self.config.len()
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        for (to, from) in data.iter_mut().zip(self.config.iter().skip(offset)) {
            *to = *from;
        }
    }

    fn activate(&self, mut activation: Activation) -> Result<(), DeviceError> {
        activation
            .take(0)
            .map_or(Ok(()), |queue| self.start_queue(queue))
    }

    fn reset(&self) {
        // The thread serves with this lock held.
        let mut state = self.lock();
        state.running = None;
        state.session.clear();
    }

    fn queue_reset(&self) -> Option<&dyn QueueReset> {
        Some(self)
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        Some(self)
    }

    fn feature_names(&self) -> &'static [(u64, &'static str)] {
        &[(MOUNT_TAG, "mount-tag")]
    }

    fn inspect(&self) -> Inspection {
        let state = self.lock();
        let (fids, most) = (state.session.fids(), state.session.most());
        drop(state);
        let access = if self.spec.read_only { "ro" } else { "rw" };
        let count = |counter: &AtomicU64| counter.load(Relaxed);
        Inspection {
            properties: vec![
                ("tag", self.spec.tag.clone()),
                ("directory", self.spec.path.display().to_string()),
                ("access", access.to_owned()),
                ("fids", fids.to_string()),
                ("msize", most.to_string()),
            ],
            counters: vec![
                ("requests", count(&self.requests)),
                ("bytes from the guest", count(&self.bytes_in)),
                ("bytes to the guest", count(&self.bytes_out)),
                ("errors", count(&self.errors)),
                ("bad requests", count(&self.bad)),
            ],
        }
    }
}

impl QueueReset for P9 {
    fn stop_queue(&self, _: u16) {
        // The thread serves with this lock held.
        self.lock().running = None;
    }

    fn start_queue(&self, queue: Virtqueue) -> Result<(), DeviceError> {
        let mut state = self.lock();
        let kick = kicks::on_kick(&self.mevent, "virtio-9p", &queue, &self.me, Self::serve)?;
        state.running = Some((queue, kick));
        Ok(())
    }
}
