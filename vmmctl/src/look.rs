//! Looks into a guest's memory: units, text, instructions, and a core file of all of it.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter, Instruction, NasmFormatter};
use serde_json::{Value, json};
use vmm_api::control::RunPhase;
use vmm_api::guest::report::printable;
use vmm_api::guest::{Kernel, Message, Process, Report, SymbolError, Symbols, backtrace};
use vmm_api::inspect::write_core;
use vmm_api::memory::MemFile;
use vmm_api::pagewalk::{self, WalkError};
use vmm_api::regs::Registers;
use vmm_api::say;

use crate::cli::{Format, Letter, Location, Place, Syntax, Work};
use crate::error::Error;
use crate::interrupt::Interrupt;
use crate::output::{Output, hex};
use crate::target::VcpuAccess;

/// Instructions that `--disasm` shows.
const INSTRUCTIONS: u32 = 16;
/// The longest instruction (Intel SDM volume 2, 2.3.11).
const INSTRUCTION_MAX: u64 = 15;
/// The longest text that is shown of one.
const TEXT_MAX: u64 = 1024;
/// Bits of CS's access rights: 64-bit code, 32-bit code.
const CODE_64: u32 = 13;
const CODE_32: u32 = 14;

/// Shows what is to be looked at.
///
/// # Errors
///
/// An address leads nowhere, or the VM has no memory.
pub fn show(access: &mut dyn VcpuAccess, work: &Work, output: &mut Output) -> Result<(), Error> {
    let looks = &work.gets.looks;
    if looks.memory.is_some() || looks.disasm.is_some() {
        let names = wanted_names(access, work)?;
        let view = View {
            work,
            registers: access.registers(work.cpu)?,
            memory: access.open_memory()?,
            names: names.as_ref(),
        };
        if let Some((format, place)) = &looks.memory {
            view.examine(*format, view.locate(place)?, output)?;
        }
        if let Some(place) = &looks.disasm {
            let place = match place {
                Some(place) => view.locate(place)?,
                None => At::Linear(pagewalk::linear_rip(&view.registers)),
            };
            let lines = view.disassemble(place, INSTRUCTIONS, output)?;
            output.field("disasm", lines);
        }
    }
    if looks.backtrace {
        let kernel = named(access, work)?;
        held(access, |access| backtraces(access, kernel.as_ref(), output))?;
    }
    if looks.dmesg || looks.processes {
        told(access, work, output)?;
    }
    if looks.panic {
        // Before it is held for this.
        let title = format!("{}: {}", work.vm, access.ending()?);
        held(access, |access| panic(access, work, &title, output))?;
    }
    match &looks.core {
        Some(path) => held(access, |access| core(access, work, path, output)),
        None => Ok(()),
    }
}

/// Shows the instruction that a vCPU executes next, with `names` for addresses.
///
/// # Errors
///
/// It cannot be read.
pub fn instruction(
    access: &mut dyn VcpuAccess,
    work: &Work,
    vcpu: u32,
    names: Option<&Symbols>,
    output: &mut Output,
) -> Result<Value, Error> {
    let view = View {
        work,
        registers: access.registers(vcpu)?,
        memory: access.open_memory()?,
        names,
    };
    let next = At::Linear(pagewalk::linear_rip(&view.registers));
    let lines = view.disassemble(next, 1, output)?;
    Ok(lines.get(0).cloned().unwrap_or_default())
}

/// Does something while no vCPU runs, so that memory and registers are of one moment.
fn held(
    access: &mut dyn VcpuAccess,
    action: impl FnOnce(&mut dyn VcpuAccess) -> Result<(), Error>,
) -> Result<(), Error> {
    // Who gives up waiting does not mean to leave the guest paused.
    let _interrupt = Interrupt::new()?;
    let resume = match access.live() {
        Ok(client) => {
            let paused = client.status()?.phase == RunPhase::Paused;
            client.pause()?;
            !paused
        }
        Err(Error::NotRunning { .. }) => false,
        Err(error) => return Err(error),
    };
    let done = action(access);
    if resume {
        access.live()?.resume()?;
    }
    done
}

