//! vmmctl as a process on VMs that do not run.

use crate::common::Bench;
use serde_json::json;
use vmm_api::regs::Registers;
use vmm_api::state::{Phase, StopReason};

#[test]
fn a_vm_is_made_filled_shown_and_destroyed() {
    let bench = Bench::new();
    assert_eq!(bench.ok("--vm=guest0 --create"), "");
    assert_eq!(bench.state("guest0").phase, Phase::Created);
    bench.ok("--vm=guest0 --set-lowmem=63 --set-highmem=1G");
    assert_eq!(
        bench.ok("--vm=guest0 --get-lowmem --get-highmem"),
        "lowmem\t0x0000000000000000/0x0000000004000000\n\
         highmem\t0x0000000100000000/0x0000000040000000\n",
        "rounded up to 2 MiB"
    );
    assert_eq!(bench.state("guest0").phase, Phase::Created);
    bench.ok("--vm=guest0 --set-rip=0x100000 --set-rsp=010 --set-rax=10");
    assert_eq!(bench.state("guest0").phase, Phase::Loaded, "by hand");
    assert_eq!(
        bench.ok("--vm=guest0 --get-rax --get-rip --get-rsp"),
        "rsp[0]\t0x0000000000000008\nrip[0]\t0x0000000000100000\nrax[0]\t0x000000000000000a\n"
    );
    insta::assert_snapshot!("get_all", bench.ok("--vm=guest0 --get-all"));
    assert_eq!(bench.ok("--vm=guest0 --destroy"), "");
    assert!(bench.root.list().unwrap().is_empty());
}

#[test]
fn all_of_it_in_one_call_is_done_in_the_documented_order() {
    let bench = Bench::new();
    let said = bench.json(
        "--destroy --get-rip --set-rip=5 --set-lowmem=2 --create --vm=a --get-desc-cs --get-lowmem",
    );
    assert_eq!(
        said,
        json!({
            "vm": "a",
            "cpu": 0,
            "phase": "loaded",
            "done": ["create", "set-memory", "set", "destroy"],
            "lowmem": { "gpa": "0x0", "length": 2 << 20 },
            "registers": { "rip": "0x5" },
            "descriptors": { "cs": { "base": "0xffff0000", "limit": "0xffff", "access": "0x93" } },
        })
    );
    assert!(bench.root.list().unwrap().is_empty());
}

#[test]
fn descriptors_are_changed_in_part_or_whole_and_keep_their_selectors() {
    let bench = Bench::new();
    drop(bench.object("guest0", "rhyveload"));
    bench.ok("--vm=guest0 --set-desc-cs --set-desc-ds --desc-base=0x1000 --desc-limit=0xffffffff --desc-access=0xc09b --set-cs=8");
    bench.ok("--vm=guest0 --set-desc-ds --desc-access=0xc093");
    assert_eq!(
        bench.ok("--vm=guest0 --get-desc-ds --get-desc-cs --get-cs"),
        "ds desc[0]\t0x0000000000001000/0xffffffff/0x0000c093\n\
         cs desc[0]\t0x0000000000001000/0xffffffff/0x0000c09b\n\
         cs[0]\t0x0000000000000008\n"
    );
    bench.ok("--vm=guest0 --set-desc-gdtr --desc-base=0x5000 --desc-limit=0x17 --desc-access=0");
    let gdtr = bench.state("guest0").vcpus[0].registers.gdtr;
    assert_eq!((gdtr.base, gdtr.limit), (0x5000, 0x17));
}

#[test]
fn a_refused_change_changes_nothing() {
    let bench = Bench::new();
    drop(bench.object("guest0", "rhyveload"));
    let before = bench.state("guest0");
    assert_eq!(
        bench.fails("--vm=guest0 --set-rip=1 --set-cs=0x10000", 1),
        "vmmctl: guest0: value 0x10000 does not fit in register cs (16 bits)\n"
    );
    bench.fails(
        "--vm=guest0 --set-rip=1 --set-desc-idtr --desc-limit=0x10000",
        1,
    );
    bench.fails(
        "--vm=guest0 --set-rip=1 --set-desc-cs --desc-access=0x100",
        1,
    );
    assert_eq!(bench.state("guest0"), before);
}

