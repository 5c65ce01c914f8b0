//! rhyveload against a loader that nobody here wrote: GRUB's kfreebsd, in QEMU, loads the FreeBSD
//! probe with the same modules, variables and preloaded disk. What the probe prints of its metadata
//! may differ only in what the two loaders are known to do differently.
//!
//! | | rhyveload, as bhyveload | GRUB 2.06, loader/i386/bsd.c |
//! |-|-------------------------|------------------------------|
//! | names | whole path | last component |
//! | kernel's type | elf kernel | elf64 kernel |
//! | kernel's size | with symbols | without, in whole pages |
//! | kernel's section headers | told | left out |
//! | modules' sections | all that have bytes | those that are allocated |
//! | memory map | two or three regions | the BIOS's |
//! | stack, page tables | below 0x6000 | wherever there is room |

#![cfg(test)]

#[path = "../support/mod.rs"]
#[allow(dead_code)]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use guest_image::freebsd_probe;
use support::{Place, Process};

/// What is loaded, in this order.
const FILES: [&str; 4] = ["kernel", "probe_base.ko", "probe_user.ko", "mdroot"];

/// What both loaders are told, besides what is theirs.
const VARIABLES: [(&str, &str); 2] = [
    ("vfs.root.mountfrom", "ufs:vtbd0"),
    ("probe.word", "two words"),
];

const MENU: &str = "\
kfreebsd -v -h (hd1)/boot/kernel/kernel
kfreebsd_loadenv (hd1)/boot/env
kfreebsd_module_elf (hd1)/boot/kernel/probe_base.ko
kfreebsd_module_elf (hd1)/boot/kernel/probe_user.ko
kfreebsd_module (hd1)/boot/kernel/mdroot type=md_image
boot
";

/// Before it has a configuration, GRUB is to say everything on COM1.
const EARLY: &str = "\
serial --unit=0 --speed=115200
terminal_output serial
normal (hd1)/boot/grub.cfg
";

/// A program that `cargo xtask test` names.
fn tool(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable);
    let path =
        path.unwrap_or_else(|| panic!("no ${variable}: run this by `cargo xtask test host`"));
    path.into()
}

fn run(command: &mut Command) {
    let output = command.output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// Makes a boot disk of GRUB's.
fn grub(place: &Place) -> PathBuf {
    let boot = tool("RHYVE_GRUB");
    let modules = place.path("modules");
    fs::create_dir(&modules).unwrap();
    for entry in boot.parent().unwrap().read_dir().unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), modules.join(entry.file_name())).unwrap();
    }
    mend(&modules.join("relocator.mod"));
    let early = place.path("early.cfg");
    fs::write(&early, EARLY).unwrap();
    let core = place.path("core.img");
    let mut mkimage = Command::new(tool("RHYVE_GRUB_MKIMAGE"));
    mkimage
        .args(["-O", "i386-pc", "-p", "/boot", "-d"])
        .arg(&modules);
    mkimage.arg("-c").arg(&early).arg("-o").arg(&core);
    run(mkimage.args(["biosdisk", "tar", "bsd", "serial", "boot", "normal"]));
    let mut disk = fs::read(boot).unwrap();
    disk.extend(fs::read(core).unwrap());
    disk.resize(disk.len().next_multiple_of(1 << 20), 0);
    let path = place.path("grub.disk");
    fs::write(&path, disk).unwrap();
    path
}

/// GRUB 2.06 for BIOSes jumps to a 64-bit kernel through the wrong word: JMP [RIP + 0] (ff 25) has a
/// displacement of 8 bytes instead of 4, behind which the address is. Later ones do not have that.
fn mend(relocator: &Path) {
    let mut module = fs::read(relocator).unwrap();
    let jump = [&[0xfc, 0xff, 0x25][..], &[0; 16]].concat();
    let places = module.windows(jump.len()).enumerate();
    let places: Vec<usize> = places
        .filter(|(_, bytes)| *bytes == jump)
        .map(|(at, _)| at)
        .collect();
    if let [at] = places[..] {
        module[at + 3] = 4;
        fs::write(relocator, module).unwrap();
    }
}

/// What the probe says when GRUB has loaded it.
fn by_grub(place: &Place, kernel: &Path) -> String {
    let boot = place.path("tree/boot");
    fs::create_dir_all(boot.join("kernel")).unwrap();
    for name in FILES {
        fs::copy(kernel.join(name), boot.join("kernel").join(name)).unwrap();
    }
    let variables: String = VARIABLES
        .iter()
        .map(|(name, value)| format!("{name}=\"{value}\"\n"))
        .collect();
    fs::write(boot.join("env"), variables).unwrap();
    fs::write(boot.join("grub.cfg"), MENU).unwrap();
    let files = place.path("files.disk");
    let mut tar = Command::new("tar");
    tar.args(["--format=ustar", "--blocking-factor=1", "-cf"]);
    run(tar
        .arg(&files)
        .arg("-C")
        .arg(place.path("tree"))
        .arg("boot"));
    let grub = grub(place);
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "--"]);
    qemu.arg(tool("RHYVE_QEMU"));
    qemu.args([
        "-accel", "tcg", "-m", "64", "-display", "none", "-vga", "none",
    ]);
    qemu.args(["-no-reboot", "-net", "none", "-serial", "stdio"]);
    for disk in [grub, files] {
        qemu.arg("-drive");
        qemu.arg(format!("file={},format=raw,if=ide", disk.display()));
    }
    let mut qemu = Process::start(qemu);
    qemu.console.expect("rhyve's FreeBSD probe");
    let said = qemu.console.expect("The probe is up");
    // A reset, which ends QEMU.
    qemu.console.send("r");
    assert_eq!(qemu.wait().status, Some(0));
    said.replace('\r', "")
}

