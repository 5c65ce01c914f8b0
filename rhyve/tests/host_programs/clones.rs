//! Snapshots of a machine that runs, and clones that share its memory.

use std::ops::Range;
use std::path::Path;

use nix::sys::signal::Signal;
use vmm_api::root::Root;
use vmm_api::state::{Phase, StopReason, VmState};
use vmm_api::vm::Vm;

use crate::disks::{disk, holds, qemu_img};
use crate::guests::{ask, load, probe};
use crate::support::{Place, Process};

/// Something large that the guest has and does not write to.
const INITRD: usize = 24 << 20;

fn state(place: &Place, name: &str) -> VmState {
    let root = Root::open_at(&place.path("root")).unwrap();
    let vm = Vm::open(&root, &name.parse().unwrap()).unwrap();
    vm.load_state().unwrap()
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
    assert!(
        running.errors.contains("guest0 runs: clone a copy of it"),
        "{running:?}"
    );

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
        .map(|(name, clone)| place.own_memory(name, clone))
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

/// Has the probe's driver do something, which has to succeed.
fn blk(guest: &mut Process, commands: &[&str]) {
    for command in commands {
        let answer = ask(guest, &format!("blk {command}"));
        assert!(answer.contains(" ok"), "{command}: {answer}");
    }
}

/// The sectors of a qcow2 image, with those of the files below it; whether all of these hold what the
/// probe writes for their seeds.
fn layered(place: &Place, image: &Path, sectors: &[(Range<u64>, u64)]) -> bool {
    qemu_img(&["check", "-q"], &[image], "");
    let raw = place.path("flat");
    qemu_img(&["convert", "-O", "raw"], &[image, &raw], "");
    all_hold(&raw, sectors)
}

fn all_hold(raw: &Path, sectors: &[(Range<u64>, u64)]) -> bool {
    let mut sectors = sectors.iter().cloned();
    sectors.all(|(mut numbers, seed)| numbers.all(|number| holds(raw, number, seed)))
}

#[test]
fn each_copy_writes_to_a_disk_of_its_own() {
    let place = Place::new();
    let kernel = probe(&place);
    let image = disk(&place, "disk.img");
    let file = |of: &str| place.path(&format!("disk.img.{of}"));
    let options = format!("-s 2,virtio-blk,{},aio=io_uring", image.display());
    load(&place, "-m 64M", &kernel);
    let mut guest = place.start(&options);
    guest.console.expect("probe> ");
    blk(&mut guest, &["modern 0", "write 100 8 1"]);
    place.ok("vmmctl --vm=guest0 --snapshot=snap");
    blk(&mut guest, &["write 104 8 2", "read 100 4 1"]);

    // Two that write different things, while the first one runs.
    let start = |vm: &str| Process::start(place.command(&format!("rhyve {vm}")));
    let mut clones = ["one", "two"].map(|vm| {
        place.ok(&format!("vmmctl --vm=snap --clone={vm}"));
        start(vm)
    });
    for (clone, seed) in clones.iter_mut().zip([3, 4]) {
        blk(clone, &["read 100 8 1", &format!("write 102 4 {seed}")]);
    }
    blk(&mut guest, &["read 104 8 2"]);
    for (clone, seed) in clones.iter_mut().zip([3, 4]) {
        let own = format!("read 102 4 {seed}");
        blk(clone, &[&own, "read 100 2 1", "read 106 2 1", "flush"]);
    }
    // Of a clone that runs, and of one that is suspended.
    place.ok("vmmctl --vm=two --snapshot=later");
    place.ok("vmmctl --vm=one --suspend --clone=three");
    assert_eq!(clones[0].wait().status, Some(1));
    blk(&mut clones[1], &["write 100 1 5"]);

    // Nobody needs what it was made of.
    place.ok("vmmctl --vm=snap --destroy");
    assert!(!file("snap").exists() && !file("snap.base").exists());
    for (vm, seed) in [("three", 3), ("later", 4)] {
        let mut copy = start(vm);
        let own = format!("read 102 4 {seed}");
        blk(&mut copy, &[&own, "read 100 2 1", "write 1000 300 6"]);
        copy.console.send("poweroff");
        assert_eq!(copy.wait().status, Some(1));
    }
    // By options, a copy has its own disk for the image all the same.
    let run = format!("rhyve -l com1,stdio {options} one");
    let mut again = Process::start(place.command(&run));
    blk(&mut again, &["read 102 4 3"]);
    let id = |guest: &mut Process| ask(guest, "blk id");
    assert_eq!(id(&mut again), id(&mut guest));
    for guest in [&mut again, &mut clones[1], &mut guest] {
        guest.console.send("poweroff");
        assert_eq!(guest.wait().status, Some(1));
    }
    // Also when it is loaded anew.
    load_as(&place, &kernel, "one");
    let mut again = Process::start(place.command(&run));
    again.console.expect("probe> ");
    blk(&mut again, &["modern 0", "read 102 4 3"]);
    again.console.send("poweroff");
    assert_eq!(again.wait().status, Some(1));

    assert!(all_hold(&image, &[(100..104, 1), (104..112, 2)]));
    for (vm, own) in [
        ("one", [(100..102, 1), (102..106, 3), (106..108, 1)]),
        ("two", [(100..101, 5), (102..106, 4), (106..108, 1)]),
        ("three", [(100..102, 1), (102..106, 3), (1000..1300, 6)]),
        ("later", [(100..102, 1), (102..106, 4), (1000..1300, 6)]),
    ] {
        assert!(layered(&place, &file(vm), &own), "{vm}");
        place.ok(&format!("vmmctl --vm={vm} --destroy"));
        assert!(!file(vm).exists() && !file(&format!("{vm}.base")).exists());
    }
}

#[test]
fn a_qcow2_image_is_copied_with_what_is_below_it() {
    let place = Place::new();
    let kernel = probe(&place);
    disk(&place, "below");
    let image = place.path("disk.qcow2");
    let over = "create -q -f qcow2 -F raw -b below";
    qemu_img(&over.split(' ').collect::<Vec<_>>(), &[&image], "1M");
    load(&place, "-m 64M", &kernel);
    let mut guest = place.start(&format!("-s 2,virtio-blk,{}", image.display()));
    guest.console.expect("probe> ");
    blk(&mut guest, &["modern 0", "write 100 300 1"]);
    place.ok("vmmctl --vm=guest0 --snapshot=snap");
    blk(&mut guest, &["write 104 300 2"]);
    let mut snap = Process::start(place.command("rhyve snap"));
    blk(&mut snap, &["read 100 300 1", "write 0 8 3"]);
    for guest in [&mut guest, &mut snap] {
        guest.console.send("poweroff");
        assert_eq!(guest.wait().status, Some(1));
    }
    assert!(layered(&place, &image, &[(100..104, 1), (104..404, 2)]));
    let snap = place.path("disk.qcow2.snap");
    assert!(layered(&place, &snap, &[(0..8, 3), (100..400, 1)]));
}

#[test]
fn a_disk_that_cannot_be_copied_is_told() {
    let place = Place::new();
    let kernel = probe(&place);
    let image = disk(&place, "disk.img");
    let refused = |option: &str, why: &str| {
        let ended = place.run(&format!("vmmctl --vm=guest0 {option}"));
        assert_eq!(ended.status, Some(1), "{ended:?}");
        assert!(ended.errors.contains(why), "{ended:?}");
        assert!(!place.path("root/snap").exists());
    };
    // What is in the way stays.
    load(&place, "-m 64M", &kernel);
    let mut guest = place.start(&format!("-s 2,virtio-blk,{}", image.display()));
    guest.console.expect("probe> ");
    for in_the_way in ["disk.img.snap", "disk.img.snap.base"] {
        std::fs::write(place.path(in_the_way), "precious").unwrap();
        refused("--snapshot=snap", "File exists");
        let kept = std::fs::read_to_string(place.path(in_the_way)).unwrap();
        assert_eq!(kept, "precious");
        std::fs::remove_file(place.path(in_the_way)).unwrap();
    }
    // An image that somebody writes to.
    place.ok("vmmctl --vm=guest0 --suspend");
    guest.wait();
    load_as(&place, &kernel, "other");
    let other = format!("-s 2,virtio-blk,{} -l com1,stdio other", image.display());
    let mut other = Process::start(place.command(&format!("rhyve {other}")));
    other.console.expect("probe> ");
    for option in ["--snapshot=snap", "--clone=snap"] {
        refused(option, "has this disk image open for writing");
        assert!(!place.path("disk.img.snap").exists());
    }
    drop(other);

    // Writes that are in memory only are not there for another process.
    load(&place, "-m 64M", &kernel);
    let mut guest = place.start(&format!("-s 2,virtio-blk,{},snapshot", image.display()));
    guest.console.expect("probe> ");
    blk(&mut guest, &["modern 0"]);
    place.ok("vmmctl --vm=guest0 --snapshot=untouched");
    blk(&mut guest, &["write 7 1 7"]);
    for option in ["--snapshot=snap", "--suspend"] {
        refused(option, "is in memory and ends with this process");
    }
    blk(&mut guest, &["read 7 1 7"]);
    guest.console.send("poweroff");
    assert_eq!(guest.wait().status, Some(1));
}

/// Loads the probe into a VM beside the first.
fn load_as(place: &Place, kernel: &Path, name: &str) {
    let mut load = place.command("rhyveload -m 64M --kernel");
    load.arg(kernel).arg(name);
    assert_eq!(Process::start(load).wait().status, Some(0));
}
