//! What is in a VM's memory, whether it runs or not.

use std::fs;

use vmm_api::regs::{Access, Registers};

use crate::common::Bench;

/// Maps the first 2 MiB of memory there and at the top half's end, with some code and text in it.
fn filled(bench: &Bench, name: &str) -> Registers {
    let mut vm = bench.object(name, "rhyveload");
    let mut state = vm.load_state().unwrap();
    let ram = vm.map_memory(&state).unwrap();
    for (gpa, entry) in [
        (0x1000, 0x2003u64),
        (0x1ff8, 0x2003),
        (0x2000, 0x3003),
        (0x3000, 0x83),
    ] {
        ram.write(gpa, &entry.to_le_bytes()).unwrap();
    }
    // mov rax, [rip + 0x10]; call +0; ud2; and what is no instruction.
    let code = [
        0x48, 0x8b, 0x05, 0x10, 0, 0, 0, 0xe8, 0, 0, 0, 0, 0x0f, 0x0b, 0x06,
    ];
    ram.write(0x5000, &code).unwrap();
    ram.write(0x6000, b"one\ttwo\0three\0").unwrap();
    ram.write(0x6010, &[0xff, 0x80, 0x41, 0x0a]).unwrap();
    let registers = &mut state.vcpus[0].registers;
    (registers.cr0, registers.cr4, registers.efer) = (0x8000_0001, 0x20, 0x500);
    registers.cr3 = 0x1000;
    registers.rip = 0xffff_ff80_0000_5000;
    registers.cs.access = Access(0xa09b);
    let registers = registers.clone();
    vm.store(&mut state).unwrap();
    registers
}

#[test]
fn memory_is_shown_as_gdb_shows_it() {
    let bench = Bench::new();
    filled(&bench, "guest0");
    let x = |options: &str| bench.ok(&format!("--vm=guest0 {options}"));
    assert_eq!(
        x("--x/3xg phys:0x1ff0"),
        "0x0000000000001ff0:\t0x0000000000000000\t0x0000000000002003\n\
         0x0000000000002000:\t0x0000000000003003\n"
    );
    assert_eq!(
        x("--x/4db 0xffffff8000006010"),
        "0xffffff8000006010:\t-1\t-128\t65\t10\n"
    );
    assert_eq!(
        x("--x/2c 0x6012"),
        "0x0000000000006012:\t65 'A'\t10 '\\n'\n"
    );
    assert_eq!(
        x("--x/2s 0x6000"),
        "0x0000000000006000:\t\"one\\ttwo\"\n0x0000000000006008:\t\"three\"\n"
    );
    let said = bench.json("--vm=guest0 --x/2xb 0x6010");
    assert_eq!(
        said["x"],
        serde_json::json!({ "address": "0x6010", "values": ["0xff", "0x80"] })
    );
    for (options, error) in [
        (
            "--x/1xg 0x1ffffc",
            "linear 0x200000 is not mapped: level 2 entry 0x0 at 0x3008 is not present",
        ),
        (
            "--x/1xg phys:0x3fffffc",
            "linear 0x3fffffc: guest-physical 0x3fffffc (0x8 bytes) is not RAM",
        ),
    ] {
        let said = bench.fails(&format!("--vm=guest0 {options}"), 1);
        assert_eq!(said, format!("vmmctl: guest0: {error}\n"));
    }
    for options in [
        "--x/0xg 1",
        "--x/xz 1",
        "--x/x here+",
        "--x/x",
        "--x/x phys:here",
        "--disasm=here+there",
    ] {
        bench.fails(&format!("--vm=guest0 {options}"), 64);
    }
}

