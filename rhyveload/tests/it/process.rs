//! `rhyveload` as a process.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;
use vmm_api::root::Root;
use vmm_api::state::{Phase, VmState};
use vmm_api::vm::{Vm, VmError};

use crate::kernels::{bzimage, plain};

pub const EXE: &str = env!("CARGO_BIN_EXE_rhyveload");

pub struct Place {
    pub tmp: TempDir,
    pub root: Root,
}

impl Place {
    pub fn new() -> Self {
        let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
        let root = Root::open_at(&tmp.path().join("root")).unwrap();
        Self { tmp, root }
    }

    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.tmp.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub fn command(&self, args: &[&str], kernel: &Path) -> Command {
        let mut command = Command::new(EXE);
        command.env("RHYVE_ROOT", self.root.path());
        command.args(args).arg("--kernel").arg(kernel).arg("guest0");
        command
    }

    pub fn load(&self, args: &[&str], kernel: &Path) -> Output {
        self.command(args, kernel).output().unwrap()
    }

    pub fn vm(&self) -> Vm {
        Vm::open(&self.root, &"guest0".parse().unwrap()).unwrap()
    }

    pub fn state(&self) -> VmState {
        self.vm().load_state().unwrap()
    }

    pub fn is_absent(&self) -> bool {
        let opened = Vm::open(&self.root, &"guest0".parse().unwrap());
        matches!(opened, Err(VmError::NotFound(_)))
    }
}

pub fn stdout(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The one line of a load that failed.
pub fn stderr(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.starts_with("rhyveload: ") && text.lines().count() == 1,
        "{text}"
    );
    text
}

#[test]
fn a_plain_kernel_is_loaded_and_loaded_again() {
    let place = Place::new();
    let kernel = place.file("kernel", &plain());
    let args = ["-m", "16M", "-e", "x=y", "--cmdline", "hello"];
    let text = stdout(&place.load(&args, &kernel));
    assert!(text.contains("kernel text=0x5 data=0x4+0x1ffc\n"), "{text}");

    let state = place.state();
    assert_eq!(state.phase, Phase::Loaded);
    assert_eq!(state.machine.memory.lowmem, 16 << 20);
    assert_eq!(state.vcpus[0].registers.rip, 0x20_0000);
    let boot = state.machine.boot.clone().unwrap();
    assert_eq!(
        (boot.protocol.as_str(), boot.cmdline.as_deref()),
        ("plain", Some("hello"))
    );
    let memory = place.vm().open_memory(&state).unwrap();
    let mut bytes = [0; 8];
    memory.read(0x20_0000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"\xf4text\0\0\0");
    assert!(memory.resident().unwrap() < 64 << 10, "holes stay holes");

    let text = stdout(&place.load(&["-m", "8", "-M", "4", "--json"], &kernel));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["memory"]["highmem"], 4 << 20);
    let again = place.state();
    assert_eq!(
        (again.machine.memory.lowmem, again.machine.memory.highmem),
        (8 << 20, 4 << 20)
    );
    assert!(again.generation > state.generation);
}

#[test]
fn a_vm_that_is_in_use_is_refused() {
    let place = Place::new();
    let kernel = place.file("kernel", &plain());
    stdout(&place.load(&["-m", "8"], &kernel));
    let generation = place.state().generation;
    let locked = place.vm().lock("rhyve").unwrap();
    let text = stderr(&place.load(&["-m", "8"], &kernel));
    assert!(
        text.contains(&format!("in use by rhyve (pid {})", std::process::id())),
        "{text}"
    );
    assert_eq!(place.state().generation, generation);
    drop(locked);
    stdout(&place.load(&["-m", "8"], &kernel));
}

#[test]
fn a_bad_kernel_changes_nothing() {
    let place = Place::new();
    let bad = place.file("bad", b"#!/bin/sh\n");
    let text = stderr(&place.load(&[], &bad));
    assert!(text.contains("bad: not a kernel"), "{text}");
    assert!(place.is_absent());
    let good = place.file("kernel", &plain());
    stdout(&place.load(&["-m", "8"], &good));
    let before = place.state();
    stderr(&place.load(&["-m", "16"], &bad));
    stderr(&place.load(&["-m", "16"], &place.tmp.path().join("none")));
    let directory = stderr(&place.load(&["-m", "16"], place.tmp.path()));
    assert!(directory.contains("not a regular file"), "{directory}");
    let fifo = place.tmp.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let fifo = stderr(&place.load(&["-m", "16"], &fifo));
    assert!(fifo.contains("not a regular file"), "{fifo}");
    assert_eq!(place.state(), before);
}

#[test]
fn a_damaged_state_is_no_obstacle() {
    let place = Place::new();
    let kernel = place.file("kernel", &plain());
    stdout(&place.load(&["-m", "8"], &kernel));
    std::fs::write(place.vm().path().join("vm.json"), b"{ half").unwrap();
    stdout(&place.load(&["-m", "8"], &kernel));
    assert_eq!(place.state().phase, Phase::Loaded);
}

