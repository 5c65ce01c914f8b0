//! Console ports, balloon, sockets and entropy under Debian's unmodified drivers, in two boots.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use super::support::{PATIENCE, Place, Process, until};
use super::suspend::again;
use super::{boot, ends, number, shell};

const MIB: u64 = 1 << 20;

/// Bytes of the host's tmpfs that guest memory takes.
fn used(place: &Place) -> u64 {
    let memory = place.path("root/guest0/mem");
    memory.metadata().unwrap().blocks() * 512
}

/// What `vmmctl --get-devices` says of the device of this kind.
pub fn device(place: &Place, kind: &str) -> serde_json::Value {
    let text = place.ok("vmmctl --vm=guest0 --get-devices --json");
    let said: serde_json::Value = serde_json::from_str(&text).unwrap();
    let devices = said["devices"].as_array().unwrap();
    let found = devices.iter().find(|device| device["kind"] == kind);
    found.unwrap_or_else(|| panic!("{kind}: {text}")).clone()
}

/// Backs all of guest memory on the host, as a guest that has used all of it would.
fn fill(place: &Place) {
    let memory = place.path("root/guest0/mem");
    let length = memory.metadata().unwrap().len().to_string();
    let mut fallocate = Command::new("fallocate");
    fallocate.args(["--length", &length]).arg(&memory);
    assert!(fallocate.status().unwrap().success());
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn consoles(place: &Place, guest: &mut Process) {
    // Where the pseudo-terminal is stands on standard error.
    guest.errors.expect("console is at ");
    let terminal = guest.errors.expect("\n");
    // What has it open when its size changes hears of it.
    shell(guest, "exec 4<>/dev/hvc0; stty raw -echo <&4");
    let size = ["-F", &terminal, "rows", "33", "cols", "111"];
    assert!(Command::new("stty").args(size).status().unwrap().success());
    let mut console = std::fs::File::options();
    // Not as the controlling terminal of the lane: its end would be everybody's.
    console.custom_flags(nix::libc::O_NOCTTY);
    let mut console = console.read(true).write(true).open(&terminal).unwrap();
    console.write_all(b"x").unwrap();
    let size = || shell(guest, "stty size <&4");
    let sizes: Vec<String> = std::iter::repeat_with(size).take(3).collect();
    assert!(sizes.iter().any(|size| size == "33 111"), "{sizes:?}");
    shell(guest, "echo hello >&4; exec 4>&-");
    let mut hello = [0; 5];
    console.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");

    let names = shell(guest, "cat /sys/class/virtio-ports/vport*/name");
    assert_eq!(names, "console\nagent\nlog");
    let mut agent = connect(&place.path("agent"));
    agent.write_all(b"question\n").unwrap();
    // A program of the guest answers through the same port.
    let mut port = |name| {
        let find = format!("basename $(dirname $(grep -lx {name} /sys/class/virtio-ports/*/name))");
        format!("/dev/{}", shell(guest, &find))
    };
    let (agent_port, log_port) = (port("agent"), port("log"));
    let answer =
        format!("exec 3<>{agent_port}; read word <&3; echo \"answer to $word\" >&3; exec 3>&-");
    assert_eq!(shell(guest, &answer), "");
    let mut line = String::new();
    BufReader::new(agent).read_line(&mut line).unwrap();
    assert_eq!(line, "answer to question\n");
    // More than a wire holds.
    shell(
        guest,
        &format!("head -c 100000 /dev/zero | tr '\\0' z >{log_port}"),
    );
    let log = place.path("log");
    until("the log", || {
        log.metadata().is_ok_and(|log| log.len() == 100_000)
    });
    assert!(
        std::fs::read(&log)
            .unwrap()
            .iter()
            .all(|&byte| byte == b'z')
    );
}

fn sockets(place: &Place, guest: &mut Process) {
    let path = place.path("vsock");
    let ask = |port: u32| {
        let mut stream = connect(&path);
        stream
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        (stream, line)
    };
    let (_, refused) = ask(99);
    assert!(refused.starts_with("ERR "), "{refused}");

    shell(guest, "vsock listen 1234 & sleep 1");
    let (mut stream, line) = ask(1234);
    assert!(line.starts_with("OK "), "{line}");
    let sent: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
    let mut writer = stream.get_ref().try_clone().unwrap();
    let mut echo = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            writer.write_all(&sent).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        stream.read_to_end(&mut echo).unwrap();
    });
    assert!(echo == sent, "{} of {} bytes", echo.len(), sent.len());

    let listener = UnixListener::bind(place.path("vsock_5000")).unwrap();
    let served = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        stream.write_all(text.to_uppercase().as_bytes()).unwrap();
    });
    assert_eq!(
        shell(guest, "echo from the guest | vsock connect 5000"),
        "FROM THE GUEST"
    );
    served.join().unwrap();
    assert_eq!(shell(guest, "echo x | vsock connect 5001; echo $?"), "1");
}

