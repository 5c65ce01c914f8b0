//! What a virtio device is to its transport, and a transport to its device.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::Virtqueue;
use crate::lifecycle::Lifecycle;

/// Device ids (section 5).
pub mod device_id {
    /// Network card.
    pub const NET: u16 = 1;
    /// Block device.
    pub const BLOCK: u16 = 2;
    /// Console.
    pub const CONSOLE: u16 = 3;
    /// Entropy source.
    pub const ENTROPY: u16 = 4;
    /// Traditional memory balloon.
    pub const BALLOON: u16 = 5;
    /// 9P file system.
    pub const NINE_P: u16 = 9;
    /// Sockets.
    pub const VSOCK: u16 = 19;
}

/// Feature bits that do not belong to a kind of device (section 6), as masks.
pub mod feature {
    /// The driver may put request headers and data into descriptors as it likes (legacy only).
    pub const ANY_LAYOUT: u64 = 1 << 27;
    /// Descriptors may refer to tables of descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Both sides say at which index they want to hear of the other.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// Buffers are used in the order in which they were made available. A device that keeps it
    /// offers it by itself.
    pub const IN_ORDER: u64 = 1 << 35;
    /// Single queues can be reset.
    pub const RING_RESET: u64 = 1 << 40;

    /// Their names (section 6), and those of bits that are never offered.
    pub(crate) const NAMES: &[(u64, &str)] = &[
        (1 << 24, "notify-on-empty"),
        (ANY_LAYOUT, "any-layout"),
        (RING_INDIRECT_DESC, "indirect-desc"),
        (RING_EVENT_IDX, "event-idx"),
        (VERSION_1, "version-1"),
        (1 << 33, "access-platform"),
        (1 << 34, "ring-packed"),
        (IN_ORDER, "in-order"),
        (1 << 36, "order-platform"),
        (1 << 37, "sr-iov"),
        (1 << 38, "notification-data"),
        (1 << 39, "notif-config-data"),
        (RING_RESET, "ring-reset"),
    ];
}

/// How a device reaches its driver. Any thread may call it, with locks of the device held; it does
/// not block and does not call back. After a reset it does nothing until the next activation.
pub trait Interrupts: Send + Sync {
    /// There are used buffers in `queue`. Whether the driver wants to hear of them is
    /// [`Virtqueue::signal`]'s business.
    fn signal_queue(&self, queue: u16);

    /// The configuration space has changed.
    fn signal_config(&self);

    /// The driver did something a device cannot go on from: sets DEVICE_NEEDS_RESET (2.1.2), which
    /// a legacy driver does not see. [`Virtqueue`] calls it for whatever is wrong with a ring.
    fn needs_reset(&self);
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest memory. The device keeps it as long as it runs, and lets go of it when it is reset.
    pub memory: GuestMemoryMmap,
    /// The features both sides agreed on: never more than were offered.
    pub features: u64,
    /// The queues the driver has set up, by ascending [`Virtqueue::index`]. A driver may leave out
    /// any of them.
    pub queues: Vec<Virtqueue>,
    /// The way to the driver; each queue has it as well.
    pub interrupts: Arc<dyn Interrupts>,
}

impl Activation {
    /// Whether all the bits of `mask` were negotiated.
    pub fn has(&self, mask: u64) -> bool {
        self.features & mask == mask
    }

    /// Takes the queue with this index out, if the driver has set it up.
    pub fn take(&mut self, index: u16) -> Option<Virtqueue> {
        let at = self.queues.iter().position(|q| q.index() == index)?;
        Some(self.queues.remove(at))
    }
}

/// What a device tells whoever looks from outside, each by a name of lower-case words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspection {
    /// How it is set up, and what it is in.
    pub properties: Vec<(&'static str, String)>,
    /// What it has served since it was made: requests, bytes, errors.
    pub counters: Vec<(&'static str, u64)>,
}

/// Why a device does not start: the host lacks something. The transport sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub struct DeviceError {
    /// What was tried.
    pub action: &'static str,
    /// The system's answer.
    #[source]
    pub source: std::io::Error,
}

