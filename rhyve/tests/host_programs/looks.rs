//! vmmctl on a VM that is loaded, runs, and has ended.

use serde_json::Value;

use crate::guests::{ENTRY, ask, load_code, start_probe};
use crate::support::{Place, until};

/// The number in `name[0]<tab>0x...`.
fn number(text: &str, name: &str) -> u64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name}[0]\t0x")));
    let digits = line.unwrap_or_else(|| panic!("no {name}: {text}"));
    u64::from_str_radix(digits, 16).unwrap()
}

fn list(place: &Place) -> Value {
    serde_json::from_str(&place.ok("vmmctl --list --json")).unwrap()
}

#[test]
fn registers_are_shown_before_during_and_after() {
    let place = Place::new();
    // mov ebx, 0xfeedface; 1: in al, 0x71; test al, al; jmp 1b
    load_code(&place, b"\xbb\xce\xfa\xed\xfe\xe4\x71\x84\xc0\xeb\xfa");
    let all = place.ok("vmmctl --vm=guest0 --cpu=0 --get-all");
    assert_eq!((number(&all, "rip"), number(&all, "rbx")), (ENTRY, 0));

    let mut guest = place.start("");
    let running = || {
        let text = place.ok("vmmctl --vm=guest0 --cpu=0 --get-rip --get-rbx");
        (number(&text, "rip"), number(&text, "rbx"))
    };
    until("it runs", || running().1 != 0);
    for _ in 0..5 {
        // Between two instructions, never within an access.
        let (rip, rbx) = running();
        assert_eq!(rbx, 0xfeed_face);
        assert!([ENTRY + 5, ENTRY + 7, ENTRY + 9].contains(&rip), "{rip:#x}");
    }
    // What is set is what goes on.
    place.ok("vmmctl --vm=guest0 --set-rsp=0x123450");
    let stats = place.ok("vmmctl --vm=guest0 --get-stats");
    assert!(
        stats.contains("number of times in/out was intercepted"),
        "{stats}"
    );

    guest.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(guest.wait().status, Some(1));
    let all = place.ok("vmmctl --vm=guest0 --cpu=0 --get-all");
    assert_eq!(
        (number(&all, "rbx"), number(&all, "rsp")),
        (0xfeed_face, 0x12_3450)
    );
}

#[test]
fn every_vcpu_can_be_looked_at() {
    let place = Place::new();
    let (mut guest, _) = start_probe(&place, "-c 2");
    for cpu in 0..2 {
        let text = place.ok(&format!("vmmctl --vm=guest0 --cpu={cpu} --get-all"));
        assert!(text.contains(&format!("rip[{cpu}]\t0x")), "{text}");
        assert!(text.contains(&format!("cr3[{cpu}]\t0x")), "{text}");
    }
    let none = place.run("vmmctl --vm=guest0 --cpu=2 --get-rip");
    assert_eq!(none.status, Some(1), "{none:?}");
    assert!(none.errors.contains("2"), "{none:?}");
    guest.console.send("hlt");
    guest.wait();
    let ended = place.ok("vmmctl --vm=guest0 --cpu=1 --get-rip");
    assert_ne!(ended, "rip[1]\t0x0000000000000000\n");
}

#[test]
fn the_list_knows_what_runs() {
    let place = Place::new();
    assert_eq!(list(&place), serde_json::json!([]));
    let (mut guest, _) = start_probe(&place, "-c 2");
    let all = list(&place);
    assert_eq!(all.as_array().map(Vec::len), Some(1), "{all}");
    let vm = &all[0];
    let text = vm.to_string();
    assert_eq!(vm["name"], "guest0", "{text}");
    assert_eq!(vm["vcpus"], 2, "{text}");
    assert_eq!(vm["phase"], "running", "{text}");
    place.ok("vmmctl --vm=guest0 --pause");
    assert_eq!(list(&place)[0]["phase"], "paused");
    place.ok("vmmctl --vm=guest0 --resume");
    assert_eq!(ask(&mut guest, "echo on"), "on\r\n");
    place.ok("vmmctl --vm=guest0 --force-poweroff");
    assert_eq!(guest.wait().status, Some(1));
    assert_eq!(list(&place)[0]["phase"], "stopped (stopped from outside)");
}
