//! FreeBSD booted from a directory and from disks, by the program: what is said, and what a kernel
//! finds in memory.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use proptest::prelude::*;
use rhyveload::freebsd::module::Module;
use rhyveload::plan_kernel;
use vmm_api::memory::MemFile;

use crate::disks::makefs;
use crate::freebsd_files::{
    KERNBASE, Meta, Section, kernel, kernel_with, kernel_with_ctors, module, module_with, shared,
    to_shared,
};
use crate::kernels::{Ph, xen_note};
use crate::process::{EXE, Place, stderr, stdout};

/// A boot tree as the seed of this project has it: a kernel, two modules, a memory disk.
pub fn tree(place: &Place) -> PathBuf {
    let root = place.tmp.path().join("guest");
    for dir in ["boot/kernel", "boot/defaults", "boot/modules", "etc"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    let file = |name: &str, bytes: &[u8]| fs::write(root.join(name), bytes).unwrap();
    let has = [Meta::Version("kernel", 1000), Meta::Version("pci", 1)];
    file("boot/kernel/kernel", &kernel(&has));
    let virtio = [
        Meta::Version("virtio", 1),
        Meta::Depend("kernel", [900, 1000, 1100]),
    ];
    file("boot/kernel/virtio.ko", &module(&virtio));
    let net = [
        Meta::Version("if_vtnet", 1),
        Meta::Depend("pci", [1, 1, 1]),
        Meta::Depend("virtio", [1, 1, 1]),
    ];
    file("boot/kernel/if_vtnet.ko", &module(&net));
    file("boot/mdroot", &[7; 5000]);
    file(
        "boot/defaults/loader.conf",
        b"exec=\"echo Loading /boot/defaults/loader.conf\"\n\
        kernel=\"kernel\"\nbootfile=\"kernel\"\nkernel_options=\"\"\n\
        loader_conf_files=\"/boot/device.hints /boot/loader.conf /boot/loader.conf.local\"\n\
        module_path=\"/boot/modules\" # more\n",
    );
    file(
        "boot/loader.conf",
        b"if_vtnet_load=\"YES\"\nif_vtnet_flags=\"-x\"\nmdroot_load=YES\nmdroot_type=\"md_image\"\n\
        mdroot_name=\"/boot/mdroot\"\nboot_verbose=\"\"\nhw.name=\"file\"\nhw.twice=\"${hw.name}!\"\n",
    );
    file("boot/device.hints", b"hint.uart.0.at=\"isa\"\n");
    file(
        "etc/fstab",
        b"# Device Mountpoint FStype\n/dev/vtbd0 / ufs rw 1 1\n",
    );
    root
}

pub fn boot(place: &Place, args: &[&str]) -> Output {
    let mut command = Command::new(EXE);
    command.env("RHYVE_ROOT", place.root.path());
    command.args(args).arg("guest0").output().unwrap()
}

/// Guest memory as a kernel that was just entered sees it.
pub struct Guest {
    memory: MemFile,
    kernend: u64,
    pub files: Vec<File>,
}

/// One file in the module list: its records by type.
pub type File = HashMap<u32, Vec<u8>>;

impl Guest {
    pub fn of(place: &Place) -> Self {
        let state = place.state();
        let registers = &state.vcpus[0].registers;
        assert_eq!(registers.rip, KERNBASE + 0x20_0010);
        let mut stack = [0; 12];
        let memory = place.vm().open_memory(&state).unwrap();
        memory.read(registers.rsp, &mut stack).unwrap();
        let word = |at: usize| u32::from_le_bytes(stack[at..at + 4].try_into().unwrap());
        Self::at(memory, word(4).into(), word(8).into())
    }

    /// The same for a module list that is somewhere.
    fn at(memory: MemFile, modulep: u64, kernend: u64) -> Self {
        let mut guest = Self {
            memory,
            kernend,
            files: Vec::new(),
        };
        let mut at = modulep;
        loop {
            let head = guest.bytes(at, 8);
            let kind = u32::from_le_bytes(head[..4].try_into().unwrap());
            let len = u64::from(u32::from_le_bytes(head[4..].try_into().unwrap()));
            match kind {
                0 => break,
                1 => guest.files.push(File::new()),
                _ => {}
            }
            let payload = guest.bytes(at + 8, len);
            guest.files.last_mut().unwrap().insert(kind, payload);
            at += (8 + len).next_multiple_of(8);
        }
        assert!(at + 8 <= guest.kernend && guest.kernend.is_multiple_of(4096));
        guest
    }

    pub fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory.read(at, &mut bytes).unwrap();
        bytes
    }

    pub fn text(&self, file: usize, kind: u32) -> &str {
        let bytes = &self.files[file][&kind];
        std::str::from_utf8(bytes.strip_suffix(b"\0").unwrap()).unwrap()
    }

    pub fn long(&self, file: usize, kind: u32) -> u64 {
        u64::from_le_bytes(self.files[file][&kind][..].try_into().unwrap())
    }

    fn env(&self) -> Vec<String> {
        let bytes = self.bytes(self.long(0, 0x8006), 4096);
        let all = bytes.split(|byte| *byte == 0);
        let vars = all.take_while(|var| !var.is_empty());
        vars.map(|var| String::from_utf8(var.to_vec()).unwrap())
            .collect()
    }

    pub fn has(&self, var: &str) -> bool {
        self.env().iter().any(|v| v == var)
    }
}

