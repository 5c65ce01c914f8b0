//! What a VM has beyond registers, whether it runs or not.

use serde_json::json;
use vmm_api::state::{Activity, Phase, VcpuState};
use vmm_api::topology::Topology;

use crate::common::Bench;

/// Every such option that is known of a VM that does not run.
const STORED: &str = "--get-memseg --get-memmap --get-pinning --get-x2apic-state --get-guest-pat \
    --get-guest-sysenter --get-active-cpus --get-suspended-cpus --get-intinfo --get-cpu-topology";

#[test]
fn a_stored_vm_tells_what_it_will_begin_with() {
    let bench = Bench::new();
    let mut vm = bench.object("guest0", "rhyveload");
    let mut state = vm.load_state().unwrap();
    state.vcpus.push(VcpuState::reset());
    vm.store(&mut state).unwrap();
    drop(vm);
    insta::assert_snapshot!("stored", bench.ok(&format!("--vm=guest0 {STORED}")));
    let said = bench.json(&format!("--vm=guest0 {STORED}"));
    insta::assert_snapshot!("stored_json", format!("{said:#}"));
}

#[test]
fn a_stopped_vm_tells_how_it_ended() {
    let bench = Bench::new();
    let mut vm = bench.object("guest0", "rhyve");
    let mut state = vm.load_state().unwrap();
    state.phase = Phase::Suspended;
    state.vcpus = vec![VcpuState::reset(); 3];
    state.vcpus[0].activity = Some(Activity::Halted);
    state.vcpus[1].activity = Some(Activity::Uninitialized);
    state.vcpus[2].activity = Some(Activity::Runnable);
    state.machine.topology = Some(Topology {
        sockets: 1,
        cores: 3,
        threads: 1,
    });
    vm.store(&mut state).unwrap();
    drop(vm);
    assert_eq!(
        bench.ok("--vm=guest0 --get-active-cpus --get-suspended-cpus --get-cpu-topology"),
        "active cpus:\t 0, 2\n\
         suspended cpus:\t 0, 2\n\
         cpu_topology:\tsockets=1, cores=3, threads=1, maxcpus=-\n"
    );
}

#[test]
fn a_stored_vm_is_changed() {
    let bench = Bench::new();
    drop(bench.object("guest0", "rhyveload"));
    assert_eq!(
        bench.ok(
            "--vm=guest0 --set-pinning=0 --set-x2apic-state=1 --get-pinning --get-x2apic-state"
        ),
        "pinning[0]\t0\nx2apic_state[0]\t1\n"
    );
    assert_eq!(bench.state("guest0").vcpus[0].pinning, [0].into());
    assert_eq!(
        bench.ok("--vm=guest0 --set-pinning=-1 --get-pinning"),
        "pinning[0]\t-1\n"
    );
    assert_eq!(
        bench.fails("--vm=guest0 --set-pinning=0,70000", 1),
        "vmmctl: this machine has no processor 70000: see lscpu(1)\n"
    );
    assert_eq!(
        bench.fails("--vm=guest0 --get-rtc-time", 1),
        "vmmctl: guest0 has no CMOS clock yet: run it, or set it with --set-rtc-time or --set-rtc-nvram\n"
    );
    let nvram = "--rtc-nvram-offset=77 --set-rtc-nvram=0xa5 --get-rtc-nvram";
    assert_eq!(
        bench.ok(&format!("--vm=guest0 --set-rtc-time=1334059200 {nvram}")),
        "rtc nvram[077]: 0xa5\n"
    );
    let time = bench.ok("--vm=guest0 --get-rtc-time");
    assert!(time.contains(": Tue Apr 10 12:00:"), "{time}");
    bench.ok("--vm=guest0 --set-mem=4096");
    assert_eq!(
        bench.ok("--vm=guest0 --get-lowmem --get-highmem"),
        "lowmem\t0x0000000000000000/0x00000000c0000000\n\
         highmem\t0x0000000100000000/0x0000000040000000\n"
    );
}

#[test]
fn a_running_vm_tells_all() {
    let bench = Bench::new();
    let _machine = bench.running("guest0");
    let all = format!(
        "--vm=guest0 {STORED} --get-tsc-offset --get-exit-reason --get-rtc-time --get-rtc-nvram \
         --rtc-nvram-offset=14 --getcap"
    );
    insta::assert_snapshot!("running", bench.ok(&all));
    insta::assert_snapshot!("running_json", format!("{:#}", bench.json(&all)));
    assert_eq!(
        bench.ok("--vm=guest0 --get-vmcs-guest-pat --get-vmcs-tsc-offset"),
        "tsc_offset[0]\t0xffffffff00000000\nguest_pat[0]\t0x0007040600070406\n",
        "2012's names"
    );
}

