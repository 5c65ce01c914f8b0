//! A vCPU's registers as gdb has them: one table makes both the target description and the order of
//! the bytes.
//!
//! The features org.gnu.gdb.i386.core, sse and segments have the registers and the order that gdb
//! wants (gdb manual, G.5.6 "x86 Features"); org.rhyve.system is ours, and gdb shows it as it comes.

use std::fmt::Write as _;
use std::sync::LazyLock;

use gdbstub::arch;
use vmm_api::kvm::Fpu;
use vmm_api::regs::{Reg, RegError, Registers};

/// x86-64, with the registers of a system's software.
pub enum X86 {}

impl arch::Arch for X86 {
    type Usize = u64;
    type Registers = VcpuRegisters;
    type BreakpointKind = usize;
    type RegId = ();

    fn target_description_xml() -> Option<&'static str> {
        static XML: LazyLock<String> = LazyLock::new(description);
        Some(&XML)
    }
}

/// What gdb sees of a vCPU's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VcpuRegisters {
    /// All but the floating point ones.
    pub system: Registers,
    /// x87 and SSE.
    pub fpu: Fpu,
}

/// Where a register's value is.
#[derive(Clone, Copy, Debug)]
enum Place {
    Word(Reg),
    /// A selector: set by loading the segment, not by itself.
    Selector(Reg),
    St(usize),
    Xmm(usize),
    Mxcsr,
    Control,
    Status,
    Tag,
    Opcode,
    /// Offset of the last instruction, its low half.
    Instruction,
    /// Offset of the last operand, its low half.
    Operand,
    /// Segments of the two, which 64-bit code does not have.
    Zero,
}

struct Shown {
    feature: &'static str,
    name: String,
    bytes: usize,
    kind: &'static str,
    place: Place,
}

const CORE: &str = "org.gnu.gdb.i386.core";
const SSE: &str = "org.gnu.gdb.i386.sse";
const SEGMENTS: &str = "org.gnu.gdb.i386.segments";
const SYSTEM: &str = "org.rhyve.system";

/// Every register in gdb's order.
static SHOWN: LazyLock<Vec<Shown>> = LazyLock::new(|| {
    let mut shown = Vec::new();
    let mut add = |feature, name: &str, bytes, kind, place| {
        shown.push(Shown {
            feature,
            name: name.to_owned(),
            bytes,
            kind,
            place,
        });
    };
    for reg in [
        Reg::Rax,
        Reg::Rbx,
        Reg::Rcx,
        Reg::Rdx,
        Reg::Rsi,
        Reg::Rdi,
        Reg::Rbp,
        Reg::Rsp,
        Reg::R8,
        Reg::R9,
        Reg::R10,
        Reg::R11,
        Reg::R12,
        Reg::R13,
        Reg::R14,
        Reg::R15,
        Reg::Rip,
    ] {
        let kind = match reg {
            Reg::Rip => "code_ptr",
            Reg::Rsp | Reg::Rbp => "data_ptr",
            _ => "int64",
        };
        add(CORE, reg.name(), 8, kind, Place::Word(reg));
    }
    add(CORE, "eflags", 4, "i386_eflags", Place::Word(Reg::Rflags));
    for reg in [Reg::Cs, Reg::Ss, Reg::Ds, Reg::Es, Reg::Fs, Reg::Gs] {
        add(CORE, reg.name(), 4, "int32", Place::Selector(reg));
    }
    for n in 0..8 {
        add(CORE, &format!("st{n}"), 10, "i387_ext", Place::St(n));
    }
    for (name, place) in [
        ("fctrl", Place::Control),
        ("fstat", Place::Status),
        ("ftag", Place::Tag),
        ("fiseg", Place::Zero),
        ("fioff", Place::Instruction),
        ("foseg", Place::Zero),
        ("fooff", Place::Operand),
        ("fop", Place::Opcode),
    ] {
        add(CORE, name, 4, "int", place);
    }
    for n in 0..16 {
        add(SSE, &format!("xmm{n}"), 16, "vec128", Place::Xmm(n));
    }
    add(SSE, "mxcsr", 4, "int", Place::Mxcsr);
    for reg in [Reg::FsBase, Reg::GsBase] {
        add(SEGMENTS, reg.name(), 8, "int64", Place::Word(reg));
    }
    for (name, reg) in [
        ("k_gs_base", Reg::KgsBase),
        ("cr0", Reg::Cr0),
        ("cr2", Reg::Cr2),
        ("cr3", Reg::Cr3),
        ("cr4", Reg::Cr4),
        ("cr8", Reg::Cr8),
        ("efer", Reg::Efer),
    ] {
        add(SYSTEM, name, 8, "int64", Place::Word(reg));
    }
    shown
});

