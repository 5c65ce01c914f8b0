//! vmmctl as a process on VMs that run, or seem to.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use crate::common::Bench;
use serde_json::json;
use vmm_api::state::Phase;

#[test]
fn registers_of_a_running_vm_are_shown_and_changed() {
    let bench = Bench::new();
    let machine = bench.running("guest0");
    machine.inner.lock().unwrap().vcpus[1].rip = 0xffff_ffff_8100_0000;
    assert_eq!(
        bench.ok("--vm=guest0 --cpu=1 --get-rip"),
        "rip[1]\t0xffffffff81000000\n"
    );
    assert_eq!(
        bench.ok("--vm=guest0 --cpu=1 --set-rip=0x1000 --set-desc-fs --desc-base=0x7000 --get-rip --get-fs-base"),
        "rip[1]\t0x0000000000001000\nfs_base[1]\t0x0000000000007000\n"
    );
    assert_eq!(machine.inner.lock().unwrap().vcpus[1].rip, 0x1000);
    assert_eq!(bench.state("guest0").vcpus[0].registers.rip, 0xfff0);
    assert_eq!(bench.ok("--vm=guest0 --get-all").lines().count(), 56);
    let said = bench.json("--vm=guest0 --pause --get-cr0 --get-lowmem --resume");
    assert_eq!(
        said,
        json!({
            "vm": "guest0", "cpu": 0, "phase": "paused", "done": ["pause", "resume"],
            "registers": { "cr0": "0x60000010" },
            "lowmem": { "gpa": "0x0", "length": 64 << 20 },
        })
    );
    bench.ok("--vm=guest0 --cpu=1 --inject-nmi --power-button");
    assert_eq!(machine.said(), "pause, resume, nmi 1, power button");
}

#[test]
fn refusals_of_a_running_vm_are_passed_on() {
    let bench = Bench::new();
    let machine = bench.running("guest0");
    assert_eq!(
        bench.fails("--vm=guest0 --cpu=2 --get-rip", 1),
        "vmmctl: guest0: there is no vCPU 2: the VM has 2, numbered from 0\n"
    );
    assert_eq!(
        bench.fails("--vm=guest0 --set-cs=0x10000 --set-rip=1", 1),
        "vmmctl: guest0: value 0x10000 does not fit in register cs (16 bits)\n"
    );
    let pid = std::process::id();
    let busy = format!(
        "vmmctl: guest0 is in use by rhyve (pid {pid}): it runs; stop it with vmmctl --vm=guest0 --force-poweroff\n"
    );
    assert_eq!(bench.fails("--vm=guest0 --destroy", 1), busy);
    assert_eq!(bench.fails("--vm=guest0 --set-lowmem=128", 1), busy);
    assert_eq!(
        bench.fails("--vm=guest0 --get-pdpte0", 2).lines().count(),
        1
    );
    assert_eq!(machine.said(), "");
    assert_eq!(machine.inner.lock().unwrap().vcpus[0].rip, 0xfff0);
}

#[test]
fn statistics_have_bhyves_list_and_more() {
    let bench = Bench::new();
    let _machine = bench.running("guest0");
    insta::assert_snapshot!("get_stats", bench.ok("--vm=guest0 --get-stats"));
    let said = bench.json("--vm=guest0 --get-stats");
    assert_eq!(said["stats"]["vcpu"]["exits"]["io"], 70);
    assert_eq!(said["stats"]["bhyve"]["total number of vm exits"], 4711);
    assert!(said["stats"]["bhyve"]["number of monitor trap exits"].is_null());
}

#[test]
fn exits_are_shown_by_place_and_caller_and_counted_anew() {
    let bench = Bench::new();
    let machine = bench.running("guest0");
    insta::assert_snapshot!("get_exits", bench.ok("--vm=guest0 --get-exits=2"));
    let said = bench.json("--vm=guest0 --get-exits=1 --reset-stats");
    insta::assert_json_snapshot!("get_exits_json", said);
    assert_eq!(machine.said(), "reset stats");
    assert!(bench.fails("--vm=guest0 --get-exits=0", 64).contains("0"));
    drop(bench.object("stored", "rhyveload"));
    assert!(
        bench
            .fails("--vm=stored --get-exits", 1)
            .contains("is not running")
    );
}

#[test]
fn devices_are_listed_with_all_there_is_of_them() {
    let bench = Bench::new();
    let machine = bench.running("guest0");
    insta::assert_snapshot!("get_devices", bench.ok("--vm=guest0 --get-devices"));
    let said = bench.json("--vm=guest0 --get-devices");
    let disk = &said["devices"][1];
    assert_eq!(disk["virtio"]["transport"], "modern");
    assert_eq!(disk["virtio"]["queues"][0]["next_avail"], 12);
    assert_eq!(disk["counters"]["bytes read"], 4096);
    bench.ok("--vm=guest0 --set-balloon=128M");
    bench.ok("--vm=guest0 --set-balloon=0");
    assert_eq!(machine.said(), "balloon 134217728, balloon 0");
    bench.object("stopped", "vmmctl");
    assert_eq!(
        bench.fails("--vm=stopped --get-devices", 1),
        "vmmctl: stopped is not running: nothing is loaded in it; load it with rhyveload\n"
    );
}

