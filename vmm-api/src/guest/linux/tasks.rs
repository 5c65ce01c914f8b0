//! Linux's processes: the list that begins at `init_task`, as ps(1) shows them.

use std::collections::HashSet;

use super::Linux;
use super::btf::Member;
use crate::guest::{GuestError, Process, View};

/// No machine has more (PID_MAX_LIMIT).
const PROCESSES_MAX: usize = 4 << 20;
/// What is shown of a command line.
const ARGUMENTS_MAX: u64 = 4096;
/// TASK_REPORT's letters by bit (fs/proc/array.c); 0 runs.
const STATES: &[u8] = b"RSDTtXZPI";
/// What is read of a kernel thread's long name.
const NAME_MAX: usize = 64;
/// Bits of a task's flags (include/linux/sched.h): it works at a queue, it has no memory of its own.
const PF_WQ_WORKER: u64 = 0x20;
const PF_KTHREAD: u64 = 0x20_0000;
/// TASK_NOLOAD: an idle kernel thread sleeps so.
const TASK_NOLOAD: u64 = 0x400;
const TASK_UNINTERRUPTIBLE: u64 = 2;

/// All processes in the kernel's order; the idle tasks are none.
///
/// # Errors
///
/// The kernel does not say where they are, or what is there makes no sense.
pub fn processes(linux: &Linux<'_>) -> Result<Vec<Process>, GuestError> {
    let init = linux.address("init_task")?;
    let fields = Fields::new(linux)?;
    let view = linux.view;
    let list = fields.list.offset;
    let mut seen = HashSet::new();
    let mut processes = Vec::new();
    let mut task = view.word(init.wrapping_add(list))?.wrapping_sub(list);
    while task != init {
        if !seen.insert(task) || processes.len() >= PROCESSES_MAX {
            return Err(GuestError::Damaged(format!(
                "the kernel's list of tasks comes back to {task:#x}"
            )));
        }
        let field = |member| view.member(task, member);
        let parent = field(fields.parent)?;
        let memory = field(fields.memory)?;
        let name = name(view, &fields, task)?;
        let arguments = fields.arguments.filter(|_| memory != 0);
        let arguments = arguments.and_then(|members| arguments_at(view, members, memory));
        processes.push(Process {
            id: field(fields.id)? as u32,
            parent: Some(view.member(parent, fields.id)? as u32),
            state: Some(letter(field(fields.state)?, field(fields.exit_state)?)),
            user: view
                .member(field(fields.credentials)?, fields.user)
                .ok()
                .map(|n| n as u32),
            command: arguments.unwrap_or_else(|| format!("[{name}]")),
            name,
        });
        task = view.word(task.wrapping_add(list))?.wrapping_sub(list);
    }
    Ok(processes)
}

/// Where what is shown of a task is.
struct Fields {
    list: Member,
    id: Member,
    comm: Member,
    parent: Member,
    memory: Member,
    state: Member,
    exit_state: Member,
    flags: Member,
    credentials: Member,
    /// Of the credentials: the effective user, as ps shows it.
    user: Member,
    /// Of the memory: where arguments begin and end, and its page tables.
    arguments: Option<[Member; 3]>,
    worker: Option<Worker>,
    /// Of a kernel thread: its pointer to what it is, and there its name, if that is a long one.
    long_name: Option<[Member; 2]>,
}

/// What tells at what a thread of a workqueue works (kernel/workqueue.c, `wq_worker_comm`).
struct Worker {
    /// Of the task, to `struct kthread`; of that, to `struct worker`.
    path: [Member; 2],
    pool: Member,
    work: Member,
    description: Member,
}

impl Fields {
    fn new(linux: &Linux<'_>) -> Result<Self, GuestError> {
        let task = |path| linux.btf.member("task_struct", path);
        let memory = |path| linux.btf.member("mm_struct", path).ok();
        let arguments = || Some([memory("arg_start")?, memory("arg_end")?, memory("pgd")?]);
        let other = |of, path| linux.btf.member(of, path).ok();
        // Until 5.16 it was in a member for something else.
        let thread = task("worker_private").or_else(|_| task("set_child_tid"));
        let thread = thread.ok();
        let worker = || {
            Some(Worker {
                path: [thread?, other("kthread", "data")?],
                pool: other("worker", "pool")?,
                work: other("worker", "current_work")?,
                description: other("worker", "desc")?,
            })
        };
        let long_name = || Some([thread?, other("kthread", "full_name")?]);
        Ok(Self {
            list: task("tasks.next")?,
            id: task("tgid")?,
            comm: task("comm")?,
            parent: task("real_parent")?,
            memory: task("mm")?,
            // Until 5.14 it was without the underscores.
            state: task("__state").or_else(|_| task("state"))?,
            exit_state: task("exit_state")?,
            flags: task("flags")?,
            credentials: task("real_cred")?,
            user: linux.btf.member("cred", "euid.val")?,
            arguments: arguments(),
            worker: worker(),
            long_name: long_name(),
        })
    }
}

/// A task's name as /proc has it (fs/proc/array.c, `proc_task_name`): a kernel thread may have a
/// longer one, and what works at a queue says at which.
fn name(view: View<'_>, fields: &Fields, task: u64) -> Result<String, GuestError> {
    let comm = view.text_of(task, fields.comm)?;
    let flags = view.member(task, fields.flags)?;
    let works = fields.worker.as_ref().filter(|_| flags & PF_WQ_WORKER != 0);
    if let Some(doing) = works.and_then(|worker| work_of(view, worker, task)) {
        return Ok(comm + &doing);
    }
    let thread = flags & (PF_KTHREAD | PF_WQ_WORKER) == PF_KTHREAD;
    let long = fields.long_name.filter(|_| thread);
    let long = long.and_then(|[thread, name]| {
        let text = view.member(view.member(task, thread).ok()?, name).ok()?;
        let text = (text != 0).then(|| view.bytes_up_to(text, NAME_MAX))?;
        let text = text.split(|&b| b == 0).next()?;
        Some(String::from_utf8_lossy(text).into_owned())
    });
    Ok(long.unwrap_or(comm))
}

/// What a worker is at (+) or was at last (-).
fn work_of(view: View<'_>, fields: &Worker, task: u64) -> Option<String> {
    let follow = |at: u64, member| view.member(at, member).ok().filter(|&at| at != 0);
    let [thread, data] = fields.path;
    let worker = follow(follow(task, thread)?, data)?;
    follow(worker, fields.pool)?;
    let description = view.text_of(worker, fields.description).ok()?;
    let sign = match follow(worker, fields.work) {
        Some(_) => '+',
        None => '-',
    };
    (!description.is_empty()).then(|| format!("{sign}{description}"))
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
fn arguments_at(view: View<'_>, members: [Member; 3], memory: u64) -> Option<String> {
    let [start, end, tables] = members.map(|member| view.member(memory, member).ok());
    let start = start?;
    let len = end?.checked_sub(start)?.min(ARGUMENTS_MAX);
    let tables = crate::pagewalk::gla2gpa_nofault(view.memory, view.registers, tables?);
    let registers = crate::regs::Registers {
        cr3: tables.ok()?.gpa,
        ..view.registers.clone()
    };
    let view = View {
        registers: &registers,
        ..view
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
