//! Linux's log: the ring of kernel/printk/printk_ringbuffer.h (5.10 and later).
//!
//! Three rings with sizes that are powers of two: descriptors, an information for each of them, and
//! text. A descriptor's number grows without end; what of it stands in its state says whether it is
//! still the one that is looked for. Positions of text grow likewise; a block begins with its
//! descriptor's number, and one that does not fit before the ring's end is at its beginning as a whole.

use super::Linux;
use crate::guest::{GuestError, Message};

/// 2^20 messages, 64 MiB of text: more than anybody configures (CONFIG_LOG_BUF_SHIFT is at most 25).
const COUNT_BITS_MAX: u64 = 20;
const SIZE_BITS_MAX: u64 = 26;
/// The two topmost bits of a descriptor's state.
const STATE_SHIFT: u32 = 62;
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;
/// A position that says there is no text has its lowest bit set.
const NO_TEXT: u64 = 1;

/// All messages that are still there, the oldest first.
///
/// # Errors
///
/// The kernel does not say where they are, or what is there makes no sense.
pub fn messages(linux: &Linux<'_>) -> Result<Vec<Message>, GuestError> {
    const RING: &str = "printk_ringbuffer";
    let view = linux.view;
    let ring = view.word(linux.address("prb")?)?;
    let field = |path| linux.member(ring, RING, path);
    let damaged = |what: &str| GuestError::Damaged(format!("the kernel's log at {ring:#x} {what}"));

    let count_bits = field("desc_ring.count_bits")?;
    let size_bits = field("text_data_ring.size_bits")?;
    if !(1..=COUNT_BITS_MAX).contains(&count_bits) || !(3..=SIZE_BITS_MAX).contains(&size_bits) {
        return Err(damaged("has an impossible size"));
    }
    let (count, size) = (1u64 << count_bits, 1u64 << size_bits);
    let descriptors = Table::new(linux, field("desc_ring.descs")?, "prb_desc", count)?;
    let infos = Table::new(linux, field("desc_ring.infos")?, "printk_info", count)?;
    let text = view.bytes(field("text_data_ring.data")?, size as usize)?;
    let ids = u64::MAX >> (64 - STATE_SHIFT);
    let head = field("desc_ring.head_id.counter")? & ids;
    let tail = field("desc_ring.tail_id.counter")? & ids;
    if head.wrapping_sub(tail) & ids > count {
        return Err(damaged("ends before it begins"));
    }

    let state = linux.btf.member("prb_desc", "state_var.counter")?.offset;
    let begin = linux.btf.member("prb_desc", "text_blk_lpos.begin")?.offset;
    let next = linux.btf.member("prb_desc", "text_blk_lpos.next")?.offset;
    let info = |path| Ok::<_, GuestError>(linux.btf.member("printk_info", path)?.offset);
    let (seq, time, len) = (info("seq")?, info("ts_nsec")?, info("text_len")?);
    // Level and flags share a byte as bit fields, the level above.
    let (facility, level) = (info("facility")?, info("level")?);

    let mut messages = Vec::new();
    let mut id = tail;
    loop {
        let slot = id & (count - 1);
        let found = descriptors.number(slot, state, 8);
        let usable = matches!(found >> STATE_SHIFT, COMMITTED | FINALIZED);
        if usable && found & ids == id {
            let begin = descriptors.number(slot, begin, 8);
            let next = descriptors.number(slot, next, 8);
            let len = infos.number(slot, len, 2);
            messages.push(Message {
                sequence: Some(infos.number(slot, seq, 8)),
                time_ns: Some(infos.number(slot, time, 8)),
                facility: infos.number(slot, facility, 1) as u8,
                level: (infos.number(slot, level, 1) >> 5) as u8,
                text: block(&text, begin, next, len),
            });
        }
        if id == head {
            return Ok(messages);
        }
        id = (id + 1) & ids;
    }
}

/// The text of one block.
fn block(ring: &[u8], begin: u64, next: u64, len: u64) -> String {
    let size = ring.len() as u64;
    if begin & NO_TEXT != 0 && next & NO_TEXT != 0 {
        return String::new();
    }
    // Behind the number of its descriptor.
    let first = if begin / size == next.wrapping_sub(1) / size {
        begin % size
    } else {
        0
    };
    let start = first as usize + 8;
    let end = start.saturating_add(len as usize).min(ring.len());
    let text = ring.get(start..end).unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

/// An array of structures.
struct Table {
    bytes: Vec<u8>,
    each: usize,
}

impl Table {
    fn new(linux: &Linux<'_>, at: u64, structure: &str, count: u64) -> Result<Self, GuestError> {
        let each = linux.btf.size_of_struct(structure)?;
        let len = each.checked_mul(count).filter(|&len| len <= 256 << 20);
        let len = len.ok_or_else(|| GuestError::NoType(structure.to_owned()))?;
        Ok(Self {
            bytes: linux.view.bytes(at, len as usize)?,
            each: each as usize,
        })
    }

    fn number(&self, slot: u64, offset: u64, size: usize) -> u64 {
        let at = slot as usize * self.each + offset as usize;
        let bytes = self.bytes.get(at..at + size).unwrap_or_default();
        let bytes = bytes.iter().rev();
        bytes.fold(0, |word, &byte| word << 8 | u64::from(byte))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_found_where_it_fits() {
        let mut ring = vec![0; 64];
        ring[16 + 8..16 + 13].copy_from_slice(b"hello");
        ring[8..12].copy_from_slice(b"wrap");
        assert_eq!(block(&ring, 64 + 16, 64 + 32, 5), "hello");
        assert_eq!(block(&ring, 64 + 56, 128 + 16, 4), "wrap");
        assert_eq!(block(&ring, 48, 64, 100).len(), 8, "up to the ring's end");
        assert_eq!(block(&ring, 1, 3, 9), "");
    }

    proptest::proptest! {
        #[test]
        fn no_position_makes_it_panic(begin: u64, next: u64, len: u64) {
            let _ = block(&[7; 32], begin, next, len);
        }
    }
}
