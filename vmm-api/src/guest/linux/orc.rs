//! Linux's unwind table, ORC: what a kernel without frame pointers carries to follow its own stacks
//! (Documentation/arch/x86/orc-unwinder.rst, arch/x86/include/asm/orc_types.h).
//!
//! Two arrays in step with each other: addresses in ascending order, each as a 32-bit distance from
//! where it stands, and for each of them 6 bytes that say how to get from the stack pointer there to
//! the caller's.

use std::ops::Range;

use super::modules::{Module, Orc};
use crate::guest::{Symbols, View};
use crate::regs::Registers;

/// No kernel has more; Debian's has 370,000.
const ENTRIES_MAX: u64 = 4_000_000;
const ENTRY: usize = 6;
/// Frames that are followed at most.
const FRAMES_MAX: usize = 128;

/// `struct pt_regs`: offsets of what is needed of it.
const REGS_BP: u64 = 32;
const REGS_IP: u64 = 128;
const REGS_CS: u64 = 136;
const REGS_SP: u64 = 152;

/// What a stack pointer or frame pointer is found by (ORC_REG_*).
const UNDEFINED: u8 = 0;
const PREV_SP: u8 = 1;
const DX: u8 = 2;
const DI: u8 = 3;
const BP: u8 = 4;
const SP: u8 = 5;
const R10: u8 = 6;
const R13: u8 = 7;
const BP_INDIRECT: u8 = 8;
const SP_INDIRECT: u8 = 9;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frame {
    /// Nothing is known of it, or it is the last.
    End,
    /// A return address is below the caller's stack pointer.
    Call,
    /// All registers are there.
    Regs,
    /// What the processor pushed is there.
    Interrupt,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    sp_offset: i16,
    bp_offset: i16,
    sp_reg: u8,
    bp_reg: u8,
    frame: Frame,
}

/// A kernel's unwind tables: its own, and those of its modules.
pub struct Unwinder {
    kernel: Table,
    modules: Vec<(Vec<Range<u64>>, Table)>,
    /// As it was before Linux 6.4: a type of 2 bits without "end of stack".
    old: bool,
}

struct Table {
    /// Where the first address stands.
    base: u64,
    addresses: Vec<u8>,
    entries: Vec<u8>,
}

impl Table {
    fn read(view: View<'_>, at: Orc) -> Option<Self> {
        if at.count == 0 || at.count > ENTRIES_MAX {
            return None;
        }
        Some(Self {
            base: at.addresses,
            addresses: view.bytes(at.addresses, at.count as usize * 4).ok()?,
            entries: view.bytes(at.entries, at.count as usize * ENTRY).ok()?,
        })
    }

    /// What is known of the code at an address.
    fn find(&self, ip: u64) -> Option<&[u8; ENTRY]> {
        let count = self.addresses.len() / 4;
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = (low + high) / 2;
            if self.address(middle)? <= ip {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let at = low.checked_sub(1)?;
        self.entries.as_chunks::<ENTRY>().0.get(at)
    }

    fn address(&self, number: usize) -> Option<u64> {
        let at = number * 4;
        let distance = i32::from_le_bytes(*self.addresses.get(at..)?.first_chunk()?);
        let here = self.base.wrapping_add(at as u64);
        Some(here.wrapping_add_signed(distance.into()))
    }
}

impl Unwinder {
    /// The tables of a kernel, if it has them.
    pub fn new(view: View<'_>, symbols: &Symbols, modules: &[Module]) -> Option<Self> {
        let addresses = symbols.address("__start_orc_unwind_ip")?;
        let end = symbols.address("__stop_orc_unwind_ip")?;
        let at = Orc {
            addresses,
            entries: symbols.address("__start_orc_unwind")?,
            count: end.checked_sub(addresses)? / 4,
        };
        let kernel = Table::read(view, at)?;
        // 6.4 gave each type another number; before, a call was the zero that most entries have.
        let types = kernel.entries.as_chunks::<ENTRY>().0.iter();
        let zeros = types.filter(|entry| entry[5] & 3 == 0).count();
        let modules = modules.iter().filter_map(|module| {
            let table = Table::read(view, module.orc?)?;
            Some((module.code.clone(), table))
        });
        Some(Self {
            old: 2 * zeros > at.count as usize,
            modules: modules.collect(),
            kernel,
        })
    }

