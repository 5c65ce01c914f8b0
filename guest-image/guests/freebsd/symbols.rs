//! Symbol tables in memory (System V ABI, chapter 4).

use core::ops::Range;

use crate::access::peek16;
use crate::memory::{peek32, peek64, string_length};

/// Bytes of an entry.
const ENTRY: u64 = 24;

/// One entry.
pub struct Symbol {
    /// Its name's address.
    pub name: u64,
    pub section: u16,
    pub value: u64,
    local: bool,
}

/// The entry at `at`, whose name is among `strings`.
pub fn symbol_at(at: u64, strings: u64) -> Option<Symbol> {
    let word = peek64(at)?;
    Some(Symbol {
        name: strings + u64::from(word as u32),
        section: peek16(at + 6)?,
        value: peek64(at + 8)?,
        local: (word >> 36) & 0xf == 0,
    })
}

/// The global symbol of this name, if the table defines it.
pub fn find(table: Range<u64>, strings: Range<u64>, name: &[u8]) -> Option<Symbol> {
    let length = name.len() as u64;
    for at in table.step_by(ENTRY as usize) {
        let start = strings.start + u64::from(peek32(at)?);
        if start + length >= strings.end {
            continue;
        }
        // SAFETY: inside of the string table, which is mapped and not written to.
        let text = unsafe { core::slice::from_raw_parts(start as *const u8, name.len()) };
        if text == name && string_length(start) == length {
            let symbol = symbol_at(at, strings.start)?;
            if symbol.section != 0 && !symbol.local {
                return Some(symbol);
            }
        }
    }
    None
}
