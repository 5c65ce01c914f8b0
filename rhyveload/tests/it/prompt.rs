//! The menu and the prompt, driven through a pseudo-terminal.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::pty::{Winsize, openpty};
use nix::unistd::ttyname;

use crate::boot::{Guest, tree};
use crate::freebsd_files::{Meta, kernel};
use crate::process::{EXE, Place};

/// How long anything may take on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which way the program gets its terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    Stdio,
    Device,
    /// Of its own.
    Pty,
}

/// A loader, and somebody at its terminal.
struct Loader {
    child: Child,
    terminal: fs::File,
    output: Receiver<Vec<u8>>,
    /// Everything that was shown, without what moves the cursor.
    text: String,
    /// How much of it was looked at.
    seen: usize,
    /// The other end stays open, so that nothing is lost when the program ends.
    _device: OwnedFd,
}

impl Loader {
    fn start(place: &Place, on: On, args: &[&str]) -> Self {
        let size = Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(Some(&size), None).unwrap();
        let mut command = Command::new(EXE);
        command
            .env("RHYVE_ROOT", place.root.path())
            .env("TERM", "xterm")
            .args(["-m", "64"])
            .args(args);
        match on {
            On::Stdio => {
                let end = || Stdio::from(pty.slave.try_clone().unwrap());
                command.stdin(end()).stdout(end()).stderr(end());
            }
            On::Device => {
                command.arg("-c").arg(ttyname(&pty.slave).unwrap());
                command.stdin(Stdio::null()).stdout(Stdio::null());
            }
            On::Pty => {
                command.args(["-c", "pty"]).stderr(Stdio::piped());
                command.stdin(Stdio::null()).stdout(Stdio::null());
            }
        }
        let mut child = command.arg("guest0").spawn().unwrap();
        let terminal = match child.stderr.take() {
            None => fs::File::from(pty.master),
            Some(errors) => {
                let mut line = String::new();
                BufReader::new(errors).read_line(&mut line).unwrap();
                let path = line.strip_prefix("rhyveload: the console is at ");
                let mut options = fs::File::options();
                let flags = OFlag::O_NOCTTY.bits();
                options.read(true).write(true).custom_flags(flags);
                options.open(path.expect(&line).trim_end()).unwrap()
            }
        };
        let mut reader = terminal.try_clone().unwrap();
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            let mut last = 0;
            while let Ok(len @ 1..) = reader.read(&mut buffer) {
                for &byte in &buffer[..len] {
                    assert!(byte != b'\n' || last == b'\r', "a line that goes down only");
                    last = byte;
                }
                if sender.send(buffer[..len].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            terminal,
            output,
            text: String::new(),
            seen: 0,
            _device: pty.slave,
        }
    }

    fn send(&mut self, keys: &str) {
        self.terminal.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until something is shown, and answers with all that was shown before.
    fn expect(&mut self, sign: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut raw = Vec::new();
        loop {
            if let Some(at) = self.text[self.seen..].find(sign) {
                let before = self.text[self.seen..self.seen + at].to_owned();
                self.seen += at + sign.len();
                return before;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(piece) => raw.extend(piece),
                Err(_) => panic!("{sign:?} was never shown, but:\n{}", &self.text),
            }
            // A sequence may come in two pieces.
            if let Ok(text) = std::str::from_utf8(&raw)
                && let Some(plain) = plain(text)
            {
                self.text += &plain;
                raw.clear();
            }
        }
    }

    /// Runs a command at the prompt; what it says.
    fn run(&mut self, command: &str) -> String {
        self.send(&format!("{command}\r"));
        self.expect(&format!("{command}\n"));
        self.expect("OK ")
    }

    /// Waits for the program's end.
    fn end(mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it goes on:\n{}", self.text);
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn boot(self) {
        assert!(self.end().success());
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Text without control sequences (ECMA-48, 5.4); none if one is not yet complete.
fn plain(text: &str) -> Option<String> {
    let mut plain = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => {
                assert_eq!(chars.next()?, '[', "another sequence than a CSI: {text:?}");
                while !('@'..='~').contains(&chars.next()?) {}
            }
            '\r' => {}
            c => plain.push(c),
        }
    }
    Some(plain)
}

/// A tree whose menu waits for ever.
fn patient_tree(place: &Place) -> PathBuf {
    let root = tree(place);
    let conf = root.join("boot/loader.conf");
    let text = fs::read_to_string(&conf)
        .unwrap()
        .replace("boot_verbose=\"\"\n", "");
    fs::write(conf, text + "autoboot_delay=NO\n").unwrap();
    root
}

const FIRST: &str = "2. [Esc]ape to loader prompt";
const LAST: &str = ".---.....----.";

#[test]
fn the_prompts_commands_do_what_they_say() {
    let place = Place::new();
    let root = patient_tree(&place);
    fs::write(
        root.join("boot/script"),
        "# a comment\n\necho one $kernel ${kernel}\n-nonsense\nset from=script\nboot -x -y z w\n",
    )
    .unwrap();
    fs::write(root.join("boot/again"), "include /boot/again\n").unwrap();
    let lines: String = (0..60).map(|n| format!("line {n}\x1b[31m\n")).collect();
    fs::write(root.join("boot/long"), lines).unwrap();
    let path = root.to_str().unwrap();
    let mut loader = Loader::start(&place, On::Stdio, &["-h", path]);
    loader.expect(FIRST);
    loader.expect(LAST);
    loader.send("\x1b");
    loader.expect("'help' lists the commands.\nOK ");
    let mut transcript = String::new();
    for command in [
        "?",
        "help load",
        "lsdev",
        "ls",
        "ls -l boot/kernel",
        "ls /nowhere",
        "ls disk7:/",
        "lsmod",
        "echo -n no newline",
        "echo 'one  two' \"$kernel\" three\\ four",
        "echo \"open",
        "set hw.test=some value",
        "set hw.test='some value'",
        "show hw.test",
        "unset hw.test",
        "show hw.test",
        "set currdev=disk0:",
        "more /etc/fstab",
        "include /boot/script",
        "show from",
        "include /boot/again",
        "unload",
        "lsmod",
        "load virtio",
        "load /boot/kernel/kernel -s",
        "load virtio",
        "load -t md_image /boot/mdroot",
        "load /boot/kernel/none.ko",
        "lsmod -v",
        "nonsense",
    ] {
        let said = loader.run(command).replace(path, "DIR");
        transcript += &format!("OK {command}\n{said}");
        if !said.is_empty() && !said.ends_with('\n') {
            transcript.push('\n');
        }
    }
    insta::assert_snapshot!("commands", transcript);

    // A long file comes in pages, without what would colour the terminal.
    loader.send("more /boot/long\r");
    let page = loader.expect("--More--");
    assert!(page.ends_with("line 22\u{fffd}[31m\n"), "{page}");
    loader.send(" ");
    loader.expect("line 45");
    loader.expect("--More--");
    loader.send("q");
    loader.expect("OK ");

    // The line before, with another last word.
    loader.run("echo alpha beta");
    loader.send("\x1b[A\x17gamma\r");
    loader.expect("\nalpha gamma\n");
    loader.expect("OK ");

    loader.send("boot -s -v\r");
    loader.boot();
    let guest = Guest::of(&place);
    assert_eq!(guest.text(0, 6), "-s -s -v");
    assert_eq!(guest.files[0][&0x8007], 0x1802u32.to_le_bytes());
    assert_eq!(guest.text(2, 2), "md_image");
}

#[test]
fn each_entry_of_the_menu_does_what_it_says() {
    let place = Place::new();
    let root = patient_tree(&place);
    let other = root.join("boot/kernel.old");
    fs::create_dir(&other).unwrap();
    let has = [Meta::Version("kernel", 1000), Meta::Version("pci", 1)];
    fs::write(other.join("kernel"), kernel(&has)).unwrap();
    let path = root.to_str().unwrap();

    for on in [On::Stdio, On::Device, On::Pty] {
        let mut loader = Loader::start(&place, on, &["-h", path]);
        let banner = loader.expect("Welcome to FreeBSD");
        assert!(banner.contains("/boot/kernel/kernel text=0x80"), "{banner}");
        let menu = loader.expect(LAST);
        for line in [
            "1. Boot [ENTER]",
            FIRST,
            "3. Reboot",
            "4. Boot Safe [M]ode: NO",
            "5. Boot [S]ingle User: NO",
            "6. Boot [V]erbose: NO",
            "7. [K]ernel: kernel (1 of 2)",
        ] {
            assert!(menu.contains(line), "{line}: {menu}");
        }
        for (key, line) in [
            ("4", "4. Boot Safe [M]ode: YES"),
            ("s", "5. Boot [S]ingle User: YES"),
            ("v", "6. Boot [V]erbose: YES"),
            ("6", "6. Boot [V]erbose: NO"),
            ("k", "kernel.old (2 of 2)"),
        ] {
            loader.send(key);
            loader.expect(line);
            loader.expect(LAST);
        }
        // To the prompt and back: what was chosen is still so.
        loader.send("2");
        loader.expect("OK ");
        assert_eq!(loader.run("show kernelname"), "/boot/kernel.old/kernel\n");
        loader.send("menu\r");
        loader.expect("5. Boot [S]ingle User: YES");
        loader.expect(LAST);
        loader.send("\r");
        // Its last words are read as well.
        loader.expect("protocol=freebsd\n");
        loader.boot();
        let guest = Guest::of(&place);
        assert_eq!(guest.text(0, 1), "/boot/kernel.old/kernel");
        for var in ["boot_single=YES", "kern.smp.disabled=1"] {
            assert!(guest.has(var), "{on:?}: {var}");
        }
        assert!(!guest.has("boot_verbose=YES"));
    }

    // The loader starts again, and forgets.
    let mut loader = Loader::start(&place, On::Stdio, &["-h", path]);
    loader.expect(LAST);
    loader.send("v");
    loader.expect("6. Boot [V]erbose: YES");
    loader.expect(LAST);
    loader.send("3");
    loader.expect("FreeBSD/amd64 User boot");
    loader.expect("6. Boot [V]erbose: NO");
    loader.expect(LAST);
    // And it can be left.
    loader.send("\x1b");
    loader.expect("OK ");
    loader.send("quit\r");
    loader.expect("rhyveload: nothing was loaded: quit at the loader's prompt");
    assert_eq!(loader.end().code(), Some(1));
}

#[test]
fn it_boots_by_itself_unless_somebody_is_there() {
    let place = Place::new();
    let root = tree(&place);
    let path = root.to_str().unwrap();
    let boot = |delay: &str, plain: &str| {
        let delay = format!("autoboot_delay={delay}");
        Loader::start(&place, On::Stdio, &["-h", path, "-e", &delay, "-e", plain])
    };
    let mut loader = boot("2", "a=b");
    loader.expect("Autoboot in 2 seconds. [Space] to pause");
    loader.expect("Autoboot in 1 seconds.");
    loader.boot();

    let mut loader = boot("-1", "a=b");
    loader.expect("entry=");
    assert!(!loader.text.contains("Welcome"), "{}", loader.text);
    loader.boot();

    let mut loader = boot("60", "a=b");
    loader.expect("Autoboot in");
    loader.send(" ");
    loader.expect("1. Boot [ENTER]");
    loader.expect(LAST);
    loader.send("b");
    loader.boot();

    // Without the menu: a countdown.
    let mut loader = boot("60", "beastie_disable=YES");
    loader.expect("Hit [Enter] to boot immediately");
    loader.expect("Booting [/boot/kernel/kernel] in ");
    loader.send("x");
    loader.expect("OK ");
    loader.send("autoboot 1\r");
    loader.expect("in 1 second... ");
    loader.boot();

    // Nothing that could be booted, but somebody who can help.
    fs::rename(root.join("boot/kernel/kernel"), root.join("boot/moved")).unwrap();
    let mut loader = boot("1", "a=b");
    loader.expect("no kernel found");
    loader.expect("OK ");
    loader.send("boot\r");
    loader.expect("no kernel found");
    loader.expect("OK ");
    loader.send("boot /boot/moved\r");
    loader.boot();
}
