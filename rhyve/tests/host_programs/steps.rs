//! A guest is led by vmmctl: instruction by instruction, and to a place.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::signal::Signal;
use vmm_api::control::Client;

use crate::guests::{ENTRY, ask, load_code, start_probe};
use crate::support::{Place, Process};

fn rip(place: &Place, vcpu: u32) -> u64 {
    let line = place.ok(&format!("vmmctl --vm=guest0 --cpu={vcpu} --get-rip"));
    let value = line.trim().split("0x").nth(1).unwrap();
    u64::from_str_radix(value, 16).unwrap()
}

/// The addresses that lines of instructions begin with.
fn addresses(shown: &str) -> Vec<u64> {
    let lines = shown.lines().filter_map(|line| line.strip_prefix("=> 0x"));
    // A name may stand behind it.
    let digits = lines.map(|rest| rest.split([':', ' ']).next().unwrap());
    digits
        .map(|digits| u64::from_str_radix(digits, 16).unwrap())
        .collect()
}

#[test]
fn one_vcpu_steps_while_the_others_wait() {
    let place = Place::new();
    let (mut guest, _) = start_probe(&place, "-c 2");
    // A loop, until a key is hit.
    guest.console.send("spin");
    guest.console.expect("spin");
    let shown = place.ok("vmmctl --vm=guest0 --step=3");
    let steps = addresses(&shown);
    assert_eq!(steps.len(), 4, "{shown}");
    assert!(steps.windows(2).all(|two| two[0] != two[1]), "{shown}");
    assert!(shown.lines().all(|line| line.starts_with("=> ")), "{shown}");
    assert!(place.ok("vmmctl --list").contains("paused"));
    assert_eq!(rip(&place, 0), steps[3]);
    let other = rip(&place, 1);
    let shown = place.ok("vmmctl --vm=guest0 --step --json");
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["step"].as_array().unwrap().len(), 2, "{shown}");
    assert_eq!(rip(&place, 1), other);
    // One that waits has no next instruction; it is as it was.
    let waits = place.run("vmmctl --vm=guest0 --cpu=1 --step=5");
    assert_eq!(waits.status, Some(1), "{waits:?}");
    assert!(waits.errors.contains("vCPU 1 waits"), "{waits:?}");
    let none = place.run("vmmctl --vm=guest0 --cpu=2 --step");
    assert!(none.errors.contains("no vCPU 2"), "{none:?}");
    place.ok("vmmctl --vm=guest0 --resume");
    guest.console.send("");
    guest.console.expect("probe> ");
    assert_eq!(ask(&mut guest, "echo on"), "on\r\n");
    assert_eq!(ask(&mut guest, "smp"), ask(&mut guest, "smp"));
}