/// An address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Linear, by the vCPU's page tables.
    Linear(u64),
    /// Guest-physical.
    Physical(u64),
}

impl At {
    /// The number.
    fn address(self) -> u64 {
        match self {
            Self::Linear(address) | Self::Physical(address) => address,
        }
    }

    /// The place `offset` bytes further on.
    fn offset(self, offset: u64) -> Self {
        match self {
            Self::Linear(address) => Self::Linear(address.wrapping_add(offset)),
            Self::Physical(address) => Self::Physical(address.wrapping_add(offset)),
        }
    }
}

/// A vCPU's view of memory.
struct View<'a> {
    work: &'a Work,
    registers: Registers,
    memory: MemFile,
    /// For addresses of instructions.
    names: Option<&'a Symbols>,
}

impl View<'_> {
    fn locate(&self, place: &Place) -> Result<At, Error> {
        match place {
            Place::Physical(gpa) => Ok(At::Physical(*gpa)),
            Place::Linear(place) => locate(self.work, place, self.names).map(At::Linear),
        }
    }

    fn read(&self, place: At, bytes: &mut [u8]) -> Result<(), Error> {
        let read = match place {
            At::Linear(gla) => pagewalk::copyin(&self.memory, &self.registers, gla, bytes),
            At::Physical(gpa) => self
                .memory
                .read(gpa, bytes)
                .map_err(|source| WalkError::Memory { gla: gpa, source }),
        };
        read.map_err(|source| Error::Walk {
            vm: self.work.vm.clone(),
            source,
        })
    }

    /// As many bytes as can be read, at most `len`.
    fn read_some(&self, place: At, len: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; len as usize];
        if self.read(place, &mut bytes).is_ok() {
            return Ok(bytes);
        }
        // The page's end is as far as one can be sure of.
        let room = 4096 - place.address() % 4096;
        bytes.truncate(room.min(len) as usize);
        self.read(place, &mut bytes)?;
        Ok(bytes)
    }

    fn examine(&self, format: Format, place: At, output: &mut Output) -> Result<(), Error> {
        let values = match format.letter {
            Letter::Instruction => self.disassemble(place, format.count, output)?,
            Letter::Text => self.texts(place, format.count, output)?,
            _ => self.units(format, place, output)?,
        };
        output.field(
            "x",
            json!({ "address": hex(place.address()), "values": values }),
        );
        Ok(())
    }

    fn units(&self, format: Format, place: At, output: &mut Output) -> Result<Value, Error> {
        let size = usize::from(format.size);
        let mut bytes = vec![0; size * format.count as usize];
        self.read(place, &mut bytes)?;
        let mut values = Vec::new();
        // gdb's lines: 16 bytes, but 8 of single bytes.
        let per_line = if size == 1 { 8 } else { 16 };
        for (n, line) in bytes.chunks(per_line).enumerate() {
            let address = place.offset((n * per_line) as u64).address();
            let mut text = format!("{address:#018x}:");
            for unit in line.chunks(size) {
                let unit = number(unit);
                text += &format!("\t{}", self::unit(unit, format));
                values.push(hex(unit));
            }
            output.line(&text);
        }
        Ok(values.into())
    }

    fn texts(&self, mut place: At, count: u32, output: &mut Output) -> Result<Value, Error> {
        let mut values = Vec::new();
        for _ in 0..count {
            let bytes = self.read_some(place, TEXT_MAX)?;
            let end = bytes.iter().position(|&b| b == 0);
            let text = bytes.get(..end.unwrap_or(bytes.len())).unwrap_or(&[]);
            let rest = if end.is_none() { "..." } else { "" };
            output.line(&format!(
                "{:#018x}:\t\"{}\"{rest}",
                place.address(),
                text.escape_ascii()
            ));
            values.push(Value::from(text.escape_ascii().to_string()));
            place = place.offset(text.len() as u64 + u64::from(end.is_some()));
        }
        Ok(values.into())
    }

    fn disassemble(&self, mut place: At, count: u32, output: &mut Output) -> Result<Value, Error> {
        let access = self.registers.cs.access;
        let long = self.registers.efer >> 10 & 1 != 0 && access.bit(CODE_64);
        let bits = match (long, access.bit(CODE_32)) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        };
        let mut formatter: Box<dyn Formatter> = match self.work.gets.looks.syntax {
            Syntax::Nasm => Box::new(NasmFormatter::new()),
            Syntax::Gas => Box::new(GasFormatter::new()),
        };
        let options = formatter.options_mut();
        options.set_hex_prefix("0x");
        options.set_hex_suffix("");
        options.set_uppercase_hex(false);
        options.set_branch_leading_zeros(false);
        options.set_space_after_operand_separator(true);
        let next = pagewalk::linear_rip(&self.registers);
        let mut values = Vec::new();
        let mut instruction = Instruction::default();
        for n in 0..count {
            let bytes = match self.read_some(place, INSTRUCTION_MAX) {
                Ok(bytes) => bytes,
                // What is not mapped ends the list, unless there is none.
                Err(error) if n == 0 => return Err(error),
                Err(_) => break,
            };
            let address = place.address();
            let mut decoder = Decoder::with_ip(bits, &bytes, address, DecoderOptions::NONE);
            decoder.decode_out(&mut instruction);
            let mut text = String::new();
            let len = if instruction.is_invalid() {
                text.push_str("(bad)");
                1
            } else {
                formatter.format(&instruction, &mut text);
                instruction.len()
            };
            let code = bytes.get(..len).unwrap_or(&[]);
            let code: Vec<_> = code.iter().map(|b| format!("{b:02x}")).collect();
            let code = code.join(" ");
            let here = place == At::Linear(next);
            let arrow = if here { "=>" } else { "  " };
            let mut value = json!({ "address": hex(address), "bytes": code });
            let mut shown = String::new();
            if let Some(name) = self.name(place) {
                shown = format!(" <{name}>");
                value["name"] = name.into();
            }
            // Where it leads to; 0 is nowhere.
            let target = match (place, instruction.near_branch_target()) {
                (At::Physical(_), _) | (_, 0) => None,
                (At::Linear(_), target) => self.name(At::Linear(target)),
            };
            if let Some(name) = target {
                text += &format!(" <{name}>");
            }
            value["text"] = text.as_str().into();
            output.line(&format!(
                "{arrow} {address:#018x}{shown}:\t{code:<30}\t{text}"
            ));
            values.push(value);
            place = place.offset(len as u64);
        }
        Ok(values.into())
    }

    /// The function at a place.
    fn name(&self, place: At) -> Option<String> {
        match place {
            At::Linear(address) => self.names?.name(address),
            At::Physical(_) => None,
        }
    }
}

