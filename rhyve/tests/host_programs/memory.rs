//! A file system that fills up while the guest runs.

use std::env;
use std::process::Command;

use vmm_api::state::{Phase, StopReason};

use crate::guests::{ENTRY, ask, start_probe};
use crate::support::{Place, Process, Tmpfs};

/// Set in the process that [`with_own_mounts`] starts.
const INSIDE: &str = "RHYVE_TEST_OWN_MOUNTS";

/// Runs the rest of the test called `name` in a process of its own, whose mounts nobody else sees.
pub fn with_own_mounts(name: &str, test: impl FnOnce()) {
    if env::var_os(INSIDE).is_some() {
        return test();
    }
    let mut again = Command::new("setpriv");
    again.args(["--pdeathsig", "KILL", "--", "unshare"]);
    // Whoever is not root is so in a user namespace.
    again.args(match nix::unistd::geteuid().is_root() {
        true => ["--mount"].as_slice(),
        false => &["--mount", "--map-root-user"],
    });
    again.arg(env::current_exe().unwrap());
    again.args(["--exact", name, "--include-ignored", "--nocapture"]);
    again.env(INSIDE, "1");
    let ended = Process::start(again).wait();
    let passed = ended.output.contains("test result: ok. 1 passed");
    assert!(passed, "{}\n{}", ended.output, ended.errors);
}

#[test]
fn a_full_file_system_stops_the_guest_and_leaves_its_object_whole() {
    with_own_mounts(
        "memory::a_full_file_system_stops_the_guest_and_leaves_its_object_whole",
        || {
            let outer = Place::new();
            let small = outer.path("small");
            let _mounted = Tmpfs::mount(&small, "66m");
            let place = Place::below(&small);
            let (mut guest, _) = start_probe(&place, "-c 2");
            // Something else takes the room that the guest was promised.
            std::fs::write(place.path("other"), vec![1; 40 << 20]).unwrap();
            assert!(ask(&mut guest, "touch 0x1000000 0x100000").contains("ok"));
            guest.console.send("touch 0x1000000 0x2f00000");
            let ended = guest.wait();
            assert_eq!(ended.status, Some(4), "{ended:?}");
            assert_eq!(ended.errors.lines().count(), 1, "{ended:?}");
            assert!(
                ended.errors.contains("no room for guest memory"),
                "{ended:?}"
            );

            let state = place.state();
            let Phase::Stopped { reason, .. } = state.phase else {
                panic!("{:?}", state.phase)
            };
            assert_eq!(reason, StopReason::Error);
            let rip = state.vcpus[0].registers.rip;
            assert!((ENTRY..ENTRY + 0x10_0000).contains(&rip), "{rip:#x}");
            let mut code = [0; 16];
            place
                .vm()
                .open_memory(&state)
                .unwrap()
                .read(rip, &mut code)
                .unwrap();
            assert_ne!(code, [0; 16]);
            assert!(
                place
                    .ok("vmmctl --vm=guest0 --get-all")
                    .contains(&format!("{rip:016x}"))
            );

            // With room again, it can be loaded and run.
            std::fs::remove_file(place.path("other")).unwrap();
            let (mut guest, _) = start_probe(&place, "-c 2");
            assert!(ask(&mut guest, "touch 0x1000000 0x2f00000").contains("ok"));
        },
    );
}
