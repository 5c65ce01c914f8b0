//! A driver for virtio-net (virtio 1.3, 5.1), and as much of a network as finds its neighbour.
//!
//! ```text
//! net legacy|modern [N]   set up the Nth card
//! net ping COUNT SEED     ask who 10.0.2.2 is (RFC 826), and have it echo what the seed says (RFC 792)
//! ```

use crate::console::{Hex, say};
use crate::shell::Words;
use crate::virtio::{Device, Queue, Rings, Shared};

const KIND: u8 = 1;
const MAC_FEATURE: u64 = 1 << 5;

/// Buffers for what comes in, and bytes of each.
const BUFFERS: u16 = 4;
const BUFFER: usize = 2048;
/// Bytes that are echoed.
const PAYLOAD: usize = 64;

const OURS: [u8; 4] = [10, 0, 2, 15];
const THEIRS: [u8; 4] = [10, 0, 2, 2];

static RECEIVE: Rings = Rings::new();
static TRANSMIT: Rings = Rings::new();
static OUT: Shared<{ BUFFER / 4 }> = Shared::new();
static IN: Shared<{ BUFFERS as usize * BUFFER / 4 }> = Shared::new();

/// The card that was set up.
#[derive(Clone, Copy)]
struct Card {
    device: Device,
    receive: Queue,
    transmit: Queue,
    mac: [u8; 6],
    /// Bytes in front of a frame (5.1.6).
    header: usize,
}

/// Of the boot CPU alone, which runs the shell.
static mut CARD: Option<Card> = None;

/// Runs one command.
pub fn run(words: &mut Words) {
    let done = match words.word() {
        Some(b"legacy") => open(false, words.number().unwrap_or(0)),
        Some(b"modern") => open(true, words.number().unwrap_or(0)),
        Some(b"ping") => {
            let (count, seed) = (words.number().unwrap_or(1), words.number().unwrap_or(1));
            ping(count, seed)
        }
        _ => Err("legacy, modern or ping"),
    };
    if let Err(why) = done {
        say!("probe: net FAILED (", why, ")");
    }
}

fn open(modern: bool, number: u64) -> Result<(), &'static str> {
    let mut device = Device::find(KIND, modern, number)?;
    if device.negotiate(MAC_FEATURE)? & MAC_FEATURE == 0 {
        return Err("no address");
    }
    let mut receive = device.queue(0, &RECEIVE)?;
    let transmit = device.queue(1, &TRANSMIT)?;
    device.start();
    let (low, high) = (device.config(0), device.config(4));
    let mut mac = [0; 6];
    for (at, byte) in mac.iter_mut().enumerate() {
        let word = if at < 4 { low } else { high };
        *byte = (word >> (8 * (at as u32 % 4))) as u8;
    }
    for buffer in 0..BUFFERS {
        post(&mut device, &mut receive, buffer);
    }
    let shown = mac.iter().fold(0, |all, &byte| all << 8 | u64::from(byte));
    say!(
        "probe: net ",
        if modern { "modern" } else { "legacy" },
        " mac ",
        Hex(shown),
        " ok"
    );
    let card = Card {
        device,
        receive,
        transmit,
        mac,
        header: if modern { 12 } else { 10 },
    };
    // SAFETY: the shell runs on one CPU, and no interrupt handler comes here.
    unsafe { CARD = Some(card) };
    Ok(())
}

fn ping(count: u64, seed: u64) -> Result<(), &'static str> {
    // SAFETY: as in `open`; it is copied out, and back.
    let mut card = unsafe { CARD }.ok_or("no card is set up")?;
    let done = card.ping(count, seed);
    // SAFETY: as in `open`.
    unsafe { CARD = Some(card) };
    if done.is_ok() {
        say!("probe: net ping ", count, " ok");
    }
    done
}

/// Gives the card a buffer.
fn post(device: &mut Device, queue: &mut Queue, buffer: u16) {
    let at = IN.address() + (usize::from(buffer) * BUFFER) as u64;
    device.post(queue, buffer, &[(at, BUFFER as u32, true)]);
}