fn share(place: &Place, guest: &mut Process) {
    let mount = |tag| {
        format!(
            "mkdir -p /{tag}; mount -t 9p -o trans=virtio,version=9p2000.L {tag} /{tag}; echo $?"
        )
    };
    assert_eq!(shell(guest, &mount("rw")), "0");
    assert_eq!(shell(guest, &mount("ro")), "0");
    let shared = place.path("share");
    assert_eq!(
        shell(guest, "cat /rw/hello /ro/hello"),
        "from the host\nfrom the host"
    );
    shell(
        guest,
        "mkdir /rw/made; head -c 300000 /dev/urandom >/rw/made/file; sync",
    );
    let sum = shell(guest, "md5sum </rw/made/file");
    let file = std::fs::File::open(shared.join("made/file")).unwrap();
    let host = Command::new("md5sum").stdin(file).output().unwrap();
    assert_eq!(String::from_utf8(host.stdout).unwrap().trim(), sum);
    assert_eq!(
        shell(
            guest,
            "umount /rw; mount -t 9p -o trans=virtio,version=9p2000.L rw /rw; md5sum </rw/made/file"
        ),
        sum
    );
    let work = "cd /rw && mv made/file made/other && ln -s made/other link && cat link | md5sum && rm -r made link && ls; cd";
    assert_eq!(shell(guest, work), format!("{sum}\nhello"));
    assert_eq!(shell(guest, "touch /ro/x 2>&1 | grep -c Read-only"), "1");
    assert_eq!(
        shell(guest, "(echo -n >/ro/hello) 2>/dev/null; cat /ro/hello"),
        "from the host"
    );
    // A link out of the directory leads into the guest's own file system.
    std::os::unix::fs::symlink("/etc/shadow", shared.join("out")).unwrap();
    assert_eq!(shell(guest, "cat /rw/out 2>/dev/null; echo $?"), "1");
}

fn balloon(place: &Place, guest: &mut Process) {
    let actual = |size: &str| {
        until(size, || {
            device(place, "virtio-balloon")["properties"]["actual"] == size
        });
    };
    fill(place);
    let before = used(place);
    place.ok("vmmctl --vm=guest0 --set-balloon=128M");
    actual("128M");
    let given = before - used(place);
    println!("inflated by 128 MiB: {} KiB less on the host", given >> 10);
    // All of it but for what the guest's own work touched meanwhile, which was there before.
    assert!(given >= 126 * MIB, "{given}");
    let shown = device(place, "virtio-balloon");
    assert!(
        shown["counters"]["pages inflated"].as_u64() >= Some(32_768),
        "{shown}"
    );
    let total = shown["properties"]["guest total"].as_str().unwrap();
    let total: u64 = total.parse().unwrap();
    assert!((100 * MIB..384 * MIB).contains(&total), "{shown}");
    place.ok("vmmctl --vm=guest0 --set-balloon=0");
    actual("0");
    assert_eq!(shell(guest, "echo all is back"), "all is back");
}

