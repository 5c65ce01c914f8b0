//! `kill -9`, which nothing can prepare for.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vmm_api::control::Client;
use vmm_api::state::{Phase, StopReason};

use crate::guests::{ENTRY, load, probe};
use crate::support::{Place, until};

/// A random number that `RHYVE_TEST_SEED` repeats.
fn seed() -> u64 {
    let given = std::env::var("RHYVE_TEST_SEED").ok();
    let seed = given.and_then(|text| text.parse().ok());
    seed.unwrap_or_else(|| RandomState::new().build_hasher().finish())
}

#[test]
fn rhyve_killed_at_random_moments_leaves_a_whole_object() {
    let place = Place::new();
    let kernel = probe(&place);
    let mut random = seed() | 1;
    println!("RHYVE_TEST_SEED={random}");
    // Moments are within 400 ms, or twice the time that it takes here to run.
    load(&place, "-m 64M", &kernel);
    let start = Instant::now();
    let mut guest = place.start("-c 2");
    until("it runs", || {
        place.vm().path().join("control.sock").exists()
    });
    let most = (start.elapsed().as_micros() as u64 * 2).max(400_000);
    guest.signal(Signal::SIGKILL);
    guest.wait();
    let mut killed_while_running = 0;
    for round in 0..20 {
        load(&place, "-m 64M", &kernel);
        let mut guest = place.start("-c 2");
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let delay = Duration::from_micros(random % most);
        thread::sleep(delay);
        guest.signal(Signal::SIGKILL);
        let ended = guest.wait();
        assert_eq!(
            ended.status,
            Some(128 + 9),
            "round {round}, {delay:?}: {ended:?}"
        );

        let state = place.state();
        match &state.phase {
            Phase::Loaded => {}
            Phase::Stopped {
                reason: StopReason::Killed,
                ..
            } => killed_while_running += 1,
            other => panic!("round {round}, {delay:?}: {other:?}"),
        }
        assert_eq!(place.vm().holder().unwrap(), None);
        let mut code = [0; 16];
        place
            .vm()
            .open_memory(&state)
            .unwrap()
            .read(ENTRY, &mut code)
            .unwrap();
        assert_ne!(code, [0; 16], "round {round}, {delay:?}");
        if round % 5 == 0 {
            // What a process sees of it.
            assert!(place.ok("vmmctl --list").contains("guest0"));
            assert!(
                place
                    .ok("vmmctl --vm=guest0 --get-rip")
                    .starts_with("rip[0]\t0x")
            );
        }
    }
    assert!(killed_while_running > 0);

    // The socket that the last one may have left is replaced.
    load(&place, "-m 64M", &kernel);
    let left = place.vm().path().join("control.sock");
    if !left.exists() {
        drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
    }
    let mut guest = place.start("-c 2");
    guest.console.expect("probe> ");
    Client::connect(&place.vm()).unwrap().status().unwrap();
    guest.console.send("hlt");
    assert_eq!(guest.wait().status, Some(2));
    assert!(!left.exists());
    place.ok("vmmctl --vm=guest0 --destroy");
    assert!(!place.path("root").join("guest0").exists());
}

#[test]
fn a_guest_killed_while_it_ran_says_so() {
    let place = Place::new();
    load(&place, "-m 64M", &probe(&place));
    let mut guest = place.start("-c 2");
    guest.console.expect("probe> ");
    guest.signal(Signal::SIGKILL);
    guest.wait();
    // It had two vCPUs, though their last states are nowhere.
    assert_eq!(place.state().vcpus.len(), 2);
    place.ok("vmmctl --vm=guest0 --cpu=1 --get-rip");
    let again = place.run("rhyve guest0");
    assert_eq!(again.status, Some(4), "{again:?}");
    assert!(
        again
            .errors
            .contains("has ended (rhyve was killed): load it again"),
        "{again:?}"
    );
    assert!(place.ok("vmmctl --list").contains("killed"));
}

#[test]
fn whoever_sees_it_run_finds_its_control_socket() {
    let place = Place::new();
    let kernel = probe(&place);
    for round in 0..20 {
        load(&place, "-m 64M", &kernel);
        let _guest = place.start("");
        until("the object says that the guest has it", || {
            place.state().phase != Phase::Loaded
        });
        let hello = Client::connect(&place.vm()).map(|client| client.hello().vcpus);
        assert!(matches!(hello, Ok(1)), "round {round}: {hello:?}");
    }
}

#[test]
fn a_vm_whose_control_socket_cannot_be_made_stays_loaded() {
    let place = Place::new();
    load(&place, "-m 64M", &probe(&place));
    let in_the_way = place.vm().path().join("control.sock");
    std::fs::create_dir(&in_the_way).unwrap();
    let refused = place.run("rhyve guest0");
    assert_eq!(refused.status, Some(4), "{refused:?}");
    assert!(
        refused.errors.contains("control.sock: cannot remove: "),
        "{refused:?}"
    );
    assert_eq!(place.state().phase, Phase::Loaded);
    std::fs::remove_dir(&in_the_way).unwrap();
    let mut guest = place.start("");
    guest.console.expect("probe> ");
}

#[test]
fn rhyveload_killed_at_random_moments_can_be_repeated() {
    let place = Place::new();
    let kernel = probe(&place);
    let line = format!("rhyveload -m 64M --kernel {} guest0", kernel.display());
    for round in 0..10 {
        let mut loader = crate::support::Process::start(place.command(&line));
        thread::sleep(Duration::from_micros(round * 700));
        loader.signal(Signal::SIGKILL);
        loader.wait();
        // Half-made or not, it can be listed and loaded.
        place.ok("vmmctl --list");
        load(&place, "-m 64M", &kernel);
        assert_eq!(place.state().phase, Phase::Loaded);
    }
}
