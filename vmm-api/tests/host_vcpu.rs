//! Host lane: a vCPU runs a few instructions on this machine's /dev/kvm.

#![cfg(test)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use support::{CODE, real_mode, vcpu};
use vmm_api::exit::{Direction, ExitKind, PortAccess, VmExit};
use vmm_api::inspect::IntInfo;

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

#[test]
fn details_are_told_and_events_are_put_in() {
    // mov dx, 0x80; in al, dx; hlt
    let (mut vcpu, _) = vcpu(&[0xba, 0x80, 0x00, 0xec, 0xf4]);
    let detail = vcpu.detail().unwrap();
    assert_eq!(detail.exit, None);
    assert_eq!(detail.apic_base & 0xffff_f900, 0xfee0_0900);
    assert_eq!(detail.pat, 0x0007_0406_0007_0406);
    assert_eq!(detail.capabilities.get("hlt_exit"), Some(&true));
    vcpu.set_x2apic(true).unwrap();
    assert!(vcpu.detail().unwrap().x2apic());
    let captured = vcpu.capture().unwrap();
    vcpu.set_x2apic(false).unwrap();
    assert!(!vcpu.detail().unwrap().x2apic());
    vcpu.restore(&captured).unwrap();
    assert!(vcpu.detail().unwrap().x2apic(), "restored");

    assert_eq!(vcpu.run().unwrap(), port(Direction::In, 0x80, 1, 1));
    assert_eq!(vcpu.complete().unwrap(), VmExit::Interrupted);
    let exit = vcpu.detail().unwrap().exit.unwrap();
    assert_eq!((exit.reason, &*exit.name), (2, "inout"));
    vcpu.inject_exception(13, Some(0x18)).unwrap();
    let current = IntInfo::current(&vcpu.detail().unwrap().events).unwrap();
    assert_eq!(current.to_string(), "exception vector 13 errcode 0x18");
    for vector in [2, 32] {
        assert!(vcpu.inject_exception(vector, None).is_err());
    }
    assert!(vcpu.inject_exception(13, None).is_err(), "one at a time");
    assert!(vcpu.lapic_local_irq(7).is_err());
    // LINT1, which is wired to NMI.
    vcpu.lapic_local_irq(2).unwrap();
    assert!(vcpu.detail().unwrap().events.nmi_pending);
}
