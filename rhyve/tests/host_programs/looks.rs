//! vmmctl on a VM that is loaded, runs, and has ended.

use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;

use nix::sys::signal::Signal;
use nix::sys::termios::LocalFlags;
use serde_json::Value;

use crate::guests::{ENTRY, ask, load_code, start_probe};
use crate::support::{Place, Process, until};

/// The number in `name[0]<tab>0x...`.
fn number(text: &str, name: &str) -> u64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name}[0]\t0x")));
    let digits = line.unwrap_or_else(|| panic!("no {name}: {text}"));
    u64::from_str_radix(digits, 16).unwrap()
}

fn json(place: &Place, options: &str) -> Value {
    serde_json::from_str(&place.ok(&format!("vmmctl --vm=guest0 --json {options}"))).unwrap()
}

fn list(place: &Place) -> Value {
    serde_json::from_str(&place.ok("vmmctl --list --json")).unwrap()
}

#[test]
fn registers_are_shown_before_during_and_after() {
    let place = Place::new();
    // mov ebx, 0xfeedface; 1: in al, 0x71; test al, al; jmp 1b
    load_code(&place, b"\xbb\xce\xfa\xed\xfe\xe4\x71\x84\xc0\xeb\xfa");
    let all = place.ok("vmmctl --vm=guest0 --cpu=0 --get-all");
    assert_eq!((number(&all, "rip"), number(&all, "rbx")), (ENTRY, 0));

    let mut guest = place.start("");
    until("it is up", || list(&place)[0]["phase"] == "running");
    let running = || {
        let text = place.ok("vmmctl --vm=guest0 --cpu=0 --get-rip --get-rbx");
        (number(&text, "rip"), number(&text, "rbx"))
    };
    until("it runs", || running().1 != 0);
    for _ in 0..5 {
        // Between two instructions, never within an access.
        let (rip, rbx) = running();
        assert_eq!(rbx, 0xfeed_face);
        assert!([ENTRY + 5, ENTRY + 7, ENTRY + 9].contains(&rip), "{rip:#x}");
    }
    // What is set is what goes on.
    place.ok("vmmctl --vm=guest0 --set-rsp=0x123450");
    let stats = place.ok("vmmctl --vm=guest0 --get-stats");
    assert!(
        stats.contains("number of times in/out was intercepted"),
        "{stats}"
    );

    // The loop's port is where it leaves the guest, and its instruction the one that does it.
    place.ok("vmmctl --vm=guest0 --reset-stats");
    until("it leaves the guest again", || {
        let exits = json(&place, "--get-exits");
        let first = &exits["exits"][0]["exits"][0];
        first["count"].as_u64() > Some(100)
    });
    let exits = json(&place, "--get-exits=1");
    let first = &exits["exits"][0]["exits"][0];
    assert_eq!(
        (&first["reason"], &first["place"], &first["write"]),
        (&"inout".into(), &"0x71".into(), &false.into())
    );
    assert_eq!(first["device"], "rtc");
    let callers = first["callers"].as_array().unwrap();
    let here = callers.iter().map(|c| c["rip"].as_str().unwrap());
    let there = [ENTRY + 5, ENTRY + 7].map(|rip| format!("{rip:#x}"));
    assert!(callers.is_empty() || here.clone().all(|rip| there.iter().any(|t| t == rip)));
    let spent = first["host_ns"].as_u64().unwrap();
    assert!(spent > 0 && spent < exits["exits"][0]["span_ns"].as_u64().unwrap());

    guest.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(guest.wait().status, Some(1));
    let all = place.ok("vmmctl --vm=guest0 --cpu=0 --get-all");
    assert_eq!(
        (number(&all, "rbx"), number(&all, "rsp")),
        (0xfeed_face, 0x12_3450)
    );
}

#[test]
fn every_vcpu_can_be_looked_at() {
    let place = Place::new();
    let (mut guest, _) = start_probe(&place, "-c 2");
    for cpu in 0..2 {
        let text = place.ok(&format!("vmmctl --vm=guest0 --cpu={cpu} --get-all"));
        assert!(text.contains(&format!("rip[{cpu}]\t0x")), "{text}");
        assert!(text.contains(&format!("cr3[{cpu}]\t0x")), "{text}");
    }
    let none = place.run("vmmctl --vm=guest0 --cpu=2 --get-rip");
    assert_eq!(none.status, Some(1), "{none:?}");
    assert!(none.errors.contains("2"), "{none:?}");
    guest.console.send("hlt");
    guest.wait();
    let ended = place.ok("vmmctl --vm=guest0 --cpu=1 --get-rip");
    assert_ne!(ended, "rip[1]\t0x0000000000000000\n");
}

