//! virtio-blk under Debian's unmodified driver: what `super::root` does not show.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

use super::root::{output, tool};
use super::support::{Place, Tmpfs};
use super::{boot, ends, shell};

const SIZE: u64 = 64 << 20;

fn image(place: &Place, name: &str) -> PathBuf {
    let path = place.path(name);
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    path
}

/// MD5 of a file's first 8 MiB, by the host.
fn sum(path: &std::path::Path) -> String {
    let head = format!("head -c 8388608 '{}' | md5sum", path.display());
    let output = Command::new("sh").args(["-c", &head]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Writes 8 MiB to /dev/vda in the guest, and reads them back past the cache: their sum.
const WRITE_AND_READ: &str = "dd if=/dev/urandom of=/tmp/r bs=1M count=8 2>/dev/null; \
    dd if=/tmp/r of=/dev/vda bs=64k conv=fsync 2>/dev/null && echo 3 >/proc/sys/vm/drop_caches; \
    md5sum </tmp/r; dd if=/dev/vda bs=1M count=8 2>/dev/null | md5sum";

#[test]
#[ignore = "nested lane"]
fn a_snapshot_is_forgotten_and_a_read_only_disk_refuses() {
    let place = Place::new();
    let disk = image(&place, "disk.img");
    let before = sum(&disk);
    let path = disk.display();
    let run = format!("-s 2,virtio-blk,{path},snapshot -s 3,virtio-blk,{path},ro");
    let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", "", &run);
    let sums = shell(&mut guest, WRITE_AND_READ);
    let (written, read) = sums.split_once('\n').unwrap();
    assert_eq!(written, read);
    assert_ne!(written, before);
    assert_eq!(
        shell(&mut guest, "cat /sys/block/vda/ro /sys/block/vdb/ro"),
        "0\n1"
    );
    ends(&mut guest, "poweroff -f", 1);
    assert_eq!(sum(&disk), before);
}

#[test]
#[ignore = "nested lane"]
fn a_full_host_is_the_guests_io_error_and_passes() {
    let place = Place::new();
    let small = place.path("small");
    let _mounted = Tmpfs::mount(&small, "16m");
    let disk = small.join("disk.img");
    File::create(&disk).unwrap().set_len(SIZE).unwrap();
    let layer = small.join("disk.qcow2");
    output(
        tool("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&layer)
            .arg("64M"),
    );
    let (raw, qcow2) = (disk.display(), layer.display());
    let run = format!("-s 2,virtio-blk,{raw} -s 3,virtio-blk,{qcow2}");
    let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", "", &run);
    shell(&mut guest, "dmesg -n 1");
    for disk in ["/dev/vda", "/dev/vdb"] {
        let write = format!("dd if=/dev/zero of={disk} bs=1M count=32 conv=fsync 2>&1");
        let failed = shell(&mut guest, &format!("{write} | grep -c error"));
        assert_eq!(failed, "1", "{disk}");
        // Giving space back makes room.
        let given = shell(&mut guest, &format!("blkdiscard {disk} && echo given"));
        assert_eq!(given, "given", "{disk}");
        let sums = shell(&mut guest, &WRITE_AND_READ.replace("/dev/vda", disk));
        let (written, read) = sums.split_once('\n').unwrap();
        assert_eq!(written, read, "{disk}");
        shell(&mut guest, "blkdiscard /dev/vda");
    }
    let ended = ends(&mut guest, "poweroff -f", 1);
    assert!(
        ended.errors.contains("No space left on device"),
        "{ended:?}"
    );
    output(tool("qemu-img").args(["check", "-q"]).arg(&layer));
}
