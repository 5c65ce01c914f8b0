//! Writes down what passes: a file as tcpdump's (libpcap's format, pcap-savefile(5)).
//!
//! Frames are as they pass here: with offloads, larger than on a wire and with checksums to be
//! filled in. A file that has frames already is gone on with, for a suspended machine has its options
//! again, and its clones have them too: each frame is written at once, and at the file's end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use vm_memory::VolatileSlice;

use super::{Backend, Info, Offloads, Port, Wait};

/// Bytes of a frame that are kept: all.
const SNAPLEN: u32 = 1 << 18;
/// Little-endian with nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;
const ETHERNET: u32 = 1;

fn header() -> [u8; 24] {
    let words: [u32; 6] = [MAGIC, 2 | 4 << 16, 0, 0, SNAPLEN, ETHERNET];
    let mut header = [0; 24];
    header.copy_from_slice(words.map(u32::to_le_bytes).as_flattened());
    header
}

/// Opens a file for what passes, which may be a pipe.
///
/// # Errors
/// The system's; there is something else in it.
pub fn create(path: &Path) -> io::Result<File> {
    let regular = std::fs::metadata(path).map_or(true, |file| file.is_file());
    let mut file = File::options()
        .append(true)
        .read(regular)
        .create(true)
        .open(path)?;
    let mut start = Vec::new();
    if regular {
        let length = header().len() as u64;
        (&mut file).take(length).read_to_end(&mut start)?;
    }
    if start.is_empty() {
        file.write_all(&header())?;
    } else if start != header() {
        return Err(io::Error::other("there is something else in it"));
    }
    Ok(file)
}

/// A backend whose frames are written down.
pub struct Recorded {
    backend: Arc<dyn Backend>,
    record: Arc<Record>,
}

struct Record {
    /// None once it could not be written.
    file: Mutex<Option<File>>,
    /// Bytes in front of a frame.
    header: Mutex<usize>,
}

struct RecordedPort {
    port: Arc<dyn Port>,
    record: Arc<Record>,
}

impl Recorded {
    /// Writes what passes `backend` to `file`, which [`create`] has made.
    pub fn new(backend: Arc<dyn Backend>, file: File) -> Self {
        let header = if backend.info().header { 12 } else { 0 };
        Self {
            backend,
            record: Arc::new(Record {
                file: Mutex::new(Some(file)),
                header: Mutex::new(header),
            }),
        }
    }
}

impl Backend for Recorded {
    fn info(&self) -> &Info {
        self.backend.info()
    }

    fn port(&self, pair: u16) -> Option<Arc<dyn Port>> {
        let port = self.backend.port(pair)?;
        let record = self.record.clone();
        Some(Arc::new(RecordedPort { port, record }))
    }

    fn configure(&self, header: usize, offloads: Offloads) -> io::Result<()> {
        if self.info().header {
            let mut len = self.record.header.lock();
            *len.as_deref_mut().unwrap_or(&mut 0) = header;
        }
        self.backend.configure(header, offloads)
    }

    fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        self.backend.set_pairs(pairs)
    }
}

impl Record {
    fn add(&self, slices: &[VolatileSlice<'_>], len: usize) {
        let skip = *self.header.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = vec![0; 16];
        for slice in slices {
            let wanted = slice.len().min((len + 16).saturating_sub(bytes.len()));
            let at = bytes.len();
            bytes.resize(at + wanted, 0);
            slice.copy_to(&mut bytes[at..]);
        }
        let frame = bytes.split_off((16 + skip).min(bytes.len()));
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        let count = frame.len() as u32;
        let words = [now.as_secs() as u32, now.subsec_nanos(), count, count];
        let mut record = words.map(u32::to_le_bytes).concat();
        record.extend(frame);
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = file.as_mut()
            && let Err(error) = open.write_all(&record)
        {
            tracing::warn!(target: "rhyve::net", "pcap: {error}; nothing more is written down");
            *file = None;
        }
    }
}

impl Port for RecordedPort {
    fn wait(&self) -> Wait {
        self.port.wait()
    }

    fn receive(&self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let len = self.port.receive(into)?;
        self.record.add(into, len);
        Ok(len)
    }

    fn wait_in_receive(&self, wait: bool) -> bool {
        self.port.wait_in_receive(wait)
    }

    fn send(&self, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.port.send(from)?;
        self.record.add(from, usize::MAX - 16);
        Ok(())
    }
}
