//! How a machine ends: exit status, and what is kept.

use nix::sys::signal::Signal;
use vmm_api::state::{Activity, Phase, StopReason};

use crate::guests::{ENTRY, ask, load_code, start_probe};
use crate::support::Place;

fn stopped(reason: StopReason) -> Phase {
    Phase::Stopped {
        reason,
        detail: None,
    }
}

#[test]
fn the_guests_own_end_is_the_exit_status() {
    let place = Place::new();
    for (command, status, reason) in [
        ("reboot", 0, StopReason::Reset),
        ("poweroff", 1, StopReason::PowerOff),
        ("hlt", 2, StopReason::Halt),
        ("fault", 3, StopReason::TripleFault),
    ] {
        let (mut guest, _) = start_probe(&place, "-c 2");
        guest.console.send(command);
        let ended = guest.wait();
        assert_eq!(ended.status, Some(status), "{command}: {ended:?}");
        assert_eq!(place.state().phase, stopped(reason), "{command}");
        assert!(!place.vm().path().join("control.sock").exists());
    }
}

#[test]
fn one_vcpu_that_goes_on_is_no_halt() {
    let place = Place::new();
    // The second CPU sleeps, the first reads its console: both in HLT, but not for good.
    let (mut guest, _) = start_probe(&place, "-c 2");
    std::thread::sleep(std::time::Duration::from_millis(1700));
    assert_eq!(ask(&mut guest, "echo still here"), "still here\r\n");
}

#[test]
fn the_last_state_is_kept() {
    let place = Place::new();
    // mov ebx, 0xfeedface; mov cr2, rbx; mov [0x300000], rbx; cli; hlt
    let code = b"\xbb\xce\xfa\xed\xfe\x0f\x22\xd3\x48\x89\x1c\x25\x00\x00\x30\x00\xfa\xf4";
    load_code(&place, code);
    let before = place.state();
    assert_eq!(before.vcpus[0].registers.rip, ENTRY);
    let ended = place.start("").wait();
    assert_eq!(ended.status, Some(2), "{ended:?}");
    assert!(ended.errors.contains("rhyve: guest0: halt"), "{ended:?}");
    let state = place.state();
    assert_eq!(state.phase, stopped(StopReason::Halt));
    let vcpu = &state.vcpus[0];
    assert_eq!(vcpu.activity, Some(Activity::Halted));
    let registers = &vcpu.registers;
    assert_eq!(
        (registers.rip, registers.rbx, registers.cr2),
        (ENTRY + code.len() as u64, 0xfeed_face, 0xfeed_face)
    );
    assert_eq!(registers.rflags & 0x200, 0);
    let mut bytes = [0; 8];
    let memory = place.vm().open_memory(&state).unwrap();
    memory.read(0x30_0000, &mut bytes).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 0xfeed_face);

    // A guest that has ended is not entered again, and says what to do.
    let again = place.run("rhyve guest0");
    assert_eq!(again.status, Some(4), "{again:?}");
    assert!(
        again.errors.contains("has ended (halt): load it again"),
        "{again:?}"
    );
    assert_eq!(place.state(), state);
}

#[test]
fn signals_stop_a_guest_that_does_not_listen() {
    let place = Place::new();
    for signal in [Signal::SIGINT, Signal::SIGHUP, Signal::SIGTERM] {
        let (guest, _) = &mut start_probe(&place, "-c 2");
        guest.signal(signal);
        let ended = guest.wait();
        assert_eq!(ended.status, Some(1), "{signal}: {ended:?}");
        let phase = Phase::Stopped {
            reason: StopReason::Stopped,
            detail: Some(signal.as_str().to_owned()),
        };
        assert_eq!(place.state().phase, phase);
    }
}

#[test]
fn sigterm_presses_the_power_button_first() {
    let place = Place::new();
    let (guest, _) = &mut start_probe(&place, "");
    // ACPI mode, and the button's event (ACPI 6.5, 4.8.3.1.2: bit 8 of PM1_EN).
    ask(guest, "out 0xb2 0xa0");
    ask(guest, "out 0x402 0x100 2");
    guest.signal(Signal::SIGTERM);
    std::thread::sleep(std::time::Duration::from_millis(300));
    let status = ask(guest, "in 0x400 2");
    let status = status
        .trim_end()
        .rsplit_once("0x")
        .map(|(_, digits)| digits);
    let status = u64::from_str_radix(status.unwrap(), 16).unwrap();
    assert_eq!(status & 0x100, 0x100, "PWRBTN_STS");
    guest.signal(Signal::SIGTERM);
    assert_eq!(guest.wait().status, Some(1));
    assert!(matches!(
        place.state().phase,
        Phase::Stopped {
            reason: StopReason::Stopped,
            ..
        }
    ));
}

#[test]
fn strict_io_stops_at_a_port_nobody_answers() {
    let place = Place::new();
    for (code, message) in [
        (
            b"\x66\xba\x34\x12\xb0\x05\xee\xfa\xf4".as_slice(),
            "Unhandled outb 0x1234",
        ),
        (b"\x66\xba\x36\x12\x66\xed\xfa\xf4", "Unhandled inw 0x1236"),
        (b"\x66\xba\x38\x12\xef\xfa\xf4", "Unhandled outl 0x1238"),
    ] {
        load_code(&place, code);
        let ended = place.start("-e").wait();
        assert_eq!(ended.status, Some(4), "{ended:?}");
        assert!(ended.errors.contains(message), "{message}: {ended:?}");
        load_code(&place, code);
        assert_eq!(place.start("").wait().status, Some(2), "without -e");
    }
}

#[test]
fn a_debug_exit_is_the_exit_status() {
    let place = Place::new();
    // mov al, 0x10; out 0xf4, al
    let code = b"\xb0\x10\xe6\xf4\xfa\xf4";
    load_code(&place, code);
    let ended = place.start("--debug-exit").wait();
    assert_eq!(ended.status, Some(0x21), "{ended:?}");
    load_code(&place, code);
    assert_eq!(place.start("").wait().status, Some(2), "not asked for");
}

#[test]
fn a_guest_that_powers_off_can_take_its_object_along() {
    let place = Place::new();
    let (mut guest, _) = start_probe(&place, "-D");
    let path = place.vm().path().to_owned();
    guest.console.send("poweroff");
    assert_eq!(guest.wait().status, Some(1));
    assert!(!path.exists());
}
