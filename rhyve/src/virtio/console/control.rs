//! Messages on the control queues (5.3.6.2).

use serde::{Deserialize, Serialize};

use crate::virtio::Reader;

/// What a message is about.
pub(super) mod event {
    /// Driver: it is ready (or has failed).
    pub const DEVICE_READY: u16 = 0;
    /// Device: there is a port.
    pub const PORT_ADD: u16 = 1;
    /// Driver: a port is ready (or has failed).
    pub const PORT_READY: u16 = 3;
    /// Device: the port is a console.
    pub const CONSOLE_PORT: u16 = 4;
    /// Device: the console's terminal has another size.
    pub const RESIZE: u16 = 5;
    /// Both: the port is open at this end, or is not.
    pub const PORT_OPEN: u16 = 6;
    /// Device: the port's name follows.
    pub const PORT_NAME: u16 = 7;
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Message {
    /// The port.
    pub id: u32,
    /// What it is about.
    pub event: u16,
    /// Mostly yes or no.
    pub value: u16,
    /// What follows.
    #[serde(with = "crate::lifecycle::bytes")]
    more: Vec<u8>,
}

impl Message {
    pub fn new(id: u32, event: u16, value: u16) -> Self {
        Self {
            id,
            event,
            value,
            more: Vec::new(),
        }
    }

    /// With something behind it.
    pub fn with(mut self, more: &[u8]) -> Self {
        self.more.extend_from_slice(more);
        self
    }

    /// The terminal's size, columns first (virtio 1.3, 5.3.6.2). Linux took it the other way round
    /// until its commit 5326ab737a47.
    pub fn resize(id: u32, (columns, rows): (u16, u16)) -> Self {
        let size = [columns.to_le_bytes(), rows.to_le_bytes()];
        Self::new(id, event::RESIZE, 0).with(&size.concat())
    }

    /// Reads a driver's.
    pub fn read(mut reader: Reader<'_, '_>) -> Option<Self> {
        let id = u32::from_le(reader.read_obj()?);
        let event = u16::from_le(reader.read_obj()?);
        let value = u16::from_le(reader.read_obj()?);
        Some(Self::new(id, event, value))
    }

    /// As it is written.
    pub fn bytes(&self) -> Vec<u8> {
        let (event, value) = (self.event.to_le_bytes(), self.value.to_le_bytes());
        [&self.id.to_le_bytes()[..], &event, &value, &self.more].concat()
    }
}
