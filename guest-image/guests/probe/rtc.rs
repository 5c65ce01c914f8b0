//! The time of day in the CMOS clock (Motorola MC146818A data sheet).

use crate::cpu::{Deadline, inb, outb};

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_D: u8 = 0x0d;
const UPDATE_IN_PROGRESS: u8 = 0x80;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;
const PM: u8 = 0x80;
/// Not the chip's but every PC's; FADT names it.
const CENTURY: u8 = 0x32;

/// A time of day.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Time {
    pub year: u32,
    pub month: u8,
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
}

fn register(index: u8) -> u8 {
    outb(INDEX, index);
    inb(DATA)
}

/// Reads the clock: twice the same between two updates. An error says what is wrong.
pub fn read() -> Result<Time, &'static str> {
    if register(REGISTER_D) == 0xff {
        return Err("nothing answers");
    }
    let mode = register(REGISTER_B);
    let mut last = None;
    for _ in 0..4 {
        let deadline = Deadline::after(Deadline::LONG);
        if !deadline.wait(|| register(REGISTER_A) & UPDATE_IN_PROGRESS == 0) {
            return Err("an update never ends");
        }
        let raw = [0u8, 2, 4, 7, 8, 9, CENTURY].map(register);
        if last == Some(raw) {
            return decode(raw, mode);
        }
        last = Some(raw);
    }
    Err("never the same twice")
}

fn decode(raw: [u8; 7], mode: u8) -> Result<Time, &'static str> {
    let pm = mode & HOURS_24 == 0 && raw[2] & PM != 0;
    let number = |value: u8| {
        if mode & BINARY != 0 {
            Ok(value)
        } else if value & 0x0f <= 9 && value >> 4 <= 9 {
            Ok((value >> 4) * 10 + (value & 0x0f))
        } else {
            Err("not BCD, though register B says so")
        }
    };
    let mut hour = number(if mode & HOURS_24 == 0 {
        raw[2] & !PM
    } else {
        raw[2]
    })?;
    if mode & HOURS_24 == 0 {
        hour = hour % 12 + if pm { 12 } else { 0 };
    }
    let century = match number(raw[6]) {
        Ok(century @ 19..=29) => u32::from(century),
        _ => 20,
    };
    let time = Time {
        year: century * 100 + u32::from(number(raw[5])?),
        month: number(raw[4])?,
        day: number(raw[3])?,
        hour,
        minute: number(raw[1])?,
        second: number(raw[0])?,
    };
    let plausible = matches!(time.month, 1..=12)
        && matches!(time.day, 1..=31)
        && time.hour < 24
        && time.minute < 60
        && time.second < 60;
    if plausible {
        Ok(time)
    } else {
        Err("out of range")
    }
}
