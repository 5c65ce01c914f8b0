//! Linux's processes: the list that begins at `init_task`, as ps(1) shows them.

use std::collections::HashSet;

use super::Linux;
use crate::guest::{GuestError, Process, View};

/// No machine has more (PID_MAX_LIMIT).
const PROCESSES_MAX: usize = 4 << 20;
/// What is shown of a command line.
const ARGUMENTS_MAX: u64 = 4096;
/// TASK_REPORT's letters by bit (fs/proc/array.c); 0 runs.
const STATES: &[u8] = b"RSDTtXZPI";
/// TASK_NOLOAD: an idle kernel thread sleeps so.
const TASK_NOLOAD: u64 = 0x400;
const TASK_UNINTERRUPTIBLE: u64 = 2;

/// All processes in the kernel's order; the idle tasks are none.
///
/// # Errors
///
/// The kernel does not say where they are, or what is there makes no sense.
pub fn processes(linux: &Linux<'_>) -> Result<Vec<Process>, GuestError> {
    const TASK: &str = "task_struct";
    let init = linux.address("init_task")?;
    let list = linux.btf.member(TASK, "tasks.next")?.offset;
    let comm = linux.btf.member(TASK, "comm")?;
    // Until 5.14 it was without the underscores.
    let state = ["__state", "state"];
    let state = state
        .iter()
        .find(|name| linux.btf.member(TASK, name).is_ok());
    let state = state.ok_or_else(|| GuestError::NoType(format!("{TASK} (state)")))?;
    let mut seen = HashSet::new();
    let mut processes = Vec::new();
    let mut task = linux.view.word(init.wrapping_add(list))?.wrapping_sub(list);
    while task != init {
        if !seen.insert(task) || processes.len() >= PROCESSES_MAX {
            return Err(GuestError::Damaged(format!(
                "the kernel's list of tasks comes back to {task:#x}"
            )));
        }
        let field = |path| linux.member(task, TASK, path);
        let parent = field("real_parent")?;
        let memory = field("mm")?;
        let comm = linux
            .view
            .text(task.wrapping_add(comm.offset), comm.size.min(64) as usize)?;
        let mut process = Process {
            id: field("tgid")? as u32,
            parent: Some(linux.member(parent, TASK, "tgid")? as u32),
            state: Some(letter(field(state)?, field("exit_state")?)),
            user: linux
                .member(field("cred")?, "cred", "uid.val")
                .ok()
                .map(|n| n as u32),
            command: format!("[{comm}]"),
            name: comm,
        };
        if memory != 0
            && let Some(arguments) = arguments(linux, memory)
        {
            process.command = arguments;
        }
        processes.push(process);
        task = linux.view.word(task.wrapping_add(list))?.wrapping_sub(list);
    }
    Ok(processes)
}

fn letter(state: u64, exit: u64) -> char {
    let both = state | exit;
    if state & (TASK_NOLOAD | TASK_UNINTERRUPTIBLE) == TASK_NOLOAD | TASK_UNINTERRUPTIBLE {
        return 'I';
    }
    // As fls() of what is reported: the highest of the bits up to 0x80.
    let highest = 64 - (both & 0x7f).leading_zeros();
    let letter = STATES.get(highest as usize).copied();
    letter.map_or('?', char::from)
}

/// What a process was started with, if that part of its memory is there.
fn arguments(linux: &Linux<'_>, memory: u64) -> Option<String> {
    let field = |path| linux.member(memory, "mm_struct", path).ok();
    let (start, end) = (field("arg_start")?, field("arg_end")?);
    let len = end.checked_sub(start)?.min(ARGUMENTS_MAX);
    let tables = field("pgd")?;
    let tables = crate::pagewalk::gla2gpa_nofault(linux.view.memory, linux.view.registers, tables);
    let registers = crate::regs::Registers {
        cr3: tables.ok()?.gpa,
        ..linux.view.registers.clone()
    };
    let view = View {
        registers: &registers,
        ..linux.view
    };
    let bytes = view.bytes(start, len as usize).ok()?;
    let words: Vec<_> = bytes
        .split(|&b| b == 0)
        .map(String::from_utf8_lossy)
        .collect();
    let line = words.join(" ").trim_end().to_owned();
    (!line.is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_ps_letters() {
        let letters = [
            (0, 0),
            (1, 0),
            (2, 0),
            (0x402, 0),
            (0x40, 0x20),
            (4, 0),
            (8, 0),
        ];
        let letters: String = letters.iter().map(|&(s, e)| letter(s, e)).collect();
        assert_eq!(letters, "RSDIPTt");
        assert_eq!(letter(0, 0x20), 'Z');
    }
}
