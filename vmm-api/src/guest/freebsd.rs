//! FreeBSD: its message buffer, its panic and its processes, by the symbols of the kernel that was
//! loaded.
//!
//! Where the members of its structures are is told by the kernel itself, in constants for debuggers
//! (sys/kern/kern_proc.c and kern_thread.c: `proc_off_p_pid` and its like), and by the fixed head of
//! `struct msgbuf` (sys/sys/msgbuf.h).

use std::collections::HashSet;

use super::{GuestError, Message, Process, Symbols, View};

/// MSG_MAGIC.
const MAGIC: u32 = 0x63062;
/// More than kern.msgbufsize is ever set to.
const SIZE_MAX: u32 = 64 << 20;
const PROCESSES_MAX: usize = 1 << 20;
/// MAXCOMLEN and its zero.
const COMM: usize = 20;
/// What the kernel keeps of a panic's words, with their zero.
const PANIC_MAX: u64 = 256;

/// The lines of the message buffer, the oldest first.
///
/// # Errors
///
/// There is none, or what is there makes no sense.
pub fn messages(view: View<'_>, symbols: &Symbols) -> Result<Vec<Message>, GuestError> {
    let pointer = symbols.address("msgbufp");
    let head = view.word(pointer.ok_or(GuestError::NoSymbol("msgbufp", false))?)?;
    // char *msg_ptr; u_int msg_magic, msg_size, msg_wseq, msg_rseq, msg_seqmod.
    let data = view.word(head)?;
    let [magic, size, written] = [8, 12, 16].map(|at| view.half(head.wrapping_add(at)));
    let (magic, size, written) = (magic?, size?, written?);
    if magic != MAGIC || size == 0 || size > SIZE_MAX {
        return Err(GuestError::Damaged(format!(
            "there is no message buffer at {head:#x}"
        )));
    }
    let ring = view.bytes(data, size as usize)?;
    let (new, old) = ring.split_at((written % size) as usize);
    let text: Vec<u8> = [old, new].concat();
    let text: Vec<u8> = text.into_iter().filter(|&b| b != 0).collect();
    let lines = String::from_utf8_lossy(&text);
    let message = |line: &str| {
        // A priority may stand in front: <118>.
        let priority = line.strip_prefix('<').and_then(|rest| rest.split_once('>'));
        let (priority, text) = match priority.map(|(n, text)| (n.parse::<u16>(), text)) {
            Some((Ok(priority), text)) => (priority, text),
            _ => (6, line),
        };
        Message {
            sequence: None,
            time_ns: None,
            facility: Some((priority >> 3) as u8),
            level: Some((priority & 7) as u8),
            text: text.to_owned(),
        }
    };
    Ok(lines.lines().map(message).collect())
}

/// What the kernel has panicked with (sys/kern/kern_shutdown.c, `panicstr`): the first panic, if one
/// came upon another. Nothing while it lives.
///
/// # Errors
///
/// It does not tell where that is, or that cannot be read.
pub fn panic(view: View<'_>, symbols: &Symbols) -> Result<Option<String>, GuestError> {
    let pointer = symbols.address("panicstr");
    let text = view.word(pointer.ok_or(GuestError::NoSymbol("panicstr", false))?)?;
    if text == 0 {
        return Ok(None);
    }
    let bytes = (0..PANIC_MAX).map_while(|at| view.number(text.wrapping_add(at), 1).ok());
    let bytes: Vec<u8> = bytes
        .take_while(|&byte| byte != 0)
        .map(|byte| byte as u8)
        .collect();
    Ok(Some(String::from_utf8_lossy(&bytes).trim().to_owned()))
}

