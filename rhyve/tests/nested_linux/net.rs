//! Network cards under Debian's unmodified driver: a tap interface in a network of the test's own, a
//! wire between two guests, the cable pulled, and what people do: ssh, and 1 GB.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use nix::sched::{CloneFlags, unshare};

use super::devices::device;
use super::support::{NOBODY, Place, Process, until};
use super::{boot, ends, number, root, shell};

/// Gives this thread, and what it starts, a network that nobody else sees. It is gone with them.
fn own_network() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace takes root");
    ip("link set lo up");
}

/// iproute2's ip.
fn ip(line: &str) -> String {
    let mut command = Command::new("/usr/sbin/ip");
    let output = command.args(line.split(' ')).output();
    let output = output.expect("ip of iproute2");
    assert!(output.status.success(), "ip {line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Sends `megabytes` from the guest to 10.9.0.1 and back over one connection.
fn there_and_back(guest: &mut Process, megabytes: u32) {
    let listener = TcpListener::bind("10.9.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mirror = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        all.len()
    });
    shell(
        guest,
        &format!("head -c {megabytes}000000 /dev/urandom >/tmp/there"),
    );
    let send = format!("nc 10.9.0.1 {port} </tmp/there >/tmp/back");
    assert_eq!(shell(guest, &send), "");
    assert_eq!(
        shell(guest, "cmp /tmp/there /tmp/back && echo same"),
        "same"
    );
    assert_eq!(mirror.join().unwrap(), megabytes as usize * 1_000_000);
}

fn pings(guest: &mut Process, address: &str) {
    let output = shell(guest, &format!("ping -c 3 -i 0.2 -w 60 {address}"));
    assert!(
        output.contains("3 packets received, 0% packet loss"),
        "{output}"
    );
}

/// The frames of a pcap file, and whether one of them is a request of ICMP's echo.
fn frames(path: &Path) -> (Vec<usize>, bool) {
    let bytes = std::fs::read(path).unwrap();
    let mut rest = &bytes[24..];
    let (mut lengths, mut echo) = (Vec::new(), false);
    while !rest.is_empty() {
        let length = u32::from_le_bytes(rest[8..12].try_into().unwrap()) as usize;
        let (frame, after) = rest[16..].split_at(length);
        let ipv4 = frame[12..14] == [8, 0] && frame[23] == 1;
        echo |= ipv4 && frame[34] == 8;
        lengths.push(length);
        rest = after;
    }
    (lengths, echo)
}

/// What is refused before a guest runs.
fn refusals() {
    let place = Place::new();
    let kernel = super::image("linux/vmlinuz");
    place.ok(&format!(
        "rhyveload -m 256M --kernel {} guest0",
        kernel.display()
    ));
    let refused = |card: &str, words: &str| {
        let line = format!("rhyve -s 1,virtio-net,{card} guest0");
        let unprivileged = words.contains("CAP_NET_ADMIN");
        let mut command = Command::new("setpriv");
        if unprivileged {
            command.arg("--bounding-set=-net_admin");
        }
        let inner = place.command(&line);
        command
            .arg("--")
            .arg(inner.get_program())
            .args(inner.get_args());
        command.env("RHYVE_ROOT", place.path("root"));
        let ended = Process::start(command).wait();
        assert_eq!(ended.status, Some(4), "{card}: {ended:?}");
        assert!(ended.errors.contains(words), "{card}: {ended:?}");
        assert_eq!(ended.errors.lines().count(), 1, "{ended:?}");
    };
    refused("tap,bridge=nobridge", "bridge nobridge: No such device");
    refused("tap,bridge=lo", "bridge lo (that is no bridge): ");
    refused("tap3", "CAP_NET_ADMIN");
    refused("tap:lo", "tap lo: cannot attach to the interface");
    // One that exists, with a queue that another program has.
    ip("tuntap add tap4 mode tap");
    refused("tap4,queues=2", "tap tap4: cannot attach to the interface");
    ip("link add bridge4 type bridge");
    ip("link set tap4 master bridge4");
    ip("link add bridge5 type bridge");
    refused("tap4,bridge=bridge5", "bridge bridge5 (it is in another): ");
    ip("link del bridge4");
    ip("link del bridge5");
    ip("link del tap4");
}

#[test]
#[ignore = "nested lane"]
fn cards_at_a_tap_and_at_a_wire_carry_what_linux_sends() {
    own_network();
    // TCP has few segments go at once where it finds the way to be slow, as a busy machine makes it.
    std::fs::write("/proc/sys/net/ipv4/tcp_min_tso_segs", "8").unwrap();
    refusals();
    let (first, second) = (Place::new(), Place::new());
    let (wire, pcap) = (first.path("wire"), first.path("pcap"));
    ip("link add bridge7 type bridge");
    ip("addr add 10.9.0.1/24 dev bridge7");
    ip("link set bridge7 up");
    let run = format!(
        "-c 2 -s 1,virtio-net,tap7,bridge=bridge7,pcap={} \
         -s 4,virtio-net,socket,listen={},mac=00:a0:98:00:00:01,mtu=1400",
        pcap.display(),
        wire.display()
    );
    let cmdline = "ip=10.9.0.2/24,10.9.0.1 ip1=10.8.0.1/24";
    let mut guest = boot(&first, "linux/vmlinuz", "-m 256M", cmdline, &run);
    let link = ip("link show tap7");
    assert!(
        link.contains(",UP") && link.contains("master bridge7"),
        "{link}"
    );
    let sys = |what: &str| format!("cat /sys/class/net/{what}");
    let told = device(&first, "virtio-net");
    assert_eq!(told["slot"], "0:1:0");
    let mac = shell(&mut guest, &sys("eth0/address"));
    assert_eq!(told["properties"]["mac"], *mac);
    assert_eq!(shell(&mut guest, &sys("eth1/address")), "00:a0:98:00:00:01");
    assert_eq!(number(&mut guest, &sys("eth1/mtu")), 1400);
    pings(&mut guest, "10.9.0.1");
    there_and_back(&mut guest, 6);

    let told = device(&first, "virtio-net");
    let features = told["virtio"]["features"].to_string();
    for name in [
        "mac",
        "status",
        "mrg-rxbuf",
        "csum",
        "guest-tso4",
        "host-tso4",
        "ctrl-vq",
    ] {
        assert!(features.contains(&format!("\"{name}\"")), "{name}: {told}");
    }
    for counter in ["bytes sent", "bytes received"] {
        let bytes = told["counters"][counter].as_u64().unwrap();
        assert!(bytes > 6_000_000, "{told}");
    }
    assert_eq!(told["counters"]["bad requests"], 0, "{told}");
    let (lengths, echo) = frames(&pcap);
    assert!(echo && lengths.iter().sum::<usize>() > 12_000_000);
    // Segments are left to the other side.
    assert!(
        lengths.iter().max() > Some(&5000),
        "{:?}",
        lengths.iter().max()
    );

    // By its control queue the driver says what it wants to receive, and another address.
    let told = |property: &str, value: &str| {
        until(value, || {
            let told = device(&first, "virtio-net");
            let is = told["properties"][property].as_str();
            is.is_some_and(|is| is.starts_with(value))
        });
    };
    told("receives", "its address, ");
    shell(&mut guest, "ifconfig eth0 promisc");
    told("receives", "everything");
    shell(&mut guest, "ifconfig eth0 -promisc");
    told("receives", "its address, ");
    shell(&mut guest, "ip link set eth0 address 00:a0:98:00:00:77");
    told("mac", "00:a0:98:00:00:77");
    // The host knows the old one.
    ip("neigh flush dev bridge7");
    pings(&mut guest, "10.9.0.1");

    // The cable is pulled, and plugged in.
    let carrier = sys("eth0/carrier");
    first.ok("vmmctl --vm=guest0 --set-link=1=down");
    until("no carrier", || number(&mut guest, &carrier) == 0);
    let lost = shell(&mut guest, "ping -c 1 -w 1 10.9.0.1 | grep received");
    assert!(lost.contains("100% packet loss"), "{lost}");
    first.ok("vmmctl --vm=guest0 --set-link=0:1:0=up");
    until("a carrier", || number(&mut guest, &carrier) == 1);
    pings(&mut guest, "10.9.0.1");
    // The interface is set down, takes nothing, and is set up again.
    ip("link set tap7 down");
    let lost = shell(&mut guest, "ping -c 2 -w 2 10.9.0.1 | grep received");
    assert!(lost.contains("100% packet loss"), "{lost}");
    ip("link set tap7 up");
    pings(&mut guest, "10.9.0.1");
    let no = first.run("vmmctl --vm=guest0 --set-link=3=up");
    assert!(no.errors.contains("no network card at 0:3:0"), "{no:?}");

    // The other end of the wire, by the other interface, comes and goes.
    let run = format!(
        "-s 3,virtio-net,socket,connect={},virtio=legacy -s 4,virtio-net,tap6,bridge=bridge7",
        wire.display()
    );
    let cmdline = "ip=10.8.0.2/24 ip1=10.9.0.3/24";
    let mut other = boot(&second, "linux/vmlinuz", "-m 128M", cmdline, &run);
    pings(&mut other, "10.8.0.1");
    pings(&mut guest, "10.8.0.2");
    // Both are on the bridge as well.
    pings(&mut other, "10.9.0.2");
    assert_eq!(
        device(&second, "virtio-net")["virtio"]["transport"],
        "legacy"
    );
    ends(&mut other, "poweroff -f", 1);

    // The interface goes away under it, while it waits for the next of several lone frames, and the guest
    // lives on.
    let ping = "for i in $(seq 20); do ping -c 1 -W 1 10.9.0.1 >/dev/null || echo no answer; done";
    assert_eq!(shell(&mut guest, ping), "");
    ip("link del tap7");
    until("no carrier", || number(&mut guest, &carrier) == 0);
    let told = device(&first, "virtio-net");
    assert_eq!(told["properties"]["link"], "down: its backend has gone");
    let ended = ends(&mut guest, "poweroff -f", 1);
    let why = "tap7: cannot receive: File descriptor in bad state";
    assert!(ended.errors.contains(why), "{ended:?}");
}

/// A descriptor of a new tap interface, which a program that is started inherits as `number`.
fn inherited(name: &str, number: i32) -> OwnedFd {
    let mut options = std::fs::File::options();
    let tun = options.read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    // IFF_TAP, IFF_NO_PI, IFF_VNET_HDR.
    request[16..18].copy_from_slice(&0x5002_u16.to_le_bytes());
    // SAFETY: TUNSETIFF reads and writes one ifreq of 40 bytes.
    let done = unsafe { nix::libc::ioctl(tun.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) };
    assert_eq!(done, 0);
    // Without FD_CLOEXEC.
    // SAFETY: nothing else has this number.
    assert_eq!(unsafe { nix::libc::dup2(tun.as_raw_fd(), number) }, number);
    // SAFETY: it is open, as of now.
    unsafe { OwnedFd::from_raw_fd(number) }
}

#[test]
#[ignore = "nested lane"]
fn a_card_with_two_pairs_of_queues_is_suspended_and_one_is_inherited() {
    own_network();
    let place = Place::new();
    ip("link add bridge8 type bridge");
    ip("addr add 10.9.0.1/24 dev bridge8");
    ip("link set bridge8 up");
    let _tap = inherited("tap9", 77);
    ip("addr add 10.7.0.1/24 dev tap9");
    ip("link set tap9 up");
    let run = "-c 2 -s 1,virtio-net,tap8,queues=2,bridge=bridge8 -s 2,virtio-net,fd=77";
    let cmdline = "ip=10.9.0.2/24 ip1=10.7.0.2/24";
    let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", cmdline, run);
    let told = device(&place, "virtio-net");
    assert_eq!(told["properties"]["queue pairs"], "2 of 2", "{told}");
    assert_eq!(
        told["virtio"]["queues"].as_array().unwrap().len(),
        5,
        "{told}"
    );
    pings(&mut guest, "10.7.0.1");
    there_and_back(&mut guest, 2);

    let started = "ping -i 0.1 -c 100000 10.9.0.1 >/tmp/pings &";
    shell(&mut guest, &format!("{{ {started} }}"));
    for _ in 0..3 {
        place.ok("vmmctl --vm=guest0 --suspend");
        assert_eq!(guest.wait().status, Some(1));
        guest = Process::start(place.command("rhyve guest0"));
        let look = "vmmctl --vm=guest0 --get-devices";
        until("it answers", || place.run(look).status == Some(0));
    }
    let told = device(&place, "virtio-net");
    assert_eq!(told["properties"]["queue pairs"], "2 of 2", "{told}");
    there_and_back(&mut guest, 2);
    pings(&mut guest, "10.9.0.1");
    pings(&mut guest, "10.7.0.1");
    assert_eq!(device(&place, "virtio-net")["counters"]["bad requests"], 0);
    ends(&mut guest, "poweroff -f", 1);
}

#[test]
#[ignore = "nested lane"]
fn the_user_network_takes_no_privileges() {
    own_network();
    let place = Place::new().of_nobody();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let run = format!(
        "-s 1,virtio-net,user,hostfwd=tcp::2222-:7,hostfwd=tcp::2223-:8,\
         guestfwd=tcp::80-127.0.0.1:{port},mtu=1400"
    );
    let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", "ip=dhcp", &run);
    until("an address by DHCP", || {
        shell(&mut guest, "ip -o -4 addr show eth0").contains("inet 10.0.2.15/24")
    });
    assert_eq!(shell(&mut guest, "ip route | grep default"), "");
    pings(&mut guest, "10.0.2.2");

    // From the host to the guest, and back.
    let listens = "{ nc -l -p 7 -e cat & }; until netstat -ltn | grep -q ':7 '; do :; done";
    shell(&mut guest, listens);
    let mut stream = TcpStream::connect("127.0.0.1:2222").unwrap();
    let sent: Vec<u8> = (0..2_000_000u32).map(|n| (n % 253) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let bytes = sent.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&bytes).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    writing.join().unwrap();
    assert!(got == sent, "{} bytes", got.len());
    // Nobody listens at the other port of the guest.
    let refused = TcpStream::connect("127.0.0.1:2223");
    let read = refused.and_then(|mut stream| stream.read(&mut [0]));
    assert!(!matches!(read, Ok(1..)), "{read:?}");

    // From the guest to the host: to what is forwarded, and to nothing else.
    let mirror = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
        (listener, all.len())
    });
    shell(&mut guest, "head -c 2000000 /dev/urandom >/tmp/there");
    shell(&mut guest, "nc 10.0.2.2 80 </tmp/there >/tmp/back");
    assert_eq!(
        shell(&mut guest, "cmp /tmp/there /tmp/back && echo same"),
        "same"
    );
    let (listener, length) = mirror.join().unwrap();
    assert_eq!(length, 2_000_000);
    for closed in [format!("10.0.2.2 {port}"), format!("10.0.2.3 {port}")] {
        let output = shell(&mut guest, &format!("nc -w 2 {closed} </dev/null; echo $?"));
        assert!(output.ends_with('1'), "{closed}: {output}");
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
    let told = device(&place, "virtio-net");
    assert_eq!(told["properties"]["backend"], "user", "{told}");
    assert_eq!(told["counters"]["bad requests"], 0, "{told}");
    ends(&mut guest, "poweroff -f", 1);
}

