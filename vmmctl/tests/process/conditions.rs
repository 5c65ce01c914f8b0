//! Every option, on a VM in each condition of its life, as text and as JSON, against golden files.

use clap::CommandFactory;
use std::collections::BTreeSet;
use vmm_api::regs::{Reg, Registers};
use vmm_api::state::{Phase, StopReason, VcpuState};
use vmmctl::cli::Cli;

use crate::common::Bench;

/// Options that belong together, or need a value; what is not here is walked by itself or, in a
/// family, all in one call.
const CALLS: [&str; 31] = [
    "--get-exits=1",
    "--get-rtc-nvram --rtc-nvram-offset=20",
    "--getcap",
    "--getcap --capname=hlt_exit",
    "--get-gpa-pmap=0x1000",
    "--x/2xg 0x0",
    "--x/2xg phys:0x1000",
    "--disasm=0x0 --syntax=gas",
    "--bt",
    "--panic",
    "--set-rip=0x1000 --get-rip",
    "--cpu=1 --get-rip",
    "--set-desc-fs --desc-base=0x7000 --desc-limit=0xffff --desc-access=0x93 --get-desc-fs",
    "--set-x2apic-state=1 --get-x2apic-state",
    "--set-pinning=0 --get-pinning",
    "--set-pinning=-1 --get-pinning",
    "--setcap=1 --capname=hlt_exit",
    "--set-rtc-nvram=5 --rtc-nvram-offset=20 --get-rtc-nvram",
    "--set-rtc-time=1000000000 --get-rtc-time",
    "--assert-lapic-lvt=1",
    "--reset-stats",
    "--set-vmcs-exception-bitmap=1",
    "--pause --get-suspended-cpus --resume",
    "--inject-nmi",
    "--set-balloon=16",
    "--set-disk=2=now",
    "--set-link=1=down",
    "--set-desc-cs --desc-base=0 --desc-limit=0xffff --desc-access=0x9b --step=2",
    "--step",
    "--until=0x1000",
    "--unassign-pptdev=1/2/3",
];

/// They end the VM, make it, or write beside it: tests of their own show them.
const ELSEWHERE: [&str; 16] = [
    "suspend",
    "list",
    "host",
    "create",
    "destroy",
    "run",
    "set-lowmem",
    "set-highmem",
    "set-mem",
    "force-reset",
    "force-poweroff",
    "power-button",
    "core",
    "symbols",
    "snapshot",
    "clone",
];

/// What their clock is set to, in seconds since 1970.
const SET: u32 = 1_000_000_000;

/// The calls: those above, each option without a value by itself, each family at once.
fn calls() -> Vec<String> {
    let command = Cli::command();
    let named: Vec<_> = command
        .get_arguments()
        .filter(|arg| !arg.get_action().takes_values())
        .filter_map(|arg| arg.get_long())
        .map(str::to_owned)
        .collect();
    let said: BTreeSet<_> = CALLS
        .iter()
        .flat_map(|call| call.split_whitespace())
        .filter_map(|word| word.strip_prefix("--"))
        .collect();
    let family = |test: &dyn Fn(&str) -> bool| {
        let words = named.iter().filter(|name| test(name));
        words.map(|name| format!("--{name}")).collect::<Vec<_>>()
    };
    let unavailable = |name: &str| {
        ["get-vmcs-", "get-vmcb-", "get-avic-"]
            .iter()
            .any(|p| name.starts_with(p))
            && !name.ends_with("tsc-offset")
            && !name.contains("guest-")
    };
    let descriptor = |name: &str| name.starts_with("get-desc-");
    let mut calls: Vec<String> = CALLS.map(str::to_owned).into();
    calls.push(family(&descriptor).join(" "));
    // One of them is enough to see; all of them answer alike.
    calls.push(family(&unavailable).join(" "));
    let register =
        |name: &str| Reg::all().any(|reg| name == format!("get-{}", reg.name().replace('_', "-")));
    calls.push(family(&register).join(" "));
    let rest = named.iter().filter(|name| {
        let name = name.as_str();
        let other = ["help", "version", "json", "getcap"].contains(&name);
        !register(name)
            && !descriptor(name)
            && !unavailable(name)
            && !other
            && !said.contains(name)
            && !ELSEWHERE.contains(&name)
            && !name.starts_with("set-desc-")
    });
    calls.extend(rest.map(|name| format!("--{name}")));
    // Last, for it leaves a VM that could not run.
    let sets = settable().map(|name| format!("--{name}=1"));
    calls.push(sets.collect::<Vec<_>>().join(" ") + " --get-all");
    calls
}

/// The options that set registers.
fn settable() -> impl Iterator<Item = String> {
    let settable = Reg::all().filter(|&reg| Registers::reset().set(reg, 1).is_ok());
    settable.map(|reg| format!("set-{}", reg.name().replace('_', "-")))
}

#[test]
fn no_option_is_forgotten() {
    let calls = calls().join(" ");
    let said: BTreeSet<_> = calls
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("--"))
        .map(|word| word.split(['=', '/']).next().unwrap_or(word))
        .collect();
    let command = Cli::command();
    // A family whose members all answer alike: one call has the others.
    let alike = |name: &str| {
        ["set-vmcs-", "set-desc-", "desc-"]
            .iter()
            .any(|family| name.starts_with(family))
    };
    let forgotten: Vec<_> = command
        .get_arguments()
        .filter_map(|arg| arg.get_long())
        .filter(|name| !said.contains(name) && !alike(name) && !ELSEWHERE.contains(name))
        .filter(|name| !["vm", "cpu", "json", "help", "version"].contains(name))
        .collect();
    assert_eq!(forgotten, [""; 0]);
}

/// All calls on one VM, with what comes of them.
fn walk(bench: &Bench, paused: bool) -> String {
    let pid = std::process::id().to_string();
    let mut text = String::new();
    for call in calls() {
        for json in ["", " --json"] {
            let line = format!("--vm=guest0 {call}{json}");
            if paused {
                // The call before may have let it go on.
                bench.ok("--vm=guest0 --pause");
            }
            let (status, out, err) = bench.vmmctl(&line);
            text += &format!("$ vmmctl {line}\n{out}{err}= {status}\n\n");
        }
    }
    // A clock that is set goes on until it is read.
    for second in 1..10 {
        let clock = |n: u32| format!("0x{:x}: Sun Sep 09 01:46:{}", SET + n, 40 + n);
        text = text.replace(&clock(second), &clock(0));
        text = text.replace(&(SET + second).to_string(), &SET.to_string());
    }
    text.replace(&format!("pid {pid}"), "pid PID")
}

#[test]
fn every_option_has_its_answer_in_each_condition() {
    for condition in ["created", "loaded", "running", "paused", "stopped"] {
        let bench = Bench::new();
        let machine = match condition {
            "running" | "paused" => Some(bench.running("guest0")),
            _ => {
                let mut vm = bench.object("guest0", "rhyveload");
                let mut state = vm.load_state().unwrap();
                state.phase = match condition {
                    "created" => Phase::Created,
                    "loaded" => Phase::Loaded,
                    _ => Phase::Stopped {
                        reason: StopReason::TripleFault,
                        detail: None,
                    },
                };
                state.vcpus = vec![VcpuState::reset()];
                vm.store(&mut state).unwrap();
                None
            }
        };
        insta::assert_snapshot!(condition, walk(&bench, condition == "paused"));
        drop(machine);
    }
}