#[test]
fn a_running_vm_is_changed() {
    let bench = Bench::new();
    let machine = bench.running("guest0");
    assert_eq!(
        bench.ok("--vm=guest0 --cpu=1 --set-pinning=0,3 --set-x2apic-state=1 --set-rtc-nvram=7 \
                  --rtc-nvram-offset=127 --set-rtc-time=0 --get-pinning --get-x2apic-state --get-rtc-nvram"),
        "pinning[1]\t0,3\nx2apic_state[1]\t1\nrtc nvram[127]: 0x07\n"
    );
    bench.ok("--vm=guest0 --cpu=1 --assert-lapic-lvt=1 --pause");
    assert_eq!(machine.said(), "time 0, pause, LocalPin { pin: 1 } for 1");
    assert_eq!(
        bench.ok("--vm=guest0 --get-suspended-cpus"),
        "suspended cpus:\t 0, 1\n"
    );
}

#[test]
fn capabilities_are_named_one_by_one_and_fixed() {
    let bench = Bench::new();
    let _machine = bench.running("guest0");
    assert_eq!(
        bench.ok("--vm=guest0 --capname=hlt_exit --getcap --setcap=1"),
        "Capability \"hlt_exit\" is set on vcpu 0\n"
    );
    let said = bench.json("--vm=guest0 --getcap --capname=mtrap_exit");
    assert_eq!(said["capabilities"], json!({ "mtrap_exit": null }));
    for (name, value, why) in [
        ("hlt_exit", 0, "is set, and KVM lets nobody clear it"),
        ("rdpid", 1, "is not set, and KVM lets nobody set it"),
        ("mtrap_exit", 1, "is not available through KVM"),
    ] {
        assert_eq!(
            bench.fails(&format!("--vm=guest0 --capname={name} --setcap={value}"), 2),
            format!("vmmctl: guest0: capability {name} {why}\n")
        );
    }
}

#[test]
fn what_only_a_running_vm_knows_is_asked_of_none_other() {
    let bench = Bench::new();
    drop(bench.object("guest0", "rhyveload"));
    for option in [
        "--get-tsc-offset",
        "--get-exit-reason",
        "--getcap",
        "--capname=rdpid --setcap=1",
        "--assert-lapic-lvt=0",
    ] {
        let error = bench.fails(&format!("--vm=guest0 {option}"), 1);
        assert!(
            error.starts_with("vmmctl: guest0 is not running"),
            "{option}: {error}"
        );
    }
    let _machine = bench.running("guest1");
    assert_eq!(
        bench.fails("--vm=guest1 --cpu=1 --get-tsc-offset", 2),
        "vmmctl: guest1: --get-tsc-offset is not available through this machine's KVM, or not yet\n"
    );
}

#[test]
fn page_tables_are_walked_in_any_condition() {
    let bench = Bench::new();
    let mut vm = bench.object("guest0", "rhyveload");
    let mut state = vm.load_state().unwrap();
    let ram = vm.map_memory(&state).unwrap();
    for (gpa, entry) in [(0x1000, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x20_0083)] {
        ram.write(gpa, &entry.to_le_bytes()).unwrap();
    }
    let registers = &mut state.vcpus[0].registers;
    (registers.cr0, registers.cr4, registers.efer) = (0x8000_0001, 0x20, 0x500);
    registers.cr3 = 0x1000;
    vm.store(&mut state).unwrap();
    drop((vm, ram));
    assert_eq!(
        bench.ok("--vm=guest0 --get-gpa-pmap=0x1234"),
        "gpa 0x201234: 0x2003 0x3003 0x200083\n"
    );
    assert_eq!(
        bench.json("--vm=guest0 --get-gpa-pmap=0x1234")["gpa_pmap"]["page_size"],
        2 << 20
    );
    assert_eq!(
        bench.fails("--vm=guest0 --get-gpa-pmap=0x200000", 1),
        "vmmctl: guest0: linear 0x200000 is not mapped: level 2 entry 0x0 at 0x3008 is not present\n"
    );
}
