//! One connection: a socket of the host, and what either side may still send (5.10.6.3).

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{Header, NO_RECEIVE, NO_SEND};
use crate::mevent::{Ready, Source};

/// Bytes of the guest's that are kept while the host's program does not read.
pub const ROOM: u32 = 256 << 10;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A program of the host has asked, the guest has not answered.
    Asked,
    /// Data may flow.
    Open,
}

/// A connection.
pub struct Connection {
    pub stream: UnixStream,
    pub source: Source,
    pub phase: Phase,
    /// From the guest, for the host's program.
    buffer: VecDeque<u8>,
    /// Bytes of the guest's that the program took, modulo 2^32, and what the guest knows of it.
    forwarded: u32,
    told: u32,
    /// Bytes that were sent to the guest, modulo 2^32.
    sent: u32,
    /// What the guest has room for, and has taken.
    peer_room: u32,
    peer_taken: u32,
    /// What the guest does no more.
    pub peer_shut: u32,
    /// The host's program sends no more, and the guest knows.
    pub ended: bool,
}

/// A guest that sends more than there is room for.
#[derive(Debug)]
pub struct Overrun;

impl Connection {
    pub fn new(stream: UnixStream, source: Source, phase: Phase) -> Self {
        Self {
            stream,
            source,
            phase,
            buffer: VecDeque::new(),
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_room: 0,
            peer_taken: 0,
            peer_shut: 0,
            ended: false,
        }
    }

    /// Takes what every packet of the guest tells: its room.
    pub fn heard(&mut self, header: &Header) {
        self.peer_room = header.buf_alloc;
        self.peer_taken = header.fwd_cnt;
    }

    /// Puts our room into a packet.
    pub fn tell(&mut self, header: &mut Header) {
        header.buf_alloc = ROOM;
        header.fwd_cnt = self.forwarded;
        self.told = self.forwarded;
    }

    /// How many bytes the guest has room for.
    pub fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.peer_taken);
        // A guest that says it took what was never sent has no room.
        self.peer_room.saturating_sub(under_way)
    }

    /// This much was sent to the guest.
    pub fn spend(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Room for the guest's bytes.
    pub fn room(&self) -> u32 {
        ROOM.saturating_sub(u32::try_from(self.buffer.len()).unwrap_or(u32::MAX))
    }

    /// Takes bytes of the guest.
    ///
    /// # Errors
    /// It was told that there is no room for them.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Overrun> {
        if bytes.len() > self.room() as usize {
            return Err(Overrun);
        }
        self.buffer.extend(bytes);
        Ok(())
    }

    /// Hands the program what it takes. True if the guest should hear of the room this made.
    ///
    /// # Errors
    /// The program is gone.
    pub fn flush(&mut self) -> io::Result<bool> {
        while !self.buffer.is_empty() {
            let (piece, _) = self.buffer.as_slices();
            match (&self.stream).write(piece) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.buffer.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.buffer.is_empty() && self.peer_shut & NO_SEND != 0 {
            // The program hears of it once; again is no error.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(self.forwarded.wrapping_sub(self.told) >= ROOM / 2)
    }

    /// The guest is done, and the program has all of its bytes.
    pub fn is_done(&self) -> bool {
        self.buffer.is_empty() && self.peer_shut == NO_RECEIVE | NO_SEND
    }

    /// Whether there is something to read for the guest, as far as is known here.
    pub fn wants_input(&self) -> bool {
        self.phase == Phase::Open
            && !self.ended
            && self.peer_shut & NO_RECEIVE == 0
            && self.credit() != 0
    }

    /// Waits for what can go on.
    pub fn wait(&self, guest_has_room: bool) {
        let mut interest = Ready::empty();
        if self.phase == Phase::Open {
            interest.set(Ready::READ, self.wants_input() && guest_has_room);
            interest.set(Ready::WRITE, !self.buffer.is_empty());
        }
        self.source.set_interest(interest);
    }
}
