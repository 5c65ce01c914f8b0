//! More ways to look at memory, and to change it: for what comes from outside and may point anywhere.

use crate::memory::{peek8, peek32, peek64};

/// Reads a 16-bit word, aligned or not.
pub fn peek16(address: u64) -> Option<u16> {
    Some(u16::from_le_bytes([peek8(address)?, peek8(address + 1)?]))
}

/// Writes a byte; false where there is no memory.
pub fn poke8(address: u64, value: u8) -> bool {
    let there = peek8(address).is_some();
    if there {
        // SAFETY: it is mapped, all that is mapped is writable, and the compiler relies on nothing
        // that a debugger or a relocation changes.
        unsafe { (address as *mut u8).write_volatile(value) };
    }
    there
}

/// Writes a 32-bit word, aligned or not; false where there is no memory.
pub fn poke32(address: u64, value: u32) -> bool {
    let there = peek32(address).is_some();
    let bytes = (address..).zip(value.to_le_bytes());
    there && { bytes }.all(|(at, byte)| poke8(at, byte))
}

/// Writes a 64-bit word, aligned or not; false where there is no memory.
pub fn poke64(address: u64, value: u64) -> bool {
    let there = peek64(address).is_some();
    let bytes = (address..).zip(value.to_le_bytes());
    there && { bytes }.all(|(at, byte)| poke8(at, byte))
}
