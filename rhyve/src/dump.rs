//! A vCPU in text, for the report of why a machine could not go on.

use std::fmt::Write;

use vmm_api::kvm::KvmVcpu;
use vmm_api::memory::GuestRam;
use vmm_api::regs::{Reg, Registers, SegReg};

/// Bytes of code that are shown.
const CODE: u64 = 16;

/// Registers, segments and the code at the instruction pointer.
pub fn vcpu(vcpu: &KvmVcpu, ram: &GuestRam) -> String {
    match vcpu.registers() {
        Ok(regs) => format!("{}{}", registers(&regs), code(vcpu, &regs, ram)),
        Err(error) => format!("registers: {}\n", crate::chain(&error)),
    }
}

fn registers(regs: &Registers) -> String {
    let selectors = ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr"];
    let words = Reg::all().filter(|reg| !selectors.contains(&reg.name()));
    let mut text = String::new();
    for (n, (reg, value)) in words
        .filter_map(|r| Some((r, regs.get(r).ok()?)))
        .enumerate()
    {
        let end = if n % 4 == 3 { "\n" } else { "  " };
        // Writing to a String cannot fail.
        let _ = write!(text, "{reg:>11} {value:016x}{end}");
    }
    text.push('\n');
    for seg in SegReg::ALL {
        let desc = regs.desc(seg);
        let _ = writeln!(
            text,
            "{seg:>11} {:04x} base {:016x} limit {:08x} access {:05x}",
            desc.selector, desc.base, desc.limit, desc.access.0
        );
    }
    text
}

fn code(vcpu: &KvmVcpu, regs: &Registers, ram: &GuestRam) -> String {
    let linear = regs.cs.base.wrapping_add(regs.rip);
    let Ok(Some(gpa)) = vcpu.translate(linear) else {
        return format!("{:>11} {linear:#x} is not mapped\n", "code");
    };
    // A page's end may be the end of what is mapped.
    let mut bytes = vec![0; CODE.min(4096 - gpa % 4096) as usize];
    match ram.read(gpa, &mut bytes) {
        Ok(()) => {
            let bytes: Vec<_> = bytes.iter().map(|b| format!("{b:02x}")).collect();
            format!(
                "{:>11} {} at {linear:#x} (physical {gpa:#x})\n",
                "code",
                bytes.join(" ")
            )
        }
        Err(error) => format!("{:>11} {}\n", "code", crate::chain(&error)),
    }
}
