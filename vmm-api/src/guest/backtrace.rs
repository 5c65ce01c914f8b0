//! How a vCPU got where it is.
//!
//! Linux without frame pointers has a table for it, which is right or ends. Else frame pointers are
//! followed as long as they lead upwards on the stack and to addresses behind a call. Where there are none, every word of the stack that is such an address is shown with a
//! question mark: it may be a caller, or what is left of an earlier call.

use serde_json::{Value, json};

use super::linux::orc::Unwinder;
use super::{Function, Symbols};
use crate::pagewalk::{self, PhysicalMemory};
use crate::regs::Registers;

/// Frames that are shown at most.
const FRAMES_MAX: usize = 64;
/// How far up a stack may reach: larger than any kernel's.
const STACK_MAX: u64 = 64 << 10;
/// Words that are looked at without frame pointers.
const SCAN_WORDS: u64 = 512;
/// A kernel moves itself by whole steps of this (Linux, CONFIG_PHYSICAL_ALIGN).
const KASLR_STEP: u64 = 2 << 20;
/// Linux's names of the first exception's handler, the newer first.
const FIRST_HANDLERS: [&str; 2] = ["asm_exc_divide_error", "divide_error"];

/// One caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Where it is, or where it will go on.
    pub address: u64,
    /// It follows from the unwind table or a frame pointer, or is the instruction pointer itself.
    pub certain: bool,
    /// It is behind a call, which may have been its function's last instruction; else the instruction
    /// itself is meant.
    pub call: bool,
}

impl Frame {
    /// The frame as a line.
    pub fn line(&self, number: usize, symbols: Option<&Symbols>) -> String {
        let doubt = if self.certain { "" } else { "? " };
        let name = symbols.and_then(|s| self.function(s));
        let name = name.map(|name| format!(" in {name}")).unwrap_or_default();
        format!("#{number:<2} {doubt}{:#018x}{name}", self.address)
    }

    /// The function that is meant: behind a call it is the caller, even if the address is that of the
    /// next function (as Linux's `%pB` has it).
    pub fn function<'a>(&self, symbols: &'a Symbols) -> Option<Function<'a>> {
        let before = u64::from(self.call);
        let found = symbols.function(self.address.wrapping_sub(before))?;
        Some(Function {
            offset: found.offset + before,
            ..found
        })
    }

    /// The frame as JSON.
    pub fn json(&self, symbols: Option<&Symbols>) -> Value {
        let name = symbols.and_then(|s| self.function(s));
        let name = name.map(|function| function.to_string());
        let address = format!("{:#x}", self.address);
        json!({ "address": address, "name": name, "certain": self.certain })
    }
}

/// Where a stack is read.
pub type Word<'a> = dyn Fn(u64) -> Option<u64> + 'a;

/// A vCPU's callers, itself first: by the kernel's own unwind table, if it has one.
pub fn backtrace(
    memory: &dyn PhysicalMemory,
    registers: &Registers,
    unwinder: Option<&Unwinder>,
) -> Vec<Frame> {
    let word = |gla| {
        let mut word = [0; 8];
        pagewalk::copyin(memory, registers, gla, &mut word).ok()?;
        Some(u64::from_le_bytes(word))
    };
    follow(memory, registers, unwinder, &word)
}

/// The same with a stack from elsewhere, as from a copy of it.
pub fn follow(
    memory: &dyn PhysicalMemory,
    registers: &Registers,
    unwinder: Option<&Unwinder>,
    word: &Word<'_>,
) -> Vec<Frame> {
    let stack = Stack {
        memory,
        registers,
        word,
    };
    let certain = |address, call| Frame {
        address,
        certain: true,
        call,
    };
    if let Some(unwinder) = unwinder {
        let found = unwinder.unwind(registers, word);
        if found.len() > 1 {
            let frames = found.into_iter();
            return frames
                .map(|(address, call)| certain(address, call))
                .collect();
        }
    }
    let mut frames = vec![certain(pagewalk::linear_rip(registers), false)];
    let mut pointer = registers.rbp;
    let mut floor = registers.rsp;
    while frames.len() < FRAMES_MAX {
        let plausible =
            pointer.is_multiple_of(8) && pointer >= floor && pointer - registers.rsp < STACK_MAX;
        let Some((next, address)) = plausible.then(|| stack.frame(pointer)).flatten() else {
            break;
        };
        frames.push(certain(address, true));
        (floor, pointer) = (pointer + 8, next);
    }
    if frames.len() == 1 {
        let words = (0..SCAN_WORDS).map_while(|n| word(registers.rsp.wrapping_add(8 * n)));
        let callers = words.filter(|&word| stack.follows_call(word));
        frames.extend(callers.take(FRAMES_MAX - 1).map(|address| Frame {
            address,
            certain: false,
            call: true,
        }));
    }
    frames
}

