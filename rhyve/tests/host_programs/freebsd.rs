//! FreeBSD as bhyve of 2012 booted it: rhyveload puts a kernel, modules and a disk into memory, and
//! rhyve runs them on that year's machine. The kernel is the FreeBSD probe, which judges what it is
//! given.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::Crc;
use flate2::write::GzEncoder;
use guest_image::cli::GuestConsole;
use guest_image::freebsd_probe;
use liblzma::write::XzEncoder;
use tar::EntryType;

use crate::support::{Place, Process};

/// What the loader reads, and where the second disk is.
struct Guest {
    tree: PathBuf,
    disk: PathBuf,
}

impl Guest {
    fn new(place: &Place) -> Self {
        let tree = place.path("guest");
        freebsd_probe::make(&tree).unwrap();
        // The disk is no part of what is loaded.
        let disk = place.path("diskdev");
        fs::rename(tree.join("diskdev"), &disk).unwrap();
        Self { tree, disk }
    }

    /// Loads with these options, and runs until the probe has nothing more to say. Returns
    /// what both said.
    fn boot(&self, place: &Place, from: &str, name: &str, options: &str) -> [String; 2] {
        let load = format!("rhyveload {from} {name}");
        let loaded = place.ok(&load).replace('\r', "");
        let disk = self.disk.display();
        let line = format!(
            "rhyve -c 2 --era=2012 {options} -s 0,hostbridge -s 2,virtio-blk,{disk} {name}"
        );
        let mut guest = Process::start(place.command(&line));
        let said = guest.console.expect("The probe is up");
        guest.console.send("h");
        // Halted: every CPU waits with interrupts off.
        assert_eq!(guest.wait().status, Some(2));
        assert!(!said.contains("FAILED"), "{said}");
        [loaded, said.replace('\r', "")]
    }
}

/// The lines about what was loaded: the kernel finds in memory what the loader said it put there.
fn loads(text: &str) -> Vec<&str> {
    let is_load = |line: &&str| line.starts_with("/boot");
    text.lines().filter(is_load).collect()
}

#[test]
fn it_boots_as_in_2012() {
    let place = Place::new();
    let guest = Guest::new(&place);
    let from = format!("-m 768 -M 2048 -h {}", guest.tree.display());
    let card = "-s 1,virtio-net,user";
    let [loaded, said] = guest.boot(&place, &from, "myguest", card);
    assert_eq!(loads(&loaded).len(), 3, "{loaded}");
    assert_eq!(loads(&loaded), loads(&said));
    for line in [
        "GDB: debug ports: bvm",
        "GDB: current port: bvm",
        "rhyve's FreeBSD probe on bvmcons",
        "probe: kernel ok",
        "probe: symbols ok",
        "probe: kernend ok",
        "SMAP type=1 base=0x100000000 len=0x80000000",
        "real memory  = 6442450944 (6144 MB)",
        "module: probe_base started",
        "module: probe_user started",
        "MPTable: <NETAPP   vFiler      >",
        "probe: mptable has no I/O APIC",
        "FreeBSD/SMP: Multiprocessor System Detected: 2 CPUs",
        " cpu0 (BSP): APIC ID:  0",
        " cpu1 (AP): APIC ID:  1",
        "SMP: AP CPU #1 Launched!",
        "virtio_pci0: host features: 0x18020 <Status,MrgRxBuf,MacAddress>",
        "vtnet0: Ethernet address: 00:a0:98:f6:70:6c",
        "virtio_pci1: host features: 0x10000004 <RingIndirect,MaxNumSegs>",
        "vtblk0: 400MB (819200 512 byte sectors)",
        "probe: image ok",
        "Trying to mount root from ufs:vtbd0 []...",
        "probe: report done",
    ] {
        assert!(said.lines().any(|it| it == line), "no {line:?} in\n{said}");
    }
    assert!(said.contains("\nprobe: lapic x2apic "), "{said}");
    assert!(said.contains("\nmd0: Preloaded image </boot"), "{said}");
    // Register blocks that are 20 + 8 and 20 + 28 bytes long.
    assert!(said.contains("Network adapter> port 0x2000-0x201f at device 1.0 on pci0"));
    assert!(said.contains("Block adapter> port 0x2040-0x207f at device 2.0 on pci0"));
    // Its symbols are where the loader has put them: nobody has to name the kernel's file.
    let callers = place.ok("vmmctl --vm=myguest --bt");
    let first = callers.lines().find(|line| line.starts_with("#0 "));
    let first = first.unwrap_or_else(|| panic!("{callers}"));
    assert!(first.starts_with("#0  0xffffffff802"), "{callers}");
    assert!(first.contains(" in "), "{callers}");
}

