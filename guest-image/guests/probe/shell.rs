//! The command prompt.

use core::sync::atomic::Ordering;

use crate::console::{Hex, Text, print, say};
use crate::cpu::{self, Deadline};
use crate::smp::{self, Work};
use crate::{acpi, apic, blk, boot, memory, net, pci, report, uart};

/// Words and numbers of a line.
pub struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    /// The next word.
    pub fn word(&mut self) -> Option<&'a [u8]> {
        let start = self.0.iter().position(|&byte| byte != b' ')?;
        let (_, rest) = self.0.split_at_checked(start)?;
        let end = rest
            .iter()
            .position(|&byte| byte == b' ')
            .unwrap_or(rest.len());
        let (word, rest) = rest.split_at_checked(end)?;
        self.0 = rest;
        Some(word)
    }

    /// The next word as a number: decimal, or hexadecimal with 0x.
    pub fn number(&mut self) -> Option<u64> {
        let word = self.word()?;
        let (digits, base) = match word.strip_prefix(b"0x") {
            Some(digits) => (digits, 16),
            None => (word, 10),
        };
        if digits.is_empty() {
            return None;
        }
        digits.iter().try_fold(0u64, |value, &byte| {
            let digit = match byte {
                b'0'..=b'9' => byte - b'0',
                b'a'..=b'f' => byte - b'a' + 10,
                b'A'..=b'F' => byte - b'A' + 10,
                _ => return None,
            };
            let digit = u64::from(digit);
            if digit >= base {
                None
            } else {
                value.checked_mul(base)?.checked_add(digit)
            }
        })
    }

    /// What is left, without the blank before it.
    fn rest(&self) -> &'a [u8] {
        self.0.strip_prefix(b" ").unwrap_or(self.0)
    }
}

struct Command {
    name: &'static str,
    help: &'static str,
    run: fn(&mut Words),
}

const COMMANDS: &[Command] = &[
    Command {
        name: "help",
        help: "this list",
        run: help,
    },
    Command {
        name: "echo",
        help: "TEXT",
        run: |words| say!(Text(words.rest())),
    },
    Command {
        name: "mem",
        help: "[ADDRESS [BYTES]]: the memory map, or what memory holds",
        run: mem,
    },
    Command {
        name: "touch",
        help: "ADDRESS BYTES: write to every page there, which stays what it is",
        run: touch,
    },
    Command {
        name: "cpuid",
        help: "[LEAF [SUBLEAF]]",
        run: cpuid,
    },
    Command {
        name: "msr",
        help: "INDEX [VALUE]: read or write a model-specific register",
        run: msr,
    },
    Command {
        name: "in",
        help: "PORT [1|2|4]: read an I/O port",
        run: port_in,
    },
    Command {
        name: "out",
        help: "PORT VALUE [1|2|4]: write an I/O port",
        run: port_out,
    },
    Command {
        name: "regs",
        help: "registers at entry and now",
        run: regs,
    },
    Command {
        name: "time",
        help: "the clock",
        run: |_| report::clock(),
    },
    Command {
        name: "ports",
        help: "[SEED [COUNT [all]]]: write random ports; all: on every CPU",
        run: ports,
    },
    Command {
        name: "pci",
        help: "the functions on the bus",
        run: |_| pci::list(),
    },
    Command {
        name: "blk",
        help: "legacy|modern [N], write|read SECTOR COUNT SEED, flush, id, discard|zero|log SECTOR COUNT",
        run: blk::run,
    },
    Command {
        name: "net",
        help: "legacy|modern [N], ping COUNT SEED",
        run: net::run,
    },
    Command {
        name: "spin",
        help: "[all]: a busy loop until a key is pressed",
        run: spin,
    },
    Command {
        name: "hlt",
        help: "stop every CPU, interrupts off",
        run: hlt,
    },
    Command {
        name: "fault",
        help: "[ud2|int3]: a triple fault",
        run: fault,
    },
    Command {
        name: "reboot",
        help: "by port 0xcf9, then by the keyboard controller",
        run: |_| reboot(),
    },
    Command {
        name: "poweroff",
        help: "by ACPI, or port 0x404 when there are no tables",
        run: |_| power_off(),
    },
];

/// Reads and obeys commands for ever.
pub extern "C" fn run() -> ! {
    let mut line = [0u8; 128];
    loop {
        print!("probe> ");
        let length = read_line(&mut line);
        let mut words = Words(line.get(..length).unwrap_or(&[]));
        let Some(name) = words.word() else { continue };
        match COMMANDS
            .iter()
            .find(|command| command.name.as_bytes() == name)
        {
            Some(command) => (command.run)(&mut words),
            None => say!("probe: no command ", Text(name), "; try help"),
        }
    }
}

