//! Linux's log: the ring of kernel/printk/printk_ringbuffer.h (5.10 and later).
//!
//! Three rings with sizes that are powers of two: descriptors, an information for each of them, and
//! text. A descriptor's number grows without end; what of it stands in its state says whether it is
//! still the one that is looked for. Positions of text grow likewise; a block begins with its
//! descriptor's number, and one that does not fit before the ring's end is at its beginning as a whole.

use super::Linux;
use super::btf::Member;
use super::vmcoreinfo::VmcoreInfo;
use crate::guest::{GuestError, Message, View};

/// 2^20 messages, 64 MiB of text: more than anybody configures (CONFIG_LOG_BUF_SHIFT is at most 25).
const COUNT_BITS_MAX: u64 = 20;
const SIZE_BITS_MAX: u64 = 26;
/// No table is larger.
const TABLE_MAX: u64 = 256 << 20;
/// The two topmost bits of a descriptor's state.
const STATE_SHIFT: u32 = 62;
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;
/// A position that says there is no text has its lowest bit set.
const NO_TEXT: u64 = 1;

/// Where a kernel's log is, and how it is made up.
pub struct Ring {
    /// Of `struct printk_ringbuffer`.
    address: u64,
    count_bits: Member,
    size_bits: Member,
    descriptors: Member,
    infos: Member,
    text: Member,
    head: Member,
    tail: Member,
    /// Bytes of `struct prb_desc`, and what is in it.
    descriptor_size: u64,
    state: Member,
    begin: Member,
    next: Member,
    /// Bytes of `struct printk_info`, and what is in it.
    info_size: u64,
    sequence: Member,
    time: Member,
    len: Member,
    /// Facility, and the byte of which the level is the upper three bits.
    origin: Option<(Member, Member)>,
}

impl Ring {
    /// By the kernel's own types.
    ///
    /// # Errors
    ///
    /// It does not say where its log is, or what that is made of.
    pub fn of_types(linux: &Linux<'_>) -> Result<Self, GuestError> {
        let ring = |path| linux.btf.member("printk_ringbuffer", path);
        let descriptor = |path| linux.btf.member("prb_desc", path);
        let info = |path| linux.btf.member("printk_info", path);
        Ok(Self {
            address: linux.view.word(linux.address("prb")?)?,
            count_bits: ring("desc_ring.count_bits")?,
            size_bits: ring("text_data_ring.size_bits")?,
            descriptors: ring("desc_ring.descs")?,
            infos: ring("desc_ring.infos")?,
            text: ring("text_data_ring.data")?,
            head: ring("desc_ring.head_id.counter")?,
            tail: ring("desc_ring.tail_id.counter")?,
            descriptor_size: linux.btf.size_of_struct("prb_desc")?,
            state: descriptor("state_var.counter")?,
            begin: descriptor("text_blk_lpos.begin")?,
            next: descriptor("text_blk_lpos.next")?,
            info_size: linux.btf.size_of_struct("printk_info")?,
            sequence: info("seq")?,
            time: info("ts_nsec")?,
            len: info("text_len")?,
            origin: Some((info("facility")?, info("level")?)),
        })
    }

