//! gdb drives Linux; what is said is in docs/gdb.md, line for line.
//!
//! No software breakpoint is set here: QEMU's software processor takes an INT3 for an INT n, so KVM gets
//! no #BP of its guest (raise_interrupt2 in its excp_helper.c). The host lane has them.

use std::fs::File;
use std::process::Command;

use nix::pty::openpty;
use nix::sys::signal::Signal;

use crate::support::{Console, PATIENCE, Place, Process};
use crate::{boot, ends, number, shell};

/// gdb in a terminal.
struct Gdb {
    process: Process,
    transcript: String,
}

impl Gdb {
    /// Its working directory is the test's.
    fn start(place: &Place) -> Self {
        let pty = openpty(None, None).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "gdb", "-q", "-nx"]);
        for setting in ["confirm off", "pagination off", "remotetimeout 60"] {
            command.args(["-iex", &format!("set {setting}")]);
        }
        command.current_dir(place.path("")).env("TERM", "dumb");
        command.stdin(pty.slave.try_clone().unwrap());
        command.stdout(pty.slave);
        let master = File::from(pty.master);
        let console = Console::new(master.try_clone().unwrap(), master);
        let mut process = Process::with_console(command, console);
        let found = process.console.find("(gdb) ", PATIENCE);
        assert!(found.is_some(), "there is no gdb: apt-get install gdb");
        Self {
            process,
            transcript: "$ gdb -q\n".to_owned(),
        }
    }

    /// Types a command; what is said until `sign`.
    fn until(&mut self, command: &str, sign: &str) -> String {
        self.process.console.send(command);
        // The echo of what was typed.
        self.process.console.expect("\n");
        let said = self.process.console.expect(sign);
        self.transcript += &format!("(gdb) {command}\n{said}");
        said
    }

    fn say(&mut self, command: &str) -> String {
        self.until(command, "(gdb) ")
    }

    /// Lets the guest go on, and does `what` meanwhile; what gdb says of the stop.
    fn go_on(&mut self, what: impl FnOnce(&mut Process)) -> String {
        let begun = self.until("continue", "Continuing.\r\n");
        what(&mut self.process);
        let stop = self.process.console.expect("(gdb) ");
        self.transcript += &format!("Continuing.\n{stop}");
        begun + &stop
    }
}

/// What is the same each time: addresses and the number of the vCPU that came by are not.
fn lasting(transcript: &str) -> String {
    let mut text = String::new();
    let mut rest = transcript;
    while let Some((before, after)) = rest.split_once("0x") {
        let digits = after.find(|c: char| !c.is_ascii_hexdigit());
        let (number, after) = after.split_at(digits.unwrap_or(after.len()));
        let number = if number.len() > 4 { "..." } else { number };
        text += &format!("{before}0x{number}");
        rest = after;
    }
    text += rest;
    let text = text.replace('\r', "").replace("Thread 2 ", "Thread 1 ");
    let lines = text.lines().map(str::trim_end);
    let lines = lines.filter(|line| !line.starts_with("[Switching to Thread "));
    lines.collect::<Vec<_>>().join("\n")
}

/// The session that docs/gdb.md shows.
fn documented() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/gdb.md");
    let text = std::fs::read_to_string(path).unwrap();
    let blocks = text
        .split("```")
        .filter_map(|block| block.strip_prefix("console\n"));
    let mut sessions = blocks.filter(|block| block.starts_with("$ gdb -q\n"));
    sessions
        .next()
        .expect("a session in docs/gdb.md")
        .to_owned()
}

#[test]
#[ignore = "nested lane"]
fn gdb_stops_linux_at_its_symbols_as_documented() {
    let place = Place::new();
    let run = format!("-c 2 -G unix:{}", place.path("gdb.sock").display());
    let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", "", &run);
    let mut symbol = |name: &str| {
        let find = format!("awk '$3 == \"{name}\" {{print \"0x\" $1}}' /proc/kallsyms");
        let address = shell(&mut guest, &find);
        assert!(address.starts_with("0xffffffff"), "{name}: {address}");
        address
    };
    let sethostname = symbol("__x64_sys_sethostname");
    let sync = symbol("__x64_sys_sync");
    let timeout = symbol("panic_timeout");
    assert_eq!(number(&mut guest, "cat /proc/sys/kernel/panic"), 0);

    let mut gdb = Gdb::start(&place);
    gdb.say("target remote gdb.sock");
    let threads = gdb.say("info threads");
    assert!(threads.contains("(vCPU 1)"), "{threads}");
    gdb.say(&format!("hbreak *{sethostname}"));
    gdb.say(&format!("hbreak *{sync}"));
    gdb.say(&format!("watch *(int *) {timeout}"));
    let work = "hostname one; sync; echo 7 > /proc/sys/kernel/panic; sync; echo done$((6*7))";
    let stop = gdb.go_on(|_| guest.console.send(work));
    assert!(stop.contains("hit Breakpoint 1,"), "{stop}");
    assert!(stop.contains(&sethostname), "{stop}");
    let step = gdb.say("stepi");
    assert!(step.starts_with("0xffffffff"), "{step}");
    assert!(!step.contains(&sethostname), "{step}");
    let ring = gdb.say("print $cs & 3");
    assert!(ring.contains("= 0"), "{ring}");
    let stop = gdb.go_on(|_| {});
    assert!(stop.contains("hit Breakpoint 2,"), "{stop}");
    assert!(stop.contains(&sync), "{stop}");
    let stop = gdb.go_on(|_| {});
    assert!(stop.contains("hit Hardware watchpoint 3:"), "{stop}");
    assert!(stop.contains("Old value = 0"), "{stop}");
    assert!(stop.contains("New value = 7"), "{stop}");
    gdb.say("delete");
    let stop = gdb.go_on(|gdb| {
        // The second sync stops nobody any more.
        guest.console.expect("\n");
        guest.console.expect("done42\r\n");
        guest.console.expect("# ");
        gdb.signal(Signal::SIGINT);
    });
    assert!(stop.contains("SIGINT"), "{stop}");
    gdb.say("detach");
    assert_eq!(shell(&mut guest, "hostname; sync"), "one");

    let (said, shown) = (lasting(&gdb.transcript), lasting(&documented()));
    assert_eq!(
        said.trim_end(),
        shown.trim_end(),
        "docs/gdb.md, found:\n{said}"
    );
    let log = shell(&mut guest, "dmesg | grep -iE 'oops|lockup|bug:' | head -5");
    assert_eq!(log, "");
    ends(&mut guest, "poweroff -f", 1);
}