/// A device model behind a transport.
///
/// # Life
///
/// ```text
///         activate              stop_queue / start_queue
///  idle ------------> running -----------------------------> running
///   ^                    |
///   +------- reset ------+
/// ```
///
/// The transport calls `activate`, `reset` and [`QueueReset`]'s from a vCPU's thread inside a
/// register access, one at a time and with its own lock held; the configuration space may be read
/// and written at any moment, also by several vCPUs. A method returns soon and never waits for the
/// guest. Locks: transport < device < [`Interrupts`]; a device never calls its transport otherwise.
///
/// Work is done elsewhere: by a worker thread or by a callback of the event thread, which waits for
/// [`Virtqueue::kick`]. The kick comes from KVM's ioeventfd when there is one and from the transport
/// when there is none, which a device cannot tell apart. A kick may be spurious, and requests may be
/// there before the first: look once after `activate`. A worker's loop, then:
///
/// ```text
/// loop { wait for kick or quit; read kick; while queue.serve(..) {} }
/// ```
///
/// A device is shared (`&self`): what changes is behind its own lock.
pub trait VirtioDevice: Send + Sync {
    /// bhyve's word for it, as in `virtio-rnd`.
    fn name(&self) -> &'static str;

    /// One of [`device_id`].
    fn id(&self) -> u16;

    /// The device's own feature bits (0 to 23 and 50 to 63), and [`feature::IN_ORDER`] if it keeps
    /// that. Constant. The transport adds what it and the queues can do.
    fn features(&self) -> u64;

    /// What its rings can do, of [`feature`]'s bits: all the transport knows of, today.
    fn ring_features(&self) -> u64 {
        feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX | feature::ANY_LAYOUT
    }

    /// The greatest size of each queue: powers of two up to 32768. Constant. A legacy driver has to
    /// take them as they are.
    fn queue_sizes(&self) -> &[u16];

    /// Bytes of the configuration space. Constant.
    fn config_size(&self) -> usize {
        0
    }

    /// The configuration space from `offset` on. Whatever lies beyond its end is left as it is.
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let _ = (offset, data);
    }

    /// The driver writes into the configuration space from `offset` on; read-only fields and
    /// whatever lies beyond its end ignore it.
    fn config_write(&self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Counts changes of the configuration space that its driver did not make (2.5). Changes under
    /// the lock under which `config_read` reads, so that no reader takes two halves for one.
    fn config_generation(&self) -> u8 {
        0
    }

    /// The driver is ready. Called when the device is idle, never twice in a row.
    ///
    /// # Errors
    /// The host lacks something; the device stays idle.
    fn activate(&self, activation: Activation) -> Result<(), DeviceError>;

    /// Makes the device as it was before `activate`, whether it was activated or not. When this
    /// returns, nothing touches guest memory or the queues any more, and requests in flight are
    /// forgotten. May wait for host I/O that is under way, but for nothing else.
    fn reset(&self);

    /// Names of its own feature bits, as masks of one bit, in the specification's words without
    /// their prefix.
    fn feature_names(&self) -> &'static [(u64, &'static str)] {
        &[]
    }

    /// What `vmmctl --get-devices` tells of it, beyond what the transport knows. Called by the
    /// control thread at any moment, without locks; returns within a tenth of a second.
    fn inspect(&self) -> Inspection {
        Inspection::default()
    }

    /// How its state outlives its process: what it has beyond features and queues, which are the
    /// transport's. A machine with a device that has none cannot be suspended. With it, `freeze`
    /// leaves no request unanswered (see [`Lifecycle`]), and `restore` comes before `activate`,
    /// whose queues go on where they were.
    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        None
    }

    /// What stops and starts single queues, if the device can do that, as all of today's: then the
    /// transport offers [`feature::RING_RESET`].
    fn queue_reset(&self) -> Option<&dyn QueueReset> {
        None
    }
}

/// Stops and starts single queues of a running device (2.6.1).
pub trait QueueReset {
    /// As [`VirtioDevice::reset`], for one queue: what it was about beyond its requests stays.
    fn stop_queue(&self, index: u16);

    /// The driver has set up a queue that is not running.
    ///
    /// # Errors
    /// The host lacks something; the queue stays stopped.
    fn start_queue(&self, queue: Virtqueue) -> Result<(), DeviceError>;
}
