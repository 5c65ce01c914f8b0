//! What loader.conf(5) and the files around it can say, name by name, and what a kernel finds of it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::boot::{Guest, boot, tree};
use crate::freebsd_files::{Meta, kernel};
use crate::process::{Place, stdout};

/// A boot tree whose loader.conf is this text.
fn tree_with(place: &Place, loader_conf: &str) -> PathBuf {
    let root = tree(place);
    fs::write(root.join("boot/loader.conf"), loader_conf).unwrap();
    root
}

/// Loads from a tree; what the kernel finds, and what was complained of.
fn load(place: &Place, root: &Path, args: &[&str]) -> (Guest, String) {
    let from = ["-m", "64", "-h", root.to_str().unwrap()];
    let output = boot(place, &[&from[..], args].concat());
    stdout(&output);
    let errors = String::from_utf8(output.stderr).unwrap();
    (Guest::of(place), errors)
}

fn howto(guest: &Guest) -> u32 {
    u32::from_le_bytes(guest.files[0][&0x8007][..].try_into().unwrap())
}

#[test]
fn each_boot_flag_is_a_bit_of_howto() {
    let place = Place::new();
    // bhyveload sets boot_serial itself.
    const SERIAL: u32 = 0x1000;
    for (flag, bit) in [
        ("boot_askname", 0x1),
        ("boot_cdrom", 0x2000),
        ("boot_ddb", 0x40),
        ("boot_dfltroot", 0x20),
        ("boot_gdb", 0x8000),
        ("boot_multicons", 0x2000_0000),
        ("boot_mute", 0x1_0000),
        ("boot_pause", 0x10_0000),
        ("boot_serial", SERIAL),
        ("boot_single", 0x2),
        ("boot_verbose", 0x800),
    ] {
        // Whatever its value.
        let root = tree_with(&place, &format!("{flag}=\"NO\"\n"));
        let (guest, _) = load(&place, &root, &[]);
        assert_eq!(howto(&guest), bit | SERIAL, "{flag}");
        assert!(guest.has(&format!("{flag}=NO")), "{flag}");
    }
    let root = tree_with(
        &place,
        "boot_multicons=YES\nconsole=\"vidconsole comconsole\"\n",
    );
    let (guest, _) = load(&place, &root, &[]);
    assert_eq!(
        howto(&guest),
        0x2000_0000,
        "the first console is the main one"
    );
}

#[test]
fn kernel_options_are_its_arguments_and_flags() {
    let place = Place::new();
    let root = tree_with(&place, "kernel_options=\"-s -v -D\"\n");
    let (guest, _) = load(&place, &root, &[]);
    assert_eq!(guest.text(0, 6), "-s -v -D");
    assert_eq!(howto(&guest), 0x2 | 0x800 | 0x2000_0000 | 0x1000);
    let (guest, _) = load(&place, &root, &["-e", "kernel_options=-a"]);
    assert_eq!(guest.text(0, 6), "-a");
    assert_eq!(howto(&guest), 0x1001);
}

#[test]
fn a_kernel_is_found_by_directory_file_and_list() {
    let place = Place::new();
    let root = tree_with(&place, "");
    let file = |name: &str| {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let has = [Meta::Version("kernel", 1000), Meta::Version("pci", 1)];
        fs::write(path, kernel(&has)).unwrap();
    };
    file("boot/kernel.old/kernel");
    file("boot/kernel/GENERIC");
    file("elsewhere/kernel");
    file("single");
    for (vars, path) in [
        (
            ["kernel=kernel.old", "bootfile=kernel"],
            "/boot/kernel.old/kernel",
        ),
        (
            ["kernel=kernel", "bootfile=none;GENERIC"],
            "/boot/kernel/GENERIC",
        ),
        (
            ["kernel=/elsewhere", "bootfile=kernel"],
            "/elsewhere/kernel",
        ),
        (["kernel=/single", "bootfile=none"], "/single"),
    ] {
        let [first, second] = vars;
        let (guest, _) = load(&place, &root, &["-e", first, "-e", second]);
        assert_eq!(guest.text(0, 1), path);
        assert!(guest.has(&format!("kernelname={path}")));
    }
}

