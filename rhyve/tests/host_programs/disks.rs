//! virtio-blk under the probe kernel's own driver, which runs on any KVM.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;

use crate::guests::{ask, load, probe, start_probe};
use crate::support::{Place, Process};

/// Sectors of the disks.
const SECTORS: u64 = 2048;

pub fn disk(place: &Place, name: &str) -> PathBuf {
    let path = place.path(name);
    File::create(&path).unwrap().set_len(SECTORS * 512).unwrap();
    path
}

/// What the probe writes (guests/probe/blk.rs).
fn sector(seed: u64, sector: u64) -> Vec<u8> {
    let words =
        (0..128u32).map(|at| (seed as u32).wrapping_mul(0x9e37_79b9) ^ (sector as u32) << 8 ^ at);
    words.flat_map(u32::to_le_bytes).collect()
}

pub fn holds(image: &Path, number: u64, seed: u64) -> bool {
    let mut found = [0; 512];
    let file = File::open(image).unwrap();
    file.read_exact_at(&mut found, number * 512).unwrap();
    found[..] == sector(seed, number)[..]
}

#[test]
fn both_interfaces_serve_a_driver_one_after_the_other() {
    let place = Place::new();
    let [both, old, new] = ["both", "old", "new"].map(|name| disk(&place, name));
    let options = format!(
        "-s 3,virtio-blk,{},ser=BOTH -s 4,virtio-rnd -s 4:1,virtio-blk,{},virtio=legacy \
         -s 0:5:0,virtio-blk,{},virtio=modern,aio=io_uring -s 31,lpc",
        both.display(),
        old.display(),
        new.display()
    );
    let (mut guest, _) = start_probe(&place, &options);
    let functions = ask(&mut guest, "pci");
    let isa = "probe: pci 0:31:0 0x70008086 class 0x60100";
    assert!(functions.contains(isa), "{functions}");
    let mut check = |command: &str, answer: &str| {
        let found = ask(&mut guest, command);
        let answer = format!("probe: blk {answer}");
        assert!(found.contains(&answer), "{command}: {found}");
    };
    // The same disk by each of its interfaces, twice.
    for (round, kind) in ["legacy", "modern", "legacy", "modern"].iter().enumerate() {
        check(&format!("blk {kind} 0"), &format!("{kind} sectors 2048"));
        check("blk id", "id BOTH ok");
        if round > 0 {
            check(&format!("blk read 100 8 {round}"), "read 8 ok");
        }
        check(&format!("blk write 100 8 {}", round + 1), "write 8 ok");
        check("blk flush", "flush ok");
    }
    check("blk read 100 8 9", "read FAILED (sector 100 differs)");
    check("blk write 2048 1 1", "FAILED (I/O error)");
    // A function that is not the first of its device, and each of those that have one interface.
    check("blk modern 1", "FAILED (no modern registers)");
    check("blk legacy 1", "legacy sectors 2048");
    check("blk write 2047 1 7", "write 1 ok");
    check("blk read 2047 1 7", "read 1 ok");
    check("blk legacy 2", "FAILED (no legacy registers)");
    check("blk modern 2", "modern sectors 2048");
    check("blk write 0 300 8", "write 300 ok");
    check("blk read 0 300 8", "read 300 ok");
    check("blk modern 3", "FAILED (no such device)");
    guest.console.send("poweroff");
    assert_eq!(guest.wait().status, Some(1));
    assert!((100..108).all(|number| holds(&both, number, 4)));
    assert!(holds(&old, 2047, 7));
    assert!((0..300).all(|number| holds(&new, number, 8)));
}