const LOADED: &str = "\
Loading /boot/defaults/loader.conf
/boot/kernel/kernel text=0x80 data=0x58+0xffa8 syms=[0x8+0x78+0x8+0xe]
/boot/kernel/if_vtnet.ko size 0x4a8 at 0x411000
loading required module 'virtio'
/boot/kernel/virtio.ko size 0x418 at 0x412000
";

#[test]
fn a_kernel_finds_what_loader_conf_asks_for() {
    let place = Place::new();
    let root = tree(&place);
    let path = root.to_str().unwrap();
    let text = stdout(&boot(
        &place,
        &["-m", "64", "-M", "32", "-h", path, "-e", "hw.name=mine"],
    ));
    let said = text.split_once("rhyveload").unwrap().1;
    let said = said.split_once('\n').unwrap().1;
    assert_eq!(
        said,
        format!("{LOADED}entry=0xffffffff80200010 protocol=freebsd\n")
    );

    let guest = Guest::of(&place);
    let names: Vec<_> = (0..4)
        .map(|n| (guest.text(n, 1), guest.text(n, 2)))
        .collect();
    assert_eq!(
        names,
        [
            ("/boot/kernel/kernel", "elf kernel"),
            ("/boot/kernel/if_vtnet.ko", "elf obj module"),
            ("/boot/kernel/virtio.ko", "elf obj module"),
            ("/boot/mdroot", "md_image"),
        ]
    );
    assert_eq!(guest.files.len(), 4);
    assert_eq!(guest.text(1, 6), "-x");

    // The kernel: symbols behind its segments, each with its length before it.
    let (addr, size) = (guest.long(0, 3), guest.long(0, 4));
    let (ssym, esym) = (guest.long(0, 0x8003), guest.long(0, 0x8004));
    assert_eq!((addr, ssym, esym), (0x20_0000, 0x41_0000, 0x41_0098));
    assert_eq!(addr + size, esym);
    let symbols = guest.bytes(ssym, esym - ssym);
    assert_eq!(symbols[..8], 0x78u64.to_le_bytes());
    assert!(symbols[8..0x80].iter().copied().eq(0..0x78));
    assert_eq!(symbols[0x80..0x88], 14u64.to_le_bytes());
    assert_eq!(&symbols[0x88..], b"\0first\0second\0\0\0");
    assert_eq!(&guest.files[0][&0x8002][..4], b"\x7fELF");
    assert_eq!(guest.files[0][&0x8009].len(), 6 * 64);
    assert_eq!(guest.files[0][&0x8007], 0x1800u32.to_le_bytes());
    assert_eq!(guest.long(0, 0x8008), guest.kernend);
    let smap = &guest.files[0][&0x9001];
    assert_eq!(smap.len(), 60);
    assert_eq!(
        smap[40..56],
        [0x1_0000_0000u64, 32 << 20].map(u64::to_le_bytes).concat()
    );

    // A module: its sections where its headers say.
    assert_eq!(guest.long(1, 3), 0x41_1000);
    let headers = &guest.files[1][&0x8009];
    let section = |index: usize| {
        let word = |at: usize| {
            let at = 64 * index + at;
            u64::from_le_bytes(headers[at..at + 8].try_into().unwrap())
        };
        guest.bytes(word(16), word(32))
    };
    assert_eq!(section(1), vec![0xc3; 100]);
    assert_eq!(section(3), vec![0; 0x200]);
    assert!(section(9).starts_with(b"\0.text\0.data\0"));

    // The memory disk follows at once, and is whole.
    let disk = (guest.long(3, 3), guest.long(3, 4));
    assert_eq!(disk, (guest.long(2, 3) + guest.long(2, 4), 5000));
    assert_eq!(guest.bytes(disk.0, 5001), [vec![7; 5000], vec![0]].concat());

    for var in [
        "hw.name=mine",
        "hw.twice=mine!",
        "hint.uart.0.at=isa",
        "boot_verbose=",
        "boot_serial=1",
        "module_path=/boot/kernel;/boot/modules",
        "kernelname=/boot/kernel/kernel",
        "vfs.root.mountfrom=ufs:/dev/vtbd0",
        "vfs.root.mountfrom.options=rw",
        "loaddev=host0:",
    ] {
        assert!(guest.has(var), "{var}: {:?}", guest.env());
    }
    let env = guest.env();
    let names = env.iter().map(|var| var.split_once('=').unwrap().0);
    assert!(names.is_sorted(), "{env:?}");
    let boot = place.state().machine.boot.unwrap();
    assert_eq!(boot.kernel, "host0:/boot/kernel/kernel");
    let symbols = boot.symbols.unwrap();
    assert_eq!((symbols.start, symbols.end), (ssym, esym));
}

