//! gdb drives the probe kernel; what is no gdb does no harm.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::guests::{ask, load, probe, start_probe};
use crate::support::{PATIENCE, Place, Process, VM};

/// Has gdb do these, one after the other; what it says.
fn gdb(place: &Place, target: &str, commands: &[&str]) -> String {
    let mut gdb = Command::new("timeout");
    gdb.args(["60", "gdb", "-nx", "-batch"]);
    let target = format!("target remote {target}");
    let first = [
        "set tcp connect-timeout 20",
        "set remotetimeout 20",
        &target,
    ];
    for command in first.iter().chain(commands) {
        gdb.args(["-ex", command]);
    }
    gdb.arg(probe(place)).stdin(Stdio::null());
    let output = gdb.output().unwrap();
    let found = output.status.code() != Some(127);
    assert!(found, "there is no gdb: apt-get install gdb");
    let errors = String::from_utf8_lossy(&output.stderr);
    format!("{}{errors}", String::from_utf8_lossy(&output.stdout))
}

/// The number that gdb printed as `$n`.
fn value(said: &str, n: u32) -> u64 {
    let line = said
        .lines()
        .find_map(|line| line.strip_prefix(&format!("${n} = 0x")));
    let digits = line.unwrap_or_else(|| panic!("${n} in {said}"));
    u64::from_str_radix(digits.trim(), 16).unwrap()
}

#[test]
fn gdb_waits_steps_leaves_and_comes_again() {
    let place = Place::new();
    load(&place, "-m 64M", &probe(&place));
    let command = format!("rhyve -c 2 -G w0 -l com1,stdio {VM}");
    let mut guest = Process::start(place.command(&command));
    guest.errors.expect("target remote ");
    let target = guest.errors.expect(", which");
    // QEMU's software processor takes an INT3 for an INT n, and so KVM in the nested lane gets no #BP
    // (raise_interrupt2 in excp_helper.c). In memory that it may not write, gdb has the processor do it.
    let lane = Path::new("/run/lane").exists();
    let code = if lane { "ro" } else { "rw" };
    let commands = [
        "info threads",
        "print/x $rip",
        "stepi",
        "print/x $rip",
        "set var $rbx = $rbx + 1",
        "set var $rbx = $rbx - 1",
        "print/x $cr0 & 1",
        "print/x *(unsigned char *)$rip",
        // What writes to the console.
        &format!("mem 0x200000 0x300000 {code}"),
        "rbreak uart..write",
        "continue",
        "print/x $pc",
        "print/x *(unsigned char *)$pc",
        "delete",
        "hbreak *$pc",
        "continue",
        "print/x $pc",
        "stepi",
        "print/x $pc",
        "detach",
    ];
    let said = gdb(&place, &target, &commands);
    for breakpoint in ["hit Breakpoint 1,", "hit Breakpoint 2,"] {
        assert!(said.contains(breakpoint), "{said}");
    }
    assert_ne!(value(&said, 6), 0xcc, "{said}");
    assert_eq!(value(&said, 7), value(&said, 5), "{said}");
    assert!(value(&said, 8) > value(&said, 7), "{said}");
    assert!(said.contains("(vCPU 1)"), "{said}");
    assert!(value(&said, 2) > value(&said, 1), "{said}");
    assert_eq!(value(&said, 3), 1, "{said}");
    guest.console.expect("probe> ");
    assert_eq!(ask(&mut guest, "echo free"), "free\r\n");

    let said = gdb(
        &place,
        &target,
        &["print/x $cr0 & 1", "print/x $efer", "detach"],
    );
    assert_eq!(value(&said, 1), 1, "{said}");
    assert_eq!(ask(&mut guest, "echo again"), "again\r\n");
    gdb(&place, &target, &["kill"]);
    assert_eq!(guest.wait().status, Some(1));
}

#[test]
fn garbage_and_silence_leave_the_guest_alone() {
    let place = Place::new();
    let socket = place.path("gdb");
    let (mut guest, _) = start_probe(&place, &format!("-G unix:{}", socket.display()));
    let mut pieces: Vec<Vec<u8>> = vec![
        vec![],
        b"\x03\x03$$$###".to_vec(),
        b"$g#00".to_vec(),
        b"$mffffffffffffffff,ffffffffffffffff#00".to_vec(),
        b"$Z0,ffffffffffffffff,1#00$vCont;s:ffffffff;c#00$P#00$G00#00".to_vec(),
        vec![b'$'; 1 << 16],
        [&b"$M0,fffff:"[..], &[b'a'; 1 << 14]].concat(),
    ];
    // A generator of numbers (xorshift) is enough for bytes of all kinds.
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..20 {
        let mut piece = Vec::new();
        for _ in 0..200 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            piece.push(seed as u8);
        }
        pieces.push(piece);
    }
    for piece in pieces {
        let mut wire = UnixStream::connect(&socket).unwrap();
        wire.set_read_timeout(Some(PATIENCE)).unwrap();
        // It may hang up in the middle.
        let _ = wire.write_all(&piece);
        let _ = wire.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = wire.read_to_end(&mut answer);
        assert_eq!(ask(&mut guest, "echo well"), "well\r\n");
    }
    // While a debugger is there, nobody else takes the machine away.
    let wire = UnixStream::connect(&socket).unwrap();
    crate::support::until("the debugger's stop", || {
        place.ok("vmmctl --list").contains("paused")
    });
    for option in ["--resume", "--suspend"] {
        let refused = place.run(&format!("vmmctl --vm=guest0 {option}"));
        assert_ne!(refused.status, Some(0), "{refused:?}");
        assert!(refused.errors.contains("debugger"), "{refused:?}");
    }
    drop(wire);
    assert_eq!(ask(&mut guest, "echo on"), "on\r\n");
    guest.console.send("poweroff");
    assert_eq!(guest.wait().status, Some(1));
    assert!(!socket.exists());
}