/// Sleeps until a key is pressed.
fn key() -> u8 {
    loop {
        cpu::disable_interrupts();
        if let Some(byte) = uart::read() {
            return byte;
        }
        if report::DEAF.load(Ordering::Relaxed) {
            uart::poll();
        } else {
            cpu::sleep();
        }
    }
}

fn read_line(line: &mut [u8]) -> usize {
    let mut length = 0;
    loop {
        match key() {
            b'\r' | b'\n' => {
                say!();
                return length;
            }
            // ^C and ^U drop the line.
            3 | 21 => {
                say!();
                return 0;
            }
            8 | 127 => {
                if length > 0 {
                    length -= 1;
                    print!("\x08 \x08");
                }
            }
            byte @ b' '..=b'~' => {
                if let Some(slot) = line.get_mut(length) {
                    *slot = byte;
                    length += 1;
                    uart::write(&[byte]);
                }
            }
            _ => {}
        }
    }
}

fn help(_: &mut Words) {
    for command in COMMANDS {
        say!("  ", command.name, " ", command.help);
    }
}

fn mem(words: &mut Words) {
    let Some(address) = words.number() else {
        match boot::read() {
            Ok(info) => info.map().for_each(|region| {
                report::region(&region);
                say!();
            }),
            Err(why) => say!("probe: mem FAILED (", why, ")"),
        }
        return;
    };
    let bytes = words.number().unwrap_or(64).min(4096);
    for row in (0..bytes).step_by(16) {
        print!(Hex(address.wrapping_add(row)), ":");
        for column in (row..bytes.min(row + 16)).step_by(4) {
            match memory::peek32(address.wrapping_add(column)) {
                Some(word) => print!(" ", Hex(word.into())),
                None => print!(" unmapped"),
            }
        }
        say!();
    }
}

fn touch(words: &mut Words) {
    let (Some(address), Some(bytes)) = (words.number(), words.number()) else {
        return say!("probe: touch FAILED (where, and how much?)");
    };
    for offset in (0..bytes).step_by(4096) {
        let at = address.wrapping_add(offset);
        if !memory::writable(at) {
            return say!("probe: touch ", Hex(at), " FAILED (cannot be written)");
        }
    }
    say!("probe: touch ", Hex(address), " ", Hex(bytes), " ok");
}

fn cpuid(words: &mut Words) {
    let Some(leaf) = words.number() else {
        return report::processor();
    };
    let result = cpu::cpuid(leaf as u32, words.number().unwrap_or(0) as u32);
    say!(
        "probe: cpuid ",
        Hex(leaf),
        " eax ",
        Hex(result.eax.into()),
        " ebx ",
        Hex(result.ebx.into()),
        " ecx ",
        Hex(result.ecx.into()),
        " edx ",
        Hex(result.edx.into()),
    );
}

fn msr(words: &mut Words) {
    let Some(index) = words.number() else {
        return say!("probe: msr FAILED (which?)");
    };
    if let Some(value) = words.number() {
        // SAFETY: none that this program could give: whoever types it wants to see what happens.
        if !unsafe { memory::try_wrmsr(index as u32, value) } {
            return say!("probe: msr FAILED (writing faults)");
        }
    }
    match memory::try_rdmsr(index as u32) {
        Some(value) => say!("probe: msr ", Hex(index), " ", Hex(value)),
        None => say!("probe: msr FAILED (reading faults)"),
    }
}

fn port_in(words: &mut Words) {
    let Some(port) = words.number() else {
        return say!("probe: in FAILED (which port?)");
    };
    let at = port as u16;
    let value = match words.number() {
        Some(4) => cpu::inl(at),
        Some(2) => cpu::inw(at).into(),
        _ => cpu::inb(at).into(),
    };
    say!("probe: in ", Hex(port), " ", Hex(value.into()));
}

fn port_out(words: &mut Words) {
    let (Some(port), Some(value)) = (words.number(), words.number()) else {
        return say!("probe: out FAILED (which port and value?)");
    };
    write_port(port as u16, value as u32, words.number().unwrap_or(1));
    say!("probe: out ", Hex(port), " ok");
}

fn write_port(port: u16, value: u32, size: u64) {
    match size {
        4 => cpu::outl(port, value),
        2 => cpu::outw(port, value as u16),
        _ => cpu::outb(port, value as u8),
    }
}