#[test]
fn the_list_knows_what_runs() {
    let place = Place::new();
    assert_eq!(list(&place), serde_json::json!([]));
    let (mut guest, _) = start_probe(&place, "-c 2");
    let all = list(&place);
    assert_eq!(all.as_array().map(Vec::len), Some(1), "{all}");
    let vm = &all[0];
    let text = vm.to_string();
    assert_eq!(vm["name"], "guest0", "{text}");
    assert_eq!(vm["vcpus"], 2, "{text}");
    assert_eq!(vm["phase"], "running", "{text}");
    place.ok("vmmctl --vm=guest0 --pause");
    assert_eq!(list(&place)[0]["phase"], "paused");
    place.ok("vmmctl --vm=guest0 --resume");
    assert_eq!(ask(&mut guest, "echo on"), "on\r\n");
    place.ok("vmmctl --vm=guest0 --force-poweroff");
    assert_eq!(guest.wait().status, Some(1));
    assert_eq!(list(&place)[0]["phase"], "stopped (stopped from outside)");
}

#[test]
fn a_boots_profile_has_its_phases_and_names() {
    let place = Place::new();
    let file = place.path("boot.json");
    let (mut guest, _) = start_probe(&place, &format!("-c 2 --boot-profile {}", file.display()));
    // A loop to be seen in, for more than one sample.
    guest.console.send("spin");
    guest.console.expect("spin");
    std::thread::sleep(std::time::Duration::from_secs(1));
    guest.console.send("");
    guest.console.send("hlt");
    let ended = guest.wait();
    assert!(
        ended.errors.contains("first console byte"),
        "{}",
        ended.errors
    );
    let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let phases: Vec<_> = report["phases"].as_array().unwrap().iter().collect();
    let names: Vec<_> = phases.iter().map(|p| p["name"].as_str().unwrap()).collect();
    let expected = [
        "load",
        "tables",
        "first entry",
        "first console byte",
        "init",
    ];
    assert_eq!(names, expected);
    let until = |n: usize| phases[n]["until_us"].as_u64();
    assert!(phases[0]["us"].as_u64().is_some_and(|us| us > 0));
    assert!(until(1) <= until(2) && until(2) <= until(3) && until(3).is_some());
    // The probe never leaves ring 0.
    assert_eq!(until(4), None);
    let stacks = report["stacks"].as_array().unwrap();
    let samples: u64 = stacks.iter().map(|s| s["count"].as_u64().unwrap()).sum();
    assert_eq!(Some(samples), report["samples"].as_u64());
    let spins = |s: &&Value| s["frames"].to_string().contains("spin");
    assert!(stacks.iter().any(|s| spins(&s)), "{report:#}");
    let svg = std::fs::read_to_string(file.with_extension("svg")).unwrap();
    assert!(svg.contains("spin") && svg.ends_with("</svg>\n"));

    let refused = place.run("rhyve --boot-profile /nowhere/boot.json guest0");
    assert_eq!(refused.status, Some(4), "{refused:?}");
    assert!(refused.errors.contains("/nowhere/boot.svg"), "{refused:?}");
}

#[test]
fn a_bad_end_is_reported_beside_the_object() {
    let place = Place::new();
    let report = place.path("root/guest0/report.txt");
    let (mut guest, _) = start_probe(&place, "");
    guest.console.send("fault ud2");
    let ended = guest.wait();
    assert_eq!(ended.status, Some(3), "{ended:?}");
    let told = format!("triple fault; see {}", report.display());
    assert!(ended.errors.contains(&told), "{ended:?}");
    assert_eq!(ended.errors.matches("triple fault").count(), 1, "{ended:?}");
    let text = std::fs::read_to_string(&report).unwrap();
    assert!(text.starts_with("guest0: triple fault\n"), "{text}");
    // By the symbols of the file that was loaded.
    assert!(text.contains("#0  0x") && text.contains("fault"), "{text}");
    let shown = place.ok("vmmctl --vm=guest0 --panic");
    assert!(
        shown.starts_with("guest0: stopped (triple fault)\n"),
        "{shown}"
    );
    assert_eq!(shown.lines().nth(3), text.lines().nth(3));
    // The next guest starts without it.
    load_code(&place, b"\xf4");
    assert!(!report.exists());
}

#[test]
fn a_guest_that_nothing_can_reach_is_reported_and_goes_on() {
    let place = Place::new();
    // cli; 1: jmp 1b
    load_code(&place, b"\xfa\xeb\xfe");
    let mut guest = place.start("");
    let report = place.path("root/guest0/report.txt");
    until("there is a report", || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        std::fs::read_to_string(&report).is_ok_and(|text| text.ends_with('\n'))
    });
    let text = std::fs::read_to_string(&report).unwrap();
    let first = text.lines().next().unwrap();
    let why = "guest0: makes no progress: vCPU 0 runs with interrupts off, on and on";
    assert_eq!(first, why);
    assert!(text.contains(&format!("rip {:#x}", ENTRY + 1)), "{text}");
    assert!(guest.is_running());
    place.ok("vmmctl --vm=guest0 --force-poweroff");
    assert!(guest.wait().errors.contains(why));
}