impl Card {
    fn ping(&mut self, count: u64, seed: u64) -> Result<(), &'static str> {
        let mac = self.resolve()?;
        for number in 0..count {
            self.echo(mac, number as u16, seed as u8)?;
        }
        Ok(())
    }

    /// Asks for the neighbour's address.
    fn resolve(&mut self) -> Result<[u8; 6], &'static str> {
        let mut at = self.ethernet([0xff; 6], 0x0806);
        at = put(at, &[0, 1, 8, 0, 6, 4, 0, 1]);
        at = put(at, &self.mac);
        at = put(at, &OURS);
        at = put(at, &[0; 6]);
        at = put(at, &THEIRS);
        self.exchange(at, |frame| {
            let answers = got16(frame + 12) == 0x0806
                && got16(frame + 20) == 2
                && (0..4).all(|n| Some(&got(frame + 28 + n)) == THEIRS.get(n));
            answers.then(|| {
                let mut mac = [0; 6];
                for (at, byte) in mac.iter_mut().enumerate() {
                    *byte = got(frame + 22 + at);
                }
                mac
            })
        })
    }

    /// Has the neighbour send something back.
    fn echo(&mut self, to: [u8; 6], number: u16, seed: u8) -> Result<(), &'static str> {
        let payload = |n: usize| seed.wrapping_add(number as u8).wrapping_add(n as u8);
        let length = (28 + PAYLOAD) as u16;
        let ip = self.ethernet(to, 0x0800);
        // Version and length, and no fragments; ICMP.
        let mut at = put(ip, &[0x45, 0]);
        at = put16(at, length);
        at = put(at, &[0, 0, 0x40, 0, 64, 1, 0, 0]);
        at = put(at, &OURS);
        let icmp = put(at, &THEIRS);
        at = put(icmp, &[8, 0, 0, 0]);
        at = put16(at, 0x7270);
        at = put16(at, number);
        for n in 0..PAYLOAD {
            at = put(at, &[payload(n)]);
        }
        put16(ip + 10, checksum(ip, icmp));
        put16(icmp + 2, checksum(icmp, at));
        self.exchange(at, |frame| {
            let (ip, icmp) = (frame + 14, frame + 34);
            let answers = got16(frame + 12) == 0x0800
                && got(ip + 9) == 1
                && got(icmp) == 0
                && got16(icmp + 4) == 0x7270
                && got16(icmp + 6) == number;
            let whole = (0..PAYLOAD).all(|n| got(icmp + 8 + n) == payload(n));
            (answers && whole).then_some(())
        })
    }

    /// Begins a frame; where it goes on.
    fn ethernet(&self, to: [u8; 6], kind: u16) -> usize {
        let mut at = 0;
        while at < self.header {
            at = put(at, &[0]);
        }
        at = put(at, &to);
        at = put(at, &self.mac);
        put16(at, kind)
    }

    /// Sends the frame that ends there, and waits for one that `look` takes.
    fn exchange<T>(
        &mut self,
        end: usize,
        look: impl Fn(usize) -> Option<T>,
    ) -> Result<T, &'static str> {
        let frame = (OUT.address(), end as u32, false);
        self.device.post(&mut self.transmit, 0, &[frame]);
        self.device.used(&mut self.transmit)?;
        for _ in 0..16 {
            let (buffer, bytes) = self.device.used(&mut self.receive)?;
            let start = buffer as usize * BUFFER;
            if bytes as usize <= self.header || bytes as usize > BUFFER || buffer >= BUFFERS.into()
            {
                return Err("an answer that cannot be");
            }
            let found = look(start + self.header);
            post(&mut self.device, &mut self.receive, buffer as u16);
            if let Some(found) = found {
                // Of one queue or of both.
                self.device.interrupted()?;
                return Ok(found);
            }
        }
        Err("other frames than the answer")
    }
}

/// Writes bytes into the frame; where the next ones go.
fn put(at: usize, bytes: &[u8]) -> usize {
    for (number, &byte) in bytes.iter().enumerate() {
        let (word, shift) = ((at + number) / 4, 8 * ((at + number) as u32 % 4));
        let kept = OUT.get(word) & !(0xff << shift);
        OUT.set(word, kept | u32::from(byte) << shift);
    }
    at + bytes.len()
}

fn put16(at: usize, value: u16) -> usize {
    put(at, &value.to_be_bytes())
}

/// A byte of what came in.
fn got(at: usize) -> u8 {
    (IN.get(at / 4) >> (8 * (at as u32 % 4))) as u8
}

fn got16(at: usize) -> u16 {
    u16::from(got(at)) << 8 | u16::from(got(at + 1))
}

/// The Internet's checksum (RFC 1071) of an even number of bytes of the frame.
fn checksum(from: usize, to: usize) -> u16 {
    let byte = |at: usize| (OUT.get(at / 4) >> (8 * (at as u32 % 4))) & 0xff;
    let mut sum = 0;
    let mut at = from;
    while at < to {
        sum += byte(at) << 8 | byte(at + 1);
        at += 2;
    }
    sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}
