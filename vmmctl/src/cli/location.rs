//! A place in a kernel, as `--until` and `--disasm` take it: `0xffffffff81000000`, `do_sys_openat2`,
//! `do_sys_openat2+0x10`.

use std::fmt;
use std::str::FromStr;

use crate::number;

/// A place in the guest's kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// Linear address.
    Address(u64),
    /// What its symbols say.
    Symbol {
        /// A function or variable.
        name: String,
        /// Bytes behind its beginning.
        offset: u64,
    },
}

impl FromStr for Location {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            return number::parse(text).map(Self::Address);
        }
        let (name, offset) = match text.split_once('+') {
            Some((name, offset)) => (name, number::parse(offset)?),
            None => (text, 0),
        };
        // A word with a colon is another kind of place.
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_graphic() && c != ':') {
            return Err("write an address, a symbol, or SYMBOL+OFFSET".into());
        }
        Ok(Self::Symbol {
            name: name.to_owned(),
            offset,
        })
    }
}

impl Location {
    /// Whether it takes symbols to find it.
    pub fn is_named(&self) -> bool {
        matches!(self, Self::Symbol { .. })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address:#x}"),
            Self::Symbol { name, offset: 0 } => f.write_str(name),
            Self::Symbol { name, offset } => write!(f, "{name}+{offset:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_and_written_alike() {
        for text in ["0xffffffff81000000", "panic", "do_sys_openat2+0x10"] {
            assert_eq!(text.parse::<Location>().unwrap().to_string(), text);
        }
        assert_eq!("4096".parse(), Ok(Location::Address(4096)));
        for text in ["", "+0x10", "panic+", "panic+x", "0x", "two words", "a:b"] {
            assert!(text.parse::<Location>().is_err(), "{text}");
        }
    }
}
