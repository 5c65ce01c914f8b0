//! Machines on which there is no KVM to be had, and guests that KVM cannot run.

use std::fs;
use std::process::Command;

use vmm_api::state::{Phase, StopReason};

use crate::guests::{ENTRY, load_code};
use crate::memory::with_own_mounts;
use crate::support::{Place, Process};

/// Runs mount(8), within [`with_own_mounts`].
fn mount(arguments: &[&str]) {
    let status = Command::new("mount").args(arguments).status().unwrap();
    assert!(status.success(), "mount {arguments:?}: {status}");
}

#[test]
fn without_kvm_it_is_said_why() {
    with_own_mounts("hosts::without_kvm_it_is_said_why", || {
        let place = Place::new();
        load_code(&place, b"\xf4");
        let refused = |command| {
            let ended = Process::start(command).wait();
            assert_eq!(ended.status, Some(4), "{ended:?}");
            assert_eq!(ended.errors.lines().count(), 1, "{ended:?}");
            assert_eq!(place.state().phase, Phase::Loaded);
            ended.errors
        };
        // Another device.
        mount(&["--bind", "/dev/null", "/dev/kvm"]);
        let text = refused(place.command("rhyve guest0"));
        assert!(text.contains("/dev/kvm: its API version is -1"), "{text}");

        // Not permitted: not even for root, who loses the right to pass over permissions.
        let closed = place.path("closed");
        fs::write(&closed, "").unwrap();
        fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
        mount(&["--bind", closed.to_str().unwrap(), "/dev/kvm"]);
        let rhyve = place.command("rhyve guest0");
        let mut command = Command::new("setpriv");
        command.args(["--inh-caps=-dac_override", "--bounding-set=-dac_override"]);
        command
            .args(rhyve.get_args())
            .env("RHYVE_ROOT", place.path("root"));
        let text = refused(command);
        assert!(
            text.contains("vm_create: Permission denied: /dev/kvm: "),
            "{text}"
        );
        assert!(text.contains("usermod -aG kvm"), "{text}");
    });
}

#[test]
fn without_the_device_it_is_said_how_to_get_it() {
    with_own_mounts("hosts::without_the_device_it_is_said_how_to_get_it", || {
        // All of /dev is hidden but for what tests and programs need of it.
        let place = Place::below(&std::env::temp_dir());
        load_code(&place, b"\xf4");
        mount(&["-t", "tmpfs", "none", "/dev"]);
        let ended = place.run("rhyve guest0");
        assert_eq!(ended.status, Some(4), "{ended:?}");
        let begin = "rhyve: vm_create: No such file or directory: /dev/kvm: ";
        assert!(ended.errors.starts_with(begin), "{ended:?}");
        assert_eq!(ended.errors.lines().count(), 1, "{ended:?}");
        assert_eq!(place.state().phase, Phase::Loaded);
    });
}

#[test]
fn an_emulation_failure_is_shown_with_all_that_is_known() {
    let place = Place::new();
    // mov ebx, 0xfeedface; mov rax, cr4; or ah, 2 (OSFXSR); mov cr4, rax;
    // paddd xmm0, [0x30000000], where there is no memory: KVM has to emulate it, and cannot.
    let setup = b"\xbb\xce\xfa\xed\xfe\x0f\x20\xe0\x80\xcc\x02\x0f\x22\xe0";
    let code = [
        setup.as_slice(),
        b"\x66\x0f\xfe\x04\x25\x00\x00\x00\x30\xf4",
    ]
    .concat();
    load_code(&place, &code);
    let ended = place.start("").wait();
    assert_eq!(ended.status, Some(4), "{ended:?}");
    let at = ENTRY + setup.len() as u64;
    for text in [
        "rhyve: guest0: error: vCPU 0: KVM internal error, suberror 1: ",
        "KVM had to emulate an instruction that its emulator does not know",
        "rbx 00000000feedface",
        &format!("rip {at:016x}"),
        "cs 0008 base 0000000000000000",
        "code 66 0f fe 04 25 00 00 00 30 f4",
    ] {
        assert!(ended.errors.contains(text), "{text}: {}", ended.errors);
    }
    let state = place.state();
    let Phase::Stopped {
        reason: StopReason::Error,
        detail: Some(detail),
    } = &state.phase
    else {
        panic!("{:?}", state.phase)
    };
    assert!(detail.contains("suberror 1"), "{detail}");
    let registers = &state.vcpus[0].registers;
    assert_eq!((registers.rip, registers.rbx), (at, 0xfeed_face));
}