#[test]
fn files_are_read_in_order_and_once() {
    let place = Place::new();
    let root = tree_with(
        &place,
        "last=conf\nconf=1\nloader_conf_files=\"/boot/loader.conf /boot/more.conf /boot/none.conf\"\n",
    );
    let file = |name: &str, text: &str| {
        let path = root.join("boot").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    file(
        "more.conf",
        "last=more\nmore=1\nexec=\"echo more is read\"\n",
    );
    file("loader.conf.local", "last=local\nlocal=1\n");
    file(
        "loader.conf.d/20-b.conf",
        "last=b\nseen=\"$seen b\"\nlocal_loader_conf_files=\"/boot/mine.conf /boot/more.conf\"\n",
    );
    file("loader.conf.d/10-a.conf", "last=a\nseen=\"a\"\n");
    file("loader.conf.d/30-c.conf.off", "last=c\nseen=\"$seen c\"\n");
    file("loader.conf.d/40-d.conf/x.conf", "last=d\n");
    file("mine.conf", "mine=\"after $last\"\n");
    // Today's defaults name a directory as well; without defaults it is read all the same.
    let defaults = root.join("boot/defaults/loader.conf");
    let text = fs::read_to_string(&defaults).unwrap();
    fs::write(
        &defaults,
        text + "loader_conf_dirs=\"/boot/loader.conf.d\"\n",
    )
    .unwrap();
    for _ in 0..2 {
        let from = ["-m", "64", "-h", root.to_str().unwrap()];
        let said = stdout(&boot(&place, &from));
        assert_eq!(said.matches("more is read").count(), 1, "{said}");
        let guest = Guest::of(&place);
        for var in [
            "conf=1",
            "more=1",
            "local=1",
            "seen=a b",
            "mine=after b",
            "last=b",
        ] {
            assert!(guest.has(var), "{var}");
        }
        let _ = fs::remove_file(&defaults);
    }
}

#[test]
fn nextboot_conf_counts_while_its_first_line_says_so() {
    let place = Place::new();
    let root = tree_with(&place, "x=conf\n");
    let defaults = root.join("boot/defaults/loader.conf");
    let text = fs::read_to_string(&defaults).unwrap();
    let text = text + "nextboot_conf=\"/boot/nextboot.conf\"\nnextboot_enable=\"NO\"\n";
    fs::write(&defaults, &text).unwrap();
    fs::create_dir(root.join("boot/next")).unwrap();
    let has = [Meta::Version("kernel", 1000), Meta::Version("pci", 1)];
    fs::write(root.join("boot/next/kernel"), kernel(&has)).unwrap();
    let next = root.join("boot/nextboot.conf");
    let body = "kernel=\"next\"\nkernel_options=\"-s\"\nx=next\n";
    // As nextboot(8) writes it, and as the loader leaves it.
    for (line, kernel) in [("YES", "next"), ("NO", "kernel")] {
        fs::write(&next, format!("nextboot_enable=\"{line}\"\n{body}")).unwrap();
        let (guest, errors) = load(&place, &root, &[]);
        assert_eq!(guest.text(0, 1), format!("/boot/{kernel}/kernel"));
        let once = errors.contains("/boot/nextboot.conf: in effect until it is removed");
        assert_eq!(once, line == "YES", "{errors}");
        let x = if line == "YES" { "x=next" } else { "x=conf" };
        assert!(guest.has(x));
    }
    // Another first line leaves it to what is said before.
    fs::write(&next, body).unwrap();
    let (guest, _) = load(&place, &root, &[]);
    assert_eq!(guest.text(0, 1), "/boot/kernel/kernel");
    fs::write(root.join("boot/loader.conf"), "nextboot_enable=YES\n").unwrap();
    let (guest, _) = load(&place, &root, &[]);
    assert_eq!(
        (guest.text(0, 1), guest.text(0, 6)),
        ("/boot/next/kernel", "-s")
    );
    let (guest, _) = load(&place, &root, &["-e", "kernel=kernel", "-e", "x=mine"]);
    assert_eq!(guest.text(0, 1), "/boot/kernel/kernel");
    assert!(guest.has("x=mine"));
    // There is none.
    fs::remove_file(&next).unwrap();
    let (guest, errors) = load(&place, &root, &[]);
    assert_eq!(guest.text(0, 1), "/boot/kernel/kernel");
    assert!(!errors.contains("nextboot"), "{errors}");
}

#[test]
fn typed_files_are_handed_over_as_they_are() {
    let place = Place::new();
    let files = [
        ("bitmap", "splash.bmp", "splash_image_data"),
        ("bootsplash", "/boot/images/splash.png", "splash"),
        ("ucode", "/boot/firmware/ucode.bin", "cpu_microcode"),
        ("card", "/boot/firmware/card.bin", "firmware"),
        ("acpi_dsdt", "/boot/acpi_dsdt.aml", "acpi_dsdt"),
        ("entropy_cache", "/boot/entropy", "boot_entropy_cache"),
        ("hostuuid", "/etc/hostid", "hostuuid"),
        ("ram_blacklist", "/boot/blacklist.txt", "ram_blacklist"),
        ("key", "/boot/keys/da0.key", "da0:geli_keyfile0"),
        ("root", "/boot/root.img", "mfs_root"),
    ];
    let mut conf = String::new();
    for (key, name, kind) in files {
        conf += &format!("{key}_load=YES\n{key}_name=\"{name}\"\n{key}_type=\"{kind}\"\n");
    }
    let root = tree_with(&place, &conf);
    let bytes = |number: usize| vec![number as u8 + 1; 1000 + 7 * number];
    let mut paths = Vec::new();
    for (number, (_, name, _)) in files.into_iter().enumerate() {
        // One without a path is looked for where modules are.
        let path = match name.starts_with('/') {
            true => name.to_owned(),
            false => format!("/boot/modules/{name}"),
        };
        let file = root.join(path.trim_start_matches('/'));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, bytes(number)).unwrap();
        paths.push(path);
    }
    let (guest, errors) = load(&place, &root, &[]);
    assert!(!errors.contains("_load"), "{errors}");
    assert_eq!(guest.files.len(), 1 + files.len());
    let mut end = guest.long(0, 3) + guest.long(0, 4);
    for (number, (_, _, kind)) in files.into_iter().enumerate() {
        let file = number + 1;
        assert_eq!(guest.text(file, 1), paths[number]);
        assert_eq!(guest.text(file, 2), kind);
        // One behind the other, without gaps; nothing but name, type, and place.
        let (at, size) = (guest.long(file, 3), guest.long(file, 4));
        assert_eq!((at, size as usize), (end, bytes(number).len()));
        assert_eq!(guest.bytes(at, size), bytes(number));
        assert_eq!(guest.files[file].len(), 4);
        end = at + size;
    }
}