fn gzip(path: &Path) {
    let bytes = fs::read(path).unwrap();
    let gz = fs::File::create(format!("{}.gz", path.display())).unwrap();
    let mut gz = flate2::write::GzEncoder::new(gz, flate2::Compression::fast());
    gz.write_all(&bytes).unwrap();
    gz.finish().unwrap();
    fs::remove_file(path).unwrap();
}

#[test]
fn compressed_and_from_a_disk_it_is_the_same() {
    let place = Place::new();
    let root = tree(&place);
    for name in ["kernel/kernel", "kernel/virtio.ko", "mdroot"] {
        gzip(&root.join("boot").join(name));
    }
    let image = place.tmp.path().join("disk");
    makefs("version=2", &image, &root);
    let image = image.to_str().unwrap();
    // A disk for other purposes comes first.
    let blank = place.file("blank", &[0; 100_000]);
    let blank = blank.to_str().unwrap();
    let text = stdout(&boot(&place, &["-m", "64", "-d", blank, "-d", image]));
    assert!(text.contains(LOADED), "{text}");
    let guest = Guest::of(&place);
    assert!(guest.has("currdev=disk1:"));
    assert_eq!(guest.bytes(guest.long(3, 3), 5000), vec![7; 5000]);
}

#[test]
fn what_goes_wrong_is_named_and_the_rest_goes_on() {
    let place = Place::new();
    let root = tree(&place);
    let file = |name: &str, bytes: &[u8]| fs::write(root.join(name), bytes).unwrap();
    let circle = |name, other| [Meta::Version(name, 1), Meta::Depend(other, [1, 1, 1])];
    file("boot/modules/a.ko", &module(&circle("a", "b")));
    file("boot/modules/b.ko", &module(&circle("b", "a")));
    let needy = [Meta::Depend("virtio", [2, 2, 3])];
    file("boot/modules/needy.ko", &module(&needy));
    let lost = [Meta::Depend("nowhere", [1, 1, 1])];
    file("boot/modules/lost.ko", &module(&lost));
    file("boot/modules/cut.ko", &module(&lost)[..700]);
    file("boot/modules/script.ko", b"#!/bin/sh\n");
    file(
        "boot/loader.conf",
        b"a_load=YES\nthis is no assignment\nneedy_load=YES\nlost_load=YES\ncut_load=YES\n\
        script_load=YES\nscript_error=\"echo script failed\"\nabsent_load=YES\n\
        virtio_load=YES\nmodule_blacklist=\"other virtio\"\nexec=\"rm -rf /\"\n\
        loader_conf_files=\"/boot/loader.conf /boot/extra.conf\"\n",
    );
    file(
        "boot/extra.conf",
        b"loader_conf_files=\"/boot/loader.conf /boot/extra.conf\"\nextra=1\nopen=\"\n",
    );
    let output = boot(&place, &["-m", "64", "-h", root.to_str().unwrap()]);
    let errors = String::from_utf8(output.stderr.clone()).unwrap();
    for line in [
        "/boot/loader.conf:2: syntax error: '=' expected after the name",
        "  this is no assignment\n       ^\n",
        "/boot/loader.conf:11: rm -rf /: unknown command 'rm'",
        "/boot/extra.conf:3: syntax error: the closing quote is missing",
        "needy_load: /boot/modules/needy.ko: module 'virtio' exists but with wrong version",
        "lost_load: /boot/modules/lost.ko: can't find 'nowhere'",
        "cut_load: /boot/modules/cut.ko: the ELF section headers (e_shoff",
        "script_load: /boot/modules/script.ko: don't know how to load it: not an ELF file",
        "absent_load: can't find 'absent'",
    ] {
        assert!(errors.contains(line), "{line}: {errors}");
    }
    let text = stdout(&output);
    assert!(text.contains("\nscript failed\n"), "{text}");
    assert!(text.contains("not loading blacklisted module 'virtio'"));
    let guest = Guest::of(&place);
    let names: Vec<_> = (0..guest.files.len()).map(|n| guest.text(n, 1)).collect();
    assert_eq!(
        names,
        [
            "/boot/kernel/kernel",
            "/boot/modules/a.ko",
            "/boot/modules/b.ko",
        ]
    );
    assert!(guest.has("extra=1"));
}