#[test]
fn a_vm_larger_than_its_file_system_is_refused() {
    let place = Place::new();
    let kernel = place.file("kernel", &plain());
    let text = stderr(&place.load(&["-m", "60T"], &kernel));
    assert!(
        text.contains("vm_setup_memory(highmem): Cannot allocate memory"),
        "{text}"
    );
    assert!(place.is_absent());
    stdout(&place.load(&["-m", "8"], &kernel));
    let loaded = place.state();
    stderr(&place.load(&["-m", "60T"], &kernel));
    assert_eq!(
        place.state(),
        loaded,
        "a VM that is there keeps what it holds"
    );
    stdout(&place.load(&["-m", "8"], &kernel));
}

#[test]
fn an_initial_ram_disk_is_loaded() {
    let place = Place::new();
    let kernel = place.file("vmlinuz", &bzimage());
    let initrd = place.file("initrd", &[7; 5000]);
    let initrd = initrd.to_str().unwrap();
    let args = ["-m", "64", "--initrd", initrd, "--cmdline", "quiet"];
    let text = stdout(&place.load(&args, &kernel));
    assert!(
        text.contains("vmlinuz setup=0xa00 kernel=0x10000\n"),
        "{text}"
    );
    assert!(text.contains("initrd size 0x1388 at 0x3ffe000\n"), "{text}");
    assert!(
        text.contains("entry=0x1000200 protocol=linux64\n"),
        "{text}"
    );
    let memory = place.vm().open_memory(&place.state()).unwrap();
    let mut bytes = [0; 5001];
    memory.read(0x3ff_e000, &mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[4999], bytes[5000]), (7, 7, 0));
    memory.read(0x100_0000, &mut bytes).unwrap();
    assert_eq!(bytes[0], 0xcc);

    let empty = place.file("empty", b"");
    let empty = empty.to_str().unwrap();
    let text = stderr(&place.load(&["--initrd", empty], &kernel));
    assert!(text.contains("the initial RAM disk is empty"), "{text}");
    let text = stderr(&place.load(&["-m", "32", "--initrd", "/no/such/file"], &kernel));
    assert!(
        text.contains("/no/such/file: cannot open it: No such file"),
        "{text}"
    );
}

#[test]
fn memory_elsewhere_and_wired() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new();
    let kernel = place.file("kernel", &plain());
    let dir = place.tmp.path().join("elsewhere");
    std::fs::create_dir(&dir).unwrap();
    let path = dir.to_str().unwrap();
    stdout(&place.load(&["-S", "-m", "8", "--mem-path", path], &kernel));
    let files: Vec<_> = dir.read_dir().unwrap().map(|f| f.unwrap().path()).collect();
    let metadata = files[0].metadata().unwrap();
    assert_eq!(
        (files.len(), metadata.len(), metadata.blocks()),
        (1, 8 << 20, 8 << 11)
    );
    assert!(place.state().machine.wired);
    let text = stderr(&place.load(&["--mem-path", "/no/such/dir"], &kernel));
    assert!(text.contains("/no/such/dir"), "{text}");
    assert_eq!(place.state().phase, Phase::Loaded, "nothing was touched");

    stdout(&place.load(&["-m", "8"], &kernel));
    assert_eq!(dir.read_dir().unwrap().count(), 0);
}

#[test]
fn usage_is_checked() {
    let place = Place::new();
    let kernel = place.file("kernel", &plain());
    let refused = |args: &[&str]| {
        let output = place.load(args, &kernel);
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused(&["-m", "12X"]).contains("no memory size"));
    assert!(refused(&["-e", "novalue"]).contains("give name=value"));
    assert!(refused(&["--boot", "multiboot"]).contains("linux64"));
    assert!(refused(&["--quiet", "--json"]).contains("cannot be used with"));
    assert!(refused(&["bad/name"]).contains("only A-Z"));
    assert!(refused(&["-C"]).contains("rhyve -C"));
    assert!(refused(&["-l", "userboot.so"]).contains("runs no userboot.so"));
    let text = stderr(&place.load(&["-m", "4G", "-M", "1G"], &kernel));
    assert!(text.contains("lowmem ends at 3 GiB"), "{text}");
    let text = stderr(&place.load(&["-m", "0"], &kernel));
    assert!(text.contains("needs some lowmem"), "{text}");
    assert!(place.is_absent());
}

#[test]
fn its_manual_and_completions_are_made_by_itself() {
    for kind in ["man", "bash", "zsh", "fish"] {
        let output = Command::new(EXE).args(["--generate", kind]).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{kind}: {output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            text.contains("rhyveload") && text.contains("cmdline"),
            "{kind}: {text}"
        );
    }
}
