//! What Linux tells of itself for dumps: vmcoreinfo, of a kernel with CONFIG_CRASH_CORE or, since 6.9,
//! CONFIG_VMCORE_INFO (Documentation/admin-guide/kdump/vmcoreinfo.rst).
//!
//! Lines of text: `SYMBOL(prb)=ffffffff82a5e0c0`, in hexadecimal and where this start has put it;
//! `SIZE(prb_desc)=24` and `OFFSET(prb_desc.state_var)=0` in bytes, in decimal. They stand on a page
//! which `vmcoreinfo_data` leads to, and once more in an ELF note that begins a page of its own. So a
//! kernel none of whose names is known has it, too: the note is found by its head.

use std::collections::HashMap;

use crate::guest::{GuestError, Symbols, View};

/// The kernel's limit is a page (VMCOREINFO_BYTES).
const TEXT_MAX: u64 = 64 << 10;
const PAGE: usize = 4096;
/// Bytes that are read at once.
const PIECE: u64 = 1 << 20;
/// An ELF note: lengths of name and text, its type (32 bits each), the name up to a multiple of 4.
const NOTE: usize = 24;
const NOTE_NAME: &[u8; 12] = b"VMCOREINFO\0\0";
/// The name with one zero.
const NOTE_NAME_LEN: u32 = 11;
/// What each kernel's begins with.
const BEGINNING: &[u8] = b"OSRELEASE=";

/// What a kernel tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmcoreInfo {
    values: HashMap<String, String>,
}

impl VmcoreInfo {
    /// Finds it: by its symbols, or in all of memory.
    pub fn find(view: View<'_>, symbols: &Symbols) -> Option<Self> {
        Self::named(view, symbols).or_else(|| Self::search(view))
    }

    /// By the symbols of a kernel with CONFIG_KALLSYMS_ALL.
    fn named(view: View<'_>, symbols: &Symbols) -> Option<Self> {
        let word = |name| view.word(symbols.address(name)?).ok();
        let size = word("vmcoreinfo_size")?.min(TEXT_MAX);
        let text = view.bytes(word("vmcoreinfo_data")?, size as usize);
        Self::parse(&text.ok()?)
    }

    /// By the note, at the beginning of some page. Memory of an earlier kernel's may be left: what this
    /// view has mapped is this one's.
    fn search(view: View<'_>) -> Option<Self> {
        let mut buffer = vec![0; PIECE as usize];
        let mut at = 0;
        while let Some(written) = view.memory.next_written(at) {
            // Holes are whole pages.
            let mut gpa = written.start & !(PAGE as u64 - 1);
            while gpa < written.end {
                let len = PIECE.min(written.end - gpa) as usize;
                let piece = buffer.get_mut(..len)?;
                view.memory.read_physical(gpa, piece).ok()?;
                for (page, bytes) in (gpa..).step_by(PAGE).zip(piece.chunks(PAGE)) {
                    let found = note(bytes).and_then(|len| {
                        let mut text = vec![0; len];
                        let text_at = page + NOTE as u64;
                        view.memory.read_physical(text_at, &mut text).ok()?;
                        Self::parse(&text)
                    });
                    if let Some(found) = found.filter(|found| found.is_of(view)) {
                        return Some(found);
                    }
                }
                gpa += len as u64;
            }
            at = written.end;
        }
        None
    }

    /// Reads its lines; none if it is not the text of one.
    pub fn parse(text: &[u8]) -> Option<Self> {
        if !text.starts_with(BEGINNING) {
            return None;
        }
        let text = text.split(|&b| b == 0).next()?;
        let text = String::from_utf8_lossy(text);
        let lines = text.lines().filter_map(|line| line.split_once('='));
        let values = lines.map(|(key, value)| (key.to_owned(), value.to_owned()));
        Some(Self {
            values: values.collect(),
        })
    }

    /// Whether it is of the kernel that a view shows: the first byte of that is there.
    fn is_of(&self, view: View<'_>) -> bool {
        let first = self.symbol("_stext");
        first.is_ok_and(|first| view.number(first, 1).is_ok())
    }

    /// Where a variable or function is in the guest.
    ///
    /// # Errors
    ///
    /// It is not told.
    pub fn symbol(&self, name: &str) -> Result<u64, GuestError> {
        self.number(format!("SYMBOL({name})"), 16)
    }

    /// Bytes from a structure's beginning to a member of it.
    ///
    /// # Errors
    ///
    /// It is not told.
    pub fn offset(&self, structure: &str, member: &str) -> Result<u64, GuestError> {
        self.number(format!("OFFSET({structure}.{member})"), 10)
    }

    /// Bytes of a structure.
    ///
    /// # Errors
    ///
    /// It is not told.
    pub fn size(&self, structure: &str) -> Result<u64, GuestError> {
        self.number(format!("SIZE({structure})"), 10)
    }

    fn number(&self, key: String, radix: u32) -> Result<u64, GuestError> {
        let value = self.values.get(&key);
        let number = value.and_then(|value| u64::from_str_radix(value, radix).ok());
        // Added up, they are far from an overflow.
        let number = number.filter(|&number| radix == 16 || number < 1 << 32);
        number.ok_or(GuestError::NotTold(key))
    }
}