#[test]
fn a_kernel_that_is_not_there_or_no_kernel_changes_nothing() {
    let place = Place::new();
    let root = tree(&place);
    let path = root.to_str().unwrap();
    let kernel = root.join("boot/kernel/kernel");
    let refused = |args: &[&str]| {
        let output = boot(&place, &[&["-q", "-h", path], args].concat());
        assert!(place.is_absent());
        stderr(&output)
    };
    let text = refused(&["-e", "kernel=old"]);
    assert!(text.contains("neither /boot/old/kernel nor old"), "{text}");
    fs::write(&kernel, crate::kernels::bzimage()).unwrap();
    let text = refused(&[]);
    assert!(
        text.contains("kernel: a Linux kernel, not FreeBSD's"),
        "{text}"
    );
    fs::write(&kernel, crate::kernels::vmlinux()).unwrap();
    assert!(refused(&[]).contains("a Linux kernel"));
    fs::write(&kernel, "no kernel").unwrap();
    assert!(refused(&[]).contains("/boot/kernel/kernel: not a kernel"));
    let mut large = crate::freebsd_files::kernel(&[]);
    large[64 + 56 + 40..64 + 56 + 48].copy_from_slice(&(1u64 << 40).to_le_bytes());
    fs::write(&kernel, large).unwrap();
    assert!(refused(&[]).contains("does not fit below"));
    fs::remove_dir_all(root.join("boot")).unwrap();
    assert!(refused(&[]).contains("no kernel found"));
    let none = stderr(&boot(&place, &["-h", "/no/such/dir"]));
    assert!(
        none.contains("/no/such/dir: cannot open the directory"),
        "{none}"
    );
    let none = stderr(&boot(&place, &["-d", "/no/such/disk"]));
    assert!(none.contains("/no/such/disk: cannot open it"), "{none}");
}