/// Another process's devices serve what this one's did.
fn resumed(place: &Place, guest: &mut Process) {
    // A file that is open, a port that somebody writes into, programs at both ends of a socket.
    shell(
        guest,
        "exec 5</rw/hello; read -r -n 4 word <&5; \
         (vsock listen 1235; echo \"it ends with $?\" >/tmp/listened) & sleep 1",
    );
    let mut stream = connect(&place.path("vsock"));
    stream.write_all(b"CONNECT 1235\n").unwrap();
    let mut ok = [0; 3];
    stream.read_exact(&mut ok).unwrap();
    place.ok("vmmctl --vm=guest0 --set-balloon=64M");
    until("64M", || {
        device(place, "virtio-balloon")["properties"]["actual"] == "64M"
    });
    again(place, guest);
    until("it answers", || {
        place.run("vmmctl --vm=guest0 --get-devices").status == Some(0)
    });
    let balloon = device(place, "virtio-balloon");
    let [target, actual] = ["target", "actual"].map(|key| balloon["properties"][key].clone());
    assert_eq!((target, actual), ("64M".into(), "64M".into()));
    place.ok("vmmctl --vm=guest0 --set-balloon=0");
    until("0", || {
        device(place, "virtio-balloon")["properties"]["actual"] == "0"
    });
    assert_eq!(
        shell(guest, "read -r rest <&5; exec 5<&-; echo $word $rest"),
        "from the host"
    );
    shell(guest, "echo again >/rw/again");
    assert_eq!(
        std::fs::read(place.path("share/again")).unwrap(),
        b"again\n"
    );

    guest.errors.expect("console is at ");
    let terminal = guest.errors.expect("\n");
    let mut console = std::fs::File::options();
    console.custom_flags(nix::libc::O_NOCTTY);
    let mut console = console.read(true).write(true).open(terminal).unwrap();
    shell(guest, "echo there >/dev/hvc0");
    let mut there = [0; 5];
    console.read_exact(&mut there).unwrap();
    assert_eq!(&there, b"there");

    // The guest's program hears that the other end is no more; new ones are.
    until("a reset", || {
        shell(guest, "cat /tmp/listened") == "it ends with 1"
    });
    let listener = UnixListener::bind(place.path("vsock_5002")).unwrap();
    let served = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
        stream.write_all(b"welcome back").unwrap();
    });
    assert_eq!(shell(guest, "echo x | vsock connect 5002"), "welcome back");
    served.join().unwrap();
}

#[test]
#[ignore = "nested lane"]
fn console_ports_sockets_and_a_balloon_serve_one_guest() {
    let place = Place::new();
    std::fs::create_dir(place.path("share")).unwrap();
    std::fs::write(place.path("share/hello"), "from the host\n").unwrap();
    let run = format!(
        "-c 2 -s 2,virtio-rnd,rate=2000 -s 3,virtio-console,console=pty,agent=unix:{},log=file:{} \
         -s 4,virtio-balloon,reporting=off -s 5,virtio-vsock,path={} \
         -s 6,virtio-9p,rw={share} -s 7,virtio-9p,ro={share},ro",
        place.path("agent").display(),
        place.path("log").display(),
        place.path("vsock").display(),
        share = place.path("share").display(),
    );
    let mut guest = boot(&place, "linux-full/vmlinuz", "-m 384M", "", &run);
    // More than the limit lets pass at once.
    assert_eq!(number(&mut guest, "head -c 4000 /dev/hwrng | wc -c"), 4000);
    let waits = &device(&place, "virtio-rnd")["counters"]["waits for the limit"];
    assert!(waits.as_u64() > Some(0), "{waits}");
    consoles(&place, &mut guest);
    sockets(&place, &mut guest);
    share(&place, &mut guest);
    balloon(&place, &mut guest);
    for kind in [
        "virtio-rnd",
        "virtio-console",
        "virtio-balloon",
        "virtio-vsock",
        "virtio-9p",
    ] {
        let device = device(&place, kind);
        assert_eq!(device["virtio"]["transport"], "modern", "{device}");
        assert_eq!(device["virtio"]["interrupts"], "msi-x", "{device}");
        let features = device["virtio"]["features"].as_array().unwrap();
        assert!(features.contains(&"ring-reset".into()), "{device}");
    }
    println!("{}", place.ok("vmmctl --vm=guest0 --get-devices"));
    resumed(&place, &mut guest);
    ends(&mut guest, "poweroff -f", 1);
    assert!(!place.path("agent").exists() && !place.path("vsock").exists());
}