/// What the probe says when rhyveload has loaded it.
fn by_rhyveload(place: &Place, guest: &Path) -> String {
    let mut load = place.command("rhyveload -m 64 -e boot_verbose=YES");
    for (name, value) in VARIABLES {
        load.arg("-e").arg(format!("{name}={value}"));
    }
    load.arg("-h").arg(guest).arg("guest0");
    assert_eq!(Process::start(load).wait().status, Some(0));
    let mut rhyve = Process::start(place.command("rhyve -l com1,stdio guest0"));
    rhyve.console.expect("rhyve's FreeBSD probe");
    let said = rhyve.console.expect("The probe is up");
    rhyve.console.send("h");
    assert_eq!(rhyve.wait().status, Some(2));
    said.replace('\r', "")
}

/// A file's records: length and value by name.
#[derive(Debug, Default)]
struct Records(BTreeMap<String, (u64, String)>);

impl Records {
    fn text(&self, name: &str) -> &str {
        self.0[name].1.trim_matches('"')
    }

    fn number(&self, name: &str) -> u64 {
        let (_, value) = &self.0[name];
        u64::from_str_radix(value.strip_prefix("0x").unwrap(), 16).unwrap()
    }

    /// Which records there are.
    fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }
}

fn files(said: &str) -> Vec<Records> {
    let mut files: Vec<Records> = Vec::new();
    for line in said.lines().filter_map(|line| line.strip_prefix("md: ")) {
        let mut words = line.splitn(3, ' ');
        let mut word = || words.next().unwrap().to_owned();
        let (name, length, value) = (word(), word().parse().unwrap(), word());
        if name == "name" {
            files.push(Records::default());
        }
        let records = &mut files.last_mut().unwrap().0;
        assert!(
            records.insert(name, (length, value)).is_none(),
            "twice: {line}"
        );
    }
    files
}

#[test]
fn grub_and_rhyveload_hand_over_the_same() {
    let place = Place::new();
    let guest = place.path("guest");
    freebsd_probe::make(&guest).unwrap();
    let ours = by_rhyveload(&place, &guest);
    let theirs = by_grub(&place, &guest.join("boot/kernel"));
    for said in [&ours, &theirs] {
        assert!(!said.contains("FAILED"), "{said}");
        // Modules are linked and run, whoever loaded them.
        assert!(said.contains("module: probe_user started"), "{said}");
        for (name, value) in VARIABLES {
            let line = format!("env: {name}={value}");
            assert!(said.lines().any(|it| it == line), "{line}: {said}");
        }
    }
    let context = format!("{ours}\n{theirs}");
    let (ours, theirs) = (files(&ours), files(&theirs));
    assert_eq!((ours.len(), theirs.len()), (4, 4), "{context}");
    for ((own, other), name) in ours.iter().zip(&theirs).zip(FILES) {
        assert_eq!(own.text("name"), format!("/boot/kernel/{name}"));
        assert_eq!(other.text("name"), name);
        let mut names = own.names();
        if name == "kernel" {
            names.retain(|record| *record != "shdr");
        } else {
            assert_eq!(own.text("type"), other.text("type"));
        }
        assert_eq!(names, other.names(), "{name}: {context}");
        for record in names {
            let (own, other) = (&own.0[record], &other.0[record]);
            match record {
                // The same bytes.
                "elfhdr" | "dynamic" | "howto" => assert_eq!(own, other, "{name} {record}"),
                "name" | "type" | "smap" => {}
                // As long, with another value.
                _ => assert_eq!(own.0, other.0, "{name} {record}"),
            }
        }
    }
    let ([own, base, user, disk], [other, its_base, its_user, its_disk]) = (&ours[..], &theirs[..])
    else {
        panic!("{context}")
    };
    assert_eq!(
        (own.text("type"), other.text("type")),
        ("elf kernel", "elf64 kernel")
    );
    assert_eq!(own.number("addr"), other.number("addr"));
    let symbols = |kernel: &Records| kernel.number("esym") - kernel.number("ssym");
    assert_eq!(symbols(own), symbols(other));
    let ssym = own.number("ssym");
    assert_eq!(own.number("addr") + own.number("size"), own.number("esym"));
    assert_eq!(
        other.number("addr") + other.number("size"),
        other.number("ssym")
    );
    assert_eq!(other.number("ssym"), ssym.next_multiple_of(4096));
    for (module, its) in [(base, its_base), (user, its_user)] {
        assert_eq!(module.number("addr") % 4096, 0);
        assert!(module.number("size") >= its.number("size"), "{context}");
    }
    assert_eq!(disk.number("size"), its_disk.number("size"));
    // Everything below 1 GiB, in the order of loading: files, variables, metadata, the end.
    for files in [&ours, &theirs] {
        let mut last = 0;
        for file in files.iter() {
            assert!(file.number("addr") >= last, "{context}");
            last = file.number("addr") + file.number("size");
        }
        assert!(files[0].number("envp") >= last, "{context}");
        assert!(
            files[0].number("kernend") > files[0].number("envp"),
            "{context}"
        );
    }
}