#[test]
fn who_gives_up_looking_leaves_the_guest_as_it_was() {
    let place = Place::new();
    load_code(&place, b"\xeb\xfe");
    let guest = place.start("");
    // What never comes holds up the look, and the guest with it.
    let symbols = place.path("symbols");
    nix::unistd::mkfifo(&symbols, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let line = format!("vmmctl --vm=guest0 --panic --symbols {}", symbols.display());
    until("it runs", || list(&place)[0]["phase"] == "running");
    let mut look = Process::start(place.command(&line));
    until("it is held", || list(&place)[0]["phase"] == "paused");
    look.signal(Signal::SIGINT);
    let mut opening = std::fs::File::options();
    let opening = opening.write(true).custom_flags(nix::libc::O_NONBLOCK);
    drop(opening.open(&symbols));
    assert_eq!(look.wait().status, Some(128 + 2), "it ends by the signal");
    assert_eq!(list(&place)[0]["phase"], "running");
    drop(guest);
}

/// What a program has drawn on a terminal of 110 columns and 20 lines.
struct Screen {
    parser: vt100::Parser,
    terminal: std::fs::File,
    child: std::process::Child,
}

impl Screen {
    fn start(place: &Place, line: &str) -> Self {
        let size = nix::pty::Winsize {
            ws_row: 20,
            ws_col: 110,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = nix::pty::openpty(&size, None).unwrap();
        let mut command = place.command(line);
        command.env("TERM", "xterm");
        command.stdin(pty.slave.try_clone().unwrap());
        command.stdout(pty.slave);
        Self {
            parser: vt100::Parser::new(20, 110, 0),
            terminal: pty.master.into(),
            child: command.spawn().unwrap(),
        }
    }

    /// Waits until the screen shows something; all of it.
    fn shows(&mut self, text: &str) -> String {
        use std::io::Read;
        use std::os::fd::AsFd;

        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        until(text, || {
            let mut fds = [PollFd::new(self.terminal.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(100u16)).unwrap() > 0 {
                let mut bytes = [0; 4096];
                let len = self.terminal.read(&mut bytes).unwrap_or(0);
                self.parser.process(&bytes[..len]);
            }
            self.parser.screen().contents().contains(text)
        });
        self.parser.screen().contents()
    }

    fn press(&mut self, keys: &str) {
        use std::io::Write;
        self.terminal.write_all(keys.as_bytes()).unwrap();
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn top_shows_all_vms_pauses_one_and_looks_into_it() {
    let place = Place::new();
    // 1: in al, 0x71; jmp 1b
    load_code(&place, b"\xe4\x71\xeb\xfc");
    let guest = place.start("");
    until("it runs", || list(&place)[0]["phase"] == "running");
    let mut screen = Screen::start(&place, "vmmctl top");
    let shown = screen.shows("guest0");
    assert!(shown.contains("EXITS/S"), "{shown}");
    screen.shows("1 of 1 VMs live");
    screen.press("s");
    screen.shows("by processor time");
    screen.press("p");
    screen.shows("paused");
    let status = || list(&place)[0]["phase"].clone();
    assert_eq!(status(), "paused");
    screen.press("p");
    screen.shows("running");
    screen.press("\r");
    for sign in ["in 0x71 (rtc)", "exits/s: inout ", "% in guest"] {
        screen.shows(sign);
    }
    screen.press("q");
    until("it quits", || screen.child.try_wait().unwrap().is_some());
    let status = screen.child.try_wait().unwrap().unwrap();
    assert!(status.success(), "{status}");
    // A signal ends it, and leaves the terminal as it was.
    let mut screen = Screen::start(&place, "vmmctl top");
    screen.shows("1 of 1 VMs live");
    let pid = i32::try_from(screen.child.id()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    until("it ends", || screen.child.try_wait().unwrap().is_some());
    let status = screen.child.try_wait().unwrap().unwrap();
    assert_eq!(status.signal(), Some(15), "{status}");
    let after = nix::sys::termios::tcgetattr(&screen.terminal).unwrap();
    assert!(
        after
            .local_flags
            .contains(LocalFlags::ICANON | LocalFlags::ECHO)
    );
    drop(guest);
    // Without a terminal it says so.
    let none = place.run("vmmctl top");
    assert_eq!(none.status, Some(1), "{none:?}");
    assert!(none.errors.contains("terminal"), "{none:?}");
}
