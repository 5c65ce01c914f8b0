//! The card's frames as smoltcp's device.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

/// The largest frame that is looked at; what is longer is cut, and then makes no sense.
const LARGEST: usize = (64 << 10) + 64;
/// Bytes in front of a packet.
const HEADER: usize = 14;

/// The far end of the card's socket pair.
pub(super) struct Frames {
    socket: OwnedFd,
    mtu: usize,
    received: Vec<u8>,
    /// What there was no room for.
    waiting: VecDeque<Vec<u8>>,
    /// As many may wait while others are received. None: the card at the near end takes frames whether or
    /// not it can send any.
    pub(super) most_waiting: usize,
    /// The near end has gone.
    ended: bool,
}

impl Frames {
    pub fn new(socket: OwnedFd, mtu: u16) -> Self {
        Self {
            socket,
            mtu: mtu.into(),
            received: vec![0; LARGEST],
            waiting: VecDeque::new(),
            most_waiting: 0,
            ended: false,
        }
    }

    /// Whether nobody takes or sends frames any more.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Sends what waits for room; true if something still does.
    pub fn flush(&mut self) -> bool {
        while let Some(frame) = self.waiting.front() {
            if !sent(&self.socket, frame) {
                return true;
            }
            self.waiting.pop_front();
        }
        false
    }
}

impl AsFd for Frames {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// False if there is no room. What cannot be sent at all is lost, as on a wire.
fn sent(socket: &OwnedFd, frame: &[u8]) -> bool {
    let flags = MsgFlags::MSG_NOSIGNAL;
    send(socket.as_raw_fd(), frame, flags) != Err(Errno::EAGAIN)
}

pub(super) struct Received<'a>(&'a [u8]);

pub(super) struct Sender<'a> {
    socket: &'a OwnedFd,
    waiting: &'a mut VecDeque<Vec<u8>>,
}

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        if !self.waiting.is_empty() || !sent(self.socket, &frame) {
            self.waiting.push_back(frame);
        }
        result
    }
}

impl Device for Frames {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Sender<'_>)> {
        // An answer wants room.
        if self.flush() && self.waiting.len() > self.most_waiting {
            return None;
        }
        let flags = MsgFlags::MSG_DONTWAIT;
        match recv(self.socket.as_raw_fd(), &mut self.received, flags) {
            Ok(0) => self.ended = true,
            Ok(len) => {
                let frame = self.received.get(..len)?;
                let (socket, waiting) = (&self.socket, &mut self.waiting);
                return Some((Received(frame), Sender { socket, waiting }));
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => self.ended = true,
        }
        None
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sender<'_>> {
        if self.flush() {
            return None;
        }
        let (socket, waiting) = (&self.socket, &mut self.waiting);
        Some(Sender { socket, waiting })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + HEADER;
        capabilities
    }
}
