//! Suspended in the middle, and run again as if nothing had been.

use serde_json::Value;
use vmm_api::state::Phase;

use crate::guests::{ask, start_probe};
use crate::support::{Place, Process, VM};

/// Runs a suspended VM with what it was run with.
fn again(place: &Place) -> Process {
    Process::start(place.command(&format!("rhyve {VM}")))
}

/// Suspends it; its process ends as after a power-off.
fn suspend(place: &Place, guest: &mut Process) {
    place.ok("vmmctl --vm=guest0 --suspend");
    let ended = guest.wait();
    assert_eq!(ended.status, Some(1), "{ended:?}");
    assert!(ended.errors.contains("suspended"), "{ended:?}");
    assert_eq!(place.state().phase, Phase::Suspended);
}

#[test]
fn a_suspended_machine_goes_on() {
    let place = Place::new();
    let disk = place.path("disk");
    std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let options = format!("-c 2 -s 2,virtio-blk,{} -s 3,virtio-rnd", disk.display());
    let (mut guest, _) = start_probe(&place, &options);
    let before = ask(&mut guest, "in 0x71 1");
    for round in 0..3 {
        suspend(&place, &mut guest);
        // A stored state can be looked at, and changed, like any other.
        let all = place.ok("vmmctl --vm=guest0 --cpu=1 --get-all");
        assert!(all.contains("rip[1]\t0x"), "{all}");
        place.ok("vmmctl --vm=guest0 --set-dr3=0x1234");
        guest = again(&place);
        let told = format!("round {round}");
        assert_eq!(
            ask(&mut guest, &format!("echo {told}")),
            format!("{told}\r\n")
        );
        let dr3 = place.ok("vmmctl --vm=guest0 --get-dr3");
        assert!(dr3.contains("1234"), "{dr3}");
    }
    assert_eq!(ask(&mut guest, "in 0x71 1").len(), before.len());

    // In the midst of work, on both CPUs.
    guest.console.send("spin all");
    guest.console.expect("\n");
    suspend(&place, &mut guest);
    guest = again(&place);
    guest.console.send("");
    guest.console.expect("spin ok");
    guest.console.expect("probe> ");
    guest.console.send("poweroff");
    assert_eq!(guest.wait().status, Some(1));
    assert!(place.state().devices.keys().eq(["rtc"]));
}

#[test]
fn what_is_not_what_was_suspended_is_refused_untouched() {
    let place = Place::new();
    let (mut guest, _) = start_probe(&place, "-c 2 -s 3,virtio-rnd");
    suspend(&place, &mut guest);
    let file = place.vm().path().join("vm.json");
    let whole = std::fs::read(&file).unwrap();
    let memory = std::fs::read(place.vm().path().join("mem")).unwrap();
    let refused = |what: &str, options: &str, said: &str| {
        let ended = place.run(&format!("rhyve {options} {VM}"));
        assert_eq!(ended.status, Some(4), "{what}: {ended:?}");
        assert!(ended.errors.contains(said), "{what}: {ended:?}");
        let after = std::fs::read(place.vm().path().join("mem")).unwrap();
        assert!(after == memory, "{what}: memory was touched");
    };
    for options in [
        "-c 2",
        "-c 1 -s 3,virtio-rnd",
        "-c 2 -s 3,virtio-rnd -l com2,pty",
    ] {
        refused(options, options, "run it with the options it had");
        assert!(std::fs::read(&file).unwrap() == whole, "{options}");
    }
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 4;
    std::fs::write(&file, &flipped).unwrap();
    refused("flipped", "", "damaged");
    std::fs::write(&file, &whole[..middle]).unwrap();
    refused("truncated", "", "damaged");
    let text = String::from_utf8(whole.clone()).unwrap();
    let newer = text.replacen("\"version\": 1", "\"version\": 9", 1);
    std::fs::write(&file, newer).unwrap();
    refused("newer", "", "version 9, this rhyve reads 1-1");
    // One device's state of a newer rhyve, in a file that is whole.
    let mut state: vmm_api::state::VmState = serde_json::from_slice(&whole).unwrap();
    state.devices.get_mut("pm").unwrap().version = 2;
    std::fs::write(&file, state.to_json().unwrap()).unwrap();
    refused(
        "newer device",
        "",
        "pm: version 2 of its state, this rhyve reads 1-1",
    );
    state.devices.get_mut("pm").unwrap().version = 1;
    state.devices.get_mut("pm").unwrap().data = Value::Null;
    std::fs::write(&file, state.to_json().unwrap()).unwrap();
    refused("damaged device", "", "pm cannot go on");
    std::fs::write(&file, &whole).unwrap();
    guest = again(&place);
    assert_eq!(ask(&mut guest, "echo on"), "on\r\n");
}
