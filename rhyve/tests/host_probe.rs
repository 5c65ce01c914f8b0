//! Any KVM: the probe kernel, loaded by rhyveload, is content with what rhyve gives it, and each of
//! its ways to end is the exit status that bhyve(8) documents.

#![cfg(test)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::Parser;
use rhyveload::cli::Cli;
use rhyveload::load::load;
use rhyveload::progress::Progress;
use tempfile::TempDir;
use vmm_api::root::Root;

/// How long the guest may take for one answer, on a busy machine that emulates its every
/// instruction.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running rhyve, with an object root of its own.
struct Guest {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    errors: Option<JoinHandle<String>>,
    /// What was read and not yet matched.
    text: String,
    _root: TempDir,
}

impl Guest {
    /// Loads the probe with rhyveload's options, and runs it with rhyve's.
    fn start(load_options: &[&str], run_options: &[&str]) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let kernel = dir.path().join("probe.elf");
        fs::write(&kernel, guest_image::probe::PROBE).unwrap();
        let objects = dir.path().join("root");
        fs::create_dir(&objects).unwrap();
        fs::set_permissions(&objects, fs::Permissions::from_mode(0o700)).unwrap();
        let mut words = vec!["rhyveload", "--kernel", kernel.to_str().unwrap()];
        words.extend(load_options);
        words.push("guest0");
        let job = Cli::parse_from(words).job();
        load(
            &Root::open_at(&objects).unwrap(),
            &job,
            &mut Progress::hidden(),
        )
        .unwrap();

        let mut child = Command::new(env!("CARGO_BIN_EXE_rhyve"))
            .args(run_options)
            .args(["-l", "com1,stdio", "guest0"])
            .env("RHYVE_ROOT", &objects)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, output) = mpsc::channel();
        let mut console = child.stdout.take().unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = console.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        let mut errors = child.stderr.take().unwrap();
        let errors = thread::spawn(move || {
            let mut text = String::new();
            errors.read_to_string(&mut text).unwrap();
            text
        });
        Self {
            input: child.stdin.take().unwrap(),
            child,
            output,
            errors: Some(errors),
            text: String::new(),
            _root: dir,
        }
    }

    /// What the console shows before `sign`, which must come.
    fn expect(&mut self, sign: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text.find(sign) {
                let mut before: String = self.text.drain(..at + sign.len()).collect();
                before.truncate(at);
                return before;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(piece) => self.text += &String::from_utf8_lossy(&piece),
                Err(why) => panic!("{why} before {sign:?}; the console shows {:?}", self.text),
            }
        }
    }

    /// The report, which must tell of no failure.
    fn report(&mut self) -> String {
        let mut report = self.expect("probe: report done");
        report += &self.expect("probe> ");
        assert!(!report.contains("FAILED"), "{report}");
        report
    }

    fn type_in(&mut self, line: &str) {
        write!(self.input, "{line}\r").unwrap();
    }

    /// rhyve's exit status and what it wrote to standard error.
    fn end(mut self) -> (Option<i32>, String) {
        // The console closes when rhyve ends.
        let deadline = Instant::now() + PATIENCE;
        while self
            .output
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            .is_ok()
        {}
        if self.child.try_wait().unwrap().is_none() && Instant::now() >= deadline {
            self.child.kill().unwrap();
            panic!("rhyve does not end");
        }
        let status = self.child.wait().unwrap().code();
        (status, self.errors.take().unwrap().join().unwrap())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_report_is_clean_in_long_mode_and_power_off_is_1() {
    let options = [
        "-m",
        "64M",
        "--boot",
        "plain",
        "-e",
        "greeting=hello",
        "--cmdline",
        "a b",
    ];
    let mut guest = Guest::start(&options, &["-c", "2"]);
    let report = guest.report();
    for line in [
        "probe: entry metadata ",
        "probe: entry cs 0x8 ds 0x10 es 0x10 fs 0x10 gs 0x10 ss 0x10 tr 0x0 ldtr 0x0\r\n",
        "probe: entry gdtr 0x5000/0x17 ",
        "probe: memory 0x100000-0x3ffffff ram ok\r\n",
        "probe: environment greeting=hello\r\n",
        "probe: environment cmdline=a b\r\n",
        "probe: mptable 0xf0000 ",
        "probe: madt cpus 2 ",
        "probe: uart 0x3f8 16550a ok\r\n",
        "probe: lapic-timer ok\r\n",
        "probe: cpu1 apic 1 up ok\r\n",
    ] {
        assert!(report.contains(line), "no {line:?} in {report}");
    }
    guest.type_in("echo Is anybody there?");
    guest.expect("\nIs anybody there?\r\n");
    guest.type_in("poweroff");
    assert_eq!(guest.end().0, Some(1));
}

#[test]
fn the_report_is_clean_by_pvh_with_highmem_and_reboot_is_0() {
    let mut guest = Guest::start(
        &[
            "-m",
            "64M",
            "-M",
            "64M",
            "--boot",
            "pvh",
            "--cmdline",
            "a b",
        ],
        &["-c", "4"],
    );
    let report = guest.report();
    for line in [
        "probe: entry pvh ",
        // No CR4: kvm-amd lets the host's CR4.MCE show in it.
        "probe: entry cr0 0x11 cr3 0x0 ",
        " efer 0x0 rflags 0x2\r\n",
        "probe: memory 0x100000-0x3ffffff ram ok\r\n",
        "probe: memory 0x100000000-0x103ffffff ram ok\r\n",
        "probe: command line \"a b\"\r\n",
        "probe: cpu3 apic 3 up ok\r\n",
    ] {
        assert!(report.contains(line), "no {line:?} in {report}");
    }
    guest.type_in("reboot");
    assert_eq!(guest.end().0, Some(0));
}

#[test]
fn all_cpus_halted_is_2() {
    let mut guest = Guest::start(&["-m", "64M"], &["-c", "2"]);
    guest.report();
    guest.type_in("hlt");
    assert_eq!(guest.end().0, Some(2));
}

#[test]
fn a_triple_fault_is_3() {
    let mut guest = Guest::start(&["-m", "64M"], &[]);
    guest.report();
    guest.type_in("fault");
    assert_eq!(guest.end().0, Some(3));
}

/// KVM-PVM's emulator does not know INT3; hardware does, and the handler is missing.
#[test]
fn an_instruction_that_kvm_cannot_emulate_is_4_and_its_state_is_shown() {
    let mut guest = Guest::start(&["-m", "64M"], &[]);
    guest.report();
    guest.type_in("fault int3");
    match guest.end() {
        (Some(3), _) => {}
        (Some(4), errors) => {
            for word in ["suberror 1", "rip 00000000002", "code cc "] {
                assert!(errors.contains(word), "no {word:?} in {errors}");
            }
        }
        (status, errors) => panic!("{status:?}: {errors}"),
    }
}

#[test]
fn random_port_accesses_on_two_cpus_do_no_harm() {
    for seed in 1..=3 {
        let mut guest = Guest::start(&["-m", "64M"], &["-c", "2"]);
        guest.report();
        guest.type_in(&format!("ports {seed} 3000 all"));
        let answer = guest.expect("probe> ");
        assert!(answer.contains("3000 ok"), "seed {seed}: {answer}");
        guest.type_in("poweroff");
        assert_eq!(guest.end().0, Some(1), "seed {seed}");
    }
}