#[test]
fn a_vm_is_ended_by_force_and_destroyed_in_one_call() {
    let bench = Bench::new();
    let machine = bench.running("guest0");
    assert_eq!(bench.ok("--vm=guest0 --force-poweroff --destroy"), "");
    assert_eq!(machine.said(), "stop");
    assert!(bench.root.list().unwrap().is_empty());
    let machine = bench.running("guest1");
    bench.ok("--vm=guest1 --force-reset");
    assert_eq!(machine.said(), "reset");
    assert_eq!(bench.vm("guest1").holder().unwrap(), None);
}

#[test]
fn the_list_says_who_runs() {
    let bench = Bench::new();
    let machine = bench.running("guest0");
    let _loading = bench.object("guest1", "rhyveload");
    drop(bench.object("guest2", "rhyveload"));
    let starting = bench.object("guest3", "rhyve");
    let pid = std::process::id();
    let list = bench.json("--list");
    let line = |n: usize| {
        let entry = &list[n];
        (entry["phase"].as_str().unwrap(), entry["pid"].as_u64())
    };
    assert_eq!(line(0), ("running", Some(pid.into())));
    assert_eq!(line(1), ("loading", Some(pid.into())));
    assert_eq!(line(2), ("created", None));
    assert_eq!(line(3), ("busy (rhyve)", Some(pid.into())));
    assert_eq!(
        (&list[0]["vcpus"], &list[0]["uptime"]),
        (&json!(2), &json!(75))
    );
    bench.ok("--vm=guest0 --pause");
    let text = bench.ok("--list");
    let paused = text.lines().find(|l| l.starts_with("guest0")).unwrap();
    let words: Vec<_> = paused.split_whitespace().collect();
    assert_eq!(
        words,
        ["guest0", "paused", "64M", "2", &pid.to_string(), "1m15s"]
    );
    drop((machine, starting));
}

#[test]
fn a_killed_vms_socket_is_a_ghost() {
    let bench = Bench::new();
    let machine = bench.running("guest0");
    machine.kill();
    assert!(bench.vm("guest0").path().join("control.sock").exists());
    assert_eq!(
        bench.ok("--vm=guest0 --set-rip=1 --get-rip"),
        "rip[0]\t0x0000000000000001\n"
    );
    assert_eq!(bench.state("guest0").phase, Phase::Loaded);
    assert!(bench.ok("--list").contains("loaded"));
    bench.ok("--vm=guest0 --destroy");
}

#[test]
fn who_else_works_on_a_vm_is_named() {
    let bench = Bench::new();
    let pid = std::process::id();
    let _loading = bench.object("guest0", "rhyveload");
    let busy =
        format!("vmmctl: guest0 is in use by rhyveload (pid {pid}): try again when it is done\n");
    for options in ["--get-all", "--set-rip=1", "--destroy", "--set-lowmem=2"] {
        assert_eq!(bench.fails(&format!("--vm=guest0 {options}"), 1), busy);
    }
    // Another vmmctl takes a moment only: it is waited for.
    let other = bench.object("guest1", "vmmctl");
    let waits = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(other);
    });
    bench.ok("--vm=guest1 --set-rip=7");
    waits.join().unwrap();
    assert_eq!(bench.state("guest1").vcpus[0].registers.rip, 7);
}

#[test]
fn a_rhyve_that_takes_its_time_to_start_or_to_end_is_waited_for() {
    let bench = Bench::new();
    let ending = bench.object("guest0", "rhyve");
    let ends = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(2));
        drop(ending);
    });
    bench.ok("--vm=guest0 --get-rip");
    ends.join().unwrap();
}

#[test]
fn a_rhyve_without_a_socket_or_without_an_answer_is_one_error_in_bounded_time() {
    let bench = Bench::new();
    let _starting = bench.object("guest0", "rhyve");
    let begin = Instant::now();
    let error = bench.fails("--vm=guest0 --get-rip", 1);
    assert!(
        error.starts_with("vmmctl: guest0 has no control socket"),
        "{error}"
    );
    assert!(begin.elapsed() < Duration::from_secs(20));

    let hanging = bench.object("guest1", "rhyve");
    let _silent = UnixListener::bind(hanging.control_path()).unwrap();
    let begin = Instant::now();
    let (status, out, error) = bench.vmmctl("--list");
    assert_eq!(status, 0);
    assert!(begin.elapsed() < Duration::from_secs(4), "the list goes on");
    assert!(out.contains("guest1  running"), "{out}");
    assert!(error.contains("guest1 does not answer"), "{error}");
    let error = bench.fails("--vm=guest1 --get-rip", 1);
    assert_eq!(
        error,
        "vmmctl: guest1 does not answer: its rhyve is stopped or hangs\n"
    );
    assert!(begin.elapsed() < Duration::from_secs(12));
}
