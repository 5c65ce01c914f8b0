//! Why a guest died, or where it is stuck: what its kernel said last, and where each vCPU is.
//!
//! [`Report::new`] takes memory and registers of one moment, so the same is written by `rhyve` when
//! a guest ends badly and shown by `vmmctl --panic` of any guest, alive or dead.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use super::{Frame, Kernel, Message, Symbols, backtrace};
use crate::pagewalk::PhysicalMemory;
use crate::regs::Registers;
use crate::state::BootInfo;

/// Lines of the log that are shown of a kernel that did not panic.
const LAST_LINES: usize = 20;
/// Lines of a panic that are shown.
const PANIC_LINES: usize = 120;
/// What a kernel begins its last words with: Linux's (kernel/panic.c, arch/x86/kernel/{dumpstack,traps}.c,
/// arch/x86/mm/fault.c), FreeBSD's (sys/kern/kern_shutdown.c, sys/amd64/amd64/trap.c).
const BEGINNINGS: [&str; 8] = [
    "Kernel panic - not syncing",
    "BUG: ",
    "kernel BUG at",
    "Oops: ",
    "general protection fault",
    "sysrq: Trigger a crash",
    "panic: ",
    "Fatal trap ",
];
/// The two of them that are the end.
const PANICS: [&str; 2] = ["Kernel panic - not syncing: ", "panic: "];
/// Functions that only carry the panic out, of Linux and of FreeBSD.
const MESSENGERS: [&str; 17] = [
    "panic",
    "vpanic",
    "kdb_enter",
    "delay_tsc",
    "__const_udelay",
    "oops_end",
    "die",
    "__die",
    "crash_kexec",
    "__crash_kexec",
    "machine_kexec",
    "native_machine_emergency_restart",
    "kassert_panic",
    "trap_fatal",
    "trap_pfault",
    "trap",
    "calltrap",
];

/// What there is to say of a guest's end.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// What its kernel says it died of, if it panicked.
    pub panic: Option<String>,
    /// The function that it died in: where the kernel's own words, or the stack, say so.
    pub function: Option<String>,
    /// The kernel's last words: from the panic's beginning on, or else its last lines.
    pub log: Vec<String>,
    /// Why there is no log.
    pub no_log: Option<String>,
    /// The vCPUs.
    pub vcpus: Vec<Place>,
}

/// Where a vCPU is.
#[derive(Clone, Debug, Serialize)]
pub struct Place {
    /// Registers, in words that people look for first.
    pub registers: String,
    /// Its callers, itself first, one a line.
    pub backtrace: Vec<String>,
}

impl Report {
    /// Looks for the end in a guest's memory; `named` is a file with symbols, `loaded` what the loader
    /// put there.
    pub fn new(
        memory: &dyn PhysicalMemory,
        vcpus: &[Registers],
        named: Option<&Path>,
        loaded: Option<&BootInfo>,
    ) -> Self {
        let kernel = Kernel::find(memory, vcpus, named, loaded)
            .map(|kernel| kernel.with_modules(memory))
            .or_else(|error| Kernel::nameless(memory, vcpus).ok_or(error));
        let unwinder = kernel.as_ref().ok().and_then(|k| k.unwinder(memory));
        let symbols = kernel.as_ref().ok().map(|kernel| &kernel.symbols);
        let stacks: Vec<_> = vcpus
            .iter()
            .map(|registers| backtrace(memory, registers, unwinder.as_ref()))
            .collect();
        let mut report = Self::default();
        // Where a kernel tells, it knows better than its log, which may have lost the panic, or be of
        // the boot before.
        let told = kernel.as_ref().ok().and_then(|k| k.panic(memory).ok());
        let lives = matches!(told, Some(None));
        match kernel.as_ref().map(|kernel| kernel.messages(memory)) {
            Ok(Ok(messages)) => report.words(&messages, symbols, lives),
            Ok(Err(error)) => report.no_log = Some(error.to_string()),
            Err(error) => report.no_log = Some(error.to_string()),
        }
        if let Some(panic) = told.flatten() {
            report.panic = Some(panic);
        }
        if report.function.is_none() && report.panic.is_some() {
            report.function = symbols.and_then(|s| stacks.iter().find_map(|f| culprit(f, s)));
        }
        report.vcpus = vcpus
            .iter()
            .zip(&stacks)
            .map(|(registers, frames)| Place {
                registers: brief(registers),
                backtrace: (0..)
                    .zip(frames)
                    .map(|(number, frame)| frame.line(number, symbols))
                    .collect(),
            })
            .collect();
        report
    }

