//! Compiles the probe kernel and refuses it if it touches a register that ring 0 must not.
//!
//! The kernel is compiled for the host's target without its libraries, because a bare-metal target
//! is not part of a plain Rust installation. The host's `core` is compiled with SSE, and a
//! hypervisor that emulates ring 0 has none: so the compiler is told to use none, and the linked
//! file is disassembled to see that none came in.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Register,
};
use object::{Object, ObjectSection, ObjectSymbol, SectionKind};

fn main() {
    if let Err(error) = build() {
        eprintln!("the probe kernel: {error}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), Box<dyn Error>> {
    let sources = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("guests/probe");
    let elf = PathBuf::from(env::var("OUT_DIR")?).join("probe.elf");
    println!("cargo::rerun-if-changed={}", sources.display());
    println!("cargo::rerun-if-changed=build.rs");
    compile(&sources, &elf)?;
    check(&fs::read(&elf)?)
}

fn compile(sources: &Path, elf: &Path) -> Result<(), Box<dyn Error>> {
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc
        .args([
            "--edition",
            "2024",
            "--crate-name",
            "probe",
            "--crate-type",
            "bin",
        ])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .arg(sources.join("main.rs"))
        .arg("-o")
        .arg(elf);
    let script = format!("link-arg=-Wl,-T,{}", sources.join("link.ld").display());
    for option in [
        "opt-level=s",
        "lto=fat",
        "codegen-units=1",
        "debuginfo=0",
        "debug-assertions=no",
        "overflow-checks=no",
        "panic=abort",
        "force-unwind-tables=no",
        "relocation-model=static",
        "code-model=small",
        // Interrupts push onto the stack that runs.
        "no-redzone",
        "target-feature=-sse,-sse2",
        "link-arg=-nostdlib",
        "link-arg=-static",
        "link-arg=-no-pie",
        "link-arg=-Wl,--build-id=none",
        "link-arg=-Wl,--gc-sections",
        "link-arg=-Wl,-z,max-page-size=0x1000",
        &script,
    ] {
        rustc.args(["-C", option]);
    }
    let output = rustc
        .output()
        .map_err(|error| format!("running {rustc:?}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("rustc failed\n{text}").into());
    }
    // The compiler warns of its own flags (rust-lang/rust issue 116344); a warning with a place is
    // the kernel's.
    for warning in text
        .split("\n\n")
        .filter(|warning| warning.contains("\n  --> "))
    {
        for line in warning.lines() {
            println!("cargo::warning={line}");
        }
    }
    Ok(())
}

/// Disassembles every code section.
fn check(elf: &[u8]) -> Result<(), Box<dyn Error>> {
    let file = object::File::parse(elf)?;
    let mut factory = InstructionInfoFactory::new();
    let mut instructions = 0;
    for section in file
        .sections()
        .filter(|section| section.kind() == SectionKind::Text)
    {
        let name = section.name()?;
        let bitness = match name {
            ".text16" => 16,
            ".text32" => 32,
            _ => 64,
        };
        let mut code = section.data()?;
        if bitness == 16 {
            // The trampoline's GDTR image follows its code.
            let data = file
                .symbol_by_name("trampoline_gdtr")
                .ok_or("no trampoline_gdtr")?;
            let length = usize::try_from(data.address() - section.address())?;
            code = code
                .get(..length)
                .ok_or("trampoline_gdtr is not in .text16")?;
        }
        let decoder = Decoder::with_ip(bitness, code, section.address(), DecoderOptions::NONE);
        for instruction in decoder {
            instructions += 1;
            if let Some(why) = forbidden(&instruction, &mut factory) {
                let at = instruction.ip();
                return Err(format!("{why} in {name} at {at:#x}: {:?}", instruction.code()).into());
            }
        }
    }
    // A section layout that hides the code must not pass for a clean kernel.
    if instructions < 1000 {
        return Err(format!("only {instructions} instructions found to check").into());
    }
    Ok(())
}

/// Why ring 0 must not execute the instruction, if it must not.
fn forbidden(
    instruction: &Instruction,
    factory: &mut InstructionInfoFactory,
) -> Option<&'static str> {
    if instruction.code() == Code::INVALID {
        return Some("not an instruction");
    }
    let vector = |register: Register| {
        register.is_xmm() || register.is_ymm() || register.is_zmm() || register.is_mm()
    };
    let info = factory.info(instruction);
    if info
        .used_registers()
        .iter()
        .any(|used| vector(used.register()))
    {
        return Some("a vector register");
    }
    instruction
        .cpuid_features()
        .iter()
        .find_map(|feature| match feature {
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 => {
                Some("an x87 instruction")
            }
            CpuidFeature::CMPXCHG16B => Some("cmpxchg16b"),
            CpuidFeature::SSE | CpuidFeature::SSE2 => Some("an SSE instruction"),
            _ => None,
        })
}