#[test]
fn new_memory_makes_the_vm_unloaded_and_the_same_size_does_nothing() {
    let bench = Bench::new();
    drop(bench.object("guest0", "rhyveload"));
    bench.ok("--vm=guest0 --set-rip=1");
    bench.ok("--vm=guest0 --set-lowmem=64");
    assert_eq!(bench.state("guest0").phase, Phase::Loaded);
    bench.ok("--vm=guest0 --set-highmem=2");
    let state = bench.state("guest0");
    assert_eq!(state.phase, Phase::Created);
    assert_eq!(
        (state.machine.memory.lowmem, state.machine.memory.highmem),
        (64 << 20, 2 << 20)
    );
    let error = bench.fails("--vm=guest0 --set-lowmem=4G", 1);
    assert!(error.contains("lowmem ends at 3 GiB"), "{error}");
    let error = bench.fails("--vm=guest0 --set-highmem=32T", 1);
    let text = "vmmctl: vm_setup_memory(highmem): Cannot allocate memory: 33554496 MiB, but ";
    assert!(error.starts_with(text), "{error}");
    bench.ok("--vm=guest0 --destroy");
}

#[test]
fn what_is_stored_of_a_stopped_vm_is_still_shown() {
    let bench = Bench::new();
    let mut vm = bench.object("guest0", "rhyve");
    let mut state = vm.load_state().unwrap();
    state.phase = Phase::Stopped {
        reason: StopReason::TripleFault,
        detail: None,
    };
    state.vcpus.push(state.vcpus[0].clone());
    state.vcpus[1].registers = Registers {
        rip: 0xdead,
        ..Registers::reset()
    };
    vm.store(&mut state).unwrap();
    drop(vm);
    assert_eq!(
        bench.ok("--vm=guest0 --cpu=1 --get-rip"),
        "rip[1]\t0x000000000000dead\n"
    );
    assert_eq!(
        bench.ok("--list"),
        "NAME    PHASE                   MEMORY  VCPUS  PID  UPTIME\n\
         guest0  stopped (triple fault)     64M      2    -       -\n"
    );
    assert_eq!(
        bench.json("--list"),
        json!([{ "name": "guest0", "phase": "stopped (triple fault)", "memory": 64 << 20,
                 "vcpus": 2, "pid": null, "uptime": null }])
    );
}

#[test]
fn each_mistake_has_one_line_and_its_status() {
    let bench = Bench::new();
    drop(bench.object("guest0", "rhyveload"));
    for (options, status, text) in [
        (
            "--vm=guest1 --get-all",
            1,
            "vm_open(guest1): No such file or directory: load it with rhyveload, or see vmmctl --list",
        ),
        (
            "--vm=guest0 --create",
            1,
            "vm_create(guest0): File exists: destroy it first with vmmctl --vm=guest0 --destroy",
        ),
        (
            "--vm=guest0 --cpu=1 --get-rip",
            1,
            "guest0: there is no vCPU 1: the VM has 1, numbered from 0",
        ),
        (
            "--vm=guest0 --cpu=4294967295 --set-rip=1",
            1,
            "guest0: there is no vCPU 4294967295: the VM has 1, numbered from 0",
        ),
        (
            "--vm=guest0 --get-stats",
            1,
            "guest0 is not running: nothing is loaded in it; load it with rhyveload",
        ),
        (
            "--vm=guest0 --force-poweroff --destroy",
            1,
            "guest0 is not running: nothing is loaded in it; load it with rhyveload",
        ),
        (
            "--vm=guest0 --get-vmcs-eptp --destroy --get-vmcb-asid",
            2,
            "not available through KVM, which shows no field of a VMCS or VMCB: --get-vmcs-eptp --get-vmcb-asid",
        ),
        (
            "--vm=guest0 --set-vmcs-exception-bitmap=1 --set-rip=1",
            2,
            "not available through KVM, which shows no field of a VMCS or VMCB: --set-vmcs-exception-bitmap",
        ),
    ] {
        let error = bench.fails(options, status);
        assert_eq!(error, format!("vmmctl: {text}\n"), "{options}");
    }
    for options in [
        "",
        "--vm=guest0",
        "--vm=a/b --get-all",
        "--vm=guest0 --get-eip",
    ] {
        let error = bench.fails(options, 64);
        assert!(!error.is_empty(), "{options}");
    }
    // Nothing of all that was done, and what could be shown is shown.
    assert_eq!(bench.state("guest0").vcpus[0].registers.rip, 0xfff0);
    let (status, out, _) = bench.vmmctl("--vm=guest0 --get-rip --get-vmcs-link");
    assert_eq!((status, &*out), (2, "rip[0]\t0x000000000000fff0\n"));
}

