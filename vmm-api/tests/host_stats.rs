//! Host lane: this machine's KVM tells its statistics.

#![cfg(test)]

use kvm_ioctls::Kvm;
use vmm_api::kvm::{CpuidPolicy, KvmVm, VmPolicy};
use vmm_api::memory::{GuestRam, MemoryLayout};
use vmm_api::stats::{self, StatKind, VcpuStats};
use vmm_api::topology::Topology;

#[test]
fn kvm_statistics_are_read_and_reach_bhyves_list() {
    let layout = MemoryLayout {
        lowmem: 1 << 20,
        highmem: 0,
    };
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(layout.total()).unwrap();
    let policy = VmPolicy {
        cpuid: CpuidPolicy {
            topology: Topology::packages(1),
            x2apic: true,
        },
        unknown_msr_exits: false,
    };
    let kvm = Kvm::new().expect("the host lane needs /dev/kvm");
    let vm = KvmVm::new(kvm, GuestRam::map(file, layout).unwrap(), policy).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();

    let of_vm = stats::read(&vm.stats_file().unwrap()).unwrap();
    assert!(
        of_vm.iter().any(|s| s.name == "remote_tlb_flush"),
        "{of_vm:?}"
    );
    let file = vcpu.stats_file().unwrap();
    let kvm = stats::read(&file).unwrap();
    let exits = kvm.iter().find(|s| s.name == "exits").unwrap();
    assert_eq!(
        (exits.kind, exits.value()),
        (StatKind::Cumulative, Some(0)),
        "it has not run"
    );
    assert_eq!(stats::read(&file).unwrap(), kvm, "and again");

    let stats = VcpuStats {
        kvm,
        ..VcpuStats::default()
    };
    let list = stats.bhyve();
    let known = |what: &str| list.iter().find(|(name, _)| *name == what).unwrap().1;
    for counted in [
        "total number of vm exits",
        "vm exits due to external interrupt",
        "number of times hlt was intercepted",
        "vm exits due to interrupt window opening",
        "vm exits due to nmi window opening",
        "number of times in/out was intercepted",
        "vm exits due to nested page fault",
    ] {
        assert!(known(counted).is_some(), "{counted}");
    }
    assert_eq!(known("number of times rdmsr was intercepted"), None);
}
