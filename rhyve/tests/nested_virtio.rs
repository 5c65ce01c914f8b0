//! An unmodified Linux kernel drives virtio devices, by each transport and each kind of interrupt.
//!
//! `cargo xtask test nested` says in $RHYVE_TEST_LINUX where the guest image "linux" is.

#![cfg(test)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A program, which Cargo puts next to rhyve, on VMs below `root`, for two minutes at most.
fn program(name: &str, root: &Path) -> Command {
    let path = Path::new(env!("CARGO_BIN_EXE_rhyve")).with_file_name(name);
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "120"]).arg(path);
    command.env("RHYVE_ROOT", root);
    command
}

fn run(command: &mut Command) -> (Output, String) {
    let output = command.output().unwrap();
    let text = [&*output.stdout, &*output.stderr].concat();
    (output, String::from_utf8_lossy(&text).into_owned())
}

/// Boots Linux with a virtio-rnd device of this transport, has it read random bytes, and returns
/// what its console shows.
fn random_bytes(transport: &str, cpus: u32, options: &str) -> String {
    let image = std::env::var_os("RHYVE_TEST_LINUX");
    let image = PathBuf::from(image.expect("RHYVE_TEST_LINUX says where the Linux image is"));
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let root = place.path().join("root");

    let commands = "cat /sys/class/misc/hw_random/rng_current /proc/interrupts; \
                    head -c 5000 /dev/hwrng | gzip | wc -c; reboot -f";
    let line = format!("console=ttyS0 quiet panic=-1 {options} -- \"{commands}\"");
    let mut load = program("rhyveload", &root);
    load.args(["-m", "256M", "--cmdline", &line, "--initrd"]);
    load.arg(image.join("initramfs.cpio")).arg("--kernel");
    let (loaded, text) = run(load.arg(image.join("vmlinux")).arg("guest0"));
    assert!(loaded.status.success(), "{text}");

    let device = format!("3,virtio-rnd,virtio={transport}");
    let mut rhyve = program("rhyve", &root);
    rhyve.args(["-c", &cpus.to_string(), "-l", "com1,stdio"]);
    let (ended, shown) = run(rhyve.args(["-s", &device, "guest0"]));
    assert_eq!(ended.status.code(), Some(0), "{shown}");
    assert!(shown.contains("virtio_rng.0"), "{shown}");
    // Random bytes do not become fewer by compression.
    let sizes = shown.lines().filter_map(|line| line.trim().parse().ok());
    assert!(sizes.into_iter().any(|size: u32| size >= 5000), "{shown}");
    shown
}

#[test]
#[ignore = "nested lane"]
fn linux_reads_random_bytes_by_msix() {
    for (transport, cpus) in [("legacy", 1), ("modern", 4), ("transitional", 2)] {
        let shown = random_bytes(transport, cpus, "");
        assert!(shown.contains("virtio0-input"), "{transport}: {shown}");
    }
}

#[test]
#[ignore = "nested lane"]
fn linux_reads_random_bytes_by_intx() {
    for (transport, options, line) in [
        ("legacy", "pci=nomsi", "19-fasteoi"),
        ("modern", "pci=nomsi", "19-fasteoi"),
        // No tables, so the 8259s and the interrupt line register.
        ("legacy", "pci=nomsi acpi=off", "XT-PIC"),
    ] {
        let shown = random_bytes(transport, 1, options);
        let mut lines = shown.lines().filter(|text| text.contains("virtio0"));
        let found = lines.any(|text| text.contains(line));
        assert!(found, "{transport} {options}: {shown}");
    }
}
