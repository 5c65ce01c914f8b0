//! virtio-net under the probe kernel's own driver, which runs on any KVM.

use crate::guests::{ask, start_probe};
use crate::support::Place;

#[test]
fn both_interfaces_of_a_card_serve_a_driver_one_after_the_other() {
    let place = Place::new();
    let pcap = place.path("pcap");
    let options = format!(
        "-s 3,virtio-net,user,mac=00:a0:98:01:02:03,pcap={} -s 4,virtio-net,user,virtio=legacy \
         -s 5,virtio-net,user,virtio=modern",
        pcap.display()
    );
    let (mut guest, _) = start_probe(&place, &options);
    let mut check = |command: &str, answer: &str| {
        let found = ask(&mut guest, command);
        let answer = format!("probe: net {answer}");
        assert!(found.contains(&answer), "{command}: {found}");
    };
    // The same card by each of its interfaces, twice.
    for kind in ["legacy", "modern", "legacy", "modern"] {
        check(
            &format!("net {kind} 0"),
            &format!("{kind} mac 0xa098010203 ok"),
        );
        check("net ping 4 7", "ping 4 ok");
    }
    check("net legacy 1", "legacy mac");
    check("net ping 8 9", "ping 8 ok");
    check("net modern 2", "modern mac");
    check("net ping 8 11", "ping 8 ok");
    check("net modern 1", "FAILED (no modern registers)");
    check("net legacy 2", "FAILED (no legacy registers)");
    let devices = place.ok("vmmctl --vm=guest0 --get-devices");
    assert!(devices.contains("0 bad requests"), "{devices}");
    // Four rounds of a question and four echoes, and their answers.
    let length = std::fs::read(&pcap).unwrap().len();
    assert!(length > 4 * 2 * (42 + 4 * 106), "{length}");
}

#[test]
fn no_socket_is_left_behind() {
    let place = Place::new();
    let paths = ["wire", "sockets", "port"].map(|name| place.path(name));
    let [wire, sockets, port] = paths.each_ref().map(|path| path.display());
    let options = format!(
        "-s 3,virtio-net,socket,listen={wire} -s 4,virtio-vsock,path={sockets} \
         -s 5,virtio-console,port=unix:{port}"
    );
    let (mut guest, _) = start_probe(&place, &options);
    assert_eq!(paths.each_ref().map(|path| path.exists()), [true; 3]);
    guest.console.send("hlt");
    assert_eq!(guest.wait().status, Some(2));
    assert_eq!(paths.each_ref().map(|path| path.exists()), [false; 3]);
}
