//! Packet headers (5.10.6).

use crate::virtio::Reader;

/// Bytes of a header.
pub const HEADER: u32 = 44;

/// The host's context id.
pub const HOST: u64 = 2;

/// The one type of socket there is here: a stream.
pub const STREAM: u16 = 1;

/// What a packet is for.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a shutdown: who sends it receives, or sends, no more.
pub const NO_RECEIVE: u32 = 1;
pub const NO_SEND: u32 = 2;

/// A connection as the host names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The host's port.
    pub host: u32,
    /// The guest's port.
    pub guest: u32,
}

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes that follow.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// Room the sender has for a connection, and how much it has taken out, modulo 2^32.
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the one at the beginning of a packet; none if it is shorter.
    pub fn read(reader: &mut Reader<'_, '_>) -> Option<Self> {
        Some(Self {
            src_cid: u64::from_le(reader.read_obj()?),
            dst_cid: u64::from_le(reader.read_obj()?),
            src_port: u32::from_le(reader.read_obj()?),
            dst_port: u32::from_le(reader.read_obj()?),
            len: u32::from_le(reader.read_obj()?),
            kind: u16::from_le(reader.read_obj()?),
            op: u16::from_le(reader.read_obj()?),
            flags: u32::from_le(reader.read_obj()?),
            buf_alloc: u32::from_le(reader.read_obj()?),
            fwd_cnt: u32::from_le(reader.read_obj()?),
        })
    }

    /// As it is written.
    pub fn bytes(&self) -> Vec<u8> {
        [
            &self.src_cid.to_le_bytes()[..],
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ]
        .concat()
    }

    /// One from the host to the guest with this id.
    pub fn to_guest(cid: u32, ports: Ports, op: u16) -> Self {
        Self {
            src_cid: HOST,
            dst_cid: cid.into(),
            src_port: ports.host,
            dst_port: ports.guest,
            kind: STREAM,
            op,
            ..Self::default()
        }
    }

    /// The connection that one from the guest belongs to.
    pub fn ports(&self) -> Ports {
        Ports {
            host: self.dst_port,
            guest: self.src_port,
        }
    }
}