/// A unit, little endian.
fn number(bytes: &[u8]) -> u64 {
    let bytes = bytes.iter().rev();
    bytes.fold(0, |word, &byte| word << 8 | u64::from(byte))
}

fn unit(value: u64, format: Format) -> String {
    let unused = 64 - 8 * u32::from(format.size);
    let signed = ((value << unused) as i64) >> unused;
    let digits = 2 + 2 * usize::from(format.size);
    match format.letter {
        Letter::Signed => signed.to_string(),
        Letter::Unsigned => value.to_string(),
        Letter::Octal => format!("0{value:o}"),
        Letter::Char => format!("{signed} '{}'", [value as u8].escape_ascii()),
        _ => format!("{value:#0digits$x}"),
    }
}

/// The guest's kernel, with names for addresses.
///
/// # Errors
///
/// There are none, or the VM cannot be asked.
fn kernel(access: &mut dyn VcpuAccess, work: &Work, memory: &MemFile) -> Result<Kernel, Error> {
    let vcpus = registers(access)?;
    let loaded = access.boot()?;
    let named = work.gets.looks.symbols.as_deref();
    let found = Kernel::find(memory, &vcpus, named, loaded.as_ref());
    found.map_err(|source| Error::Symbols {
        vm: work.vm.clone(),
        source,
    })
}

