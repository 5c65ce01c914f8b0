//! virtio-rnd under Debian's unmodified driver, by each transport and each kind of interrupt.

use super::support::Place;
use super::{boot, ends, number, shell};

/// Boots Linux with a virtio-rnd device of this transport in this place, has it read random bytes,
/// and returns its interrupts.
fn interrupts(at: &str, transport: &str, options: &str, cmdline: &str) -> String {
    let place = Place::new();
    let run = format!("{options} -s {at},virtio-rnd,virtio={transport}");
    let mut guest = boot(&place, "linux/vmlinux", "-m 256M", cmdline, &run);
    let current = shell(&mut guest, "cat /sys/class/misc/hw_random/rng_current");
    assert_eq!(current, "virtio_rng.0", "{transport}");
    // Random bytes do not become fewer by compression.
    let compressed = number(&mut guest, "head -c 5000 /dev/hwrng | gzip | wc -c");
    assert!(compressed >= 5000, "{transport}: {compressed}");
    let interrupts = shell(&mut guest, "grep virtio0 /proc/interrupts");
    let text = place.ok("vmmctl --vm=guest0 --get-devices --json");
    let said: serde_json::Value = serde_json::from_str(&text).unwrap();
    let rnd = &said["devices"][1];
    assert_eq!(
        (&rnd["slot"], &rnd["kind"]),
        (&at.into(), &"virtio-rnd".into())
    );
    let used = if transport == "legacy" {
        "legacy"
    } else {
        "modern"
    };
    assert_eq!(rnd["virtio"]["transport"], used);
    assert!(rnd["counters"]["bytes"].as_u64().unwrap() >= 5000, "{rnd}");
    ends(&mut guest, "reboot -f", 0);
    interrupts
}

#[test]
#[ignore = "nested lane"]
fn random_bytes_come_by_msix() {
    for (transport, cpus) in [
        ("legacy", "-c 1"),
        ("modern", "-c 4"),
        ("transitional", "-c 2"),
    ] {
        let shown = interrupts("0:3:0", transport, cpus, "");
        assert!(shown.contains("virtio0-input"), "{transport}: {shown}");
    }
}

#[test]
#[ignore = "nested lane"]
fn random_bytes_come_by_intx() {
    for (at, transport, options, cmdline, line) in [
        ("0:3:0", "legacy", "", "pci=nomsi", "19-fasteoi"),
        // A bus of its own. Linux uses MSI-X for virtio or none of its messages (drivers/virtio/
        // virtio_pci_common.c).
        ("9:2:0", "modern", "-W", "", "19-fasteoi"),
        // No tables, so the 8259s and the interrupt line register.
        ("0:3:0", "legacy", "", "pci=nomsi acpi=off", "XT-PIC"),
    ] {
        let shown = interrupts(at, transport, options, cmdline);
        assert!(
            shown.contains(line),
            "{transport} {options} {cmdline}: {shown}"
        );
    }
}