#[test]
fn the_command_line_wins_over_every_file() {
    let place = Place::new();
    let root = tree_with(
        &place,
        "a=conf\nif_vtnet_load=YES\nif_vtnet_before=\"set a=before\"\n\
        exec=\"set a=exec\"\nexec=\"include /boot/script\"\nexec=\"unset b\"\nc=conf\n\
        autoboot_delay=5\n",
    );
    let file = |name: &str, text: &str| {
        let path = root.join("boot").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    file("script", "set a=script\nset d=script\n");
    file("loader.conf.local", "a=local\n");
    file("loader.conf.d/a.conf", "a=directory\n");
    file("device.hints", "hint.uart.0.at=\"isa\"\na=hints\n");
    file("nextboot.conf", "nextboot_enable=\"YES\"\na=next\n");
    fs::remove_file(root.join("boot/defaults/loader.conf")).unwrap();
    let options = [
        "a=mine",
        "b=mine",
        "hint.uart.0.at=none",
        "vfs.root.mountfrom=ufs:/dev/md0",
        "autoboot_delay=-1",
    ];
    let args: Vec<_> = options.iter().flat_map(|option| ["-e", *option]).collect();
    let (guest, _) = load(&place, &root, &args);
    for var in options.iter().chain(&["c=conf", "d=script"]) {
        assert!(guest.has(var), "{var}");
    }
    let (guest, _) = load(&place, &root, &[]);
    for var in ["a=before", "d=script", "vfs.root.mountfrom=ufs:/dev/vtbd0"] {
        assert!(guest.has(var), "{var}");
    }
}