    /// Takes what the kernel said; nothing of it is the end of one that lives.
    fn words(&mut self, messages: &[Message], symbols: Option<&Symbols>, lives: bool) {
        let lines: Vec<_> = messages.iter().flat_map(Message::lines).collect();
        let texts: Vec<&str> = messages.iter().flat_map(|m| m.text.split('\n')).collect();
        let begins = |text: &&str| BEGINNINGS.iter().any(|b| text.contains(b));
        let end = texts.iter().rposition(|text| panic_of(text).is_some());
        let end = end.filter(|_| !lives);
        // The first of what belongs together: an oops that became a panic is one.
        let start = end.map(|end| {
            let near = end.saturating_sub(PANIC_LINES);
            let first = texts.iter().skip(near).position(begins);
            near + first.unwrap_or(0)
        });
        match (start, end) {
            (Some(start), Some(end)) => {
                self.panic = texts.get(end).and_then(|text| panic_of(text));
                let log = lines.iter().skip(start).take(PANIC_LINES);
                self.log = log.cloned().collect();
                let after = texts.iter().skip(start).take(PANIC_LINES);
                self.function = after.copied().find_map(|text| instruction(text, symbols));
            }
            _ => {
                let skipped = lines.len().saturating_sub(LAST_LINES);
                self.log = lines.into_iter().skip(skipped).collect();
            }
        }
    }

    /// The report for people to read; `title` says of whom and when.
    pub fn text(&self, title: &str) -> String {
        let mut text = format!("{title}\n");
        // Writing to a String cannot fail.
        if let Some(panic) = &self.panic {
            let _ = writeln!(text, "panic: {panic}");
        }
        if let Some(function) = &self.function {
            let _ = writeln!(text, "in: {function}");
        }
        for (vcpu, place) in self.vcpus.iter().enumerate() {
            let _ = writeln!(text, "\nvcpu{vcpu}: {}", place.registers);
            for line in &place.backtrace {
                let _ = writeln!(text, "{line}");
            }
        }
        match &self.no_log {
            Some(why) => {
                let _ = writeln!(text, "\nno log: {why}");
            }
            None => {
                text.push_str("\nThe kernel's last words:\n");
                for line in &self.log {
                    let _ = writeln!(text, "{}", printable(line));
                }
            }
        }
        text
    }
}

/// Text of a guest's, without what would drive a terminal.
pub fn printable(text: &str) -> String {
    let shown = text.chars().map(|c| match c {
        '\t' => c.to_string(),
        c if c.is_control() => c.escape_default().to_string(),
        c => c.to_string(),
    });
    shown.collect()
}

/// What a line says the kernel died of.
fn panic_of(line: &str) -> Option<String> {
    let line = line.split("---[ end ").next()?;
    PANICS.iter().find_map(|words| {
        let rest = match line.split_once(words) {
            Some((before, rest)) if before.is_empty() || before.ends_with(' ') => rest,
            _ => return None,
        };
        Some(rest.trim().to_owned())
    })
}