/// All processes, the newest first as the kernel has them.
///
/// # Errors
///
/// The kernel does not say where they are, or what is there makes no sense.
pub fn processes(view: View<'_>, symbols: &Symbols) -> Result<Vec<Process>, GuestError> {
    let address = |name| {
        symbols
            .address(name)
            .ok_or(GuestError::NoSymbol(name, false))
    };
    let offset = |name| Ok::<_, GuestError>(u64::from(view.half(address(name)?)?));
    let (pid, comm, next) = (
        offset("proc_off_p_pid")?,
        offset("proc_off_p_comm")?,
        offset("proc_off_p_list")?,
    );
    let mut seen = HashSet::new();
    let mut processes = Vec::new();
    let mut process = view.word(address("allproc")?)?;
    while process != 0 {
        if !seen.insert(process) || processes.len() >= PROCESSES_MAX {
            return Err(GuestError::Damaged(format!(
                "the kernel's list of processes comes back to {process:#x}"
            )));
        }
        let name = view.text(process.wrapping_add(comm), COMM)?;
        processes.push(Process {
            id: view.half(process.wrapping_add(pid))?,
            parent: None,
            state: None,
            user: None,
            command: name.clone(),
            name,
        });
        process = view.word(process.wrapping_add(next))?;
    }
    Ok(processes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::guest::{Kernel, Report};
    use crate::memory::{MemFile, MemoryLayout};
    use crate::regs::Registers;
    use crate::state::{BootInfo, SymbolTables};

    const TABLES: u64 = 0x1_0000;
    const MSGBUFP: u64 = 0x3000;
    const PANICSTR: u64 = 0x3008;
    const MSGBUF: u64 = 0x4000;
    const RING: u64 = 0x5000;
    const TEXT: u64 = 0x6000;

    /// A kernel's memory without paging, and what its loader left there.
    struct Guest {
        memory: std::fs::File,
        tables: SymbolTables,
    }

    impl Guest {
        fn new() -> Self {
            let memory = tempfile::tempfile().unwrap();
            memory.set_len(1 << 20).unwrap();
            // Functions have type 2, data type 1; a file's name is of no use.
            let (mut table, mut strings) = (vec![0; 24], vec![0]);
            for (name, info, address) in [
                ("kern_shutdown.c", 4, 0x1000),
                ("panic", 0x12, 0x2000),
                ("guilty", 0x12, 0x2100),
                ("msgbufp", 0x11, MSGBUFP),
                ("panicstr", 0x11, PANICSTR),
            ] {
                table.extend((strings.len() as u32).to_le_bytes());
                table.extend([info, 0, 1, 0]);
                table.extend([address, 8].map(u64::to_le_bytes).concat());
                strings.extend(name.bytes().chain([0]));
            }
            let mut both = Vec::new();
            for part in [table, strings] {
                both.extend((part.len() as u64).to_le_bytes());
                both.extend(part);
                both.resize(both.len().next_multiple_of(8), 0);
            }
            let end = TABLES + both.len() as u64;
            let guest = Self {
                memory,
                tables: SymbolTables { start: TABLES, end },
            };
            guest.put(TABLES, &both);
            guest
        }

        fn put(&self, at: u64, bytes: &[u8]) {
            self.memory.write_all_at(bytes, at).unwrap();
        }

        /// A message buffer of 256 bytes, into which this much was written.
        fn says(&self, text: &str) {
            self.put(MSGBUFP, &MSGBUF.to_le_bytes());
            self.put(MSGBUF, &RING.to_le_bytes());
            self.put(
                MSGBUF + 8,
                &[MAGIC, 256, text.len() as u32]
                    .map(u32::to_le_bytes)
                    .concat(),
            );
            let mut ring = [0; 256];
            for (at, byte) in text.bytes().enumerate() {
                ring[at % 256] = byte;
            }
            self.put(RING, &ring);
        }

        fn panics(&self, text: &str) {
            self.put(PANICSTR, &TEXT.to_le_bytes());
            self.put(TEXT, format!("{text}\0").as_bytes());
        }

        fn report(&self) -> Report {
            let layout = MemoryLayout {
                lowmem: 1 << 20,
                highmem: 0,
            };
            let memory = MemFile::new(self.memory.try_clone().unwrap(), layout).unwrap();
            let mut registers = Registers {
                rip: 0x2010,
                rsp: 0x8000,
                ..Registers::reset()
            };
            registers.cs.base = 0;
            let boot = BootInfo {
                kernel: "host0:/boot/kernel/kernel".to_owned(),
                symbols: Some(self.tables),
                ..BootInfo::default()
            };
            Report::new(&memory, &[registers], None, Some(&boot))
        }
    }

    #[test]
    fn a_panic_is_told_by_the_kernels_own_word_and_its_last_lines() {
        let guest = Guest::new();
        guest.says(
            "booting\n\nFatal trap 12: page fault while in kernel mode\n\
             instruction pointer\t= 0x20:0x2104\npanic: page fault\ncpuid = 1\n",
        );
        guest.panics("page fault");
        let report = guest.report();
        assert_eq!(report.panic.as_deref(), Some("page fault"));
        assert_eq!(report.function.as_deref(), Some("guilty+0x4"));
        assert_eq!(
            report.log[0],
            "Fatal trap 12: page fault while in kernel mode"
        );
        assert_eq!(report.log.last().unwrap(), "cpuid = 1");
        assert!(report.vcpus[0].backtrace[0].ends_with("in panic+0x10"));
        let text = report.text("guest0: reset");
        assert!(
            text.contains("\npanic: page fault\nin: guilty+0x4\n"),
            "{text}"
        );
    }

    #[test]
    fn a_panic_whose_words_the_log_has_lost_is_told() {
        let guest = Guest::new();
        guest.says(&format!(
            "panic: first words\n{}",
            "lines and lines\n".repeat(60)
        ));
        guest.panics("first words\n");
        let report = guest.report();
        assert_eq!(report.panic.as_deref(), Some("first words"));
        assert!(report.log.len() <= 20, "{:?}", report.log);
        assert_eq!(report.log.last().unwrap(), "lines and lines");

        // Or it has no log at all.
        let guest = Guest::new();
        guest.panics(&"long ".repeat(100));
        let report = guest.report();
        assert_eq!(report.panic.unwrap().len() as u64, PANIC_MAX);
        assert!(report.no_log.is_some());
    }

    #[test]
    fn a_kernel_that_lives_has_not_panicked_whatever_its_log_has() {
        let guest = Guest::new();
        guest.says("panic: of the boot before\nrebooted\nfine\n");
        let report = guest.report();
        assert_eq!(report.panic, None);
        assert_eq!(report.function, None);
        assert_eq!(report.log.last().unwrap(), "fine");
    }

    #[test]
    fn symbols_that_are_no_longer_there_are_not_made_up() {
        let whole = Guest::new();
        let layout = MemoryLayout {
            lowmem: 1 << 20,
            highmem: 0,
        };
        let memory = MemFile::new(whole.memory.try_clone().unwrap(), layout).unwrap();
        let found = |start, end| Symbols::handed_over(&memory, SymbolTables { start, end });
        let SymbolTables { start, end } = whole.tables;
        let symbols = found(start, end).unwrap();
        assert_eq!(symbols.address("panicstr"), Some(PANICSTR));
        assert_eq!(symbols.name(0x2fff).as_deref(), Some("guilty+0xeff"));
        assert_eq!(symbols.address("kern_shutdown.c"), None);
        for (start, end) in [
            (end, start),
            (start, start + 16),
            (0, 0),
            (0, u64::MAX),
            (u64::MAX - 8, u64::MAX),
            (0xf_0000, 0xf_1000),
        ] {
            assert_eq!(found(start, end), None, "{start:#x} {end:#x}");
        }
        // Then the file is what is left, and that is elsewhere.
        whole.put(TABLES, &u64::MAX.to_le_bytes());
        let report = whole.report();
        let why = report.no_log.unwrap();
        assert!(
            why.contains("host0:/boot/kernel/kernel: cannot be read"),
            "{why}"
        );
        let nobody = Kernel::find(&memory, &[], None, None);
        assert!(nobody.is_err());
    }
}