fn regs(_: &mut Words) {
    report::registers();
    let [cr0, cr2, cr3, cr4] = cpu::control();
    say!(
        "probe: now cr0 ",
        Hex(cr0),
        " cr2 ",
        Hex(cr2),
        " cr3 ",
        Hex(cr3),
        " cr4 ",
        Hex(cr4)
    );
}

/// Port ranges that random writes leave alone: resets and power, which would end the test, and the
/// console, which has to tell of it.
const SPARED: [(u32, u32); 6] = [
    (uart::PORT as u32, uart::PORT as u32 + 7),
    (0x64, 0x64),
    (0x92, 0x92),
    (0x404, 0x405),
    (0x501, 0x504), // a debug exit, where there is one
    (0xcf9, 0xcf9),
];

/// Writes and reads `count` random ports: xorshift64*, so that a seed gives the same run again.
pub fn random_ports(seed: u64, count: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for _ in 0..count {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let random = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
        // Three in four below 0x1000, where the devices are.
        let mask = if random >> 62 == 0 { 0xffff } else { 0x0fff };
        let port = (random >> 32) as u16 & mask;
        let size = [1, 2, 4, 4][random as usize >> 50 & 3];
        let (first, last) = (u32::from(port), u32::from(port) + size - 1);
        if SPARED.iter().any(|&(from, to)| first <= to && from <= last) {
            continue;
        }
        if random & 1 << 61 == 0 {
            write_port(port, random as u32, size.into());
        } else if size == 4 {
            cpu::inl(port);
        } else {
            cpu::inb(port);
        }
    }
}

fn ports(words: &mut Words) {
    let seed = words.number().unwrap_or(1);
    let count = words.number().unwrap_or(1000);
    let all = words.word() == Some(b"all");
    if all {
        smp::give(Work::Ports);
    }
    random_ports(seed, count);
    if all {
        smp::give(Work::Sleep);
    }
    say!("probe: ports ", Hex(seed), " ", count, " ok");
}

fn spin(words: &mut Words) {
    let all = words.word() == Some(b"all");
    say!("probe: spinning, any key ends it");
    if all {
        smp::give(Work::Spin);
    }
    let mut rounds = 0u64;
    loop {
        rounds += 1;
        cpu::enable_interrupts();
        core::hint::spin_loop();
        cpu::disable_interrupts();
        if report::DEAF.load(Ordering::Relaxed) {
            uart::poll();
        }
        if uart::read().is_some() {
            break;
        }
    }
    if all {
        smp::give(Work::Sleep);
    }
    say!("probe: spin ok, ", rounds, " rounds");
}

fn hlt(_: &mut Words) {
    say!("probe: halting");
    smp::give(Work::Halt);
    apic::stop_timer();
    cpu::halt()
}

fn fault(words: &mut Words) {
    let breakpoint = words.word() == Some(b"int3");
    say!(
        "probe: triple fault by ",
        if breakpoint { "int3" } else { "ud2" }
    );
    cpu::triple_fault(breakpoint)
}

fn reboot() {
    say!("probe: rebooting");
    // Reset control register of the PIIX3: full reset, then the edge that starts it.
    cpu::outb(0xcf9, 0x02);
    cpu::outb(0xcf9, 0x06);
    Deadline::after(Deadline::SHORT * 20).wait(|| false);
    // Keyboard controller: pulse the reset line.
    cpu::outb(0x64, 0xfe);
    Deadline::after(Deadline::SHORT * 20).wait(|| false);
    say!("probe: reboot FAILED (still here)");
}

fn power_off() {
    // bhyve's fixed hardware: PM1a_CNT at 0x404, sleep type 5.
    const FALLBACK: (u16, u16) = (0x404, 5);
    const SLEEP_ENABLE: u16 = 1 << 13;
    let found = boot::read()
        .ok()
        .and_then(|info| acpi::find(&info))
        .and_then(|acpi| acpi.power_off());
    let (port, sleep_type) = found.unwrap_or(FALLBACK);
    let source = if found.is_some() {
        " by acpi"
    } else {
        " by default"
    };
    say!(
        "probe: powering off",
        source,
        ", port ",
        Hex(port.into()),
        " type ",
        u32::from(sleep_type)
    );
    cpu::outw(port, sleep_type << 10 | SLEEP_ENABLE);
    Deadline::after(Deadline::SHORT * 20).wait(|| false);
    say!("probe: poweroff FAILED (still here)");
}