#[test]
fn the_ways_to_load_exclude_each_other() {
    let place = Place::new();
    let refused = |args: &[&str]| {
        let output = boot(&place, args);
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused(&["-h", "/", "--kernel", "/k"]).contains("cannot be used with"));
    assert!(refused(&["-d", "/", "--initrd", "/k"]).contains("cannot be used with"));
    assert!(refused(&[]).contains("--kernel"));
    let help = Command::new(EXE).arg("--help").output().unwrap();
    assert!(stdout(&help).contains("Boot FreeBSD from this directory"));
}

proptest! {
    #[test]
    fn damaged_modules_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        dest in any::<u32>(),
    ) {
        let mut file = module(&[
            Meta::Version("virtio", 1),
            Meta::Depend("pci", [1, 1, 1]),
        ]);
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        check_module(file, dest.into());
    }

    #[test]
    fn damaged_headers_of_modules_never_panic(
        at in 0usize..90, word in any::<u64>(), shift in 0u32..64, dest in any::<u32>(),
    ) {
        let mut file = module(&[Meta::Version("virtio", 1)]);
        // The file header first, then the section headers at the end.
        let at = if at < 8 { 8 * at } else { file.len() - 8 * (at - 7) };
        file[at..at + 8].copy_from_slice(&(word >> shift).to_le_bytes());
        check_module(file, dest.into());
    }

    #[test]
    fn damaged_kernels_with_symbols_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut file = kernel(&[Meta::Version("kernel", 1)]);
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        crate::elf::check(&file);
    }
}

