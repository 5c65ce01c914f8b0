//! Host lane: a vCPU runs a few instructions on this machine's /dev/kvm.

#![cfg(test)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use kvm_ioctls::Kvm;
use vmm_api::exit::{Direction, ExitKind, PortAccess, VmExit};
use vmm_api::kvm::{CpuidPolicy, KvmVcpu, KvmVm, VmPolicy};
use vmm_api::memory::{GuestRam, MemoryLayout};
use vmm_api::regs::{Access, Registers, Segment};
use vmm_api::state::VcpuState;
use vmm_api::topology::Topology;

const CODE: u64 = 0x1000;

/// A vCPU in real mode at `code`, which lies at 0x1000.
fn vcpu(code: &[u8]) -> KvmVcpu {
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
    let vm = KvmVm::new(kvm, ram, policy).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut state = VcpuState::reset();
    state.registers = real_mode();
    vcpu.restore(&state).unwrap();
    vcpu
}

fn real_mode() -> Registers {
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

fn port(direction: Direction, port: u16, size: u8, count: u32) -> VmExit {
    VmExit::Port(PortAccess {
        direction,
        port,
        size,
        count,
    })
}

#[test]
fn port_exits_are_owned_and_their_data_goes_both_ways() {
    // mov dx, 0x3f8; in al, dx; inc al; out dx, al; hlt
    let mut vcpu = vcpu(&[0xba, 0xf8, 0x03, 0xec, 0xfe, 0xc0, 0xee, 0xf4]);
    assert_eq!(vcpu.run().unwrap(), port(Direction::In, 0x3f8, 1, 1));
    vcpu.pio_data().copy_from_slice(&[0x41]);
    assert_eq!(vcpu.run().unwrap(), port(Direction::Out, 0x3f8, 1, 1));
    assert_eq!(vcpu.pio_data(), [0x42]);
    assert_eq!(vcpu.counters().exits(ExitKind::Inout), 2);
    assert!(vcpu.counters().guest_ns() > 0);
}

#[test]
fn registers_are_consistent_after_completion() {
    // mov dx, 0x80; in al, dx; hlt
    let mut vcpu = vcpu(&[0xba, 0x80, 0x00, 0xec, 0xf4]);
    assert_eq!(vcpu.run().unwrap(), port(Direction::In, 0x80, 1, 1));
    vcpu.pio_data().copy_from_slice(&[0x5a]);
    assert_eq!(vcpu.complete().unwrap(), VmExit::Interrupted);
    let regs = vcpu.registers().unwrap();
    assert_eq!(
        (regs.rip, regs.rax & 0xff, regs.rdx),
        (CODE + 4, 0x5a, 0x80)
    );
}

#[test]
fn what_is_captured_can_be_restored() {
    let vcpu = vcpu(&[0xf4]);
    let mut state = vcpu.capture().unwrap();
    assert_eq!(state.lapic.len(), 1024);
    assert!(state.xsave.len() >= 4096);
    assert!(state.msrs.contains_key(&0x10), "the time stamp counter");
    let rest = real_mode();
    assert_eq!(
        (state.registers.rip, state.registers.rflags),
        (rest.rip, rest.rflags)
    );
    state.registers.rbx = 0x1234_5678_9abc_def0;
    let mut other = self::vcpu(&[0xf4]);
    other.restore(&state).unwrap();
    assert_eq!(other.registers().unwrap(), state.registers);
}

#[test]
fn a_kick_is_never_lost() {
    // jmp $
    let mut vcpu = vcpu(&[0xeb, 0xfe]);
    let kick = vcpu.bind_thread();
    // Before the entry: the next run returns at once.
    kick.kick();
    assert_eq!(vcpu.run().unwrap(), VmExit::Interrupted);
    // During the run, at changing moments.
    for delay in (0..20).map(|n| Duration::from_micros(n * 100)) {
        let done = Arc::new(AtomicBool::new(false));
        let seen = done.clone();
        let kicker = std::thread::spawn(move || {
            std::thread::sleep(delay);
            seen.store(true, SeqCst);
            kick.kick();
        });
        while !done.load(SeqCst) {
            assert_eq!(vcpu.run().unwrap(), VmExit::Interrupted);
        }
        kicker.join().unwrap();
    }
}
