//! Debian's unmodified kernel with its root on virtio-blk: up to the login, data written with fsync,
//! and down again; then the image is looked at by programs that are not ours. One boot writes 200 MB,
//! the others a part of that: the lane's processor is slow.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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

/// Pieces of 8 MB: 200 MB of them, and fewer.
const ALL: u32 = 25;
const SOME: u32 = 3;

/// Writes pieces that differ, and switches off by the init's own way. Returns the MD5 sum that the
/// guest found once fsync had returned.
fn write_and_end(guest: &mut Process, pieces: u32) -> String {
    let write = format!(
        "head -c 8000000 /dev/urandom >/dev/shm/r; for i in $(seq {pieces}); do echo $i; \
         cat /dev/shm/r; done | dd of=/root/data bs=1M iflag=fullblock conv=fsync 2>/dev/null; \
         md5sum </root/data"
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

/// The file system of a raw image is whole, and has what was written.
fn check(image: &Path, sum: &str) {
    output(tool("e2fsck").args(["-f", "-n"]).arg(image));
    let mut cat = Command::new("sh");
    let path = std::env::var("PATH").unwrap_or_default();
    cat.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    let debugfs = format!("debugfs -R 'cat /root/data' '{}' | md5sum", image.display());
    let found = output(cat.args(["-c", &debugfs])).stdout;
    assert_eq!(String::from_utf8_lossy(&found).trim(), sum);
}

#[test]
#[ignore = "nested lane"]
fn a_root_disk_is_whole_after_200_mb_by_every_interface() {
    for (transport, cpus, pieces) in [
        ("legacy", 1, SOME),
        ("modern", 4, SOME),
        ("transitional", 4, ALL),
    ] {
        let place = Place::new();
        let disk = disk(&place);
        let run = format!(
            "-c {cpus} -s 2,virtio-blk,{},virtio={transport},queues={cpus}",
            disk.display()
        );
        let mut guest = boot_root(&place, "-m 512M", "", &run);
        assert_eq!(shell(&mut guest, "nproc"), cpus.to_string());
        let sum = write_and_end(&mut guest, pieces);
        check(&disk, &sum);
    }
}

#[test]
#[ignore = "nested lane"]
fn a_qcow2_root_is_whole_and_its_base_untouched() {
    let place = Place::new();
    let (base, disk) = (disk(&place), place.path("disk.qcow2"));
    guest_image::layer::make(&disk, &base).unwrap();
    let run = format!("-c 4 -s 2,virtio-blk,{}", disk.display());
    let mut guest = boot_root(&place, "-m 512M", "", &run);
    let sum = write_and_end(&mut guest, SOME);
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
    let mut guest = boot_root(&place, "-m 512M", "", &run);
    write_and_end(&mut guest, SOME);
    output(Command::new("cmp").arg(&disk).arg(image("linux/disk.img")));
}