/// Debian's makefs: what `cargo xtask test` names in $MAKEFS, or the one that is installed.
fn makefs() -> PathBuf {
    let program = std::env::var_os("MAKEFS").unwrap_or_else(|| "/usr/sbin/makefs".into());
    program.into()
}

/// UFS2 by makefs.
fn ufs(tree: &Path, image: &Path) -> Vec<u8> {
    let program = makefs();
    let mut makefs = Command::new(&program);
    makefs.args(["-t", "ffs", "-B", "little", "-o", "version=2", "-M", "4m"]);
    let output = makefs.arg(image).arg(tree).output();
    let output = output.unwrap_or_else(|error| {
        panic!(
            "{}: {error}: install Debian's package makefs, name the program in $MAKEFS, or run the \
             tests by `cargo xtask test`",
            program.display()
        )
    });
    assert!(output.status.success(), "{output:?}");
    fs::read(image).unwrap()
}

/// Where the partition of these disks begins.
const START: u64 = 64;

/// The file system in a FreeBSD slice of an MBR, with a BSD label for its partition `a` (FreeBSD,
/// sys/sys/{diskmbr,disklabel}.h).
fn in_mbr(ufs: &[u8]) -> Vec<u8> {
    let sectors = (ufs.len() / 512) as u32;
    let mut disk = vec![0; START as usize * 512];
    disk[446] = 0x80;
    disk[450] = 0xa5;
    disk[454..458].copy_from_slice(&(START as u32).to_le_bytes());
    disk[458..462].copy_from_slice(&sectors.to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(ufs);
    // The label is in the second sector, which UFS leaves to it.
    let label = &mut disk[(START as usize + 1) * 512..][..512];
    for at in [0, 132] {
        label[at..at + 4].copy_from_slice(&0x8256_4557u32.to_le_bytes());
    }
    label[138] = 8;
    let partition = |sectors: u32, kind: u8| {
        let mut entry = [0; 16];
        entry[..4].copy_from_slice(&sectors.to_le_bytes());
        entry[12] = kind;
        entry
    };
    label[148..164].copy_from_slice(&partition(sectors, 7));
    label[148 + 32..148 + 48].copy_from_slice(&partition(sectors, 0));
    let words = label[..148 + 8 * 16].chunks_exact(2);
    let sum = words.fold(0, |sum, word| sum ^ u16::from_le_bytes([word[0], word[1]]));
    label[136..138].copy_from_slice(&sum.to_le_bytes());
    disk
}

/// The file system in a partition of a GPT (UEFI 2.10, 5.3).
fn in_gpt(ufs: &[u8]) -> Vec<u8> {
    let sectors = (ufs.len() / 512) as u64;
    let last = START + sectors + 33;
    let mut entries = vec![0; 128 * 128];
    // 516e7cb6-6ecf-11d6-8ff8-00022d09712b
    let ufs_type = *b"\xb6\x7c\x6e\x51\xcf\x6e\xd6\x11\x8f\xf8\x00\x02\x2d\x09\x71\x2b";
    entries[..16].copy_from_slice(&ufs_type);
    entries[16..32].copy_from_slice(&[7; 16]);
    entries[32..40].copy_from_slice(&START.to_le_bytes());
    entries[40..48].copy_from_slice(&(START + sectors - 1).to_le_bytes());
    let crc = |bytes: &[u8]| {
        let mut crc = Crc::new();
        crc.update(bytes);
        crc.sum().to_le_bytes()
    };
    let header = |own: u64, other: u64, table: u64| {
        let mut header = b"EFI PART\0\0\x01\0\x5c\0\0\0\0\0\0\0\0\0\0\0".to_vec();
        header.extend([own, other, 34, last - 34].map(u64::to_le_bytes).concat());
        header.extend([9; 16]);
        header.extend(table.to_le_bytes());
        header.extend([128u32, 128].map(u32::to_le_bytes).concat());
        header.extend(crc(&entries));
        let sum = crc(&header);
        header[16..20].copy_from_slice(&sum);
        header.resize(512, 0);
        header
    };
    let mut disk = vec![0; 512];
    disk[450] = 0xee;
    disk[454] = 1;
    disk[458..462].copy_from_slice(&u32::try_from(last).unwrap().to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(header(1, last, 2));
    disk.extend(&entries);
    disk.resize(START as usize * 512, 0);
    disk.extend(ufs);
    disk.extend(&entries);
    disk.extend(header(last, 1, last - 32));
    disk
}

#[test]
fn it_boots_from_every_kind_of_disk() {
    let place = Place::new();
    let guest = Guest::new(&place);
    // The kernel and a module compressed, as they may be.
    for name in ["kernel", "probe_user.ko"] {
        let plain = guest.tree.join("boot/kernel").join(name);
        let packed = fs::File::create(plain.with_file_name(format!("{name}.gz"))).unwrap();
        let mut packed = GzEncoder::new(packed, flate2::Compression::default());
        packed.write_all(&fs::read(&plain).unwrap()).unwrap();
        packed.finish().unwrap();
        fs::remove_file(plain).unwrap();
    }
    let bare = ufs(&guest.tree, &place.path("ufs"));
    let disk = place.path("disk");
    for (bytes, device) in [
        (bare.clone(), "disk0:"),
        (in_mbr(&bare), "disk0s1a:"),
        (in_gpt(&bare), "disk0p1:"),
    ] {
        fs::write(&disk, bytes).unwrap();
        let from = format!("-m 64 -d {}", disk.display());
        let [loaded, said] = guest.boot(&place, &from, "disks", "");
        assert_eq!(loads(&loaded).len(), 3, "{loaded}");
        // The kernel knows its file by the name without .gz, or with it: as the loader says.
        let sizes = |text| {
            loads(text)
                .into_iter()
                .map(|line| line.split_once(' ').unwrap().1)
        };
        assert!(sizes(&loaded).eq(sizes(&said)), "{loaded}\n{said}");
        let currdev = format!("env: currdev={device}");
        assert!(
            said.lines().any(|line| line == currdev),
            "{currdev}: {said}"
        );
        assert!(said.contains("module: probe_user started"));
    }
}

/// A distribution set of a tree and a few entries more.
fn set(path: &Path, tree: Option<&Path>, entries: &[(&str, EntryType, u32, &str)]) {
    let file = fs::File::create(path).unwrap();
    let mut set = tar::Builder::new(XzEncoder::new(file, 1));
    for &(name, kind, mode, text) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        let [uid, gid] = [0, 5];
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_mtime(1_333_097_051);
        if matches!(kind, EntryType::Symlink | EntryType::Link) {
            header.set_size(0);
            set.append_link(&mut header, name, text).unwrap();
        } else {
            header.set_size(text.len() as u64);
            set.append_data(&mut header, name, text.as_bytes()).unwrap();
        }
    }
    if let Some(tree) = tree {
        set.append_dir_all("./boot", tree.join("boot")).unwrap();
    }
    set.into_inner().unwrap().finish().unwrap();
}

#[test]
fn it_boots_from_distribution_sets() {
    let place = Place::new();
    let probe = Guest::new(&place);
    let (dist, out) = (place.path("dist"), place.path("made"));
    fs::create_dir(&dist).unwrap();
    let base = [
        ("./", EntryType::Directory, 0o755, ""),
        ("./bin", EntryType::Directory, 0o755, ""),
        ("./bin/sh", EntryType::Regular, 0o4555, "a shell\n"),
        ("./bin/[", EntryType::Link, 0o4555, "./bin/sh"),
        (
            "./etc/ttys",
            EntryType::Regular,
            0o444,
            "console none off\n",
        ),
        ("./sys", EntryType::Symlink, 0o777, "usr/src/sys"),
        ("./var/empty", EntryType::Directory, 0o555, ""),
    ];
    set(&dist.join("base.txz"), None, &base);
    set(&dist.join("kernel.txz"), Some(&probe.tree), &[]);
    let image = guest_image::freebsd::make(&dist, GuestConsole::Bvm, &out, &makefs()).unwrap();
    assert_eq!(image.files.len(), 3);
    let guest = Guest {
        tree: out.clone(),
        disk: out.join("diskdev"),
    };
    for from in [&guest.tree, &guest.disk] {
        let option = if from.is_dir() { "-h" } else { "-d" };
        let from = format!("-m 64 {option} {}", from.display());
        let [_, said] = guest.boot(&place, &from, "sets", "");
        let root = "env: vfs.root.mountfrom=ufs:/dev/vtbd0";
        assert!(said.lines().any(|line| line == root), "{said}");
        assert!(said.contains("module: probe_user started"));
    }
    // An inode of the set-uid file with two names, and its owner's ids (sys/ufs/ufs/dinode.h).
    let inode = [
        &0o104_555_u16.to_le_bytes()[..],
        &[2, 0, 0, 0, 0, 0, 5, 0, 0, 0],
    ]
    .concat();
    let bytes = fs::read(&guest.disk).unwrap();
    let mut inodes = bytes.chunks(256);
    assert!(
        inodes.any(|it| it.starts_with(&inode)),
        "owners, modes, links"
    );

    // The same without programs, of /boot alone, on a serial console.
    let image = guest_image::freebsd::make(&probe.tree, GuestConsole::Serial, &out, &makefs());
    assert_eq!(image.unwrap().files.len(), 3);
    place.ok(&format!("rhyveload -m 64 -d {} boot", guest.disk.display()));
    let mut rhyve = Process::start(place.command("rhyve -l com1,stdio boot"));
    let said = rhyve.console.expect("The probe is up");
    assert!(said.contains("env: console=comconsole"), "{said}");

    // Names that lead elsewhere are refused, before anything is written there.
    let away = [
        ("./out", EntryType::Symlink, 0o777, "/"),
        ("./out/away", EntryType::Regular, 0o644, "x"),
    ];
    set(&dist.join("base.txz"), None, &away);
    let made = guest_image::freebsd::make(&dist, GuestConsole::Bvm, &out, &makefs());
    let error = made.unwrap_err().to_string();
    assert!(error.contains("base.txz"), "{error}");
    assert!(!Path::new("/away").exists());
}

#[test]
fn a_debugger_talks_to_the_kernels_own_stub() {
    let place = Place::new();
    let guest = Guest::new(&place);
    // RB_KDB: the kernel stops early and waits for a debugger.
    place.ok(&format!(
        "rhyveload -m 64 -e boot_ddb=1 -h {} dbg",
        guest.tree.display()
    ));
    let mut rhyve = Process::start(place.command("rhyve -c 2 --era=2012 dbg"));
    rhyve
        .console
        .expect("KDB: enter: Boot flags requested debugger");
    rhyve.errors.expect("waiting for connection from gdb at ");
    let place_of_port = rhyve.errors.expect("\n");
    let mut gdb = Command::new("timeout");
    // FreeBSD's own ABI is known to gdb-multiarch only.
    gdb.args(["60", "gdb", "-nx", "-batch", "-iex", "set osabi none"]);
    let target = format!("target remote {place_of_port}");
    for command in [
        "set tcp connect-timeout 20",
        "set remotetimeout 20",
        &target,
        "print/x $rip",
        "print/x $cs",
        // What the loader left at 0x1000, and a register that is changed and set back.
        "x/1wx 0x1000",
        "set var $rbx = $rbx + 1",
        "set var $rbx = $rbx - 1",
        "info symbol $rip",
        "detach",
    ] {
        gdb.args(["-ex", command]);
    }
    gdb.arg(guest.tree.join("boot/kernel/kernel"));
    gdb.stdin(std::process::Stdio::null());
    let output = gdb.output().unwrap();
    let found = output.status.code() != Some(127);
    assert!(found, "there is no gdb: apt-get install gdb");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("$1 = 0xffffffff802"), "{output:?}");
    assert!(said.contains("$2 = 0x8\n"), "{output:?}");
    assert!(said.contains("0x1000:\t0x00000000"), "{output:?}");
    assert!(said.contains("in section .text"), "{output:?}");
    // It goes on.
    rhyve.console.expect("KDB: left");
    let rest = rhyve.console.expect("The probe is up");
    assert!(rest.contains("SMP: AP CPU #1 Launched!"), "{rest}");
    assert!(!rest.contains("FAILED"), "{rest}");
    // And it stops again when it is asked to.
    rhyve.console.send("d");
    rhyve.console.expect("KDB: enter: manual");
    rhyve.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(rhyve.wait().status, Some(1));
}

#[test]
fn the_consoles_of_an_era_can_be_elsewhere() {
    let place = Place::new();
    let guest = Guest::new(&place);
    let load = format!("rhyveload -m 64 -h {} elsewhere", guest.tree.display());
    // Today's machine has no BVM console and no debug port: the kernel takes the serial port.
    place.ok(&load);
    let mut rhyve = Process::start(place.command("rhyve -c 2 -l com1,stdio elsewhere"));
    let said = rhyve.console.expect("The probe is up");
    assert!(said.contains("rhyve's FreeBSD probe on ttyu0"), "{said}");
    assert!(!said.contains("GDB:") && !said.contains("FAILED"), "{said}");
    // And it can have them.
    rhyve.console.send("r");
    assert_eq!(rhyve.wait().status, Some(0), "a reboot");
    place.ok(&load);
    let log = place.path("bvmcons");
    let line = format!("rhyve -l bvmcons,file:{} -g 0 elsewhere", log.display());
    let _rhyve = Process::start(place.command(&line));
    crate::support::until("the report in the file", || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        let said = fs::read_to_string(&log).unwrap_or_default();
        said.contains("rhyve's FreeBSD probe on bvmcons") && said.contains("report done\r\n")
    });
}