/// Symbols where the guest has them: Linux moves itself at its start, and its interrupt table tells
/// by how much. Another kernel is taken to be where its file says.
pub fn place(symbols: Symbols, memory: &dyn PhysicalMemory, registers: &Registers) -> Symbols {
    let file = FIRST_HANDLERS.iter().find_map(|name| symbols.address(name));
    let slide = file
        .zip(first_handler(memory, registers))
        .map(|(file, guest)| guest.wrapping_sub(file));
    match slide {
        Some(slide) if slide.is_multiple_of(KASLR_STEP) => symbols.moved(slide),
        _ => symbols,
    }
}

/// Where the first gate of a 64-bit interrupt table leads (Intel SDM volume 3, 6.14.1).
fn first_handler(memory: &dyn PhysicalMemory, registers: &Registers) -> Option<u64> {
    let mut gate = [0; 16];
    pagewalk::copyin(memory, registers, registers.idtr.base, &mut gate).ok()?;
    let [low, high] = [0, 8].map(|at| {
        gate.iter()
            .skip(at)
            .take(8)
            .rev()
            .fold(0u64, |word, &b| word << 8 | u64::from(b))
    });
    let present = low >> 47 & 1 != 0;
    present.then_some(low & 0xffff | low >> 32 & 0xffff_0000 | high << 32)
}

struct Stack<'a> {
    memory: &'a dyn PhysicalMemory,
    registers: &'a Registers,
    word: &'a Word<'a>,
}