/// The guest's kernel, if there are names for its addresses; a word on why if the loaded file has
/// none.
///
/// # Errors
///
/// The file that was named has none, or the VM cannot be asked.
pub fn named(access: &mut dyn VcpuAccess, work: &Work) -> Result<Option<Kernel>, Error> {
    let memory = access.open_memory()?;
    match kernel(access, work, &memory) {
        Ok(kernel) => Ok(Some(kernel.with_modules(&memory))),
        Err(Error::Symbols {
            source: SymbolError::Nowhere,
            ..
        }) => Ok(None),
        Err(error @ Error::Symbols { .. }) if work.gets.looks.symbols.is_none() => {
            say!("vmmctl: {}", crate::error::chain(&error));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Names, if instructions are to be shown or something is asked for by its name.
fn wanted_names(access: &mut dyn VcpuAccess, work: &Work) -> Result<Option<Symbols>, Error> {
    let looks = &work.gets.looks;
    let named = |place: &Place| matches!(place, Place::Linear(place) if place.is_named());
    let memory = looks.memory.as_ref();
    let disasm = looks.disasm.as_ref().and_then(Option::as_ref);
    let required = memory.is_some_and(|(_, place)| named(place)) || disasm.is_some_and(named);
    let code = memory.is_some_and(|(format, _)| format.letter == Letter::Instruction);
    if required || code || looks.disasm.is_some() {
        names(access, work, required)
    } else {
        Ok(None)
    }
}

/// The kernel's names. Unless they are required, or a file is named for them, they are no more than an
/// addition, and their lack is no news.
///
/// # Errors
///
/// There are none, or the VM cannot be asked.
pub fn names(
    access: &mut dyn VcpuAccess,
    work: &Work,
    required: bool,
) -> Result<Option<Symbols>, Error> {
    let memory = access.open_memory()?;
    match kernel(access, work, &memory) {
        Ok(kernel) => Ok(Some(kernel.with_modules(&memory).symbols)),
        Err(error) if required || work.gets.looks.symbols.is_some() => Err(error),
        Err(_) => Ok(None),
    }
}

/// The linear address of a place.
///
/// # Errors
///
/// The kernel has no such symbol.
pub fn locate(work: &Work, place: &Location, names: Option<&Symbols>) -> Result<u64, Error> {
    let (name, offset) = match place {
        Location::Address(address) => return Ok(*address),
        Location::Symbol { name, offset } => (name, *offset),
    };
    let address = names.and_then(|names| names.address(name));
    let address = address.ok_or_else(|| Error::NoSymbol {
        vm: work.vm.clone(),
        name: name.clone(),
    })?;
    Ok(address.wrapping_add(offset))
}

/// Shows what the kernel has to say: its log, its processes.
fn told(access: &mut dyn VcpuAccess, work: &Work, output: &mut Output) -> Result<(), Error> {
    let looks = &work.gets.looks;
    let memory = access.open_memory()?;
    let kernel = match kernel(access, work, &memory) {
        Ok(kernel) => kernel,
        Err(error) => {
            let nameless = Kernel::nameless(&memory, &registers(access)?);
            nameless.filter(|_| looks.symbols.is_none()).ok_or(error)?
        }
    };
    let error = |source| Error::Guest {
        vm: work.vm.clone(),
        source,
    };
    held(access, |_| {
        if looks.dmesg {
            let messages = kernel.messages(&memory).map_err(error)?;
            for line in messages.iter().flat_map(Message::lines) {
                output.line(&printable(&line));
            }
            output.field("dmesg", json!(messages));
        }
        if looks.processes {
            let processes = kernel.processes(&memory).map_err(error)?;
            output.line("    PID    PPID S    UID COMMAND");
            for process in &processes {
                output.line(&process_line(process));
            }
            output.field("ps", json!(processes));
        }
        Ok(())
    })
}

fn process_line(process: &Process) -> String {
    let number = |n: Option<u32>| n.map_or("-".into(), |n| n.to_string());
    let command = printable(&process.command);
    format!(
        "{:>7} {:>7} {} {:>6} {command}",
        process.id,
        number(process.parent),
        process.state.unwrap_or('-'),
        number(process.user),
    )
}

/// Shows why the guest died, or where it is.
fn panic(
    access: &mut dyn VcpuAccess,
    work: &Work,
    title: &str,
    output: &mut Output,
) -> Result<(), Error> {
    let memory = access.open_memory()?;
    let vcpus = registers(access)?;
    let loaded = access.boot()?;
    let named = work.gets.looks.symbols.as_deref();
    let report = Report::new(&memory, &vcpus, named, loaded.as_ref());
    for line in report.text(title).lines() {
        output.line(line);
    }
    output.field("panic", json!(report));
    Ok(())
}

/// Shows how each vCPU got where it is. Without symbols there are only addresses.
fn backtraces(
    access: &mut dyn VcpuAccess,
    kernel: Option<&Kernel>,
    output: &mut Output,
) -> Result<(), Error> {
    let memory = access.open_memory()?;
    let vcpus = registers(access)?;
    let symbols = kernel.map(|kernel| &kernel.symbols);
    let unwinder = kernel.and_then(|kernel| kernel.unwinder(&memory));
    let mut values = Vec::new();
    for (vcpu, registers) in vcpus.iter().enumerate() {
        let frames = backtrace(&memory, registers, unwinder.as_ref());
        output.line(&format!("vcpu{vcpu}:"));
        for (number, frame) in frames.iter().enumerate() {
            output.line(&frame.line(number, symbols));
        }
        let frames = frames.iter().map(|frame| frame.json(symbols));
        values.push(Value::from_iter(frames));
    }
    output.field("bt", values);
    Ok(())
}

/// All vCPUs' registers.
fn registers(access: &mut dyn VcpuAccess) -> Result<Vec<Registers>, Error> {
    let count = access.vcpus()?;
    (0..count).map(|vcpu| access.registers(vcpu)).collect()
}

/// Writes all of a guest into a file that must not be there yet.
fn core(
    access: &mut dyn VcpuAccess,
    work: &Work,
    path: &Path,
    output: &mut Output,
) -> Result<(), Error> {
    let memory = access.open_memory()?;
    let vcpus = registers(access)?;
    let error = |source| Error::Core {
        vm: work.vm.clone(),
        path: path.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| error(e.into()))?;
    let report = write_core(&file, &memory, &vcpus).map_err(|source| {
        // Half a core is none.
        let _ = std::fs::remove_file(path);
        error(source)
    })?;
    if report.truncated {
        say!(
            "vmmctl: {}: page tables map more than the {} ranges in {}",
            work.vm,
            report.segments,
            path.display()
        );
    }
    output.field(
        "core",
        json!({ "path": path.to_string_lossy(), "segments": report.segments,
                "truncated": report.truncated, "written": report.written }),
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_written_as_gdb_does() {
        let write = |value, format: &str| unit(value, format.parse().unwrap());
        assert_eq!(write(0xff, "xb"), "0xff");
        assert_eq!(write(7, "xg"), "0x0000000000000007");
        assert_eq!(write(0xff, "db"), "-1");
        assert_eq!(write(0xffff_ffff, "dw"), "-1");
        assert_eq!(write(0xff, "ub"), "255");
        assert_eq!(write(8, "ow"), "010");
        assert_eq!(write(65, "c"), "65 'A'");
        assert_eq!(write(0xffff_ffff_ffff_fffe, "dg"), "-2");
    }
}