    /// The callers of what runs at these registers, itself first, and whether each of them is behind a
    /// call; `word` reads the stack.
    pub fn unwind(
        &self,
        registers: &Registers,
        word: &dyn Fn(u64) -> Option<u64>,
    ) -> Vec<(u64, bool)> {
        let mut addresses = vec![(registers.rip, false)];
        let (mut ip, mut sp, mut bp) = (registers.rip, registers.rsp, registers.rbp);
        // A return address is behind the call; an interrupted instruction is itself meant.
        let mut exact = true;
        while addresses.len() < FRAMES_MAX {
            let Some(entry) = self.find(if exact { ip } else { ip.wrapping_sub(1) }) else {
                break;
            };
            let Some(top) = self.top(entry, registers, sp, bp, addresses.len() == 1, word) else {
                break;
            };
            let mut whole = None;
            let next = match entry.frame {
                Frame::End => None,
                Frame::Call => word(top.wrapping_sub(8)).map(|ip| (ip, top)),
                Frame::Regs | Frame::Interrupt => {
                    // What the processor pushed is the end of pt_regs.
                    let regs = match entry.frame {
                        Frame::Regs => top,
                        _ => top.wrapping_sub(REGS_IP),
                    };
                    let field = |offset| word(regs.wrapping_add(offset));
                    if entry.frame == Frame::Regs {
                        whole = field(REGS_BP);
                    }
                    match field(REGS_CS) {
                        // From user mode: there is nothing of the kernel's behind it.
                        Some(cs) if cs & 3 == 0 => field(REGS_IP).zip(field(REGS_SP)),
                        _ => None,
                    }
                }
            };
            let frame_pointer = match entry.bp_reg {
                UNDEFINED => Some(whole.unwrap_or(bp)),
                PREV_SP => word(add(top, entry.bp_offset)),
                BP => word(add(bp, entry.bp_offset)),
                _ => None,
            };
            let (Some((next_ip, next_sp)), Some(next_bp)) = (next, frame_pointer) else {
                break;
            };
            // A call's stack goes upwards; only an interrupt changes to another.
            if next_ip == 0 || (entry.frame == Frame::Call && next_sp <= sp) {
                break;
            }
            exact = entry.frame != Frame::Call;
            (ip, sp, bp) = (next_ip, next_sp, next_bp);
            addresses.push((ip, !exact));
        }
        addresses
    }

    /// The stack pointer before the call or interrupt.
    fn top(
        &self,
        entry: Entry,
        registers: &Registers,
        sp: u64,
        bp: u64,
        innermost: bool,
        word: &dyn Fn(u64) -> Option<u64>,
    ) -> Option<u64> {
        let offset = entry.sp_offset;
        let now = |value| innermost.then_some(value);
        match entry.sp_reg {
            SP => Some(add(sp, offset)),
            BP => Some(add(bp, offset)),
            SP_INDIRECT => Some(add(word(sp)?, offset)),
            BP_INDIRECT => word(add(bp, offset)),
            DX => now(registers.rdx),
            DI => now(registers.rdi),
            R10 => now(registers.r10),
            R13 => now(registers.r13),
            _ => None,
        }
    }