/// The length of the text in a note of vmcoreinfo's that a page begins with.
fn note(page: &[u8]) -> Option<usize> {
    let (head, name) = page.get(..NOTE)?.split_at(12);
    let half = |at: usize| {
        let bytes = head.get(at..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    };
    let is_note = half(0)? == NOTE_NAME_LEN && half(8)? == 0 && name == NOTE_NAME;
    let len = u64::from(half(4)?);
    (is_note && len <= TEXT_MAX).then_some(len as usize)
}

#[cfg(test)]
mod tests {
    use super::super::log::tests::{PRB, write};
    use super::*;
    use crate::guest::testing::Ram;
    use crate::guest::{Kernel, Message};

    /// As Linux 6.1 writes it, but for what has nothing to do with its log.
    const TEXT: &str = "OSRELEASE=6.1.0
BUILD-ID=0123456789abcdef
PAGESIZE=4096
SYMBOL(init_uts_ns)=ffffffff82a1c3a0
SYMBOL(_stext)=1000
SYMBOL(prb)=100
SIZE(printk_ringbuffer)=88
OFFSET(printk_ringbuffer.desc_ring)=8
OFFSET(printk_ringbuffer.text_data_ring)=56
SIZE(prb_desc_ring)=48
OFFSET(prb_desc_ring.count_bits)=0
OFFSET(prb_desc_ring.descs)=8
OFFSET(prb_desc_ring.infos)=16
OFFSET(prb_desc_ring.head_id)=24
OFFSET(prb_desc_ring.tail_id)=32
SIZE(prb_desc)=24
OFFSET(prb_desc.state_var)=0
OFFSET(prb_desc.text_blk_lpos)=8
SIZE(prb_data_blk_lpos)=16
OFFSET(prb_data_blk_lpos.begin)=0
OFFSET(prb_data_blk_lpos.next)=8
SIZE(printk_info)=40
OFFSET(printk_info.seq)=0
OFFSET(printk_info.ts_nsec)=8
OFFSET(printk_info.text_len)=16
OFFSET(printk_info.caller_id)=20
SIZE(prb_data_ring)=32
OFFSET(prb_data_ring.size_bits)=0
OFFSET(prb_data_ring.data)=8
SIZE(atomic_long_t)=8
OFFSET(atomic_long_t.counter)=0
NUMBER(phys_base)=-10485760
KERNELOFFSET=1a000000
";

    fn put_note(ram: &mut Ram, at: u64, text: &str) {
        ram.half(at, NOTE_NAME_LEN);
        ram.half(at + 4, text.len() as u32);
        ram.put(at + 12, NOTE_NAME);
        ram.put(at + NOTE as u64, text.as_bytes());
    }

    fn texts(messages: &[Message]) -> Vec<&str> {
        messages
            .iter()
            .map(|message| message.text.as_str())
            .collect()
    }

    #[test]
    fn a_kernel_without_names_or_types_shows_its_log() {
        let mut ram = Ram::new(3 << 20);
        write(&mut ram);
        // What another kernel left: its code is not there any more. And what is no note.
        let other = TEXT.replace("_stext)=1000", "_stext)=ffffffff81000000");
        put_note(&mut ram, 0x3000, &other);
        put_note(&mut ram, 0x5008, &TEXT.replace("(prb)=100", "(prb)=9999"));
        assert!(Kernel::nameless(&ram, ram.vcpus()).is_none());
        put_note(&mut ram, 0x20_7000, TEXT);
        let kernel = Kernel::nameless(&ram, ram.vcpus()).unwrap();
        let messages = kernel.messages(&ram).unwrap();
        assert_eq!(texts(&messages), ["text5", "text6"]);
        assert_eq!(messages[0].sequence, Some(105));
        assert_eq!(messages[0].time_ns, Some(5_000_000_000));
        assert_eq!((messages[0].facility, messages[0].level), (None, None));
        let error = kernel.processes(&ram).unwrap_err().to_string();
        let missing = "its vmcoreinfo does not give OFFSET(task_struct.tasks)";
        assert!(error.ends_with(missing), "{error}");
    }

    #[test]
    fn symbols_lead_to_it_where_they_are_there() {
        let mut ram = Ram::new(0x8000);
        write(&mut ram);
        ram.put(0x2000, TEXT.as_bytes());
        ram.word(0x1800, 0x2000);
        ram.word(0x1808, TEXT.len() as u64);
        let map = "0000000000001800 d vmcoreinfo_data\n0000000000001808 d vmcoreinfo_size\n\
                   0000000000001810 D init_task\n0000000000001000 T _stext\n";
        let symbols = Symbols::parse(map.as_bytes()).unwrap();
        let told = VmcoreInfo::find(ram.view(), &symbols).unwrap();
        assert_eq!(told.symbol("prb").unwrap(), PRB);
        assert_eq!(told.size("prb_desc").unwrap(), 24);
        let error = told.offset("prb_desc", "colour").unwrap_err().to_string();
        assert!(
            error.contains("does not give OFFSET(prb_desc.colour)"),
            "{error}"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), map).unwrap();
        let kernel = Kernel::find(&ram, ram.vcpus(), Some(file.path()), None).unwrap();
        let messages = kernel.messages(&ram).unwrap();
        assert_eq!(texts(&messages), ["text5", "text6"]);
        // One that tells less is named what it lacks.
        ram.put(
            0x2000,
            TEXT.replace("prb_desc.state_var", "prb_desc.old_states")
                .as_bytes(),
        );
        let error = kernel.messages(&ram).unwrap_err().to_string();
        assert!(error.contains("OFFSET(prb_desc.state_var)"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".*", number in "-?[0-9a-z]{0,40}") {
            let text = format!("OSRELEASE={text}\nSYMBOL(prb)={number}\nSIZE(prb_desc)={number}\n");
            let told = VmcoreInfo::parse(text.as_bytes()).unwrap();
            let _ = told.symbol("prb");
            if let Ok(size) = told.size("prb_desc") {
                proptest::prop_assert!(size < 1 << 32);
            }
            proptest::prop_assert_eq!(VmcoreInfo::parse(&text.as_bytes()[1..]), None);
        }
    }
}
