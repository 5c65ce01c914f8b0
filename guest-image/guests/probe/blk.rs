//! A driver for virtio-blk (virtio 1.3, 5.2), one sector at a time.
//!
//! ```text
//! blk legacy|modern [N]            set up the Nth disk
//! blk write|read SECTOR COUNT SEED fill sectors with what the seed says, or look whether it is there
//! blk flush | id
//! blk discard|zero SECTOR COUNT    give sectors back, or make them zeros that may be given back
//! blk log SECTOR COUNT             write numbers, each flushed before it is printed
//! ```

use core::sync::atomic::{AtomicBool, Ordering};

use crate::console::{Hex, Text, say};
use crate::shell::Words;
use crate::virtio::{Device, Queue, Rings, Shared};

const KIND: u8 = 2;
const FLUSH_FEATURE: u64 = 1 << 9;
const DISCARD_FEATURE: u64 = 1 << 13;
const ZEROES_FEATURE: u64 = 1 << 14;

/// Words of a sector.
const SECTOR: usize = 128;

/// Request types.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// A segment's flag: its space may be given back.
const UNMAP: u32 = 1;

static RINGS: Rings = Rings::new();
/// Header, then the status.
static REQUEST: Shared<8> = Shared::new();
const STATUS: usize = 4;
static DATA: Shared<SECTOR> = Shared::new();

/// The disk that was set up.
#[derive(Clone, Copy)]
struct Disk {
    device: Device,
    queue: Queue,
}

/// Of the boot CPU alone, which runs the shell.
static mut DISK: Option<Disk> = None;
static BUSY: AtomicBool = AtomicBool::new(false);

/// Runs one command.
pub fn run(words: &mut Words) {
    let done = match words.word() {
        Some(b"legacy") => open(false, words.number().unwrap_or(0)),
        Some(b"modern") => open(true, words.number().unwrap_or(0)),
        Some(verb) => with_disk(|disk| disk.run(verb, words)),
        None => Err("what?"),
    };
    if let Err(why) = done {
        say!("probe: blk FAILED (", why, ")");
    }
}

fn open(modern: bool, number: u64) -> Result<(), &'static str> {
    let mut device = Device::find(KIND, modern, number)?;
    let features = device.negotiate(FLUSH_FEATURE | DISCARD_FEATURE | ZEROES_FEATURE)?;
    let queue = device.queue(0, &RINGS)?;
    device.start();
    let sectors = u64::from(device.config(0)) | u64::from(device.config(4)) << 32;
    say!(
        "probe: blk ",
        if modern { "modern" } else { "legacy" },
        " sectors ",
        sectors,
        " features ",
        Hex(features),
        " ok"
    );
    BUSY.store(false, Ordering::Relaxed);
    // SAFETY: the shell runs on one CPU, and no interrupt handler comes here.
    unsafe { DISK = Some(Disk { device, queue }) };
    Ok(())
}

fn with_disk(work: impl FnOnce(&mut Disk) -> Result<(), &'static str>) -> Result<(), &'static str> {
    if BUSY.swap(true, Ordering::Relaxed) {
        return Err("an exception left it in mid-request");
    }
    // SAFETY: as in `open`; it is copied out, and back.
    let mut disk = unsafe { DISK }.ok_or("no disk is set up")?;
    let done = work(&mut disk);
    // SAFETY: as in `open`.
    unsafe { DISK = Some(disk) };
    BUSY.store(false, Ordering::Relaxed);
    done
}

impl Disk {
    fn run(&mut self, verb: &[u8], words: &mut Words) -> Result<(), &'static str> {
        let first = words.number().unwrap_or(0);
        let count = words.number().unwrap_or(1);
        let seed = words.number().unwrap_or(1);
        match verb {
            b"write" => {
                for sector in first..first.saturating_add(count) {
                    fill(seed, sector);
                    self.request(OUT, sector)?;
                }
                say!("probe: blk write ", count, " ok");
            }
            b"read" => {
                for sector in first..first.saturating_add(count) {
                    fill(!seed, sector);
                    self.request(IN, sector)?;
                    if !(0..SECTOR).all(|at| DATA.get(at) == word(seed, sector, at)) {
                        say!("probe: blk read FAILED (sector ", sector, " differs)");
                        return Ok(());
                    }
                }
                say!("probe: blk read ", count, " ok");
            }
            b"flush" => {
                self.request(FLUSH, 0)?;
                say!("probe: blk flush ok");
            }
            b"discard" | b"zero" => {
                let zero = verb == b"zero";
                let flags = if zero { UNMAP } else { 0 };
                let segment = [first as u32, (first >> 32) as u32, count as u32, flags];
                for (at, word) in segment.into_iter().enumerate() {
                    DATA.set(at, word);
                }
                self.request(if zero { WRITE_ZEROES } else { DISCARD }, 0)?;
                say!("probe: blk ", Text(verb), " ", count, " ok");
            }
            b"id" => {
                self.request(GET_ID, 0)?;
                let mut id = [0; 20];
                for (at, byte) in id.iter_mut().enumerate() {
                    *byte = (DATA.get(at / 4) >> (8 * (at as u32 % 4))) as u8;
                }
                let length = id.iter().position(|&byte| byte == 0).unwrap_or(id.len());
                say!(
                    "probe: blk id ",
                    Text(id.get(..length).unwrap_or(&id)),
                    " ok"
                );
            }
            b"log" => {
                for number in 0..count {
                    fill(number, first + number);
                    self.request(OUT, first + number)?;
                    self.request(FLUSH, 0)?;
                    say!("stable ", number);
                }
                say!("probe: blk log ok");
            }
            _ => return Err("legacy, modern, write, read, flush, discard, zero, id or log"),
        }
        Ok(())
    }

    fn request(&mut self, kind: u32, sector: u64) -> Result<(), &'static str> {
        let header = [kind, 0, sector as u32, (sector >> 32) as u32];
        for (at, word) in header.into_iter().enumerate() {
            REQUEST.set(at, word);
        }
        REQUEST.set(STATUS, 0xff);
        let header = (REQUEST.address(), 16, false);
        let (bytes, written) = match kind {
            GET_ID => (20, true),
            DISCARD | WRITE_ZEROES => (16, false),
            _ => (512, kind != OUT),
        };
        let data = (DATA.address(), bytes, written);
        let status = (REQUEST.address() + 4 * STATUS as u64, 1, true);
        if kind == FLUSH {
            self.device.ask(&mut self.queue, &[header, status])?;
        } else {
            self.device.ask(&mut self.queue, &[header, data, status])?;
        }
        match REQUEST.get(STATUS) as u8 {
            0 => Ok(()),
            1 => Err("I/O error"),
            2 => Err("not supported"),
            _ => Err("no status"),
        }
    }
}

/// What a sector holds: its number and the seed, mixed into every word.
fn word(seed: u64, sector: u64, at: usize) -> u32 {
    (seed as u32).wrapping_mul(0x9e37_79b9) ^ (sector as u32) << 8 ^ at as u32
}

fn fill(seed: u64, sector: u64) {
    for at in 0..SECTOR {
        DATA.set(at, word(seed, sector, at));
    }
}
