//! Debian's unmodified kernel with its root on virtio-blk: up to the login, 200 MB written with fsync,
//! and down again; then the image is looked at by programs that are not ours.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::support::{self, Place, Process};
use super::{ends, image, shell};

/// Debian's e2fsprogs and qemu-img, wherever they are.
fn tool(program: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("env");
    command
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .arg(program);
    command
}

fn output(command: &mut Command) -> Output {
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
         dd if=/dev/null of=/root/data conv=notrunc,fsync 2>/dev/null && md5sum </dev/shm/r"
    );
    let sum = shell(guest, &write);
    assert_eq!(
        sum.len(),
        "d41d8cd98f00b204e9800998ecf8427e  -".len(),
        "{sum}"
    );
    ends(guest, "poweroff", 1);
    sum
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

fn by_every_interface(cpus: u32) {
    for transport in ["legacy", "modern", "transitional"] {
        let place = Place::new();
        let disk = disk(&place);
        let run = format!(
            "-c {cpus} -s 2,virtio-blk,{},virtio={transport},queues={cpus}",
            disk.display()
        );
        let mut guest = boot_root(&place, LOAD, "", &run);
        assert_eq!(shell(&mut guest, "nproc"), cpus.to_string());
        let sum = write_and_end(&mut guest);
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