    /// What is known of the code at an address.
    fn find(&self, ip: u64) -> Option<Entry> {
        let mut modules = self.modules.iter();
        let module = modules.find(|(code, _)| code.iter().any(|range| range.contains(&ip)));
        let table = module.map_or(&self.kernel, |(_, table)| table);
        let [s0, s1, b0, b1, regs, kind] = *table.find(ip)?;
        let frame = match (self.old, kind & if self.old { 3 } else { 7 }) {
            // The bit "end" is the last: 2, or 3 behind "signal" in 6.3, where nothing sets both.
            (true, 0) if kind & 0b100 != 0 => Frame::End,
            (true, 0) | (false, 2) => Frame::Call,
            (true, 1) | (false, 3) => Frame::Regs,
            (true, 2) | (false, 4) => Frame::Interrupt,
            _ => Frame::End,
        };
        Some(Entry {
            sp_offset: i16::from_le_bytes([s0, s1]),
            bp_offset: i16::from_le_bytes([b0, b1]),
            sp_reg: regs & 15,
            bp_reg: regs >> 4,
            frame,
        })
    }
}

fn add(address: u64, offset: i16) -> u64 {
    address.wrapping_add_signed(offset.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xffff_ffff_8200_0000;
    const CODE: u64 = 0xffff_ffff_8100_0000;

    fn table(entries: &[(u64, [u8; 6])]) -> Table {
        let addresses = (0..).zip(entries).flat_map(|(n, (address, _))| {
            let here = BASE + 4 * n;
            (address.wrapping_sub(here) as i32).to_le_bytes()
        });
        Table {
            base: BASE,
            addresses: addresses.collect(),
            entries: entries.iter().flat_map(|(_, entry)| *entry).collect(),
        }
    }

    fn unwinder(entries: &[(u64, [u8; 6])]) -> Unwinder {
        Unwinder {
            kernel: table(entries),
            modules: Vec::new(),
            old: true,
        }
    }

    fn registers(rip: u64, rsp: u64) -> Registers {
        Registers {
            rip,
            rsp,
            rbp: 0x77,
            ..Registers::reset()
        }
    }

    fn stack(words: &[(u64, u64)]) -> impl Fn(u64) -> Option<u64> + use<> {
        let words = words.to_vec();
        move |at| words.iter().find(|w| w.0 == at).map(|w| w.1)
    }

    #[test]
    fn calls_interrupts_and_the_stacks_end_are_followed() {
        let unwinder = unwinder(&[
            // A leaf: the return address is on top of the stack.
            (CODE, [8, 0, 0, 0, SP, 0]),
            // An interrupt's entry: pt_regs are 8 bytes up.
            (CODE + 0x100, [8, 0, 0, 0, SP, 1]),
            // Frame of 32 bytes, the frame pointer saved 16 below its top.
            (CODE + 0x200, [32, 0, 0xf0, 0xff, SP | PREV_SP << 4, 0]),
            // By the frame pointer.
            (CODE + 0x300, [16, 0, 0, 0, BP, 0]),
            (CODE + 0x400, [0, 0, 0, 0, 0, 4]),
        ]);
        let regs = 0x1010;
        let words = stack(&[
            (0x1000, CODE + 0x110),
            (regs + REGS_IP, CODE + 0x210),
            (regs + REGS_CS, 0x10),
            (regs + REGS_SP, 0x2000),
            (regs + REGS_BP, 0x99),
            (0x2018, CODE + 0x310),
            (0x2010, 0x3000),
            (0x3008, CODE + 0x400),
        ]);
        let found = unwinder.unwind(&registers(CODE + 4, 0x1000), &words);
        let offsets: Vec<_> = found.iter().map(|(ip, call)| (ip - CODE, *call)).collect();
        // Behind a call at a function's very end is the next function's first byte.
        let expected = [
            (4, false),
            (0x110, true),
            (0x210, false),
            (0x310, true),
            (0x400, true),
        ];
        assert_eq!(offsets, expected);
    }

    #[test]
    fn user_mode_and_circles_end_it() {
        let unwinder = unwinder(&[
            (CODE, [0, 0, 0, 0, SP, 0]),
            (CODE + 0x100, [0, 0, 0, 0, SP, 1]),
        ]);
        let circle = stack(&[(0xff8, CODE)]);
        let found = unwinder.unwind(&registers(CODE, 0x1000), &circle);
        assert_eq!(found, [(CODE, false)]);
        let user = stack(&[
            (0x1000 + REGS_IP, 0x40_0000),
            (0x1000 + REGS_CS, 0x33),
            (0x1000 + REGS_SP, 0x7000),
        ]);
        let found = unwinder.unwind(&registers(CODE + 0x100, 0x1000), &user);
        assert_eq!(found, [(CODE + 0x100, false)]);
        assert_eq!(unwinder.unwind(&registers(1, 2), &user), [(1, false)]);
    }

    #[test]
    fn a_modules_code_is_looked_up_in_the_modules_table() {
        const MODULE: u64 = CODE + 0x10_0000;
        let mut unwinder = unwinder(&[
            (CODE, [16, 0, 0, 0, SP, 0]),
            (CODE + 0x100, [0, 0, 0, 0, 0, 4]),
        ]);
        let code: Vec<_> = std::iter::once(MODULE..MODULE + 0x1000).collect();
        let entries = [(MODULE, [32, 0, 0, 0, SP, 0])];
        unwinder.modules.push((code, table(&entries)));
        let words = stack(&[(0x1018, CODE + 8), (0x1028, CODE + 0x101)]);
        let found = unwinder.unwind(&registers(MODULE + 4, 0x1000), &words);
        let callers = [(MODULE + 4, false), (CODE + 8, true), (CODE + 0x101, true)];
        assert_eq!(found, callers);
        let behind = unwinder.unwind(&registers(MODULE + 0x1000, 0x1000), &words);
        assert_eq!(behind.len(), 1, "nobody's code");
    }

    proptest::proptest! {
        #[test]
        fn no_table_and_no_stack_make_it_panic(
            entries: Vec<(u16, [u8; 6])>, words: Vec<(u8, u64)>, rsp: u8, bp: u8, old: bool,
        ) {
            let mut entries: Vec<_> = entries.iter().map(|&(at, e)| (CODE + u64::from(at), e)).collect();
            entries.sort_unstable();
            let unwinder = Unwinder { old, ..unwinder(&entries) };
            let words: Vec<_> = words.iter().map(|&(at, w)| (u64::from(at), CODE + w % 0x10000)).collect();
            let mut registers = registers(CODE + 5, rsp.into());
            registers.rbp = bp.into();
            let found = unwinder.unwind(&registers, &stack(&words));
            proptest::prop_assert!(found.len() <= FRAMES_MAX);
        }
    }
}