#[test]
fn a_guest_runs_until_it_comes_to_a_place() {
    let place = Place::new();
    let socket = place.path("gdb");
    let (mut guest, _) = start_probe(&place, &format!("-c 2 -G unix:{}", socket.display()));
    // A place in a loop, by the name that the loaded kernel has for it; the guest is there already.
    guest.console.send("spin");
    guest.console.expect("spin");
    place.ok("vmmctl --vm=guest0 --step=2");
    let trace = place.ok("vmmctl --vm=guest0 --bt");
    let innermost = trace.lines().find(|line| line.starts_with("#0")).unwrap();
    let name = innermost.split_whitespace().last().unwrap();
    let start = |to: &str| {
        place.ok("vmmctl --vm=guest0 --pause");
        Process::start(place.command(&format!("vmmctl --vm=guest0 --until={to}")))
    };
    let here = rip(&place, 0);
    for to in [name, &format!("{here:#x}")] {
        let there = start(to).wait();
        assert_eq!(there.status, Some(0), "{there:?}");
        assert!(there.output.starts_with("vcpu0:\n=> "), "{there:?}");
        assert_eq!(addresses(&there.output), [here]);
        assert_eq!(rip(&place, 0), here);
        assert!(place.ok("vmmctl --list").contains("paused"));
    }
    place.ok("vmmctl --vm=guest0 --resume");
    guest.console.send("");
    guest.console.expect("probe> ");

    // Nobody comes there: whoever has enough of waiting leaves the guest as it was.
    let mut waits = start("0x1234567");
    guest.console.send("echo go");
    guest.console.expect("go\r\nprobe> ");
    waits.signal(Signal::SIGINT);
    let left = waits.wait();
    assert_eq!(left.status, Some(1), "{left:?}");
    assert!(left.errors.contains("interrupted"), "{left:?}");
    assert!(left.errors.contains("paused, as before"), "{left:?}");
    place.ok("vmmctl --vm=guest0 --resume");
    assert_eq!(ask(&mut guest, "echo on"), "on\r\n");
    let nothing = place.run("vmmctl --vm=guest0 --until=no_such_function");
    assert_eq!(nothing.status, Some(1), "{nothing:?}");
    assert!(nothing.errors.contains("no_such_function"), "{nothing:?}");

    let nowhere = place.run("vmmctl --vm=guest0 --until=0xdeadbeefdeadbeef");
    assert_eq!(nowhere.status, Some(1), "{nowhere:?}");
    assert!(nowhere.errors.contains("not canonical"), "{nowhere:?}");

    // A debugger is not disturbed.
    let wire = UnixStream::connect(&socket).unwrap();
    crate::support::until("the debugger's stop", || {
        place.ok("vmmctl --list").contains("paused")
    });
    for option in ["--step", "--until=0x1000"] {
        let refused = place.run(&format!("vmmctl --vm=guest0 {option}"));
        assert_eq!(refused.status, Some(1), "{refused:?}");
        assert!(refused.errors.contains("debugger"), "{refused:?}");
    }
    drop(wire);
    assert_eq!(ask(&mut guest, "echo again"), "again\r\n");
    // A guest that ends on its way does not come there.
    let mut leads = start("0x1234567");
    guest.console.send("poweroff");
    let ended = leads.wait();
    assert_eq!(ended.status, Some(1), "{ended:?}");
    assert_eq!(guest.wait().status, Some(1));
}

#[test]
fn one_vcpu_is_suspended_while_the_others_run() {
    let place = Place::new();
    let (mut guest, _) = start_probe(&place, "-c 2");
    let mut client = Client::connect(&place.vm()).unwrap();
    client.suspend_cpu(0).unwrap();
    let shown = || place.ok("vmmctl --vm=guest0 --get-suspended-cpus");
    assert_eq!(shown(), "suspended cpus:\t 0\n");
    guest.console.send("echo late");
    let answer = guest.console.find("late", Duration::from_millis(500));
    assert_eq!(answer, None);
    assert!(place.ok("vmmctl --list").contains("running"));
    client.resume_cpu(0).unwrap();
    guest.console.expect("late\r\nprobe> ");
    assert_eq!(shown(), "suspended cpus:\t (none)\n");
    assert!(client.suspend_cpu(2).is_err());
}

#[test]
fn a_guest_is_suspended_to_another_name() {
    let place = Place::new();
    let (mut guest, _) = start_probe(&place, "");
    // bhyvectl's name for it makes a copy, and the guest goes on.
    place.ok("vmmctl --vm=guest0 --checkpoint=before");
    assert_eq!(ask(&mut guest, "echo on"), "on\r\n");
    let taken = place.run("vmmctl --vm=guest0 --suspend=before");
    assert_eq!(taken.status, Some(1), "{taken:?}");
    assert_eq!(ask(&mut guest, "echo still"), "still\r\n");
    place.ok("vmmctl --vm=guest0 --suspend=after");
    assert_eq!(guest.wait().status, Some(1));
    let mut guest = Process::start(place.command("rhyve after"));
    guest.console.send("echo again");
    guest.console.expect("again\r\nprobe> ");
}

#[test]
fn a_guests_own_breakpoint_is_its_own() {
    let place = Place::new();
    // 1: jmp 1b; int3, for which it has no handler.
    load_code(&place, b"\xeb\xfe\xcc");
    let mut guest = place.start("");
    place.ok(&format!(
        "vmmctl --vm=guest0 --pause --set-rip={:#x}",
        ENTRY + 2
    ));
    let leads = place.run("vmmctl --vm=guest0 --until=0x1234567");
    assert_eq!(leads.status, Some(1), "{leads:?}");
    let ended = guest.wait();
    assert_eq!(ended.status, Some(3), "{ended:?}");
}