/// What the types are that the table names and gdb does not know by itself.
const TYPES: [(&str, &str); 2] = [
    (
        CORE,
        r#"<flags id="i386_eflags" size="4"><field name="CF" start="0" end="0"/><field name="PF" start="2" end="2"/><field name="AF" start="4" end="4"/><field name="ZF" start="6" end="6"/><field name="SF" start="7" end="7"/><field name="TF" start="8" end="8"/><field name="IF" start="9" end="9"/><field name="DF" start="10" end="10"/><field name="OF" start="11" end="11"/><field name="NT" start="14" end="14"/><field name="RF" start="16" end="16"/><field name="VM" start="17" end="17"/><field name="AC" start="18" end="18"/></flags>"#,
    ),
    (
        SSE,
        r#"<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/><vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/><vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/><union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/><field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/><field name="uint128" type="uint128"/></union>"#,
    ),
];

fn description() -> String {
    let mut xml = "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\">\
                   <target><architecture>i386:x86-64</architecture>"
        .to_owned();
    for feature in [CORE, SSE, SEGMENTS, SYSTEM] {
        // Writing into a String does not fail.
        let _ = write!(xml, "<feature name=\"{feature}\">");
        let types = TYPES.iter().filter(|(of, _)| *of == feature);
        types.for_each(|(_, types)| xml += types);
        for shown in SHOWN.iter().filter(|shown| shown.feature == feature) {
            let (name, bits, kind) = (&shown.name, shown.bytes * 8, shown.kind);
            let _ = write!(
                xml,
                "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"/>"
            );
        }
        xml += "</feature>";
    }
    xml + "</target>"
}

/// The x87 tag word of two bits a register from FXSAVE's of one: a register is in use (00), with
/// whatever number, or empty (11).
fn long_tag(short: u8) -> u32 {
    let empty = (0..8).filter(|n| short >> n & 1 == 0);
    empty.fold(0, |tag, n| tag | 0b11 << (2 * n))
}

fn short_tag(long: u32) -> u8 {
    let used = (0..8).filter(|n| long >> (2 * n) & 0b11 != 0b11);
    used.fold(0, |tag, n| tag | 1 << n)
}

impl VcpuRegisters {
    /// The value, in 16 bytes, little endian.
    fn get(&self, place: Place) -> [u8; 16] {
        let fpu = &self.fpu;
        let word = match place {
            Place::St(n) => {
                let mut value = [0; 16];
                if let Some(st) = fpu.st.get(n) {
                    value[..10].copy_from_slice(st);
                }
                return value;
            }
            Place::Xmm(n) => return fpu.xmm.get(n).copied().unwrap_or_default(),
            Place::Word(reg) | Place::Selector(reg) => self.system.get(reg).unwrap_or(0),
            Place::Mxcsr => fpu.mxcsr.into(),
            Place::Control => fpu.fcw.into(),
            Place::Status => fpu.fsw.into(),
            Place::Tag => long_tag(fpu.ftw).into(),
            Place::Opcode => fpu.fop.into(),
            Place::Instruction => fpu.ip & 0xffff_ffff,
            Place::Operand => fpu.dp & 0xffff_ffff,
            Place::Zero => 0,
        };
        u128::from(word).to_le_bytes()
    }

    fn set(&mut self, place: Place, value: [u8; 16]) -> Result<(), RegError> {
        let fpu = &mut self.fpu;
        let word = u128::from_le_bytes(value) as u64;
        match place {
            Place::St(n) => {
                if let Some(st) = fpu.st.get_mut(n) {
                    st.copy_from_slice(&value[..10]);
                }
            }
            Place::Xmm(n) => {
                if let Some(xmm) = fpu.xmm.get_mut(n) {
                    *xmm = value;
                }
            }
            Place::Word(reg) | Place::Selector(reg) => self.system.set(reg, word)?,
            Place::Mxcsr => fpu.mxcsr = word as u32,
            Place::Control => fpu.fcw = word as u16,
            Place::Status => fpu.fsw = word as u16,
            Place::Tag => fpu.ftw = short_tag(word as u32),
            Place::Opcode => fpu.fop = word as u16,
            Place::Instruction => fpu.ip = word,
            Place::Operand => fpu.dp = word,
            Place::Zero => {}
        }
        Ok(())
    }

