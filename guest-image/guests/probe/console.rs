//! Lines of text on the kernel's console, `crate::terminal`. `core::fmt` is out of reach: the compiled `core` uses SSE in
//! it.

use crate::memory::peek64;
use crate::terminal;

/// Something that can be printed.
pub trait Print {
    /// Sends it to the console.
    fn print(&self);
}

impl Print for &str {
    fn print(&self) {
        terminal::write(self.as_bytes());
    }
}

impl Print for u64 {
    fn print(&self) {
        digits(*self, 10, "");
    }
}

impl Print for u32 {
    fn print(&self) {
        digits(u64::from(*self), 10, "");
    }
}

/// A number in base 16, with 0x.
pub struct Hex(pub u64);

impl Print for Hex {
    fn print(&self) {
        digits(self.0, 16, "0x");
    }
}

/// A number as two decimal digits.
pub struct Two(pub u8);

impl Print for Two {
    fn print(&self) {
        terminal::write(&[b'0' + self.0 / 10 % 10, b'0' + self.0 % 10]);
    }
}

/// Bytes from outside: what is not printable ASCII becomes a dot.
pub struct Text<'a>(pub &'a [u8]);

impl Print for Text<'_> {
    fn print(&self) {
        for chunk in self.0.chunks(16) {
            let mut line = [b' '; 16];
            for (out, byte) in line.iter_mut().zip(chunk) {
                *out = match byte {
                    b' '..=b'~' => *byte,
                    _ => b'.',
                };
            }
            terminal::write(line.get(..chunk.len()).unwrap_or(&line));
        }
    }
}

/// Text that lies in memory: its address and length.
pub struct Stored(pub u64, pub u64);

impl Print for Stored {
    fn print(&self) {
        let Self(address, length) = *self;
        for offset in (0..length).step_by(8) {
            let word = peek64(address + offset).unwrap_or(0).to_le_bytes();
            let some = (length - offset).min(8) as usize;
            Text(word.get(..some).unwrap_or(&word)).print();
        }
    }
}

fn digits(mut value: u64, base: u64, prefix: &str) {
    let mut text = [0u8; 24];
    let mut start = text.len();
    for slot in text.iter_mut().rev() {
        // Constant divisors: no division by zero that the compiler would have to guard against.
        let digit = (if base == 16 { value % 16 } else { value % 10 }) as u8;
        *slot = if digit < 10 {
            b'0' + digit
        } else {
            b'a' - 10 + digit
        };
        start -= 1;
        value = if base == 16 { value / 16 } else { value / 10 };
        if value == 0 {
            break;
        }
    }
    prefix.print();
    terminal::write(text.get(start..).unwrap_or(&text));
}

/// Prints the items, without a line end.
macro_rules! print {
    ($($item:expr),* $(,)?) => {{
        $( $crate::console::Print::print(&$item); )*
    }};
}

/// Prints the items as a line.
macro_rules! say {
    ($($item:expr),* $(,)?) => {
        $crate::console::print!($($item,)* "\r\n")
    };
}

pub(crate) use {print, say};
