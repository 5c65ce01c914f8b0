//! Single queues reset by Debian's unmodified driver: that of network cards does it when its rings get
//! another size. No other of Linux 6.1 does, and none takes a device up on answering in order.

use super::devices::device;
use super::support::Place;
use super::{boot, ends, shell};

#[test]
#[ignore = "nested lane"]
fn linux_changes_the_size_of_a_cards_rings() {
    let place = Place::new();
    let disk = place.path("disk.img");
    std::fs::File::create(&disk)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let run = format!("-s 1,virtio-net,user -s 2,virtio-blk,{}", disk.display());
    let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", "ip=10.0.2.15/24", &run);
    let sizes = || {
        let told = device(&place, "virtio-net");
        let queues = told["virtio"]["queues"].as_array().unwrap().clone();
        let sizes = queues.iter().map(|queue| queue["size"].as_u64().unwrap());
        sizes.collect::<Vec<_>>()
    };
    let before = sizes();
    // With frames on their way, of every size.
    shell(
        &mut guest,
        "{ ping -q -i 0.01 -s 1400 -c 100000 10.0.2.2 >/dev/null & }",
    );
    // Below 19 Linux would wait for room for ever (2 + MAX_SKB_FRAGS, drivers/net/virtio_net.c).
    for size in [32, 128, 64, before[0]] {
        let changed = shell(&mut guest, &format!("rings eth0 {size}; echo $?"));
        assert_eq!(changed, "0", "{size}");
        assert_eq!(sizes()[..2], [size, size]);
        // The control queue stays as it is.
        assert_eq!(sizes()[2..], before[2..]);
        let pinged = shell(
            &mut guest,
            "ping -q -i 0.1 -c 20 10.0.2.2 | grep -c '20 packets received'",
        );
        assert_eq!(pinged, "1", "{size}");
    }
    assert_eq!(shell(&mut guest, "rings eth0 65536 2>&1; echo $?"), "1");
    for kind in ["virtio-net", "virtio-blk"] {
        let told = device(&place, kind);
        let features = |list: &str| told["virtio"][list].to_string();
        assert!(features("features").contains("ring-reset"), "{told}");
        assert!(!features("features").contains("in-order"), "{told}");
        assert_eq!(told["counters"]["bad requests"], 0, "{told}");
    }
    ends(&mut guest, "poweroff -f", 1);
}
