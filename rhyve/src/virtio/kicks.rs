//! Devices that are served on an event thread: what wakes them.

use std::os::fd::AsFd;
use std::sync::Weak;

use super::{DeviceError, Virtqueue};
use crate::mevent::{Mevent, Ready, Source};

/// Calls `serve` on the event thread whenever the driver kicks `queue`, and once from the start, for
/// requests that are there already. `serve` takes the kick ([`Virtqueue::kick`]). Ends with what is
/// returned, or with the device.
///
/// # Errors
/// The host is out of descriptors.
pub(super) fn on_kick<D: Send + Sync + 'static>(
    mevent: &Mevent,
    name: &str,
    queue: &Virtqueue,
    device: &Weak<D>,
    serve: impl Fn(&D) + Send + 'static,
) -> Result<Source, DeviceError> {
    let fd = queue.as_fd().try_clone_to_owned();
    let fd = fd.map_err(|source| DeviceError {
        action: "wait for the driver",
        source,
    })?;
    let device = device.clone();
    let source = mevent.add(name, fd, Ready::READ, move |_| {
        if let Some(device) = device.upgrade() {
            serve(&device);
        }
    });
    again(queue);
    Ok(source)
}

/// Has the queue served once more, after others on the event thread had their turn.
pub(super) fn again(queue: &Virtqueue) {
    // The one failure, a counter at its maximum, means that it is going to be served anyway.
    let _ = queue.kick().write(1);
}
