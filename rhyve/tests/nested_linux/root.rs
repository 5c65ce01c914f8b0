//! Debian's unmodified kernel with its root on virtio-blk: up to the login, 200 MB written with fsync,
//! and down again; then the image is looked at by programs that are not ours.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::sys::signal::Signal;

use super::support::{self, Place, Process, until};
use super::{ends, image, random, shell};

/// Debian's e2fsprogs and qemu-img, wherever they are.
pub fn tool(program: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("env");
    command
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .arg(program);
    command
}

pub fn output(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}

/// A copy of the disk that guest-image makes, for one guest.
pub fn disk(place: &Place) -> PathBuf {
    let path = place.path("disk.img");
    let mut cp = Command::new("cp");
    cp.arg("--sparse=always").arg(image("linux/disk.img"));
    output(cp.arg(&path));
    path
}

/// Boots from the disk and logs in.
pub fn boot_root(place: &Place, load: &str, cmdline: &str, run: &str) -> Process {
    let mut command = place.command(&format!("rhyveload {load} --cmdline"));
    command.arg(format!("console=ttyS0 quiet root=/dev/vda {cmdline}"));
    command.arg("--initrd").arg(image("linux/initramfs.cpio"));
    command.arg("--kernel").arg(image("linux/vmlinux"));
    let ended = Process::start({
        command.arg(support::VM);
        command
    })
    .wait();
    assert_eq!(ended.status, Some(0), "{ended:?}");
    let mut guest = place.start(run);
    guest.console.expect("rhyve login: ");
    guest.console.send("root");
    guest.console.expect("Password: ");
    guest.console.send("rhyve");
    guest.console.expect("# ");
    guest.console.send("stty cols 999");
    guest.console.expect("\n");
    guest.console.expect("# ");
    guest
}

/// What is written, 200 MB: pieces of 8 MB, each behind its number.
const PIECES: usize = 25;
const PIECE: usize = 8_000_000;

/// A guest of less memory than it writes: what it has touched it has for the next piece, which in the
/// lane takes less time than to touch more.
const LOAD: &str = "-m 192M";

/// Writes the pieces, and switches off by the init's own way once fsync has returned. Returns the
/// piece's MD5 sum, as the guest found it.
fn write_and_end(guest: &mut Process) -> String {
    let write = format!(
        "head -c {PIECE} /dev/urandom >/dev/shm/r; for i in $(seq {PIECES}); do echo $i; \
         cat /dev/shm/r; done >/root/data; \
         dd if=/dev/null of=/root/data conv=notrunc,fsync 2>/dev/null && md5sum </dev/shm/r; \
         echo 3 >/proc/sys/vm/drop_caches; tail -c {PIECE} /root/data | md5sum"
    );
    let sums = shell(guest, &write);
    let (written, read) = sums.split_once('\n').unwrap_or_default();
    assert_eq!(written.len(), "d41d8cd98f00b204e9800998ecf8427e  -".len());
    assert_eq!(written, read, "past the cache");
    ends(guest, "poweroff", 1);
    written.to_owned()
}