#[test]
fn on_another_bus_a_single_message_tells_of_each_answer() {
    let place = Place::new();
    let path = disk(&place, "disk.img");
    // The disk is on a bus of its own, whose root has other addresses.
    let options = format!("-W -s 3,virtio-rnd -s 40:3:0,virtio-blk,{}", path.display());
    let (mut guest, _) = start_probe(&place, &options);
    let functions = ask(&mut guest, "pci");
    assert!(
        functions.contains("probe: pci 40:3:0 0x10011af4"),
        "{functions}"
    );
    for kind in ["legacy", "modern"] {
        ask(&mut guest, &format!("blk {kind}"));
        let written = ask(&mut guest, "blk write 0 20 1");
        assert!(written.contains("write 20 ok"), "{kind}: {written}");
        let devices = place.ok("vmmctl --vm=guest0 --get-devices --json");
        assert!(devices.contains(r#""interrupts": "msi""#), "{devices}");
        assert!(devices.contains(r#""slot": "40:3:0""#), "{devices}");
    }
    guest.console.send("poweroff");
    assert_eq!(guest.wait().status, Some(1));
}

#[test]
fn a_file_that_shrinks_under_the_guest_is_its_io_error() {
    for engine in ["threads", "io_uring"] {
        let place = Place::new();
        let path = disk(&place, "disk.img");
        let run = format!("-s 2,virtio-blk,{},aio={engine}", path.display());
        let (mut guest, _) = start_probe(&place, &run);
        let shown = format!("disk.img: 1MB (2048 512 byte sectors), {engine}\n");
        guest.errors.expect(&shown);
        let mut check = |command: &str, answer: &str| {
            let found = ask(&mut guest, command);
            assert!(found.contains(answer), "{engine}, {command}: {found}");
        };
        check("blk modern", "sectors 2048");
        check("blk write 0 8 1", "write 8 ok");
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(4 * 512).unwrap();
        check("blk read 4 1 1", "FAILED (I/O error)");
        check("blk read 0 4 1", "read 4 ok");
        // A write makes the file longer again.
        check("blk write 7 1 1", "write 1 ok");
        check("blk read 7 1 1", "read 1 ok");
        check("blk flush", "flush ok");
        let devices = place.ok("vmmctl --vm=guest0 --get-devices");
        assert!(devices.contains("1 host errors"), "{devices}");
        guest.console.send("poweroff");
        let ended = guest.wait();
        assert_eq!(ended.status, Some(1));
        assert!(ended.errors.contains("disk.img: read: "), "{ended:?}");
    }
}

#[test]
fn an_image_that_a_vm_writes_is_nobody_elses() {
    let place = Place::new();
    let path = disk(&place, "disk.img");
    let shown = path.display();
    let (mut guest, _) = start_probe(&place, &format!("-s 2,virtio-blk,{shown}"));
    let mut load = place.command("rhyveload -m 16M --kernel");
    load.arg(probe(&place)).arg("guest1");
    assert_eq!(Process::start(load).wait().status, Some(0));
    for options in ["", ",ro", ",snapshot"] {
        let refused = place.run(&format!("rhyve -s 2,virtio-blk,{shown}{options} guest1"));
        assert_eq!(refused.status, Some(4), "{options}: {refused:?}");
        let why = format!("rhyve: disk image {shown} is in use: another VM or program has it open");
        assert!(refused.errors.contains(&why), "{options}: {refused:?}");
    }
    // QEMU's programs take locks of the same kind.
    let mut other = Command::new("qemu-io");
    other.args(["-f", "raw", "-c", "write 0 512"]).arg(&path);
    let other = other
        .output()
        .expect("qemu-io of Debian's package qemu-utils");
    let errors = String::from_utf8_lossy(&other.stderr);
    assert!(errors.contains("lock"), "{errors}");
    guest.console.send("poweroff");
    assert_eq!(guest.wait().status, Some(1));
    assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn disks_of_each_kind_become_larger_or_say_why_not() {
    let place = Place::new();
    let [raw, base, thrown] = ["raw", "base", "thrown"].map(|name| disk(&place, name));
    let over = place.path("over.qcow2");
    let backing = format!("backing_file={},backing_fmt=raw", base.display());
    qemu_img(
        &["create", "-q", "-f", "qcow2", "-o", &backing],
        &[&over],
        "1M",
    );
    let run = format!(
        "-s 2,virtio-blk,{} -s 3,virtio-blk,{} -s 4,virtio-blk,{},snapshot -s 5,virtio-rnd",
        raw.display(),
        over.display(),
        thrown.display()
    );
    let (mut guest, _) = start_probe(&place, &run);
    for (slot, number) in [(2, 0), (3, 1)] {
        place.ok(&format!("vmmctl --vm=guest0 --set-disk={slot}=2M"));
        for (command, answer) in [
            (format!("modern {number}"), "sectors 4096"),
            (format!("write 4000 90 {slot}"), "write 90 ok"),
            (format!("read 4000 90 {slot}"), "read 90 ok"),
            ("flush".into(), "flush ok"),
        ] {
            let found = ask(&mut guest, &format!("blk {command}"));
            assert!(found.contains(answer), "{slot}: {command}: {found}");
        }
    }
    for (change, why) in [
        (
            "2=1M",
            "a disk only grows, by whole blocks: it has 2097152 bytes in blocks of 512",
        ),
        ("4=2M", "another size of this disk than 1048576 bytes"),
        ("5=2M", "there is no disk at 0:5:0: see --get-devices"),
    ] {
        let refused = place.run(&format!("vmmctl --vm=guest0 --set-disk={change}"));
        assert!(refused.errors.contains(why), "{change}: {refused:?}");
    }
    // What is thrown away is, and what an image is based on stays as it was.
    for (command, answer) in [
        ("modern 2", "ok"),
        ("write 0 9 1", "ok"),
        ("read 0 9 1", "ok"),
    ] {
        let found = ask(&mut guest, &format!("blk {command}"));
        assert!(
            found.contains(answer) && !found.contains("FAILED"),
            "{command}: {found}"
        );
    }
    guest.console.send("poweroff");
    assert_eq!(guest.wait().status, Some(1));
    assert_eq!(raw.metadata().unwrap().len(), 2 << 20);
    assert!(holds(&raw, 4089, 2));
    for untouched in [&base, &thrown] {
        let bytes = std::fs::read(untouched).unwrap();
        assert!(bytes.len() == 1 << 20 && bytes.iter().all(|byte| *byte == 0));
    }
    qemu_img(&["check", "-q"], &[&over], "");
    let flat = place.path("flat");
    qemu_img(&["convert", "-O", "raw"], &[&over, &flat], "");
    assert!(holds(&flat, 4089, 3));
}

#[test]
fn what_a_guest_discards_goes_back_to_the_host() {
    let place = Place::new();
    let raw = disk(&place, "raw");
    let qcow2 = |name: &str, version: &str| {
        let path = place.path(name);
        let version = format!("compat={version}");
        qemu_img(
            &["create", "-q", "-f", "qcow2", "-o", &version],
            &[&path],
            "1M",
        );
        path
    };
    let (new, old) = (qcow2("new.qcow2", "1.1"), qcow2("old.qcow2", "0.10"));
    // What a snapshot in the image has is the snapshot's as well.
    let kept = qcow2("kept.qcow2", "1.1");
    let images = [&raw, &new, &old, &kept];
    let shown = images.map(|image| image.display().to_string());
    let disks = (2..).zip(&shown);
    let disks = disks.map(|(slot, path)| format!("-s {slot},virtio-blk,{path} "));
    let run: String = disks.collect();
    let work = |commands: &[&str]| {
        let (mut guest, _) = start_probe(&place, &run);
        for number in 0..images.len() {
            ask(&mut guest, &format!("blk modern {number}"));
            for command in commands.iter().chain(&["flush"]) {
                let done = ask(&mut guest, &format!("blk {command}"));
                let verb = command.split(' ').next().unwrap();
                assert!(
                    done.contains(&format!("blk {verb} ")) && done.contains("ok"),
                    "{number}: {done}"
                );
                assert!(!done.contains("FAILED"), "{number}, {command}: {done}");
            }
        }
        guest.console.send("poweroff");
        assert_eq!(guest.wait().status, Some(1));
        images.map(|image| image.metadata().unwrap().blocks())
    };
    let full = work(&["write 0 1000 1"]);
    qemu_img(&["snapshot", "-c", "before"], &[&kept], "");
    // Clusters of 128 sectors, and one that is given back in part.
    let less = work(&[
        "discard 128 300",
        "zero 512 128",
        "read 0 128 1",
        "read 640 300 1",
    ]);
    assert!(
        less[0] < full[0] && less[1] < full[1] && less[2] < full[2],
        "{full:?}, {less:?}"
    );
    for (image, format) in images.into_iter().zip(["raw", "qcow2", "qcow2", "qcow2"]) {
        if format == "qcow2" {
            qemu_img(&["check", "-q"], &[image], "");
        }
        let flat = place.path("flat");
        qemu_img(&["convert", "-f", format, "-O", "raw"], &[image, &flat], "");
        assert!(
            (0..128)
                .chain(428..512)
                .chain(640..1000)
                .all(|number| holds(&flat, number, 1))
        );
        let bytes = std::fs::read(&flat).unwrap();
        assert!(bytes[512 * 512..640 * 512].iter().all(|byte| *byte == 0));
    }
    qemu_img(&["snapshot", "-a", "before"], &[&kept], "");
    let flat = place.path("flat");
    qemu_img(&["convert", "-O", "raw"], &[&kept, &flat], "");
    assert!((0..1000).all(|number| holds(&flat, number, 1)));
}

#[test]
fn what_a_flush_returned_for_is_in_the_image_after_kill_9() {
    let place = Place::new();
    let kernel = probe(&place);
    for round in 0..20 {
        // Raw and qcow2, by threads and by io_uring.
        let (name, options) = [
            ("disk.img", ""),
            ("disk.qcow2", ""),
            ("disk.img", ",aio=io_uring,virtio=modern"),
            ("disk.qcow2", ",virtio=legacy"),
        ][round % 4];
        let path = place.path(name);
        let _ = std::fs::remove_file(&path);
        if name.ends_with("qcow2") {
            qemu_img(&["create", "-q", "-f", "qcow2"], &[&path], "1M");
        } else {
            disk(&place, name);
        }
        load(&place, "-m 64M", &kernel);
        let mut guest = place.start(&format!("-s 2,virtio-blk,{}{options}", path.display()));
        guest.console.expect("probe> ");
        let legacy = options.contains("legacy");
        guest
            .console
            .send(if legacy { "blk legacy" } else { "blk modern" });
        guest.console.expect("probe> ");
        // Sectors apart, so that qcow2 has clusters to allocate.
        let first = 1 + 97 * round as u64 % 1000;
        guest.console.send(&format!("blk log {first} 1000"));
        guest.console.expect(&format!("stable {}\r", 3 + 2 * round));
        guest.signal(Signal::SIGKILL);
        let ended = guest.wait();
        assert_eq!(ended.status, Some(128 + 9), "{ended:?}");
        let told = ended.output.lines().filter_map(|line| {
            let number = line.strip_prefix("stable ")?;
            number.trim().parse::<u64>().ok()
        });
        // The last line may be cut short, which makes another number of it.
        let stable = told
            .max()
            .map_or(3 + 2 * round as u64, |last| last.max(3 + 2 * round as u64));
        let raw = if name.ends_with("qcow2") {
            // Leaked clusters (3) are what a crash may leave; errors are not.
            let check = Command::new("qemu-img")
                .arg("check")
                .arg(&path)
                .output()
                .unwrap();
            assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
            let raw = place.path("raw");
            qemu_img(&["convert", "-O", "raw"], &[&path, &raw], "");
            raw
        } else {
            path
        };
        for number in 0..=stable {
            assert!(
                holds(&raw, first + number, number),
                "round {round}: {number} of {stable} is lost"
            );
        }
    }
}

/// Runs qemu-img, which has to succeed.
pub fn qemu_img(options: &[&str], files: &[&Path], size: &str) {
    let mut command = Command::new("qemu-img");
    command.args(options).args(files);
    command.args((!size.is_empty()).then_some(size));
    let output = command
        .output()
        .expect("qemu-img of Debian's package qemu-utils");
    assert!(output.status.success(), "{command:?}: {output:?}");
}
