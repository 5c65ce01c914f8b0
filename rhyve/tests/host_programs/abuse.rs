//! A guest that writes to every port, and clients that do to the control socket what they like.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_api::control::Client;

use crate::guests::{ask, start_probe};
use crate::support::Place;

#[test]
fn random_port_accesses_do_no_harm() {
    let place = Place::new();
    for seed in 1..=3 {
        let (mut guest, _) = start_probe(&place, "-c 2");
        let answer = ask(&mut guest, &format!("ports {seed} 3000 all"));
        assert!(answer.contains("3000 ok"), "seed {seed}: {answer}");
        assert_eq!(ask(&mut guest, "echo alive"), "alive\r\n");
        guest.console.send("poweroff");
        let ended = guest.wait();
        assert_eq!(ended.status, Some(1), "seed {seed}: {ended:?}");
    }
}

/// A connection to the control socket that has heard the greeting. Clients that have just left may
/// still count, and this one be refused for them.
fn connect(place: &Place) -> UnixStream {
    loop {
        let (stream, greeting) = greet(place);
        if greeting.contains("\"protocol\"") {
            return stream;
        }
        assert!(greeting.contains("\"limit\""), "{greeting}");
    }
}

fn greet(place: &Place) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(place.vm().path().join("control.sock")).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    stream
        .set_write_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let (mut greeting, mut byte) = (String::new(), [0]);
    while byte != *b"\n" {
        stream.read_exact(&mut byte).unwrap();
        greeting.push(byte[0].into());
    }
    (stream, greeting)
}

#[test]
fn the_control_socket_stands_abuse() {
    let place = Place::new();
    let (mut guest, _) = start_probe(&place, "-c 2");
    let good = |place: &Place| Client::connect(&place.vm()).unwrap().registers(1).unwrap();

    // Garbage is answered, line by line, or hung up on.
    let mut garbage = connect(&place);
    garbage
        .write_all(b"\0\xff\xfe garbage\n{\"id\":1,\"request\":\"fly\"}\n[]\n")
        .unwrap();
    let mut answer = [0; 512];
    let length = garbage.read(&mut answer).unwrap();
    assert!(String::from_utf8_lossy(&answer[..length]).contains("error"));
    let mut endless = connect(&place);
    let _ = endless.write_all(&[b'x'; 100_000]);
    good(&place);

    // A flood whose answers nobody reads.
    let mut flood = connect(&place);
    flood.set_nonblocking(true).unwrap();
    let line = b"{\"id\":1,\"request\":{\"registers\":{\"vcpu\":0}}}\n".repeat(1000);
    let until = Instant::now() + Duration::from_millis(500);
    while Instant::now() < until {
        let _ = flood.write(&line);
    }
    good(&place);
    drop((garbage, endless, flood));

    // As many clients as there may be say nothing, or half a line.
    let silent: Vec<_> = (0..15).map(|_| connect(&place)).collect();
    for mut half in &silent {
        half.write_all(b"{\"id\":").unwrap();
    }
    good(&place);
    assert_eq!(ask(&mut guest, "echo undisturbed"), "undisturbed\r\n");
    drop(silent);

    // Requests for what is not there.
    let mut client = Client::connect(&place.vm()).unwrap();
    client.registers(2).unwrap_err();
    client.nmi(u32::MAX).unwrap_err();
    client.pause().unwrap();
    client.pause().unwrap();
    assert_eq!(client.registers(0).unwrap(), client.registers(0).unwrap());
    client.resume().unwrap();
    assert_eq!(ask(&mut guest, "echo and on"), "and on\r\n");

    // And it can end the guest.
    client.stop().unwrap();
    let ended = guest.wait();
    assert_eq!(ended.status, Some(1), "{ended:?}");
}
