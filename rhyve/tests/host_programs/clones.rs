//! Snapshots of a machine that runs, and clones that share its memory.

use std::os::unix::fs::MetadataExt;

use nix::sys::signal::Signal;
use vmm_api::root::Root;
use vmm_api::state::{Phase, StopReason, VmState};
use vmm_api::vm::Vm;

use crate::guests::{ask, load, probe};
use crate::support::{Place, Process};

/// Something large that the guest has and does not write to.
const INITRD: usize = 24 << 20;

fn state(place: &Place, name: &str) -> VmState {
    let root = Root::open_at(&place.path("root")).unwrap();
    let vm = Vm::open(&root, &name.parse().unwrap()).unwrap();
    vm.load_state().unwrap()
}

/// Bytes that a clone has for itself: pages of its process, and of its file.
fn own(place: &Place, name: &str, clone: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", clone.pid())).unwrap();
    let anonymous = status.lines().find_map(|line| {
        let kib = line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB")?;
        kib.parse::<u64>().ok()
    });
    let file = std::fs::metadata(place.path("root").join(name).join("mem")).unwrap();
    anonymous.unwrap() * 1024 + file.blocks() * 512
}

#[test]
fn ten_clones_of_one_guest_run_at_once() {
    let place = Place::new();
    let kernel = probe(&place);
    let initrd = place.path("initrd");
    std::fs::write(&initrd, vec![0x5a; INITRD]).unwrap();
    let options = format!("-m 64M --initrd {}", initrd.display());
    load(&place, &options, &kernel);
    let mut guest = place.start("-c 2");
    guest.console.expect("probe> ");

    // Of a machine that runs, which goes on.
    place.ok("vmmctl --vm=guest0 --snapshot=snap");
    assert_eq!(state(&place, "snap").phase, Phase::Suspended);
    assert_eq!(ask(&mut guest, "echo the first"), "the first\r\n");
    let again = place.run("vmmctl --vm=guest0 --snapshot=snap");
    assert_eq!(again.status, Some(1));
    assert!(again.errors.contains("File exists"), "{again:?}");
    // One that runs has no settled memory to share.
    let running = place.run("vmmctl --vm=guest0 --clone=clone");
    assert!(running.errors.contains("is in use by rhyve"), "{running:?}");

    let names: Vec<String> = (0..10).map(|n| format!("clone{n}")).collect();
    let mut clones: Vec<Process> = Vec::new();
    for name in &names {
        place.ok(&format!("vmmctl --vm=snap --clone={name}"));
        clones.push(Process::start(place.command(&format!("rhyve {name}"))));
    }
    for (name, clone) in names.iter().zip(&mut clones) {
        assert_eq!(ask(clone, &format!("echo {name}")), format!("{name}\r\n"));
    }
    assert_eq!(ask(&mut guest, "echo still there"), "still there\r\n");
    let all: u64 = names
        .iter()
        .zip(&clones)
        .map(|(name, clone)| own(&place, name, clone))
        .sum();
    let ten_times = 10 * INITRD as u64;
    assert!(all < ten_times / 2, "{all} bytes of {ten_times}");

    // What one writes is seen in it, and in no other.
    let holds = |name: &str, typed: &str| {
        let core = place.path("core");
        place.ok(&format!("vmmctl --vm={name} --core={}", core.display()));
        let bytes = std::fs::read(&core).unwrap();
        std::fs::remove_file(&core).unwrap();
        bytes.windows(typed.len()).any(|w| w == typed.as_bytes())
    };
    assert!(holds("clone3", "echo clone3"));
    assert!(!holds("clone3", "echo clone4"));
    assert!(!holds("clone4", "echo clone3"));

    // It is a machine like any other: suspended, and itself cloned.
    place.ok("vmmctl --vm=clone0 --suspend --clone=grandchild");
    assert_eq!(clones[0].wait().status, Some(1));
    for name in ["clone0", "grandchild"] {
        let mut again = Process::start(place.command(&format!("rhyve {name}")));
        assert_eq!(ask(&mut again, "echo again"), "again\r\n");
        again.console.send("poweroff");
        assert_eq!(again.wait().status, Some(1));
    }
    // They outlive what they were made of, and each other.
    place.ok("vmmctl --vm=snap --destroy");
    clones[1].signal(Signal::SIGKILL);
    clones[1].wait();
    let killed = state(&place, "clone1").phase;
    assert!(matches!(
        killed,
        Phase::Stopped {
            reason: StopReason::Killed,
            ..
        }
    ));
    place.ok("vmmctl --vm=clone1 --get-all");
    place.ok("vmmctl --vm=clone1 --destroy");
    assert_eq!(ask(&mut clones[2], "echo alone"), "alone\r\n");
    clones[2].console.send("poweroff");
    assert_eq!(clones[2].wait().status, Some(1));
    // And what was loaded anew shares nothing.
    let mut load = place.command("rhyveload -m 32M --kernel");
    load.arg(&kernel).arg("clone2");
    assert_eq!(Process::start(load).wait().status, Some(0));
    assert!(!place.path("root/clone2/base").exists());
}

#[test]
fn disks_that_are_written_to_are_not_copied() {
    let place = Place::new();
    let kernel = probe(&place);
    let image = place.path("disk.img");
    std::fs::write(&image, [0; 1 << 20]).unwrap();
    for (mode, works) in [("", false), (",ro", true)] {
        load(&place, "-m 64M", &kernel);
        let mut guest = place.start(&format!("-s 2,virtio-blk,{}{mode}", image.display()));
        guest.console.expect("probe> ");
        let snapshot = place.run("vmmctl --vm=guest0 --snapshot=snap");
        assert_eq!(snapshot.status == Some(0), works, "{snapshot:?}");
        assert_eq!(snapshot.errors.contains("disk"), !works, "{snapshot:?}");
        place.ok("vmmctl --vm=guest0 --suspend");
        guest.wait();
        let clone = place.run("vmmctl --vm=guest0 --clone=clone");
        assert_eq!(clone.status == Some(0), works, "{clone:?}");
        assert_eq!(clone.errors.contains("disk"), !works, "{clone:?}");
    }
    let mut clone = Process::start(place.command("rhyve clone"));
    assert_eq!(ask(&mut clone, "echo shares a disk"), "shares a disk\r\n");
}