#[test]
fn a_linker_set_at_the_end_of_all_addresses_is_no_panic() {
    let mut file = module(&[Meta::Version("a", 1), Meta::Version("b", 1)]);
    // sh_addralign of section 4 of 10.
    let at = file.len() - 64 * 6 + 48;
    file[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
    check_module(file, 0x40_0000);
}

/// Whatever is placed comes out of the file.
fn check_module(file: Vec<u8>, dest: u64) {
    let Ok(module) = Module::place(&file, dest) else {
        return;
    };
    for segment in &module.segments {
        assert!(segment.offset + segment.filesz <= file.len() as u64);
        assert!(segment.gpa >= dest);
    }
}

#[test]
fn a_kernel_file_has_its_symbols_too() {
    let plan = plan_kernel(&kernel(&[])).unwrap();
    assert_eq!(
        plan.summary,
        "text=0x80 data=0x0+0x10000 syms=[0x8+0x78+0x8+0xe]"
    );
    // What is not in the file may be of any size, and has no strings.
    let summary = |section: usize| {
        let mut file = kernel(&[]);
        let headers = u64::from_le_bytes(file[40..48].try_into().unwrap()) as usize;
        let header = &mut file[headers + 64 * section..][..64];
        header[4..8].copy_from_slice(&8_u32.to_le_bytes());
        header[32..40].fill(0xff);
        plan_kernel(&file).unwrap().summary
    };
    assert_eq!(summary(3), plan.summary);
    assert_eq!(summary(2), "text=0x80 data=0x0+0x10000");
}

#[test]
fn a_kernel_entered_by_pvh_gets_modules_and_variables_too() {
    let place = Place::new();
    let root = tree(&place);
    let path = root.to_str().unwrap();
    let text = stderr(&boot(
        &place,
        &["-m", "64", "-h", path, "--boot", "pvh", "-q"],
    ));
    assert!(text.contains("it has no PVH entry point"), "{text}");
    let has = [Meta::Version("kernel", 1000), Meta::Version("pci", 1)];
    // Where the note leads is where the segment lies, whatever p_paddr says.
    let file = kernel_with(&has, &[xen_note(0x20_0020)]);
    fs::write(root.join("boot/kernel/kernel"), file).unwrap();
    let text = stdout(&boot(&place, &["-m", "64", "-h", path, "--boot", "pvh"]));
    assert!(text.ends_with("entry=0x200020 protocol=pvh\n"), "{text}");
    let state = place.state();
    let registers = &state.vcpus[0].registers;
    assert_eq!((registers.rip, registers.rbx), (0x20_0020, 0x6000));
    let memory = place.vm().open_memory(&state).unwrap();
    let word = |at: u64| {
        let mut bytes = [0; 8];
        memory.read(at, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    };
    // hvm_start_info: magic and version; one module; the RSDP.
    assert_eq!(word(0x6000), 1 << 32 | 0x336e_c578);
    assert_eq!(word(0x6008), 1 << 32);
    assert_eq!(word(0x6020), 0xf_2400);
    let module = word(0x6010);
    let (modulep, len, text) = (word(module), word(module + 8), word(module + 16));
    assert_ne!(text, 0);
    let guest = Guest::at(
        place.vm().open_memory(&state).unwrap(),
        modulep,
        modulep + len,
    );
    assert_eq!(guest.long(0, 0x9006), modulep);
    assert_eq!(guest.files.len(), 4);
    assert_eq!(guest.text(3, 2), "md_image");
    assert!(guest.has("hw.name=file"));
    let output = boot(&place, &["-h", path, "--boot", "linux64"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn shared_modules_and_kernels_with_a_red_herring_are_loaded() {
    let place = Place::new();
    let root = tree(&place);
    let interpreter = |name: &[u8]| Ph {
        kind: 3,
        ..Ph::load(0, 4, name, 13)
    };
    let has = [Meta::Version("kernel", 1000), Meta::Version("pci", 1)];
    let file = kernel_with(&has, &[interpreter(b"/red/herring\0")]);
    fs::write(root.join("boot/kernel/kernel"), file).unwrap();
    let needs = [Meta::Version("sh", 1), Meta::Depend("virtio", [1, 1, 1])];
    fs::write(root.join("boot/modules/sh.ko"), shared(&needs)).unwrap();
    fs::write(root.join("boot/loader.conf"), "sh_load=YES\n").unwrap();
    let path = root.to_str().unwrap();
    let text = stdout(&boot(&place, &["-m", "64", "-h", path]));
    assert!(
        text.contains("/boot/modules/sh.ko size 0x210098 at 0x411000"),
        "{text}"
    );
    let guest = Guest::of(&place);
    let names: Vec<_> = (0..3)
        .map(|n| (guest.text(n, 1), guest.text(n, 2)))
        .collect();
    assert_eq!(names[1], ("/boot/modules/sh.ko", "elf module"));
    assert_eq!(names[2], ("/boot/kernel/virtio.ko", "elf obj module"));
    let (addr, ssym) = (guest.long(1, 3), guest.long(1, 0x8003));
    assert_eq!(guest.bytes(addr, 0x80), vec![0x90; 0x80]);
    assert_eq!(ssym, addr + 0x21_0000);
    assert_eq!(guest.bytes(ssym, 8), 0x78u64.to_le_bytes());

    // A program is no kernel.
    let file = kernel_with(&has, &[interpreter(b"/libexec/ld.s\0")]);
    fs::write(root.join("boot/kernel/kernel"), file).unwrap();
    let text = stderr(&boot(&place, &["-q", "-m", "64", "-h", path]));
    assert!(text.contains("a dynamically linked program"), "{text}");
}

#[test]
fn constructors_are_told_of() {
    let place = Place::new();
    let root = tree(&place);
    let has = [Meta::Version("kernel", 1000), Meta::Version("pci", 1)];
    fs::write(root.join("boot/kernel/kernel"), kernel_with_ctors(&has)).unwrap();
    let file = to_shared(kernel_with_ctors(&[Meta::Version("sh", 1)]));
    fs::write(root.join("boot/modules/sh.ko"), file).unwrap();
    // SHT_INIT_ARRAY.
    let array = Section {
        name: ".init_array",
        kind: 14,
        align: 8,
        bytes: (1..=16).collect(),
        ..Section::default()
    };
    let file = module_with(&[Meta::Version("init", 1)], vec![array]);
    fs::write(root.join("boot/modules/init.ko"), file).unwrap();
    fs::write(
        root.join("boot/loader.conf"),
        "sh_load=YES\ninit_load=YES\n",
    )
    .unwrap();
    let path = root.to_str().unwrap();
    stdout(&boot(&place, &["-m", "64", "-h", path]));
    let guest = Guest::of(&place);
    // As the section header has it: to the kernel an address, to a shared module an offset.
    assert_eq!(guest.long(0, 0x800a), KERNBASE + 0x50_0000);
    assert_eq!(guest.long(1, 0x800a), 0x30_0000);
    assert_eq!((guest.long(0, 0x800b), guest.long(1, 0x800b)), (24, 24));
    // A relocatable module's sections are all told of in its headers.
    assert!(!guest.files[2].contains_key(&0x800a));
    let header = &guest.files[2][&0x8009][64 * 9..64 * 10];
    let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
    assert_eq!(word(32), 16);
    let array: Vec<u8> = (1..=16).collect();
    assert_eq!(guest.bytes(word(16), 16), array);
    // Nothing is made up where there are none.
    let root = tree(&place);
    stdout(&boot(&place, &["-m", "64", "-h", root.to_str().unwrap()]));
    let guest = Guest::of(&place);
    for absent in [0x800a, 0x800b, 0x9002] {
        assert!(guest.files.iter().all(|file| !file.contains_key(&absent)));
    }
}

#[test]
fn commands_in_the_configuration_are_run() {
    let place = Place::new();
    let root = tree(&place);
    let long = "x".repeat(1 << 20);
    let conf = format!(
        "virtio_load=YES\nvirtio_before=\"set before=$kernel\"\n\
        virtio_after=\"load -t raw /boot/device.hints\"\n\
        none_load=YES\nnone_error=\"echo 'none: no $kernel module'\"\n\
        name=\"a\"\nexpanded=\"${{name}}-$name.b $none\"\nlong={long}\n\
        exec=\"include /boot/more\"\nexec=\"boot\"\nrootdev=\"host0:\"\n"
    );
    fs::write(root.join("boot/loader.conf"), conf).unwrap();
    fs::write(
        root.join("boot/more"),
        "set from=include\nnonsense\nset not=reached\n",
    )
    .unwrap();
    let output = boot(&place, &["-m", "64", "-h", root.to_str().unwrap()]);
    let errors = String::from_utf8(output.stderr.clone()).unwrap();
    for line in [
        "none_load: can't find 'none'",
        "/boot/loader.conf:9: include /boot/more: /boot/more:2: unknown command 'nonsense'",
        "/boot/loader.conf:10: boot: not while the configuration is read",
        "/boot/loader.conf:8: the value has more than 65536 bytes",
    ] {
        assert!(errors.contains(line), "{line}: {errors:.2000}");
    }
    assert!(stdout(&output).contains("\nnone: no kernel module\n"));
    let guest = Guest::of(&place);
    assert_eq!(
        (guest.text(2, 1), guest.text(2, 2)),
        ("/boot/device.hints", "raw")
    );
    for var in [
        "before=kernel",
        "expanded=a- ",
        "from=include",
        "vfs.root.mountfrom=ufs:/dev/vtbd0",
    ] {
        assert!(guest.has(var), "{var}");
    }
    assert!(!guest.has("not=reached"));
}
