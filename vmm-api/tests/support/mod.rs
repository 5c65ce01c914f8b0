//! A vCPU for tests.

use kvm_ioctls::Kvm;
use vmm_api::kvm::{CpuidPolicy, KvmVcpu, KvmVm, VmPolicy};
use vmm_api::memory::{GuestRam, MemoryLayout};
use vmm_api::regs::{Access, Registers, Segment};
use vmm_api::state::VcpuState;
use vmm_api::topology::Topology;

/// Where the code lies.
pub const CODE: u64 = 0x1000;

/// A vCPU in real mode at `code`, and its memory of 1 MiB.
pub fn vcpu(code: &[u8]) -> (KvmVcpu, GuestRam) {
    let layout = MemoryLayout {
        lowmem: 1 << 20,
        highmem: 0,
    };
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(layout.total()).unwrap();
    let ram = GuestRam::map(file, layout).unwrap();
    ram.write(CODE, code).unwrap();
    let kvm = Kvm::new().expect("the host lane needs /dev/kvm");
    let cpuid = CpuidPolicy {
        topology: Topology::packages(1),
        x2apic: true,
    };
    let policy = VmPolicy {
        cpuid,
        unknown_msr_exits: false,
    };
    let vm = KvmVm::new(kvm, ram.clone(), policy).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut state = VcpuState::reset();
    state.registers = real_mode();
    vcpu.restore(&state).unwrap();
    (vcpu, ram)
}

/// Real mode at the code, with a stack.
pub fn real_mode() -> Registers {
    let cs = Segment {
        selector: 0,
        base: 0,
        limit: 0xffff,
        access: Access(0x9b),
    };
    Registers {
        rip: CODE,
        cs,
        rsp: 0x8000,
        ..Registers::reset()
    }
}