#[test]
#[ignore = "nested lane"]
fn memory_that_a_guest_does_not_use_goes_back_by_itself() {
    let place = Place::new();
    let mut guest = boot(
        &place,
        "linux/vmlinuz",
        "-m 256M",
        "",
        "-s 2,virtio-balloon",
    );
    fill(&place);
    let before = used(&place);
    // Linux tells of free blocks of 2 MiB, two seconds after there are some (mm/page_reporting.c).
    shell(
        &mut guest,
        "dd if=/dev/zero of=/tmp/x bs=1M count=24 2>/dev/null; rm /tmp/x",
    );
    until("16 MiB less", || {
        thread::sleep(Duration::from_millis(200));
        used(&place) + 16 * MIB <= before
    });
    let reported = device(&place, "virtio-balloon")["counters"]["bytes reported"].as_u64();
    assert!(reported >= Some(16 * MIB), "{reported:?}");
    ends(&mut guest, "poweroff -f", 1);
}

/// Each device does what it is for.
fn all_serve(place: &Place, guest: &mut Process, round: &str) {
    assert_eq!(number(guest, "head -c 500 /dev/hwrng | wc -c"), 500);
    shell(guest, &format!("echo {round} >/dev/hvc0"));
    let log = place.path("log");
    until("a line in the console's file", || {
        std::fs::read_to_string(&log).is_ok_and(|log| log.contains(round))
    });
    let mount = "mkdir -p /src; mount -t 9p -o trans=virtio,version=9p2000.L src /src";
    let write = format!("{mount} && echo {round} >/src/written && umount /src; echo $?");
    assert_eq!(shell(guest, &write), "0");
    let written = std::fs::read_to_string(place.path("share/written"));
    assert_eq!(written.unwrap().trim_end(), round);
    for size in ["32M", "0"] {
        place.ok(&format!("vmmctl --vm=guest0 --set-balloon={size}"));
        until(size, || {
            device(place, "virtio-balloon")["properties"]["actual"] == size
        });
    }
}

#[test]
#[ignore = "nested lane"]
fn legacy_devices_serve_a_driver_that_leaves_and_comes_back() {
    let place = Place::new();
    std::fs::create_dir(place.path("share")).unwrap();
    let run = format!(
        "-s 2,virtio-rnd,virtio=legacy -s 3,virtio-console,console=file:{},virtio=legacy \
         -s 4,virtio-balloon,virtio=legacy -s 5,virtio-9p,src={},virtio=legacy",
        place.path("log").display(),
        place.path("share").display(),
    );
    let mut guest = boot(&place, "linux-full/vmlinuz", "-m 256M", "", &run);
    all_serve(&place, &mut guest, "first");
    for driver in [
        "virtio_rng",
        "virtio_console",
        "virtio_balloon",
        "9pnet_virtio",
    ] {
        let again = format!(
            "cd /sys/bus/virtio/drivers/{driver} && device=$(basename virtio*) && \
             echo $device >unbind && echo $device >bind; echo $?; cd /"
        );
        assert_eq!(shell(&mut guest, &again), "0", "{driver}");
    }
    all_serve(&place, &mut guest, "second");
    for kind in [
        "virtio-rnd",
        "virtio-console",
        "virtio-balloon",
        "virtio-9p",
    ] {
        let device = device(&place, kind);
        assert_eq!(device["virtio"]["transport"], "legacy", "{device}");
    }
    ends(&mut guest, "poweroff -f", 1);
}
