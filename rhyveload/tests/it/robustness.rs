//! Loads that are interrupted, and file systems without room.

use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use vmm_api::state::Phase;

use crate::kernels::{Ph, elf, plain};
use crate::process::{EXE, Place, stdout};

/// A kernel of so many MiB without a page of zeros.
fn large(mib: usize) -> Vec<u8> {
    let bytes = vec![0xf4; mib << 20];
    let len = bytes.len() as u64;
    elf(0, 0x20_0000, &[Ph::load(0x20_0000, 7, &bytes, len)])
}

#[test]
fn a_killed_loader_leaves_a_vm_that_can_be_loaded() {
    let place = Place::new();
    let small = place.file("small", &plain());
    let kernel = place.file("large", &large(24));
    let mut interrupted = 0;
    for round in 0..20 {
        let mut child = place
            .command(&["-m", "64"], &kernel)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        sleep(Duration::from_micros(1500 * round));
        child.kill().unwrap();
        let finished = child.wait().unwrap().success();
        interrupted += u32::from(!finished);
        if !place.is_absent() {
            // Loaded means whole; whatever else it is, it is not loaded.
            if let Ok(state) = place.vm().load_state()
                && state.phase == Phase::Loaded
                && state.machine.memory.lowmem == 64 << 20
            {
                let memory = place.vm().open_memory(&state).unwrap();
                let mut last = [0];
                memory.read(0x20_0000 + (24 << 20) - 1, &mut last).unwrap();
                assert_eq!(last, [0xf4]);
            }
        }
        // Every other round begins with a VM that is there.
        if round % 2 == 0 {
            stdout(&place.load(&["-m", "8"], &small));
            assert_eq!(place.state().machine.memory.lowmem, 8 << 20);
        }
    }
    assert!(interrupted > 0, "no loader was interrupted");
    stdout(&place.load(&["-m", "64"], &kernel));
    assert_eq!(place.state().phase, Phase::Loaded);
}

/// Runs a shell script in a mount namespace of its own, where $DIR is a tmpfs of 24 MiB.
fn on_a_small_tmpfs(script: &str) -> String {
    let place = Place::new();
    let dir = place.tmp.path().join("small");
    std::fs::create_dir(&dir).unwrap();
    let flags = if nix::unistd::geteuid().is_root() {
        "-m"
    } else {
        "-rm"
    };
    let mut command = Command::new("unshare");
    command
        .args([flags, "sh", "-c"])
        .arg(format!(
            "set -e; mount -t tmpfs -o size=24m rhyve-test \"$DIR\"; {script}"
        ))
        .env("DIR", &dir)
        .env("RHYVE_ROOT", dir.join("root"))
        .env("LOAD", EXE)
        .env("LARGE", place.file("large", &large(12)))
        .env("SMALL", place.file("plain", &plain()));
    let output = command.output().expect("unshare(1), of util-linux");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "this test mounts a tmpfs: run it as root, or allow user namespaces \
        (sysctl kernel.unprivileged_userns_clone=1): {stderr}"
    );
    String::from_utf8(output.stdout).unwrap() + &stderr
}

#[test]
fn a_tmpfs_that_fills_up_is_one_error_and_a_sane_vm() {
    let text = on_a_small_tmpfs(
        r#"
        head -c 16M /dev/zero > "$DIR/filler"
        if "$LOAD" -m 20M --kernel "$LARGE" fresh; then exit 9; fi
        test ! -e "$RHYVE_ROOT/fresh"
        "$LOAD" -q -m 20M --kernel "$SMALL" old
        if "$LOAD" -m 20M --kernel "$LARGE" old; then exit 9; fi
        cat "$RHYVE_ROOT/old/vm.json"
        if "$LOAD" -S -m 20M --kernel "$SMALL" old; then exit 9; fi
        rm "$DIR/filler"
        "$LOAD" -m 20M --kernel "$LARGE" old
        "#,
    );
    let full = text.matches("large: no room for guest memory at").count();
    assert_eq!(full, 2, "{text}");
    assert!(text.contains(r#""state": "created""#), "{text}");
    assert!(text.contains(r#""lowmem": 0"#), "{text}");
    assert!(
        text.contains("vm_setup_memory(lowmem): Cannot allocate memory"),
        "{text}"
    );
    assert!(text.contains("protocol=plain"), "{text}");
}
