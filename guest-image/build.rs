//! Compiles the probe kernels, and modules for one of them, and refuses what touches a register that
//! ring 0 must not.
//!
//! A kernel is compiled for the host's target without its libraries, because a bare-metal target
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
        eprintln!("the probe kernels: {error}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), Box<dyn Error>> {
    let guests = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("guests");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    println!("cargo::rerun-if-changed={}", guests.display());
    println!("cargo::rerun-if-changed=build.rs");
    let probe = out.join("probe.elf");
    let options = ["code-model=small", "link-arg=-static"].map(str::to_owned);
    kernel(&guests.join("probe"), &probe, &options)?;
    check(&fs::read(&probe)?, 1000)?;

    // A kernel has a dynamic section only if it is linked with something: with a library that is
    // empty, as FreeBSD's (sys/conf/kern.post.mk, hack.pico).
    let library = out.join("hack.so");
    let mut link = cc();
    link.args(["-shared", "-nostdlib", "-x", "c", "/dev/null", "-o"]);
    run(link.arg(&library))?;
    let freebsd = out.join("freebsd.elf");
    let options = [
        "code-model=kernel".to_owned(),
        format!("link-arg=-Wl,--no-as-needed,{}", library.display()),
        "link-arg=-Wl,--export-dynamic,--hash-style=sysv,--dynamic-linker,/red/herring".to_owned(),
    ];
    kernel(&guests.join("freebsd"), &freebsd, &options)?;
    brand(&freebsd, 1000)?;
    for name in ["base", "user"] {
        let module = out.join(format!("probe_{name}.ko"));
        let source = guests.join(format!("freebsd/modules/{name}.rs"));
        let mut rustc = rustc(&format!("probe_{name}"), &source);
        rustc.args(["--crate-type", "lib", "-C", "code-model=kernel"]);
        let object = out.join(format!("probe_{name}.o"));
        let mut emit = std::ffi::OsString::from("obj=");
        emit.push(&object);
        rustc.arg("--emit").arg(emit);
        compile(&mut rustc)?;
        // Sections of one name become one, as in FreeBSD's modules.
        let mut link = cc();
        link.args(["-r", "-nostdlib", "-Wl,--build-id=none", "-o"]);
        run(link.arg(&module).arg(&object))?;
        brand(&module, 20)?;
    }
    for name in ["vsock", "rings"] {
        let source = guests.join(format!("{name}/main.rs"));
        program(name, &source, &out.join(format!("{name}.elf")))?;
    }
    Ok(())
}

/// Compiles and links a program for Linux guests, which needs nothing of theirs.
fn program(name: &str, source: &Path, elf: &Path) -> Result<(), Box<dyn Error>> {
    let mut rustc = rustc(name, source);
    rustc.args(["--crate-type", "bin", "-o"]).arg(elf);
    for option in [
        "lto=fat",
        "link-arg=-nostdlib",
        "link-arg=-static",
        "link-arg=-no-pie",
    ] {
        rustc.args(["-C", option]);
    }
    compile(&mut rustc)
}

/// Makes a file FreeBSD's (ELFOSABI_FREEBSD), and checks it.
fn brand(path: &Path, instructions: u64) -> Result<(), Box<dyn Error>> {
    let mut elf = fs::read(path)?;
    *elf.get_mut(7).ok_or("no ELF file")? = 9;
    fs::write(path, &elf)?;
    check(&elf, instructions).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// Compiles and links the kernel whose sources are in this directory.
fn kernel(sources: &Path, elf: &Path, options: &[String]) -> Result<(), Box<dyn Error>> {
    let mut rustc = rustc("probe", &sources.join("main.rs"));
    rustc.args(["--crate-type", "bin", "-o"]).arg(elf);
    let script = format!("link-arg=-Wl,-T,{}", sources.join("link.ld").display());
    for option in [
        "lto=fat",
        "link-arg=-nostdlib",
        "link-arg=-no-pie",
        "link-arg=-Wl,--build-id=none",
        "link-arg=-Wl,--gc-sections",
        "link-arg=-Wl,-z,max-page-size=0x1000",
        &script,
    ] {
        rustc.args(["-C", option]);
    }
    for option in options {
        rustc.args(["-C", option]);
    }
    compile(&mut rustc)
}

/// The compiler, with what is common to all that runs in ring 0.
fn rustc(name: &str, source: &Path) -> Command {
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc
        .args(["--edition", "2024", "--crate-name", name])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .arg(source);
    for option in [
        "opt-level=s",
        "codegen-units=1",
        "debuginfo=0",
        "debug-assertions=no",
        "overflow-checks=no",
        "panic=abort",
        "force-unwind-tables=no",
        "relocation-model=static",
        // Interrupts push onto the stack that runs.
        "no-redzone",
        "target-feature=-sse,-sse2",
    ] {
        rustc.args(["-C", option]);
    }
    rustc
}

/// The C compiler, which Rust links with as well.
fn cc() -> Command {
    Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()))
}

/// Runs a command that has to succeed; returns what it says.
fn run(command: &mut Command) -> Result<String, Box<dyn Error>> {
    let output = command
        .output()
        .map_err(|error| format!("running {command:?}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        return Err(format!("{command:?} failed\n{text}").into());
    }
    Ok(text)
}

fn compile(rustc: &mut Command) -> Result<(), Box<dyn Error>> {
    let text = run(rustc)?;
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

/// Disassembles every code section, of so many instructions at least.
fn check(elf: &[u8], least: u64) -> Result<(), Box<dyn Error>> {
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
    if instructions < least {
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
