//! What is refused, with one line that says why and what to do.

use std::fs;

use vmm_api::state::Phase;

use crate::guests::{ask, load_code, probe, start_probe};
use crate::support::{Place, Process};

const HALT: &[u8] = b"\xfa\xf4";

/// The one line that a program says when it refuses.
fn refused(place: &Place, line: &str, status: i32) -> String {
    let ended = place.run(line);
    assert_eq!(ended.status, Some(status), "{line}: {ended:?}");
    let name = line.split_whitespace().next().unwrap();
    assert!(
        ended.errors.starts_with(&format!("{name}: ")),
        "{line}: {ended:?}"
    );
    assert_eq!(ended.errors.lines().count(), 1, "{line}: {ended:?}");
    assert_eq!(ended.output, "", "{line}");
    ended.errors
}

#[test]
fn names_that_cannot_be() {
    let place = Place::new();
    let kernel = probe(&place);
    let long = "x".repeat(32);
    for name in ["a/b", "../guest0", ".hidden", "", long.as_str()] {
        let mut load = place.command("rhyveload --kernel");
        load.arg(&kernel).arg(name);
        let ended = Process::start(load).wait();
        assert_eq!(ended.status, Some(2), "{name}: {ended:?}");
        let mut run = place.command("rhyve");
        run.arg(name);
        let ended = Process::start(run).wait();
        assert_eq!(ended.status, Some(4), "{name}: {ended:?}");
        let mut look = place.command("vmmctl --get-all");
        look.arg(format!("--vm={name}"));
        let ended = Process::start(look).wait();
        assert!(
            ended.status.is_some_and(|status| status > 0),
            "{name}: {ended:?}"
        );
    }
    assert!(!place.path("root").join("a").exists() && !place.path("guest0").exists());
    // One character less is a name.
    let longest = "x".repeat(31);
    let mut load = place.command("rhyveload --kernel");
    load.arg(&kernel).arg(&longest);
    assert_eq!(Process::start(load).wait().status, Some(0));
    assert!(place.ok("vmmctl --list").contains(&longest));
}

#[test]
fn a_vm_that_does_not_exist() {
    let place = Place::new();
    for (line, status) in [("rhyve nobody", 4), ("vmmctl --vm=nobody --get-all", 1)] {
        let text = refused(&place, line, status);
        assert!(
            text.contains("vm_open(nobody): No such file or directory"),
            "{text}"
        );
    }
    place.ok("vmmctl --vm=guest0 --create");
    let text = refused(&place, "vmmctl --vm=guest0 --create", 1);
    assert!(text.contains("vm_create(guest0): File exists"), "{text}");
    let text = refused(&place, "rhyve guest0", 4);
    assert!(
        text.contains("nothing is loaded in guest0: load it with rhyveload"),
        "{text}"
    );
}

#[test]
fn another_size_of_memory() {
    let place = Place::new();
    load_code(&place, HALT);
    let text = refused(&place, "rhyve -m 32M guest0", 4);
    assert!(
        text.contains("guest0 was loaded with 16M of memory, not with 32M"),
        "{text}"
    );
    assert_eq!(place.state().phase, Phase::Loaded);
    assert_eq!(place.run("rhyve -m 16M guest0").status, Some(2));
}

#[test]
fn a_vm_that_runs() {
    let place = Place::new();
    let (mut guest, _) = start_probe(&place, "");
    let generation = place.state().generation;
    let kernel = place.path("probe");
    let load = format!("rhyveload --kernel {} guest0", kernel.display());
    for (line, status) in [
        (load.as_str(), 1),
        ("rhyve guest0", 4),
        ("vmmctl --vm=guest0 --destroy", 1),
        ("vmmctl --vm=guest0 --set-lowmem=32", 1),
    ] {
        let text = refused(&place, line, status);
        assert!(
            text.contains("guest0 is in use by rhyve (pid "),
            "{line}: {text}"
        );
    }
    assert_eq!(place.state().generation, generation);
    assert_eq!(ask(&mut guest, "echo undisturbed"), "undisturbed\r\n");
}

#[test]
fn a_damaged_state() {
    let place = Place::new();
    let file = || place.vm().path().join("vm.json");
    for (text, message) in [
        ("", "damaged; load the VM again, or destroy it"),
        ("{\"format\":\"rhyve-vm\",\"version\":1,", "damaged; load"),
        (
            "{\"format\":\"rhyve-vm\",\"version\":9}",
            "version 9, this rhyve reads 1-1",
        ),
        ("{\"format\":\"other\",\"version\":1}", "format is 'other'"),
    ] {
        load_code(&place, HALT);
        fs::write(file(), text).unwrap();
        let said = refused(&place, "rhyve guest0", 4);
        assert!(said.contains(message), "{said}");
        let said = refused(&place, "vmmctl --vm=guest0 --get-rip", 1);
        assert!(said.contains(message), "{said}");
        place.ok("vmmctl --list");
        load_code(&place, HALT);
        assert_eq!(
            place.run("rhyve guest0").status,
            Some(2),
            "loaded again, it runs"
        );
        fs::write(file(), text).unwrap();
        place.ok("vmmctl --vm=guest0 --destroy");
    }
}

