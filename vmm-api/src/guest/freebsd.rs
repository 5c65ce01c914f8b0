//! FreeBSD: its message buffer and its processes, by the symbols of the kernel that was loaded.
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
            facility: (priority >> 3) as u8,
            level: (priority & 7) as u8,
            text: text.to_owned(),
        }
    };
    Ok(lines.lines().map(message).collect())
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