#[test]
fn a_damaged_vm_is_listed_and_can_be_destroyed() {
    let bench = Bench::new();
    let path = bench.object("guest0", "rhyveload").path().join("vm.json");
    drop(bench.object("guest1", "rhyveload"));
    std::fs::write(&path, "{\"format\": \"rhyve-vm\", \"version\": 7}").unwrap();
    let (status, out, err) = bench.vmmctl("--list");
    assert_eq!(status, 0);
    assert_eq!(
        out,
        "NAME    PHASE       MEMORY  VCPUS  PID  UPTIME\n\
         guest0  unreadable       -      -    -       -\n\
         guest1  created        64M      1    -       -\n"
    );
    assert!(err.contains("version 7, this rhyve reads 1-1"), "{err}");
    let error = bench.fails("--vm=guest0 --get-rip", 1);
    assert!(error.contains("version 7"), "{error}");
    std::fs::write(&path, "{\"form").unwrap();
    bench.fails("--vm=guest0 --get-rip", 1);
    bench.ok("--vm=guest0 --destroy");
    assert_eq!(bench.ok("--list").lines().count(), 2);
}

#[test]
fn run_becomes_the_rhyve_beside_vmmctl() {
    let bench = Bench::new();
    drop(bench.object("guest0", "rhyveload"));
    // A hard link has a place of its own, but must be on the same file system.
    let beside = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let program = beside.path().join("vmmctl");
    std::fs::hard_link(assert_cmd::cargo::cargo_bin!("vmmctl"), &program).unwrap();
    let rhyve = beside.path().join("rhyve");
    std::os::unix::fs::symlink("/bin/echo", &rhyve).unwrap();
    let said = bench.program(&program, "--vm=guest0 --get-rip --run");
    let expected = "rip[0]\t0x000000000000fff0\nguest0\n";
    assert_eq!(said, (0, expected.into(), String::new()));
    std::fs::remove_file(&rhyve).unwrap();
    std::os::unix::fs::symlink("/bin/false", &rhyve).unwrap();
    let said = bench.program(&program, "--vm=guest0 --run --destroy");
    assert_eq!(said, (1, String::new(), String::new()), "rhyve's status");
    assert!(bench.root.list().unwrap().is_empty());
}

#[test]
fn the_host_is_reported_on() {
    let bench = Bench::new();
    let text = bench.vmmctl("--host").1;
    let report: serde_json::Value = serde_json::from_str(&bench.vmmctl("--host --json").1).unwrap();
    let lines = report["requirements"].as_array().unwrap();
    assert_eq!(
        text.lines().count(),
        lines.len() + 1,
        "one line a requirement"
    );
    for line in lines {
        assert!(text.contains(line["name"].as_str().unwrap()), "{line}");
    }
    assert!(text.contains(&*bench.root.path().to_string_lossy()));
}

#[test]
fn man_page_and_completions_are_generated() {
    let bench = Bench::new();
    assert!(bench.ok("--generate man").contains("vmmctl"));
    for shell in ["bash", "zsh", "fish"] {
        let text = bench.ok(&format!("--generate {shell}"));
        for option in ["get-all", "set-rip", "get-desc-gdtr"] {
            assert!(text.contains(option), "{shell}: {option}");
        }
    }
}

#[test]
fn a_root_that_cannot_be_used_is_one_error() {
    let bench = Bench::new();
    let file = bench.dir().join("file");
    std::fs::write(&file, "").unwrap();
    let output = std::process::Command::new(assert_cmd::cargo::cargo_bin!("vmmctl"))
        .env("RHYVE_ROOT", &file)
        .arg("--list")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("RHYVE_ROOT"), "{text}");
}