#[test]
fn instructions_are_shown_in_both_syntaxes() {
    let bench = Bench::new();
    filled(&bench, "guest0");
    let lines = |options: &str| {
        let said = bench.ok(&format!("--vm=guest0 {options}"));
        said.lines()
            .take(4)
            .map(|line| format!("{line}\n"))
            .collect::<String>()
    };
    insta::assert_snapshot!("nasm", lines("--disasm"));
    insta::assert_snapshot!("gas", lines("--disasm=phys:0x5000 --syntax=gas"));
    assert_eq!(
        lines("--x/1i 0x500c"),
        "   0x000000000000500c:\t0f 0b                         \tud2\n"
    );
    let said = bench.json("--vm=guest0 --disasm");
    assert_eq!(said["disasm"][2]["text"], "ud2");
    assert_eq!(said["disasm"][2].get("name"), None);
    // With names, where a call leads to has one as well.
    let map = bench.dir().join("System.map");
    fs::write(&map, "ffffff8000005004 T code\n").unwrap();
    let symbols = format!("--symbols {}", map.display());
    insta::assert_snapshot!("named", lines(&format!("--disasm {symbols}")));
    assert_eq!(
        lines(&format!("--x/1i 0xffffff800000500c {symbols}")),
        "   0xffffff800000500c <code+0x8>:\t0f 0b                         \tud2\n"
    );
    let said = bench.json(&format!("--vm=guest0 --disasm {symbols}"));
    assert_eq!(said["disasm"][0].get("name"), None);
    assert_eq!(said["disasm"][2]["name"], "code+0x8");
    assert_eq!(
        bench.ok(&format!("--vm=guest0 --x/2xb code+8 {symbols}")),
        "0xffffff800000500c:\t0x0f\t0x0b\n"
    );
    let by_name = bench.ok(&format!("--vm=guest0 --disasm=code {symbols}"));
    assert!(
        by_name.starts_with("   0xffffff8000005004 <code+0x0>:\t"),
        "{by_name}"
    );
    let error = bench.fails(&format!("--vm=guest0 --disasm=other {symbols}"), 1);
    assert_eq!(
        error,
        "vmmctl: guest0: its kernel has nothing called other: see /proc/kallsyms there, or give an address\n"
    );
    let error = bench.fails("--vm=guest0 --x/1xg code", 1);
    assert!(
        error.starts_with("vmmctl: guest0: no names for addresses"),
        "{error}"
    );
    // A file that is named has to have names.
    fs::write(&map, "").unwrap();
    let error = bench.fails(&format!("--vm=guest0 --disasm {symbols}"), 1);
    assert!(error.contains("no symbols in it"), "{error}");
}

#[test]
fn a_core_is_written_once_and_the_guest_goes_on() {
    let bench = Bench::new();
    let registers = filled(&bench, "guest0");
    let path = bench.dir().join("core");
    let options = format!("--vm=guest0 --core {}", path.display());
    let said = bench.json(&options);
    assert_eq!(said["core"]["segments"], 2);
    let core = fs::read(&path).unwrap();
    assert_eq!(&core[..4], b"\x7fELF");
    let needle = registers.rip.to_le_bytes();
    assert!(core[..4096].windows(8).any(|word| word == needle), "RIP");
    let error = bench.fails(&options, 1);
    assert!(
        error.ends_with("the core file cannot be written: File exists (os error 17)\n"),
        "{error}"
    );
    assert_eq!(fs::read(&path).unwrap(), core);

    let machine = bench.running("guest1");
    let path = bench.dir().join("other");
    bench.ok(&format!("--vm=guest1 --core {}", path.display()));
    assert_eq!(machine.said(), "pause, resume");
    let options = format!(
        "--vm=guest1 --pause --core {}",
        bench.dir().join("third").display()
    );
    bench.ok(&options);
    assert_eq!(machine.said(), "pause, resume, pause, pause", "stays held");
    // Half a core is not left behind.
    drop(bench.object("guest2", "rhyveload"));
    fs::remove_file(bench.vm("guest2").path().join("mem")).unwrap();
    let path = bench.dir().join("none");
    bench.fails(&format!("--vm=guest2 --core {}", path.display()), 1);
    assert!(!path.exists());
}