    /// Takes what the debugger changed; everything that it does not see stays as it is.
    ///
    /// # Errors
    ///
    /// A register that cannot be set by itself: a selector (what it selects would not follow).
    pub fn change(&mut self, wanted: &Self) -> Result<(), RegError> {
        for shown in SHOWN.iter() {
            let value = wanted.get(shown.place);
            let shown_part = |bytes: &[u8; 16]| bytes.iter().take(shown.bytes).copied().collect();
            let before: Vec<u8> = shown_part(&self.get(shown.place));
            let after: Vec<u8> = shown_part(&value);
            match shown.place {
                _ if before == after => {}
                Place::Selector(reg) => return Err(RegError::ReadOnly(reg)),
                place => self.set(place, value)?,
            }
        }
        Ok(())
    }
}

impl arch::Registers for VcpuRegisters {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.system.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        for shown in SHOWN.iter() {
            let value = self.get(shown.place);
            value
                .iter()
                .take(shown.bytes)
                .for_each(|&byte| write_byte(Some(byte)));
        }
    }

    fn gdb_deserialize(&mut self, mut bytes: &[u8]) -> Result<(), ()> {
        for shown in SHOWN.iter() {
            let (these, rest) = bytes.split_at_checked(shown.bytes).ok_or(())?;
            let mut value = [0; 16];
            value
                .get_mut(..shown.bytes)
                .ok_or(())?
                .copy_from_slice(these);
            self.set(shown.place, value).map_err(drop)?;
            bytes = rest;
        }
        if bytes.is_empty() { Ok(()) } else { Err(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gdbstub::arch::Registers as _;

    fn bytes(registers: &VcpuRegisters) -> Vec<u8> {
        let mut bytes = Vec::new();
        registers.gdb_serialize(|byte| bytes.extend(byte));
        bytes
    }

    #[test]
    fn what_is_written_is_what_was_read() {
        let mut registers = VcpuRegisters::default();
        registers.system.rip = 0x1234;
        registers.system.cr3 = 0x5000;
        registers.fpu.xmm[15] = [7; 16];
        registers.fpu.st[7] = [9; 10];
        registers.fpu.ftw = 0x81;
        let sent = bytes(&registers);
        let mut back = VcpuRegisters::default();
        back.gdb_deserialize(&sent).unwrap();
        assert_eq!(back, registers);
        assert!(back.gdb_deserialize(&sent[1..]).is_err());
        assert!(back.gdb_deserialize(&[&sent[..], &[0]].concat()).is_err());
    }

    #[test]
    fn hidden_parts_stay_and_selectors_are_refused() {
        let mut registers = VcpuRegisters::default();
        registers.system.gdtr.limit = 7;
        registers.fpu.ip = 0xffff_ffff_8000_0000;
        let mut wanted = VcpuRegisters::default();
        wanted.gdb_deserialize(&bytes(&registers)).unwrap();
        wanted.system.rax = 5;
        registers.change(&wanted).unwrap();
        assert_eq!((registers.system.rax, registers.system.gdtr.limit), (5, 7));
        assert_eq!(registers.fpu.ip, 0xffff_ffff_8000_0000);
        wanted.system.cs.selector = 8;
        assert!(registers.change(&wanted).is_err());
    }

    #[test]
    fn tags_are_widened_and_narrowed() {
        for tag in 0..=255 {
            assert_eq!(short_tag(long_tag(tag)), tag);
        }
        assert_eq!(long_tag(0), 0xffff);
    }

    #[test]
    fn the_description_has_every_register() {
        let xml = description();
        assert_eq!(xml.matches("<reg ").count(), SHOWN.len());
        assert!(xml.contains(r#"<reg name="cr3" bitsize="64""#), "{xml}");
    }
}