/// Runs a program of the guest's disk on this side; what it prints.
fn peer(name: &str, arguments: &[&str]) -> String {
    // Longer than anything else takes: a gigabyte through a slow processor.
    let mut command = Command::new("timeout");
    command.arg("600").arg(super::image("linux").join(name));
    command.args(arguments).env("DROPBEAR_PASSWORD", "rhyve");
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{name} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command in the guest by ssh, as root; `to` is where its server is found.
fn ssh(to: &[&str], command: &str) -> String {
    let login = ["-y", "-y", "-l", "root"];
    peer("ssh", &[&login[..], to, &[command]].concat())
}

const GIGABYTE: u64 = 1_000_000_000;

/// Sends 1 GB by iperf3 in one connection, to the guest or from it.
fn gigabyte(direction: &[&str]) {
    // What is under way when the sender has sent all is not counted by the receiver.
    let bytes = (GIGABYTE + 10_000_000).to_string();
    let client = ["--client", "10.9.0.2", "--json", "--bytes", &bytes];
    let said = peer("iperf3", &[&client[..], direction].concat());
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let received = said["end"]["sum_received"]["bytes"].as_u64();
    assert!(received >= Some(GIGABYTE), "{direction:?}: {said}");
}

/// The interface and the disk are made for the user who runs the guest. Its frames are as large as
/// they can be: rhyve without optimizations moves 7 MB/s here in ordinary ones.
#[test]
#[ignore = "nested lane"]
fn ssh_and_a_gigabyte_each_way_pass_without_privileges() {
    own_network();
    let place = Place::new().of_nobody();
    ip("tuntap add tap5 mode tap user 65534");
    ip("addr add 10.9.0.1/24 dev tap5");
    ip("link set tap5 up mtu 65000");
    let disk = root::disk(&place);
    chown(&disk, Some(NOBODY), Some(NOBODY)).unwrap();
    let run = format!(
        "-s 1,virtio-net,tap5,mtu=65000 -s 2,virtio-blk,{} \
         -s 3,virtio-net,user,hostfwd=tcp::2222-:22",
        disk.display()
    );
    let cmdline = "ip=10.9.0.2/24 ip1=dhcp";
    let mut guest = root::boot_root(&place, "-m 256M", cmdline, &run);
    for to in [&["10.9.0.2"][..], &["-p", "2222", "127.0.0.1"]] {
        assert_eq!(ssh(to, "hostname; id -u"), "rhyve\n0\n");
    }
    ssh(&["10.9.0.2"], "iperf3 --server --daemon");
    gigabyte(&[]);
    gigabyte(&["--reverse"]);
    let told = device(&place, "virtio-net");
    for counter in ["bytes received", "bytes sent"] {
        let bytes = told["counters"][counter].as_u64();
        assert!(bytes > Some(GIGABYTE), "{told}");
    }
    assert_eq!(told["counters"]["bad requests"], 0, "{told}");
    ends(&mut guest, "poweroff", 1);
}