#[test]
fn callers_are_named_and_guesses_marked() {
    let bench = Bench::new();
    filled(&bench, "guest0");
    let mut vm = bench.vm("guest0").lock("rhyveload").unwrap();
    let mut state = vm.load_state().unwrap();
    let ram = vm.map_memory(&state).unwrap();
    // Behind the call at 0x5007.
    ram.write(0x8018, &0x500cu64.to_le_bytes()).unwrap();
    ram.write(0x8010, &0u64.to_le_bytes()).unwrap();
    let registers = &mut state.vcpus[0].registers;
    (registers.rsp, registers.rbp) = (0x8000, 0x8010);
    let mut second = state.vcpus[0].clone();
    second.registers.rbp = 0;
    state.vcpus.push(second);
    vm.store(&mut state).unwrap();
    drop((vm, ram));
    let map = bench.dir().join("System.map");
    fs::write(&map, "0000000000005000 T low\nffffff8000005000 T high\n").unwrap();
    let options = format!("--vm=guest0 --bt --symbols {}", map.display());
    assert_eq!(
        bench.ok(&options),
        "vcpu0:\n#0  0xffffff8000005000 in high+0x0\n#1  0x000000000000500c in low+0xc\n\
         vcpu1:\n#0  0xffffff8000005000 in high+0x0\n#1  ? 0x000000000000500c in low+0xc\n"
    );
    let said = bench.json(&options);
    assert_eq!(said["bt"][1][1]["certain"], false);
    // Without names there are addresses.
    assert!(
        bench
            .ok("--vm=guest0 --bt")
            .contains("#1  ? 0x000000000000500c\n")
    );
    fs::write(&map, "").unwrap();
    let error = bench.fails(&options, 1);
    assert!(
        error.contains("no symbols in it: give an ELF file"),
        "{error}"
    );
}

#[test]
fn a_kernel_that_is_not_known_tells_nothing() {
    let bench = Bench::new();
    let _machine = bench.running("guest0");
    for option in ["--dmesg", "--ps"] {
        let error = bench.fails(&format!("--vm=guest0 {option}"), 1);
        assert!(
            error.starts_with("vmmctl: guest0: no names for addresses"),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let map = bench.dir().join("System.map");
    std::fs::write(&map, "0000000000001000 T main\n").unwrap();
    let error = bench.fails(
        &format!("--vm=guest0 --dmesg --symbols {}", map.display()),
        1,
    );
    assert!(error.contains("no kernel that is known here"), "{error}");
}

#[test]
fn shells_complete_names_of_vms_and_registers() {
    let bench = Bench::new();
    drop(bench.object("guest0", "rhyveload"));
    drop(bench.object("web", "rhyveload"));
    let script = bench.dir().join("vmmctl.bash");
    fs::write(&script, bench.ok("--generate bash")).unwrap();
    let complete = |words: &str, current: &str, previous: &str| {
        let count = words.split(' ').count() - 1;
        let line = format!(
            "source {}; COMP_WORDS=({words}); COMP_CWORD={count}; _vmmctl vmmctl '{current}' '{previous}'; echo ${{COMPREPLY[@]}}",
            script.display()
        );
        let output = std::process::Command::new("bash")
            .env("RHYVE_ROOT", bench.root.path())
            .args(["--norc", "-c", &line])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(complete("vmmctl --vm = g", "g", "="), "guest0");
    assert_eq!(complete("vmmctl --vm =", "=", "--vm"), "guest0 web");
    assert_eq!(complete("vmmctl --vm w", "w", "--vm"), "web");
    assert_eq!(
        complete("vmmctl --get-rf", "--get-rf", "vmmctl"),
        "--get-rflags"
    );
    for (shell, names) in [("zsh", "NAME:_rhyve_vms"), ("fish", "-l vm -x -a")] {
        let text = bench.ok(&format!("--generate {shell}"));
        assert!(
            text.contains(names) && text.contains("get-rflags"),
            "{shell}"
        );
        assert!(
            text.contains("-a top\n") || text.contains(":(top)'"),
            "{shell}"
        );
    }
}
