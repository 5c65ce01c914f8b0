//! Linux is stopped in the midst of work and goes on in another process.

use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use vmm_api::state::Phase;

use super::support::{Place, Process, VM};
use super::{boot, ends, number, shell};

/// Suspends the guest and runs it again, with nothing said but its name.
pub fn again(place: &Place, guest: &mut Process) {
    let suspend = place.run("vmmctl --vm=guest0 --suspend");
    assert_eq!(
        suspend.status,
        Some(0),
        "{suspend:?}; {}",
        guest.console.circumstances()
    );
    assert_eq!(place.state().phase, Phase::Suspended);
    let console = guest.wait();
    assert_eq!(console.status, Some(1), "{console:?}");
    *guest = Process::start(place.command(&format!("rhyve {VM}")));
}

#[test]
#[ignore = "nested lane"]
fn a_dd_that_was_suspended_twenty_times_has_its_checksum() {
    for (cpus, interface) in [(1, "modern"), (4, "legacy")] {
        let place = Place::new();
        let disk = place.path("disk.img");
        let fill = format!(
            "head -c 8388608 /dev/urandom > {0}; sha256sum < {0}",
            disk.display()
        );
        let output = Command::new("sh").args(["-c", &fill]).output().unwrap();
        let sum = String::from_utf8(output.stdout).unwrap();
        let run = format!(
            "-c {cpus} -s 2,virtio-blk,{},virtio={interface} -s 3,virtio-rnd",
            disk.display()
        );
        let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", "", &run);
        let uptime = number(&mut guest, "cut -d. -f1 /proc/uptime");
        // On every CPU at once, and past the cache.
        let work = "for n in $(seq $(nproc)); do (dd if=/dev/vda bs=64k iflag=direct 2>/dev/null \
                    | sha256sum >/tmp/sum$n) & done; wait; cat /tmp/sum*; echo work done";
        guest.console.send(work);
        guest.console.expect("\n");
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(50));
            again(&place, &mut guest);
        }
        let sums = guest.console.expect("work done\r\n");
        let sums: Vec<&str> = sums
            .split_whitespace()
            .filter(|word| *word != "-")
            .collect();
        let right = sum.split_whitespace().next().unwrap();
        assert_eq!(sums, vec![right; cpus], "{cpus} CPUs");
        guest.console.expect("# ");
        // Its clocks have not jumped, and nothing complains.
        let later = number(&mut guest, "cut -d. -f1 /proc/uptime");
        assert!((uptime..uptime + 120).contains(&later), "{uptime}, {later}");
        let log = shell(&mut guest, "dmesg | grep -iE 'stall|lockup|hung' | head -5");
        assert_eq!(log, "", "{cpus} CPUs");
        ends(&mut guest, "poweroff -f", 1);
    }
}

/// Ten clones of a guest that was booted once run at once: each answers, and together they take little
/// more memory than the one.
pub fn clone_ten_times(place: &Place, guest: &mut Process) {
    place.ok("vmmctl --vm=guest0 --snapshot=booted");
    let names: Vec<String> = (0..10).map(|n| format!("clone{n}")).collect();
    let mut clones: Vec<Process> = Vec::new();
    for name in &names {
        place.ok(&format!("vmmctl --vm=booted --clone={name}"));
        clones.push(Process::start(place.command(&format!("rhyve {name}"))));
    }
    for (name, clone) in names.iter().zip(&mut clones) {
        let told = format!("echo {name} >/tmp/name; cat /tmp/name");
        assert_eq!(shell(clone, &told), *name);
    }
    // Each has what it has written itself, and the first one has nothing of it.
    for (name, clone) in names.iter().zip(&mut clones) {
        assert_eq!(shell(clone, "cat /tmp/name"), *name);
    }
    assert_eq!(shell(guest, "ls /tmp/name 2>/dev/null; echo on"), "on");
    let shared = std::fs::metadata(place.path("root/booted/base")).unwrap();
    let shared = shared.blocks() * 512;
    let own = names.iter().zip(&clones);
    let own: u64 = own.map(|(name, clone)| place.own_memory(name, clone)).sum();
    assert!(shared > 30 << 20, "{shared} bytes");
    assert!(own < 2 * shared, "{own} bytes beside {shared}");
}