/// The kernel's function that a line names as the one: of Linux "RIP: 0010:function+0x16/0x20", of
/// FreeBSD "instruction pointer = 0x20:0xffffffff80123456" (sys/amd64/amd64/trap.c).
fn instruction(line: &str, symbols: Option<&Symbols>) -> Option<String> {
    if let Some(rest) = line.strip_prefix("instruction pointer") {
        let pointer = rest.trim_start_matches(|c: char| c.is_whitespace() || c == '=');
        let (selector, address) = pointer.trim_end().split_once(':')?;
        let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
        // A program's are not the kernel's.
        return (number(selector)? & 3 == 0)
            .then(|| symbols?.name(number(address)?))
            .flatten();
    }
    let (_, rest) = line.split_once("RIP: 0010:")?;
    let name = rest.split_whitespace().next()?;
    let offset = name.split('/').next()?;
    offset.contains('+').then(|| offset.to_owned())
}

/// Who called for a panic, by the stack of the vCPU that did it.
fn culprit(frames: &[Frame], symbols: &Symbols) -> Option<String> {
    let names: Vec<_> = frames
        .iter()
        .map(|frame| frame.function(symbols).map(|f| f.name))
        .collect();
    let panics = |name: &Option<&str>| matches!(name, Some("panic" | "vpanic"));
    let at = names.iter().position(panics)?;
    let caller = names
        .iter()
        .skip(at)
        .position(|name| name.is_some_and(|name| !MESSENGERS.contains(&name)))?;
    let caller = frames.get(at + caller)?.function(symbols)?;
    Some(caller.to_string())
}

fn brief(r: &Registers) -> String {
    format!(
        "rip {:#x} rsp {:#x} rflags {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cs {:#x}",
        r.rip, r.rsp, r.rflags, r.cr0, r.cr2, r.cr3, r.cs.selector
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(text: &str) -> Vec<Message> {
        let message = |line: &str| Message {
            sequence: None,
            time_ns: None,
            facility: Some(0),
            level: Some(1),
            text: line.to_owned(),
        };
        text.lines().map(message).collect()
    }

    #[test]
    fn a_panics_words_are_found() {
        let mut report = Report::default();
        report.words(&log(
            "booting\nsysrq: Trigger a crash\nKernel panic - not syncing: sysrq triggered crash\n\
             CPU: 1 PID: 60\nCall Trace:\n RIP: 0033:0x47b7a0\n\
             ---[ end Kernel panic - not syncing: sysrq triggered crash ]---",
        ), None, false);
        assert_eq!(report.panic.as_deref(), Some("sysrq triggered crash"));
        assert_eq!(
            report.log.first().map(String::as_str),
            Some("sysrq: Trigger a crash")
        );
        assert_eq!(report.function, None, "only user mode is named");
        report.words(
            &log(
                "BUG: kernel NULL pointer dereference, address: 0\n#PF: supervisor\n\
             RIP: 0010:bad_driver+0x16/0x40 [bad]\nKernel panic - not syncing: Fatal exception",
            ),
            None,
            false,
        );
        assert_eq!(report.function.as_deref(), Some("bad_driver+0x16"));
        assert_eq!(report.log.len(), 4);
    }

    #[test]
    fn without_a_panic_there_are_the_last_lines() {
        let mut report = Report::default();
        let lines: Vec<_> = (0..50).map(|n| format!("line {n}")).collect();
        report.words(&log(&lines.join("\n")), None, false);
        assert_eq!(report.log.len(), LAST_LINES);
        assert_eq!(report.panic, None);
        assert!(report.text("guest0").contains("line 49"));
        report.words(&log("panic: page fault\ncpuid = 0"), None, false);
        assert_eq!(report.panic.as_deref(), Some("page fault"));
    }

    #[test]
    fn who_panicked_is_behind_the_panic() {
        let symbols =
            b"0000000000001000 T delay_tsc\n0000000000002000 T panic\n0000000000003000 T guilty\n";
        let symbols = Symbols::parse(symbols).unwrap();
        let frame = |address| Frame {
            address,
            certain: true,
            call: true,
        };
        let stack = [0x1005, 0x2010, 0x3003, 0x1001].map(frame);
        assert_eq!(culprit(&stack, &symbols).as_deref(), Some("guilty+0x3"));
        assert_eq!(culprit(&stack[2..], &symbols), None);
    }
}