impl Stack<'_> {
    /// The saved frame pointer and the return address behind it, if they are such.
    fn frame(&self, pointer: u64) -> Option<(u64, u64)> {
        let next = (self.word)(pointer)?;
        let address = (self.word)(pointer.checked_add(8)?)?;
        self.follows_call(address).then_some((next, address))
    }

    /// Whether an address may be executed and the instruction before it is a call: E8 with a 32-bit
    /// offset, or FF /2 with any operand (Intel SDM volume 2, CALL).
    fn follows_call(&self, address: u64) -> bool {
        const LONGEST: usize = 7;
        let Some(start) = address.checked_sub(LONGEST as u64) else {
            return false;
        };
        let code = pagewalk::gla2gpa_nofault(self.memory, self.registers, address);
        if !code.is_ok_and(|found| found.executable) {
            return false;
        }
        let mut bytes = [0; LONGEST];
        if pagewalk::copyin(self.memory, self.registers, start, &mut bytes).is_err() {
            return false;
        }
        let indirect = |len: usize| {
            let at = LONGEST - len;
            bytes[at] == 0xff && bytes[at + 1] >> 3 & 7 == 2
        };
        bytes[LONGEST - 5] == 0xe8 || [2, 3, 4, 6, 7].into_iter().any(indirect)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::memory::{MemFile, MemoryLayout};

    /// Flat memory of 1 MiB with a call before 0x1005 and 0x2002.
    fn memory(words: &[(u64, u64)]) -> MemFile {
        let layout = MemoryLayout {
            lowmem: 1 << 20,
            highmem: 0,
        };
        let file: File = tempfile::tempfile().unwrap();
        file.set_len(layout.total()).unwrap();
        file.write_all_at(&[0xe8, 0, 0, 0, 0], 0x1000).unwrap();
        file.write_all_at(&[0xff, 0xd0], 0x2000).unwrap();
        for &(at, word) in words {
            file.write_all_at(&word.to_le_bytes(), at).unwrap();
        }
        MemFile::new(file, layout).unwrap()
    }

    fn registers(rsp: u64, rbp: u64) -> Registers {
        let mut registers = Registers {
            rip: 0x1234,
            rsp,
            rbp,
            ..Registers::reset()
        };
        registers.cs.base = 0;
        registers
    }

    fn addresses(memory: &dyn PhysicalMemory, registers: &Registers) -> Vec<(u64, bool)> {
        let frames = backtrace(memory, registers, None);
        frames.iter().map(|f| (f.address, f.certain)).collect()
    }

    #[test]
    fn frame_pointers_are_followed_as_far_as_they_can_be_true() {
        let chain = [
            (0x8010, 0x8040),
            (0x8018, 0x1005),
            (0x8040, 0x8020),
            (0x8048, 0x2002),
        ];
        let memory = memory(&chain);
        assert_eq!(
            addresses(&memory, &registers(0x8000, 0x8010)),
            [(0x1234, true), (0x1005, true), (0x2002, true)],
            "the third leads down"
        );
    }

    #[test]
    fn without_them_words_that_follow_a_call_are_doubtful_callers() {
        let memory = memory(&[(0x8008, 0x1005), (0x8010, 0x1006), (0x8100, 0x2002)]);
        for rbp in [0, 7, 0x9000_0000, u64::MAX] {
            assert_eq!(
                addresses(&memory, &registers(0x8000, rbp)),
                [(0x1234, true), (0x1005, false), (0x2002, false)]
            );
        }
        assert_eq!(
            addresses(&memory, &registers(u64::MAX, 0)),
            [(0x1234, true)]
        );
    }

    #[test]
    fn a_chain_in_a_circle_ends() {
        let memory = memory(&[(0x8010, 0x8010), (0x8018, 0x1005)]);
        assert_eq!(addresses(&memory, &registers(0x8000, 0x8010)).len(), 2);
    }

    #[test]
    fn a_call_at_a_functions_end_is_that_functions() {
        let symbols = Symbols::parse(b"1000 T first\n1010 T second\n").unwrap();
        let frame = |address, call| Frame {
            address,
            certain: true,
            call,
        };
        let line = |frame: Frame| frame.line(1, Some(&symbols));
        assert!(line(frame(0x1010, true)).ends_with("in first+0x10"));
        assert!(line(frame(0x1010, false)).ends_with("in second+0x0"));
        assert!(line(frame(0x1011, true)).ends_with("in second+0x1"));
    }

    #[test]
    fn symbols_move_with_the_interrupt_table() {
        let text = b"0000000000300000 T asm_exc_divide_error\n0000000000300100 T next\n";
        let symbols = Symbols::parse(text).unwrap();
        let gate = |offset: u64| (offset & 0xffff) | 1 << 47 | (offset & 0xffff_0000) << 32;
        let mut registers = registers(0x8000, 0);
        registers.idtr.base = 0x4000;
        let there = memory(&[(0x4000, gate(0x70_0000))]);
        let moved = place(symbols.clone(), &there, &registers);
        assert_eq!(moved.address("next"), Some(0x70_0100));
        let odd = memory(&[(0x4000, gate(0x70_0010))]);
        assert_eq!(place(symbols.clone(), &odd, &registers), symbols);
        assert_eq!(place(symbols.clone(), &memory(&[]), &registers), symbols);
    }

    proptest::proptest! {
        #[test]
        fn any_stack_gives_an_answer(
            words in proptest::collection::vec((0u64..0x20000, proptest::num::u64::ANY), 0..50),
            rsp: u64, near in 0u64..0x20000, rbp in 0u64..0x20000, low: bool,
        ) {
            let memory = memory(&words);
            let rsp = if low { near } else { rsp };
            let frames = backtrace(&memory, &registers(rsp, rbp), None);
            proptest::prop_assert!((1..=FRAMES_MAX).contains(&frames.len()));
        }
    }
}
