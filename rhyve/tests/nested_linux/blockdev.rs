//! Block devices of the host as disks, and what Linux makes of a disk's options.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::devices::device;
use super::support::Place;
use super::{boot, ends, number, shell};

/// A block device in memory with blocks of 4 KiB, which forgets what is discarded but, as a thin
/// volume does, has no way to write zeros (Documentation/block/null_blk.rst).
struct NullBlk {
    config: PathBuf,
    node: PathBuf,
}

impl NullBlk {
    fn new() -> Self {
        let configs = Path::new("/sys/kernel/config");
        if !configs.join("nullb").exists() {
            let mut mount = Command::new("mount");
            mount.args(["-t", "configfs", "configfs"]).arg(configs);
            assert!(mount.status().unwrap().success());
        }
        let config = configs.join("nullb/nullb1");
        fs::create_dir(&config).unwrap();
        for (name, value) in [
            ("memory_backed", "1"),
            ("discard", "1"),
            ("blocksize", "4096"),
            ("size", "32"),
            ("power", "1"),
        ] {
            fs::write(config.join(name), value).unwrap();
        }
        let node = PathBuf::from("/dev/nullb1");
        assert!(node.exists());
        Self { config, node }
    }
}

impl Drop for NullBlk {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.config);
    }
}

#[test]
#[ignore = "nested lane"]
fn linux_takes_a_block_device_and_a_disks_options() {
    let place = Place::new();
    let host = NullBlk::new();
    let file = place.path("disk.img");
    File::create(&file).unwrap().set_len(32 << 20).unwrap();
    let run = format!(
        "-c 2 -s 2,virtio-blk,{},nocache \
         -s 3,virtio-blk,{},sync,sectorsize=512/8192,nodelete,queues=2,ser=SECOND",
        host.node.display(),
        file.display()
    );
    let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", "", &run);
    // One that the host reads and writes without its page cache, and waits for.
    let told = device(&place, "virtio-blk");
    assert_eq!(told["properties"]["engine"], "io_uring", "{told}");
    let queue = |guest: &mut _, disk, names| {
        let said = shell(guest, &format!("cd /sys/block/{disk}/queue; cat {names}"));
        said.replace('\n', " ")
    };
    let sizes = "logical_block_size physical_block_size minimum_io_size";
    assert_eq!(queue(&mut guest, "vda", sizes), "4096 4096 4096");
    assert_eq!(queue(&mut guest, "vdb", sizes), "512 8192 8192");
    assert_eq!(
        queue(&mut guest, "vdb", "discard_max_bytes ../serial"),
        "0 SECOND"
    );
    assert_eq!(number(&mut guest, "ls /sys/block/vdb/mq | wc -l"), 2);
    for disk in ["vda", "vdb"] {
        let copy = format!(
            "dd if=/dev/urandom of=/tmp/r bs=1M count=8 2>/dev/null; \
             dd if=/tmp/r of=/dev/{disk} bs=64k conv=fsync 2>/dev/null; \
             echo 3 >/proc/sys/vm/drop_caches; md5sum </tmp/r; \
             dd if=/dev/{disk} bs=1M count=8 2>/dev/null | md5sum"
        );
        let sums = shell(&mut guest, &copy);
        let (written, read) = sums.split_once('\n').unwrap();
        assert_eq!(written, read, "{disk}");
    }
    // A part of it goes bad, and is mended: the last block, in sectors.
    let last = |guest: &mut _| {
        let read = "dd if=/dev/vda of=/dev/null bs=4k skip=8191 iflag=direct 2>&1";
        shell(
            guest,
            &format!("dmesg -n 1; {read} | grep -c 'Input/output'"),
        )
    };
    for (change, errors) in [("+65528-65535", "1"), ("-65528-65535", "0")] {
        fs::write(host.config.join("badblocks"), change).unwrap();
        assert_eq!(last(&mut guest), errors, "{change}");
    }
    let told = device(&place, "virtio-blk");
    assert_eq!(told["counters"]["host errors"], 1, "{told}");
    // What is discarded is gone on the host.
    let used = |bytes: &[u8]| bytes.iter().filter(|byte| **byte != 0).count();
    assert!(used(&fs::read(&host.node).unwrap()) > 7 << 20);
    assert_eq!(
        shell(&mut guest, "blkdiscard /dev/vda && echo given"),
        "given"
    );
    assert_eq!(used(&fs::read(&host.node).unwrap()), 0);
    let ended = ends(&mut guest, "poweroff -f", 1);
    let why = "read: Input/output error (os error 5) (error 1)";
    assert!(ended.errors.contains(why), "{ended:?}");
}

/// Reads all of the disk in the guest past its cache: the sum.
const READ: &str = "echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/vda";

#[test]
#[ignore = "nested lane"]
fn linux_lets_go_of_a_disk_and_takes_it_back() {
    let place = Place::new();
    let file = place.path("disk.img");
    fs::write(&file, vec![0x5a; 4 << 20]).unwrap();
    let run = format!("-c 2 -s 2,virtio-blk,{},queues=2", file.display());
    let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", "", &run);
    let sum = shell(&mut guest, READ);
    // The driver lets go: the device is reset, and set up again.
    let driver = "cd /sys/bus/virtio/drivers/virtio_blk; echo virtio0 >unbind; echo virtio0 >bind";
    // The function goes and is found again: BARs, MSI-X and doorbells with it.
    let function = "echo 1 >/sys/bus/pci/devices/0000:00:02.0/remove; echo 1 >/sys/bus/pci/rescan";
    for again in [driver, function, driver, function] {
        shell(&mut guest, again);
        shell(&mut guest, "until [ -b /dev/vda ]; do sleep 0.1; done");
        assert_eq!(shell(&mut guest, READ), sum, "{again}");
    }
    // A processor goes and comes, and with it a queue and its message; with requests under way.
    let read = "{ while :; do dd if=/dev/vda of=/dev/null bs=4k iflag=direct; done 2>/dev/null & }";
    shell(&mut guest, read);
    for online in [0, 1, 0, 1] {
        let one = "/sys/devices/system/cpu/cpu1/online";
        assert_eq!(
            number(&mut guest, &format!("echo {online} >{one}; cat {one}")),
            online
        );
        assert_eq!(shell(&mut guest, READ), sum);
    }
    shell(&mut guest, "kill $!; wait 2>/dev/null");
    let told = device(&place, "virtio-blk");
    assert_eq!(told["virtio"]["interrupts"], "msi-x", "{told}");
    assert_eq!(told["counters"]["bad requests"], 0, "{told}");
    ends(&mut guest, "poweroff -f", 1);
}
