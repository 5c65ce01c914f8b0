//! What serial ports can be connected to.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::libc::O_NOCTTY;

use crate::guests::{ask, load, probe, start_probe};
use crate::support::{Console, Place, Process, VM, until};

/// Runs the probe with COM1 connected to this, and returns where that is.
fn start(place: &Place, com1: &str) -> (Process, String) {
    load(place, "-m 64M", &probe(place));
    let mut guest = Process::start(place.command(&format!("rhyve -l com1,{com1} {VM}")));
    guest.errors.expect("is at ");
    let location = guest.errors.expect("\n");
    (guest, location)
}

/// Talks to the probe's prompt at the other end of a connection.
fn talk(mut console: Console) {
    // The prompt may have been shown before anybody listened: then ^U has it shown once more.
    until("a prompt", || {
        let shown = console.find("probe> ", Duration::from_secs(2)).is_some();
        if !shown {
            console.send("\x15");
        }
        shown
    });
    console.send("echo who is there");
    console.expect("\nwho is there\r\n");
}

#[test]
fn a_pseudo_terminal() {
    let place = Place::new();
    let (_guest, path) = start(&place, "pty");
    let open = || {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(O_NOCTTY);
        options.open(&path).unwrap()
    };
    // Somebody who looks in and leaves again does not disturb.
    let mut visitor = open();
    visitor.read_exact(&mut [0]).unwrap();
    drop(visitor);
    talk(Console::new(open(), open()));
}

#[test]
fn a_unix_socket() {
    let place = Place::new();
    let path = place.path("com1");
    // A socket that a killed rhyve left is replaced.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let (mut guest, location) = start(&place, &format!("unix:{}", path.display()));
    assert_eq!(location, path.to_str().unwrap());
    let client = UnixStream::connect(&path).unwrap();
    let mut second = UnixStream::connect(&path).unwrap();
    talk(Console::new(
        client.try_clone().unwrap(),
        client.try_clone().unwrap(),
    ));
    assert_eq!(second.read(&mut [0]).unwrap(), 0, "one client at a time");
    client.shutdown(std::net::Shutdown::Both).unwrap();

    guest.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(guest.wait().status, Some(1));
    assert!(!path.exists());
}

#[test]
fn a_tcp_port() {
    let place = Place::new();
    let (_guest, address) = start(&place, "tcp=0");
    assert!(address.starts_with("127.0.0.1:"), "{address}");
    let client = TcpStream::connect(address).unwrap();
    talk(Console::new(client.try_clone().unwrap(), client));
}

#[test]
fn a_file() {
    let place = Place::new();
    let path = place.path("log");
    std::fs::write(&path, "what was there before\n").unwrap();
    load(&place, "-m 64M", &probe(&place));
    let conf = format!("rhyve -l com1,file:{} {VM}", path.display());
    let _guest = Process::start(place.command(&conf));
    until("the report in the file", || {
        std::thread::sleep(Duration::from_millis(20));
        let text = std::fs::read_to_string(&path).unwrap();
        text.starts_with("what was there before\n") && text.ends_with("probe> ")
    });
}

#[test]
fn all_four_ports_at_once() {
    let place = Place::new();
    let log = place.path("com2");
    let socket = place.path("com3");
    let options = format!(
        "-l com2,file:{} -l com3,unix:{} -l com4,tcp=0",
        log.display(),
        socket.display()
    );
    let (mut guest, _) = start_probe(&place, &options);
    guest.errors.expect("com4 is at ");
    let mut tcp = TcpStream::connect(guest.errors.expect("\n")).unwrap();
    let mut unix = UnixStream::connect(&socket).unwrap();

    ask(&mut guest, "out 0x2f8 0x32");
    ask(&mut guest, "out 0x3e8 0x33");
    ask(&mut guest, "out 0x2e8 0x34");
    let mut byte = [0];
    unix.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"3");
    tcp.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"4");

    unix.write_all(b"U").unwrap();
    tcp.write_all(b"T").unwrap();
    for (port, status, value) in [("0x3e8", "0x3ed", "0x55"), ("0x2e8", "0x2ed", "0x54")] {
        // Data is ready (16550A, line status register, bit 0).
        until("data is ready", || {
            let answer = ask(&mut guest, &format!("in {status}"));
            answer.trim_end().ends_with('1')
        });
        let read = ask(&mut guest, &format!("in {port}"));
        assert!(read.contains(&format!("in {port} {value}")), "{read}");
    }
    guest.console.send("hlt");
    assert_eq!(guest.wait().status, Some(2));
    let mut text = String::new();
    File::open(log).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "2");
}

#[test]
fn a_closed_pipe_does_not_end_the_guest() {
    let place = Place::new();
    load(&place, "-m 64M", &probe(&place));
    let log = place.path("com2");
    let line = format!("rhyve -l com1,stdio -l com2,file:{} {VM}", log.display());
    let mut command = place.command(&line);
    // Nothing to read, nobody to hear.
    let (reader, writer) = std::io::pipe().unwrap();
    command.stdin(std::process::Stdio::null()).stdout(writer);
    drop(reader);
    let nobody = Console::new(std::io::empty(), std::io::sink());
    let mut guest = Process::with_console(command, nobody);
    std::thread::sleep(Duration::from_millis(1500));
    assert!(guest.is_running());
    guest.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(guest.wait().status, Some(1));
}