#[test]
fn memory_that_is_gone_or_cut_off() {
    let place = Place::new();
    load_code(&place, HALT);
    let memory = place.vm().path().join("mem");
    fs::OpenOptions::new()
        .write(true)
        .open(&memory)
        .unwrap()
        .set_len(4096)
        .unwrap();
    refused(&place, "rhyve guest0", 4);
    fs::remove_file(&memory).unwrap();
    let text = refused(&place, "rhyve guest0", 4);
    assert!(
        text.contains("guest0 has no memory: load it with rhyveload"),
        "{text}"
    );
    load_code(&place, HALT);
    assert_eq!(place.run("rhyve guest0").status, Some(2));
}

#[test]
fn what_rhyve_cannot_connect_or_make() {
    let place = Place::new();
    load_code(&place, HALT);
    for (options, message) in [
        (
            "-l com1,unix:/no/such/directory/com1",
            "com1: console unix:/no/such/directory/com1: No",
        ),
        (
            "-l com1,file:/no/such/directory/log",
            "No such file or directory",
        ),
        ("-l com1,/dev/null0", "No such file or directory"),
        (
            "-c 4096",
            "-c: 4096 vCPUs are more than this machine's KVM runs",
        ),
        ("-p 0:4095", "vCPU 0 cannot be pinned to host CPU 4095: "),
        (
            "-G unix:/no/such/directory/gdb",
            "-G: cannot listen at unix:/no/such/directory/gdb: No",
        ),
        ("-G 192.0.2.1:1234", "-G: cannot listen at 192.0.2.1:1234: "),
    ] {
        let text = refused(&place, &format!("rhyve {options} guest0"), 4);
        assert!(text.contains(message), "{options}: {text}");
        assert_eq!(place.state().phase, Phase::Loaded, "{options}");
    }
    // A debug server's socket that nobody listens at any more is no hindrance.
    let socket = place.path("gdb.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let line = format!("rhyve -G unix:{} guest0", socket.display());
    assert_eq!(place.run(&line).status, Some(2));
    assert!(!socket.exists());
    load_code(&place, HALT);
    assert_eq!(place.run("rhyve guest0").status, Some(2));
}

#[test]
fn nobody_to_tell_it() {
    let place = Place::new();
    load_code(&place, HALT);
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    for (line, status) in [
        ("vmmctl --list", 1),
        ("vmmctl --vm=guest0 --get-all --json", 1),
        ("rhyve -s help", 4),
    ] {
        let mut command = place.command(line);
        let ended = command.stdout(full()).output().unwrap();
        assert_eq!(ended.status.code(), Some(status), "{line}: {ended:?}");
        let errors = String::from_utf8(ended.stderr).unwrap();
        assert!(errors.ends_with("standard output: No space left on device (os error 28)\n"));
    }
    // The guest runs to its end all the same.
    let mut command = place.command("rhyve -G 0 guest0");
    let ended = command.stderr(full()).status().unwrap();
    assert_eq!(ended.code(), Some(2));
}

#[test]
fn a_device_without_its_end_on_the_host_says_which_it_is() {
    let place = Place::new();
    load_code(&place, HALT);
    let long = format!("/tmp/{}", "x".repeat(200));
    for (device, words) in [
        (
            "virtio-9p,src=/nope",
            "virtio-9p at 0:2:0: /nope: cannot open the directory that is shared: No such file",
        ),
        (
            "virtio-9p,src=/dev/null",
            "virtio-9p at 0:2:0: /dev/null: cannot open the directory that is shared: Not a dir",
        ),
        (
            "virtio-vsock,path=/nope/v",
            "virtio-vsock at 0:2:0: /nope/v: cannot listen at its socket: No such file",
        ),
        (
            &format!("virtio-vsock,path={long}"),
            &format!("virtio-vsock at 0:2:0: {long}: cannot listen at its socket: path must be"),
        ),
        (
            &format!("virtio-net,socket,connect={long}"),
            &format!("{long}: cannot use that path: File name too long"),
        ),
    ] {
        let said = refused(&place, &format!("rhyve -s 2,{device} guest0"), 4);
        assert!(said.contains(words), "{device}: {said}");
    }
    assert_eq!(place.state().phase, Phase::Loaded);
}

#[test]
fn no_more_memory_is_asked_for_than_there_is() {
    let place = Place::new();
    let (_guest, _) = start_probe(&place, "-s 2,virtio-balloon");
    let target = || {
        let devices = place.ok("vmmctl --vm=guest0 --get-devices");
        let target = devices.lines().find(|line| line.contains("target"));
        target
            .unwrap()
            .split_whitespace()
            .last()
            .unwrap()
            .to_owned()
    };
    place.ok("vmmctl --vm=guest0 --set-balloon=16M");
    assert_eq!(target(), "16M");
    let said = refused(&place, "vmmctl --vm=guest0 --set-balloon=65M", 1);
    assert!(
        said.contains("the guest has 64M, and cannot lend 65M"),
        "{said}"
    );
    assert_eq!(target(), "16M");
    place.ok("vmmctl --vm=guest0 --set-balloon=64M");
    assert_eq!(target(), "64M");
}