    /// By what the kernel tells makedumpfile, which is all but facilities and levels. Sizes of members
    /// are those of kernel/printk/printk_ringbuffer.h, the same in all versions.
    ///
    /// # Errors
    ///
    /// Something is not told.
    pub fn of_vmcoreinfo(view: View<'_>, told: &VmcoreInfo) -> Result<Self, GuestError> {
        let member = |path: &[(&str, &str)], size| {
            let offsets = path.iter().map(|(of, name)| told.offset(of, name));
            let offset = offsets.sum::<Result<u64, _>>()?;
            Ok::<_, GuestError>(Member { offset, size })
        };
        let counter = ("atomic_long_t", "counter");
        let ring = |name, size| {
            let path = [("printk_ringbuffer", "desc_ring"), ("prb_desc_ring", name)];
            member(&path, size)
        };
        let ring_counter = |name| {
            let outer = ring(name, 8)?.offset;
            let offset = outer + member(&[counter], 8)?.offset;
            Ok::<_, GuestError>(Member { offset, size: 8 })
        };
        let text = |name, size| {
            let path = [
                ("printk_ringbuffer", "text_data_ring"),
                ("prb_data_ring", name),
            ];
            member(&path, size)
        };
        let position = |name| {
            let path = [("prb_desc", "text_blk_lpos"), ("prb_data_blk_lpos", name)];
            member(&path, 8)
        };
        let info = |name, size| member(&[("printk_info", name)], size);
        Ok(Self {
            address: view.word(told.symbol("prb")?)?,
            count_bits: ring("count_bits", 4)?,
            size_bits: text("size_bits", 4)?,
            descriptors: ring("descs", 8)?,
            infos: ring("infos", 8)?,
            text: text("data", 8)?,
            head: ring_counter("head_id")?,
            tail: ring_counter("tail_id")?,
            descriptor_size: told.size("prb_desc")?,
            state: member(&[("prb_desc", "state_var"), counter], 8)?,
            begin: position("begin")?,
            next: position("next")?,
            info_size: told.size("printk_info")?,
            sequence: info("seq", 8)?,
            time: info("ts_nsec", 8)?,
            len: info("text_len", 2)?,
            origin: None,
        })
    }

