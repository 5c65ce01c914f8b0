//! Host lane: a vCPU runs a few instructions on this machine's /dev/kvm.

#![cfg(test)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use support::{CODE, real_mode, vcpu};
use vmm_api::exit::{Direction, ExitKind, PortAccess, VmExit};

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
    let (mut vcpu, _) = vcpu(&[0xba, 0xf8, 0x03, 0xec, 0xfe, 0xc0, 0xee, 0xf4]);
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
    let (mut vcpu, _) = vcpu(&[0xba, 0x80, 0x00, 0xec, 0xf4]);
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
    let (vcpu, _) = vcpu(&[0xf4]);
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
    let (mut other, _) = support::vcpu(&[0xf4]);
    other.restore(&state).unwrap();
    assert_eq!(other.registers().unwrap(), state.registers);
}

#[test]
fn a_kick_is_never_lost() {
    // jmp $
    let (mut vcpu, _) = vcpu(&[0xeb, 0xfe]);
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