/// The MD5 sum of these bytes.
fn md5(bytes: &[u8]) -> String {
    let mut program = Command::new("md5sum");
    let program = program.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut program = program.spawn().unwrap();
    program.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = program.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// The file system of a raw image is whole, and has what was written.
fn check(image: &Path, sum: &str) {
    output(tool("e2fsck").args(["-f", "-n"]).arg(image));
    let mut cat = tool("debugfs");
    cat.args(["-R", "cat /root/data"]).arg(image);
    let cat = cat.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut cat = cat.spawn().unwrap();
    let mut data = cat.stdout.take().unwrap();
    let (mut first, mut piece) = (vec![0; PIECE], vec![0; PIECE]);
    for number in 1..=PIECES {
        let line = format!("{number}\n");
        let mut found = vec![0; line.len()];
        data.read_exact(&mut found).unwrap();
        assert_eq!(found, line.as_bytes());
        data.read_exact(&mut piece).unwrap();
        if number == 1 {
            first.copy_from_slice(&piece);
        }
        assert!(piece == first, "piece {number}");
    }
    assert_eq!(data.read(&mut [0]).unwrap(), 0, "more than was written");
    assert!(cat.wait().unwrap().success());
    assert_eq!(md5(&first), sum);
}

/// The disk is what it was said to be, and becomes larger.
fn grows(place: &Place, guest: &mut Process) {
    let known = "cd /sys/block/vda; cat size serial queue/write_cache";
    let known = shell(guest, known).replace(char::is_whitespace, " ");
    assert_eq!(known, "2097152 A-DISKwrite back");
    let smaller = place.run("vmmctl --vm=guest0 --set-disk=2=32M");
    assert!(smaller.errors.contains("only grows"), "{smaller:?}");
    place.ok("vmmctl --vm=guest0 --set-disk=2=1056M");
    until("the larger disk", || {
        shell(guest, "cat /sys/block/vda/size") == "2162688"
    });
}

fn by_every_interface(cpus: u32) {
    for transport in ["legacy", "modern", "transitional"] {
        let place = Place::new();
        let disk = disk(&place);
        let run = format!(
            "-c {cpus} -s 2,virtio-blk,{},virtio={transport},ser=A-DISK,queues={cpus} \
             -s 3,virtio-rnd,virtio={transport}",
            disk.display()
        );
        let mut guest = boot_root(&place, LOAD, "", &run);
        assert_eq!(shell(&mut guest, "nproc"), cpus.to_string());
        let interrupts = random::interrupts(&place, &mut guest, "0:3:0", transport);
        assert!(
            interrupts.contains("virtio1-input"),
            "by MSI-X: {interrupts}"
        );
        grows(&place, &mut guest);
        let sum = write_and_end(&mut guest);
        assert_eq!(disk.metadata().unwrap().len(), 1056 << 20);
        check(&disk, &sum);
    }
}

#[test]
#[ignore = "nested lane"]
fn a_root_disk_is_whole_after_200_mb_by_every_interface_on_one_cpu() {
    by_every_interface(1);
}

#[test]
#[ignore = "nested lane"]
fn a_root_disk_is_whole_after_200_mb_by_every_interface_on_four_cpus() {
    by_every_interface(4);
}

#[test]
#[ignore = "nested lane"]
fn a_qcow2_root_is_whole_and_its_base_untouched() {
    let place = Place::new();
    let (base, disk) = (disk(&place), place.path("disk.qcow2"));
    guest_image::layer::make(&disk, &base).unwrap();
    let run = format!("-c 4 -s 2,virtio-blk,{}", disk.display());
    let mut guest = boot_root(&place, LOAD, "", &run);
    let sum = write_and_end(&mut guest);
    output(tool("qemu-img").arg("check").arg(&disk));
    let raw = place.path("raw.img");
    let mut convert = tool("qemu-img");
    output(convert.args(["convert", "-O", "raw"]).arg(&disk).arg(&raw));
    check(&raw, &sum);
    output(Command::new("cmp").arg(&base).arg(image("linux/disk.img")));
}

#[test]
#[ignore = "nested lane"]
fn a_snapshot_of_a_root_leaves_the_image_as_it_was() {
    let place = Place::new();
    let disk = disk(&place);
    let run = format!("-s 2,virtio-blk,{},snapshot", disk.display());
    let mut guest = boot_root(&place, LOAD, "", &run);
    write_and_end(&mut guest);
    output(Command::new("cmp").arg(&disk).arg(image("linux/disk.img")));
}

/// How often rhyve is killed. The host lane does it 20 times, with a driver that writes sectors.
const KILLS: usize = 3;
/// Lines of an entry.
const LINES: usize = 500;

#[test]
#[ignore = "nested lane"]
fn what_fsync_returned_for_is_in_the_file_system_after_kill_9() {
    let place = Place::new();
    let (raw, qcow2) = (disk(&place), place.path("disk.qcow2"));
    guest_image::layer::make(&qcow2, &image("linux/disk.img")).unwrap();
    for round in 0..KILLS {
        let (image, options) = [
            (&raw, "virtio=legacy"),
            (&qcow2, "virtio=modern"),
            (&raw, "virtio=modern,aio=io_uring"),
        ][round % 3];
        let run = format!("-s 2,virtio-blk,{},{options}", image.display());
        // From the second time on, a disk that nobody has put in order.
        let mut guest = boot_root(&place, LOAD, "", &run);
        let file = format!("/root/log{round}");
        let append = format!("dd of={file} oflag=append conv=notrunc,fsync 2>/dev/null");
        guest.console.send(&format!(
            "n=0; while seq $n $((n+{LINES}-1)) | {append}; do n=$((n+{LINES})); echo stable $n; done"
        ));
        let least = (5 + 7 * round % 20) * LINES;
        guest.console.expect(&format!("stable {least}\r"));
        guest.signal(Signal::SIGKILL);
        let ended = guest.wait();
        assert_eq!(ended.status, Some(128 + 9), "{ended:?}");
        let stable = ended.output.lines().filter_map(|line| {
            // The last line may be cut short: then it says too little.
            line.trim().strip_prefix("stable ")?.parse().ok()
        });
        let stable = stable.max().unwrap_or(least).max(least);

        let copy = place.path("copy.img");
        let mut convert = tool("qemu-img");
        output(convert.args(["convert", "-O", "raw"]).arg(image).arg(&copy));
        // The journal is played back; what is wrong otherwise would be an error (status 4).
        let mut replay = tool("e2fsck");
        let replayed = replay.arg("-p").arg(&copy).status().unwrap().code();
        assert!(matches!(replayed, Some(0 | 1)), "{replayed:?}");
        output(tool("e2fsck").args(["-f", "-n"]).arg(&copy));
        let mut cat = tool("debugfs");
        let found = output(cat.args(["-R", &format!("cat {file}")]).arg(&copy)).stdout;
        let mut wanted = String::new();
        (0..stable).for_each(|line| wanted += &format!("{line}\n"));
        assert!(
            found.starts_with(wanted.as_bytes()),
            "round {round}: {} bytes of {} at least",
            found.len(),
            wanted.len()
        );
    }
}
