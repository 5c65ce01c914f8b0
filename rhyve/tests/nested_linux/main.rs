//! Nested lane: Debian's unmodified kernel, to its shell and back. Each boot shows several things,
//! because a boot there takes its time.

#![cfg(test)]

mod blockdev;
mod devices;
mod disk;
mod gdb;
mod looks;
mod net;
mod random;
mod rings;
mod root;
#[path = "../support/mod.rs"]
mod support;
mod suspend;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;
use vmm_api::state::{Phase, StopReason};

use support::{Ended, Place, Process, Tmpfs, program, until};

/// A file that guest-image makes.
fn image(name: &str) -> PathBuf {
    let path = program("rhyve").with_file_name("../guest").join(name);
    assert!(
        path.exists(),
        "{} is not made: run `cargo xtask guest-image linux` (or linux-full), or `cargo xtask test`",
        path.display()
    );
    path
}

/// Boots Linux up to its shell; `load` is for rhyveload, `cmdline` for the kernel, `run` for rhyve.
fn boot(place: &Place, kernel: &str, load: &str, cmdline: &str, run: &str) -> Process {
    let full = kernel.starts_with("linux-full/");
    let profile = if full { "linux-full" } else { "linux" };
    let initrd = image(&format!("{profile}/initramfs.cpio"));
    let mut command = place.command(&format!("rhyveload {load} --cmdline"));
    command.arg(format!("console=ttyS0 quiet {cmdline}"));
    command.arg("--initrd").arg(initrd);
    command.arg("--kernel").arg(image(kernel)).arg(support::VM);
    let ended = Process::start(command).wait();
    assert_eq!(ended.status, Some(0), "{ended:?}");
    let mut guest = place.start(run);
    let before = guest.console.expect("rhyve-init: up");
    assert!(!before.to_lowercase().contains("error"), "{before}");
    guest.console.expect("# ");
    // Or the shell breaks long lines in two.
    guest.console.send("stty cols 999");
    guest.console.expect("\n");
    guest.console.expect("# ");
    guest
}

/// Types a command into the shell; what it prints.
fn shell(guest: &mut Process, command: &str) -> String {
    guest.console.send(&format!("{command}; echo done$((6*7))"));
    // The echo of what was typed.
    guest.console.expect("\n");
    let output = guest.console.expect("done42\r\n");
    guest.console.expect("# ");
    output.replace('\r', "").trim().to_owned()
}

fn number(guest: &mut Process, command: &str) -> u64 {
    let output = shell(guest, command);
    output
        .parse()
        .unwrap_or_else(|_| panic!("{command}: {output}"))
}

/// MiB of memory as the guest sees it.
fn free(guest: &mut Process) -> u64 {
    number(guest, "free -m | awk '/Mem/ {print $2}'")
}

/// Types a command that ends the guest.
fn ends(guest: &mut Process, command: &str, status: i32) -> Ended {
    guest.console.send(command);
    let ended = guest.wait();
    assert_eq!(ended.status, Some(status), "{command}: {ended:?}");
    ended
}