    /// All messages that are still there, the oldest first.
    ///
    /// # Errors
    ///
    /// What is there makes no sense.
    pub fn messages(&self, view: View<'_>) -> Result<Vec<Message>, GuestError> {
        let ring = self.address;
        let field = |member| view.member(ring, member);
        let damaged =
            |what: &str| GuestError::Damaged(format!("the kernel's log at {ring:#x} {what}"));
        let count_bits = field(self.count_bits)?;
        let size_bits = field(self.size_bits)?;
        if !(1..=COUNT_BITS_MAX).contains(&count_bits) || !(3..=SIZE_BITS_MAX).contains(&size_bits)
        {
            return Err(damaged("has an impossible size"));
        }
        let (count, size) = (1u64 << count_bits, 1u64 << size_bits);
        let table = |at, each: u64| {
            let len = each.checked_mul(count).filter(|&len| len <= TABLE_MAX);
            let len = len.ok_or_else(|| damaged("has an impossible size"))?;
            Ok::<_, GuestError>(Table {
                bytes: view.bytes(field(at)?, len as usize)?,
                each: each as usize,
            })
        };
        let descriptors = table(self.descriptors, self.descriptor_size)?;
        let infos = table(self.infos, self.info_size)?;
        let text = view.bytes(field(self.text)?, size as usize)?;
        let ids = u64::MAX >> (64 - STATE_SHIFT);
        let head = field(self.head)? & ids;
        let tail = field(self.tail)? & ids;
        if head.wrapping_sub(tail) & ids > count {
            return Err(damaged("ends before it begins"));
        }
        let mut messages = Vec::new();
        let mut id = tail;
        loop {
            let slot = id & (count - 1);
            let state = descriptors.number(slot, self.state);
            let usable = matches!(state >> STATE_SHIFT, COMMITTED | FINALIZED);
            if usable && state & ids == id {
                let begin = descriptors.number(slot, self.begin);
                let next = descriptors.number(slot, self.next);
                let len = infos.number(slot, self.len);
                let origin = self.origin.map(|(facility, level)| {
                    let [facility, level] = [facility, level].map(|m| infos.number(slot, m) as u8);
                    // The level shares its byte with flags.
                    (facility, level >> 5)
                });
                messages.push(Message {
                    sequence: Some(infos.number(slot, self.sequence)),
                    time_ns: Some(infos.number(slot, self.time)),
                    facility: origin.map(|(facility, _)| facility),
                    level: origin.map(|(_, level)| level),
                    text: block(&text, begin, next, len),
                });
            }
            if id == head {
                return Ok(messages);
            }
            id = (id + 1) & ids;
        }
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
    fn number(&self, slot: u64, member: Member) -> u64 {
        let at = (slot as usize * self.each).saturating_add(member.offset as usize);
        let end = at.saturating_add(member.size.min(8) as usize);
        let bytes = self.bytes.get(at..end).unwrap_or_default();
        let bytes = bytes.iter().rev();
        bytes.fold(0, |word, &byte| word << 8 | u64::from(byte))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::btf::tests::Types;
    use super::*;
    use crate::guest::Symbols;
    use crate::guest::testing::Ram;

    /// `struct printk_ringbuffer` and what it has, for tests: 4 descriptors, 64 bytes of text.
    pub(crate) const PRB: u64 = 0x100;
    const RING: u64 = 0x200;
    const DESCRIPTORS: u64 = 0x400;
    const INFOS: u64 = 0x500;
    const TEXT: u64 = 0x700;

    /// Messages 5 to 7 of a log; the fifth was printed anew, the seventh is not finished.
    pub(crate) fn write(ram: &mut Ram) {
        ram.word(PRB, RING);
        ram.half(RING + 8, 2);
        ram.word(RING + 16, DESCRIPTORS);
        ram.word(RING + 24, INFOS);
        ram.word(RING + 32, 7);
        ram.word(RING + 40, 4);
        ram.half(RING + 56, 6);
        ram.word(RING + 64, TEXT);
        let states = [(4, 3u64), (5, FINALIZED), (6, COMMITTED), (7, 0)];
        for (id, state) in states {
            let (descriptor, info) = (DESCRIPTORS + 24 * (id & 3), INFOS + 40 * (id & 3));
            ram.word(descriptor, state << STATE_SHIFT | id);
            ram.word(descriptor + 8, 64 + 16 * ((id + 3) & 3));
            ram.word(descriptor + 16, 64 + 16 * ((id + 3) & 3) + 16);
            ram.word(info, 100 + id);
            ram.word(info + 8, 1_000_000_000 * id);
            // Length, facility, flags and level.
            ram.put(info + 16, &[5, 0, 1, 4 << 5 | 3]);
            ram.put(
                TEXT + 16 * ((id + 3) & 3) + 8,
                format!("text{id}").as_bytes(),
            );
        }
    }

    fn types() -> Vec<u8> {
        let mut types = Types::new();
        let (byte, short, half, word) = (types.int(1), types.int(2), types.int(4), types.int(8));
        let counter = types.structure("", 8, &[("counter", word, 0)]);
        let descriptors = types.structure(
            "prb_desc_ring",
            48,
            &[
                ("count_bits", half, 0),
                ("descs", word, 8),
                ("infos", word, 16),
                ("head_id", counter, 24),
                ("tail_id", counter, 32),
            ],
        );
        let text = [("size_bits", half, 0), ("data", word, 8)];
        let text = types.structure("prb_data_ring", 32, &text);
        let ring = [("desc_ring", descriptors, 8), ("text_data_ring", text, 56)];
        types.structure("printk_ringbuffer", 88, &ring);
        let position = [("begin", word, 0), ("next", word, 8)];
        let position = types.structure("prb_data_blk_lpos", 16, &position);
        let descriptor = [("state_var", counter, 0), ("text_blk_lpos", position, 8)];
        types.structure("prb_desc", 24, &descriptor);
        let info = [
            ("seq", word, 0),
            ("ts_nsec", word, 8),
            ("text_len", short, 16),
            ("facility", byte, 18),
            ("level", byte, 19),
        ];
        types.structure("printk_info", 40, &info);
        types.bytes()
    }

    fn message(id: u64) -> Message {
        Message {
            sequence: Some(100 + id),
            time_ns: Some(1_000_000_000 * id),
            facility: Some(1),
            level: Some(4),
            text: format!("text{id}"),
        }
    }

    #[test]
    fn messages_are_read_by_the_kernels_types() {
        let mut ram = Ram::new(0x4000);
        write(&mut ram);
        let types = types();
        ram.put(0x2000, &types);
        let map = b"0000000000000100 D prb\n0000000000002000 R __start_BTF\n0000000000003000 T f\n";
        let symbols = Symbols::parse(map).unwrap();
        let linux = Linux::new(ram.view(), &symbols).unwrap();
        let ring = Ring::of_types(&linux).unwrap();
        let read = ring.messages(ram.view()).unwrap();
        assert_eq!(read, [message(5), message(6)]);
        // The head is no longer where it can be.
        ram.word(RING + 32, 100);
        let error = ring.messages(ram.view()).unwrap_err();
        assert!(error.to_string().contains("ends before"), "{error}");
        ram.half(RING + 8, 60);
        assert!(ring.messages(ram.view()).is_err());
    }

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
