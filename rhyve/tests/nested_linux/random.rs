//! virtio-rnd under Debian's unmodified driver, by each transport and each kind of interrupt.

use super::devices::device;
use super::support::{Place, Process};
use super::{boot, ends, number, shell};

/// Has Linux read random bytes from a virtio-rnd device of this transport in this place, and returns
/// the interrupts of its virtio devices.
pub fn interrupts(place: &Place, guest: &mut Process, at: &str, transport: &str) -> String {
    let current = shell(guest, "cat /sys/class/misc/hw_random/rng_current");
    assert_eq!(current, "virtio_rng.0", "{transport}");
    // Random bytes do not become fewer by compression.
    let compressed = number(guest, "head -c 5000 /dev/hwrng | gzip | wc -c");
    assert!(compressed >= 5000, "{transport}: {compressed}");
    let rnd = device(place, "virtio-rnd");
    assert_eq!(rnd["slot"], at);
    let used = if transport == "legacy" {
        "legacy"
    } else {
        "modern"
    };
    assert_eq!(rnd["virtio"]["transport"], used);
    assert!(rnd["counters"]["bytes"].as_u64().unwrap() >= 5000, "{rnd}");
    shell(guest, "grep virtio /proc/interrupts")
}

// By MSI-X they come in `super::root`.
#[test]
#[ignore = "nested lane"]
fn random_bytes_come_by_intx() {
    let cloud = "linux/vmlinux";
    for (kernel, at, transport, options, cmdline, line) in [
        (cloud, "0:3:0", "legacy", "", "pci=nomsi", "19-fasteoi"),
        // A bus of its own. Linux uses MSI-X for virtio or none of its messages (drivers/virtio/
        // virtio_pci_common.c).
        (cloud, "9:2:0", "modern", "-W", "", "19-fasteoi"),
        // No tables, so the 8259s and the interrupt line register.
        (cloud, "0:3:0", "legacy", "", "pci=nomsi acpi=off", "XT-PIC"),
        // The MP table instead, which the cloud kernel does not read (CONFIG_X86_MPPARSE).
        (
            "linux-full/vmlinuz",
            "9:2:0",
            "transitional",
            "-a",
            "pci=nomsi,lastbus=9 acpi=off",
            "19-fasteoi",
        ),
    ] {
        let place = Place::new();
        let run = format!("{options} -s {at},virtio-rnd,virtio={transport}");
        let mut guest = boot(&place, kernel, "-m 256M", cmdline, &run);
        let shown = interrupts(&place, &mut guest, at, transport);
        assert!(
            shown.contains(line),
            "{kernel} {transport} {options} {cmdline}: {shown}"
        );
        ends(&mut guest, "reboot -f", 0);
    }
}