fn reason(place: &Place) -> StopReason {
    match place.state().phase {
        Phase::Stopped { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap().as_secs()
}

#[test]
#[ignore = "nested lane"]
fn bzimage_on_one_cpu_is_looked_at_and_powers_off() {
    let place = Place::new();
    let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", "", "");
    assert_eq!(number(&mut guest, "nproc"), 1);
    let memory = free(&mut guest);
    assert!((180..256).contains(&memory), "{memory} MiB");
    for clock in ["date -u +%s", "cat /sys/class/rtc/rtc0/since_epoch"] {
        let before = now();
        let shown = number(&mut guest, clock);
        let right = before - 3..=now() + 3;
        assert!(right.contains(&shown), "{clock}: {shown}, {right:?}");
    }

    let look = |option: &str| place.ok(&format!("vmmctl --vm=guest0 --cpu=0 {option}"));
    let rip = look("--get-rip");
    assert!(rip.starts_with("rip[0]\t0xffffffff"), "in HLT: {rip}");
    let all = look("--get-all");
    for register in ["rip", "rsp", "cr0", "cr3", "cr4", "efer", "cs"] {
        assert!(all.contains(&format!("{register}[0]\t0x")), "{all}");
    }
    assert!(look("--get-stats").contains("total number of vm exits"));
    let list = || {
        let text = place.ok("vmmctl --list --json");
        let list: serde_json::Value = serde_json::from_str(&text).unwrap();
        ["phase", "vcpus", "memory"].map(|field| list[0][field].clone())
    };
    let [phase, vcpus, memory] = list();
    assert_eq!((phase, vcpus), ("running".into(), 1.into()));
    assert_eq!(memory, 256 << 20);
    assert_eq!(shell(&mut guest, "echo and on"), "and on");

    ends(&mut guest, "poweroff -f", 1);
    assert_eq!(reason(&place), StopReason::PowerOff);
    assert_eq!(list()[0], "stopped (power-off)");
    let all = look("--get-all");
    assert!(all.contains("rip[0]\t0xffffffff"), "{all}");
    place.ok("vmmctl --vm=guest0 --destroy");
    assert_eq!(place.ok("vmmctl --list --json").trim(), "[]");
}

#[test]
#[ignore = "nested lane"]
fn looking_for_a_busy_kernels_panic_keeps_no_memory() {
    let place = Place::new();
    let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", "", "");
    let before = guest.anonymous_memory();
    guest.console.send("while :; do :; done");
    let kept = |guest: &Process| {
        std::thread::sleep(Duration::from_millis(2));
        guest.anonymous_memory().saturating_sub(before)
    };
    until("the kernel's names are read", || kept(&guest) > 8 << 20);
    until("what that took is given back", || kept(&guest) < 512 << 10);

    guest.console.send("\x03");
    guest.console.send("echo c >/proc/sysrq-trigger");
    let report = place.path("root/guest0/report.txt");
    until("the panic is seen", || {
        kept(&guest);
        std::fs::read_to_string(&report).is_ok_and(|text| text.ends_with('\n'))
    });
    until("what the report took is given back", || {
        kept(&guest) < 512 << 10
    });
    let report = std::fs::read_to_string(&report).unwrap();
    let why = "guest0: makes no progress: its kernel has panicked\npanic: sysrq triggered crash\n";
    assert!(report.starts_with(why), "{report}");
    place.ok("vmmctl --vm=guest0 --force-poweroff");
    guest.wait();
}

#[test]
#[ignore = "nested lane"]
fn vmlinux_on_two_cpus_has_a_second_serial_port_and_reboots() {
    let place = Place::new();
    let socket = place.path("com2");
    let run = format!("-c 2 -x -s 31,lpc -l com2,unix:{}", socket.display());
    let load = "-m 256M --boot linux64";
    let mut guest = boot(&place, "linux/vmlinux", load, "", &run);
    assert_eq!(number(&mut guest, "nproc"), 2);
    assert_eq!(number(&mut guest, "grep -c x2apic /proc/cpuinfo"), 2);

    let bridge = "cd /sys/bus/pci/devices/0000:00:1f.0; cat vendor device class";
    assert_eq!(shell(&mut guest, bridge), "0x8086\n0x7000\n0x060100");

    let mut line = UnixStream::connect(&socket).unwrap();
    line.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let hello = "stty -F /dev/ttyS1 raw -echo; echo hello >/dev/ttyS1";
    shell(&mut guest, hello);
    let mut heard = [0; 6];
    line.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello\n");
    // What comes before the port is open is lost, or cut short.
    let read = "until [ \"$word\" = there ]; do read word; done </dev/ttyS1; echo got $word";
    guest.console.send(read);
    until("a line from ttyS1", || {
        line.write_all(b"there\n").unwrap();
        let second = Duration::from_secs(1);
        guest.console.find("\ngot there", second).is_some()
    });
    guest.console.expect("# ");

    ends(&mut guest, "reboot -f", 0);
    assert_eq!(reason(&place), StopReason::Reset);
}

#[test]
#[ignore = "nested lane"]
fn pvh_on_eight_cpus_knows_how_they_are_arranged_and_halts() {
    let place = Place::new();
    let run = "-c 8,sockets=2,cores=4";
    let mut guest = boot(&place, "linux/vmlinux", "-m 512M --boot pvh", "", run);
    assert_eq!(number(&mut guest, "nproc"), 8);
    let memory = free(&mut guest);
    assert!((400..512).contains(&memory), "{memory} MiB");
    let topology = "/sys/devices/system/cpu/cpu7/topology";
    let place_of = format!("cat {topology}/physical_package_id {topology}/core_siblings_list");
    assert_eq!(shell(&mut guest, &place_of), "1\n4-7");
    for cpu in 0..8 {
        let rip = place.ok(&format!("vmmctl --vm=guest0 --cpu={cpu} --get-rip"));
        let kernel = format!("rip[{cpu}]\t0xffffffff");
        assert!(rip.starts_with(&kernel), "in HLT: {rip}");
    }
    ends(&mut guest, "halt -f", 2);
    assert_eq!(reason(&place), StopReason::Halt);
}

#[test]
#[ignore = "nested lane"]
fn five_gib_are_there_and_the_power_button_is_felt() {
    let outer = Place::new();
    // More than the lane's memory, as is well as long as nobody fills it.
    let large = outer.path("large");
    let _mounted = Tmpfs::mount(&large, "8g");
    let place = Place::below(&large);
    let mut guest = boot(&place, "linux/vmlinuz", "-m 5G", "", "-c 2");
    let memory = free(&mut guest);
    assert!((4850..5120).contains(&memory), "{memory} MiB");
    let map = shell(&mut guest, "grep 'System RAM' /proc/iomem");
    assert!(map.contains("100000000-17fffffff : System RAM"), "{map}");

    let pressed = "awk '{print $1}' /sys/firmware/acpi/interrupts/ff_pwr_btn";
    assert_eq!(number(&mut guest, pressed), 0);
    guest.signal(Signal::SIGTERM);
    until("the button's event", || number(&mut guest, pressed) != 0);
    assert!(guest.is_running());
    guest.signal(Signal::SIGTERM);
    assert_eq!(guest.wait().status, Some(1));
    assert_eq!(reason(&place), StopReason::Stopped);
}

#[test]
#[ignore = "nested lane"]
fn without_acpi_the_mptable_does_and_the_keyboard_controller_resets() {
    let place = Place::new();
    let cmdline = "acpi=off reboot=k pci=lastbus=1";
    // The lane's own kernel: the cloud kernel does not read MP tables (CONFIG_X86_MPPARSE).
    let run = "-c 2 -a -s 1:2:0,virtio-rnd";
    let mut guest = boot(&place, "lane/vmlinuz", "-m 256M", cmdline, run);
    assert_eq!(number(&mut guest, "nproc"), 2);
    assert_eq!(number(&mut guest, "grep -c x2apic /proc/cpuinfo"), 0);
    let interrupts = shell(&mut guest, "cat /proc/interrupts");
    assert!(interrupts.contains("IO-APIC"), "{interrupts}");
    assert!(!interrupts.contains("acpi"), "{interrupts}");
    // Its pin's way is that of bus 1, device 2.
    let irq = "cd /sys/bus/pci/devices/0000:01:02.0 && echo 1 >enable; cat irq";
    assert_eq!(shell(&mut guest, irq), "19");
    ends(&mut guest, "reboot -f", 0);
    assert_eq!(reason(&place), StopReason::Reset);
}

#[test]
#[ignore = "nested lane"]
fn ten_clones_run_at_once_and_a_forced_triple_fault_is_told() {
    let place = Place::new();
    let mut guest = boot(&place, "linux/vmlinuz", "-m 160M", "reboot=t", "-Y");
    suspend::clone_ten_times(&place, &mut guest);
    let ended = ends(&mut guest, "reboot -f", 3);
    let told = "rhyve: guest0: triple fault";
    assert!(ended.errors.contains(told), "{ended:?}");
    assert_eq!(reason(&place), StopReason::TripleFault);
}
