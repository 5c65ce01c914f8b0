use std::fs;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

use super::*;
use crate::config::NetSpec;

fn slices(bytes: &mut [u8]) -> [VolatileSlice<'_>; 2] {
    let (first, second) = bytes.split_at_mut(bytes.len() / 2);
    [first.into(), second.into()]
}

fn spec(conf: &str) -> NetSpec {
    NetSpec::parse(conf).unwrap()
}

fn error(conf: &str) -> String {
    match open(&spec(conf)) {
        Ok((backend, _)) => panic!("{conf}: {:?}", backend.info()),
        Err(error) => crate::chain(&error),
    }
}

fn hear(port: &dyn Port) -> Vec<u8> {
    let end = Instant::now() + Duration::from_secs(10);
    let mut bytes = vec![0; 2000];
    loop {
        match port.receive(&slices(&mut bytes)) {
            Ok(len) => return bytes[..len].to_vec(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
        assert!(Instant::now() < end, "nothing comes");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// An end of a wire at `path`, and the place where it listens.
fn end(end: &str, path: &Path) -> (Arc<dyn Port>, Option<SocketFile>) {
    let (backend, file) = open(&spec(&format!("socket,{end}={}", path.display()))).unwrap();
    assert!(!backend.info().header && backend.port(1).is_none());
    (backend.port(0).unwrap(), file)
}

/// Both ends of a wire at `path`, connected, and that place.
fn wire(path: &Path) -> ([Arc<dyn Port>; 2], SocketFile) {
    let [(connecting, _), (listening, file)] = ["connect", "listen"].map(|e| end(e, path));
    let ends = [connecting, listening];
    for (from, to) in [(0, 1), (1, 0)] {
        let end = Instant::now() + Duration::from_secs(10);
        // What is sent before they have met is lost; then one end has to look first.
        while ends[to].receive(&slices(&mut [0; 100])).is_err() {
            ends[from].send(&slices(&mut [7; 20])).unwrap();
            let _ = ends[from].receive(&slices(&mut [0; 100]));
            assert!(Instant::now() < end);
        }
        while ends[to].receive(&slices(&mut [0; 100])).is_ok() {}
    }
    (ends, file.unwrap())
}

#[test]
fn a_wire_keeps_frames_apart_and_both_ends_may_come_back() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("wire");
    let ([connecting, listening], file) = wire(&path);
    for len in [60, 1514] {
        connecting.send(&slices(&mut vec![1; len])).unwrap();
    }
    assert_eq!(
        [hear(&*listening).len(), hear(&*listening).len()],
        [60, 1514]
    );
    listening.send(&slices(&mut [2; 70])).unwrap();
    assert_eq!(hear(&*connecting), [2; 70]);

    drop(connecting);
    let mut bytes = [0; 100];
    let gone = listening.receive(&slices(&mut bytes)).unwrap_err();
    assert_eq!(gone.kind(), io::ErrorKind::WouldBlock);
    listening.send(&slices(&mut [3; 60])).unwrap();
    let (back, _) = end("connect", &path);
    back.send(&slices(&mut [4; 60])).unwrap();
    assert_eq!(hear(&*listening), [4; 60]);
    drop((listening, file));
    assert!(!path.exists());
    assert!(back.wait().timeout.is_none());
    assert!(back.receive(&slices(&mut bytes)).is_err());
    assert!(back.wait().fd.is_none() && back.wait().timeout.is_some());
    let (again, _file) = end("listen", &path);
    assert!(back.receive(&slices(&mut bytes)).is_err(), "it tries");
    assert!(again.receive(&slices(&mut bytes)).is_err(), "and is heard");
    back.send(&slices(&mut [5; 60])).unwrap();
    assert_eq!(hear(&*again), [5; 60]);
}

#[test]
fn an_end_that_takes_nothing_holds_nobody_up_for_long() {
    let place = tempfile::tempdir().unwrap();
    let ([connecting, listening], _file) = wire(&place.path().join("wire"));
    let send = |byte| connecting.send(&slices(&mut [byte; 1000]));
    let mut under_way = 0;
    while send(1).is_ok() {
        under_way += 1;
    }
    let full = send(2).unwrap_err();
    assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    // Whoever waits for room looks again before there is any.
    let begun = Instant::now();
    while send(2).is_err() {
        let again = connecting.wait().timeout.expect("a time to look again");
        assert!(begun.elapsed() < Duration::from_secs(10));
        std::thread::sleep(again);
    }
    assert!(send(2).is_ok(), "lost as well, at once");
    for _ in 0..under_way {
        assert_eq!(hear(&*listening)[0], 1);
    }
    send(3).unwrap();
    assert_eq!(hear(&*listening)[0], 3);
    assert_eq!(connecting.wait().timeout, None);
}

#[test]
fn a_place_that_another_has_is_refused_and_a_ghost_replaced() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("wire");
    let conf = format!("socket,listen={}", path.display());
    let first = open(&spec(&conf)).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "this user's only");
    assert!(
        error(&conf).contains("cannot listen there"),
        "{}",
        error(&conf)
    );
    drop(first);
    // One that ended without a word.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    open(&spec(&conf)).map(|_| ()).unwrap();
    fs::write(&path, "a file").unwrap();
    assert!(error(&conf).contains("in use"), "{}", error(&conf));
    let long = "x".repeat(200);
    for end in ["listen", "connect"] {
        let text = error(&format!("socket,{end}=/tmp/{long}"));
        assert!(text.contains("cannot use that path"), "{text}");
    }
    // What will never be the other end is not waited for.
    let conf = format!("socket,connect={}", path.display());
    let text = error(&conf);
    assert!(text.contains("wire: cannot connect there: "), "{text}");
    fs::remove_file(&path).unwrap();
    let _stream = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let text = error(&conf);
    assert!(text.contains("wrong type for socket"), "{text}");
}

#[test]
fn what_passes_is_written_down() {
    let place = tempfile::tempdir().unwrap();
    let [path, pcap] = ["wire", "pcap"].map(|name| place.path().join(name));
    let conf = format!("socket,listen={},pcap={}", path.display(), pcap.display());
    let (backend, _file) = open(&spec(&conf)).unwrap();
    let port = backend.port(0).unwrap();
    let (other, _) = end("connect", &path);
    other.send(&slices(&mut [1; 60])).unwrap();
    hear(&*port);
    port.send(&slices(&mut [2; 80])).unwrap();
    let bytes = fs::read(&pcap).unwrap();
    assert_eq!(bytes[..8], [0x4d, 0x3c, 0xb2, 0xa1, 2, 0, 4, 0]);
    assert_eq!(bytes[20..24], [1, 0, 0, 0], "Ethernet");
    let words = |at: usize| {
        let word = |n| u32::from_le_bytes(bytes[at + n..at + n + 4].try_into().unwrap());
        (word(0), word(8), word(12))
    };
    let (seconds, kept, len) = words(24);
    assert!(seconds > 1_600_000_000 && (kept, len) == (60, 60));
    assert_eq!(bytes[40..100], [1; 60]);
    assert_eq!(words(100).2, 80);
    assert_eq!(bytes[116..], [2; 80]);

    // Whoever writes next, as this machine does when it goes on, or its clones, goes on behind that.
    drop((backend, port));
    let conf = format!("socket,connect=x,pcap={}", pcap.display());
    let [first, second] = [0; 2].map(|_| open(&spec(&conf)).unwrap().0.port(0).unwrap());
    for (byte, port) in [(3, &first), (4, &second), (5, &first)] {
        port.send(&slices(&mut [byte; 70])).unwrap();
    }
    let more = fs::read(&pcap).unwrap();
    assert_eq!(more[..bytes.len()], bytes);
    let records = more[bytes.len()..].chunks(16 + 70);
    let frames: Vec<u8> = records.map(|record| record[16]).collect();
    assert_eq!(frames, [3, 4, 5]);
    // And not into what somebody else has there.
    fs::write(&pcap, "a file of another kind").unwrap();
    let text = error(&conf);
    assert!(
        text.contains("pcap: there is something else in it"),
        "{text}"
    );
    assert_eq!(fs::read(&pcap).unwrap(), b"a file of another kind");

    let conf = format!("socket,connect=x,pcap={}/none/x", place.path().display());
    assert!(error(&conf).starts_with("pcap="), "{}", error(&conf));
}

#[test]
fn descriptors_that_are_none_of_a_tap_are_refused() {
    let file = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
    let text = error(&format!("fd={file}"));
    assert!(
        text.contains(&format!("descriptor {file} is no tap")),
        "{text}"
    );
    let text = error("fd=1021");
    assert!(
        text.contains("descriptor 1021") && text.contains("Bad file"),
        "{text}"
    );
}
