//! Plans of Linux kernels.

use proptest::prelude::*;
use rhyveload::plan::{Boot, Protocol, Request, plan};

use crate::elf::{blob, check, failure, request};
use crate::kernels::{Ph, bzimage, elf, vmlinux, xen_note};

const ZERO_PAGE: u64 = 0x7000;

fn word(bytes: &[u8], at: usize, len: usize) -> u64 {
    let mut word = [0; 8];
    word[..len].copy_from_slice(&bytes[at..at + len]);
    u64::from_le_bytes(word)
}

/// The e820 table of a zero page.
fn e820(page: &[u8]) -> Vec<(u64, u64, u64)> {
    let entry = |n: usize| {
        let at = 0x2d0 + 20 * n;
        (
            word(page, at, 8),
            word(page, at + 8, 8),
            word(page, at + 16, 4),
        )
    };
    (0..usize::from(page[0x1e8])).map(entry).collect()
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry() {
    let request = Request {
        cmdline: Some("console=ttyS0"),
        initrd: Some(0x1234),
        ..request(64)
    };
    let plan = plan(&bzimage()[..], &request).unwrap();
    assert_eq!(plan.protocol, Protocol::Linux64);
    let kernel = plan.segments[0];
    assert_eq!(
        (kernel.gpa, kernel.offset, kernel.filesz),
        (0x100_0000, 0xa00, 0x1_0000)
    );
    assert_eq!(
        (plan.registers.rip, plan.registers.rsi),
        (0x100_0200, ZERO_PAGE)
    );
    assert_eq!(plan.summary, "setup=0xa00 kernel=0x10000");
    assert_eq!(plan.initrd, Some(0x3ff_e000));

    let page = blob(&plan, ZERO_PAGE);
    assert_eq!(page.len(), 4096);
    // What the file's header says is kept, what a loader fills in is filled in.
    assert_eq!(&page[0x202..0x208], b"HdrS\x0f\x02");
    assert_eq!((page[0x210], word(page, 0x258, 8)), (0xff, 0x100_0000));
    assert_eq!(
        (word(page, 0x218, 4), word(page, 0x21c, 4)),
        (0x3ff_e000, 0x1234)
    );
    let cmdline = word(page, 0x228, 4);
    assert_eq!(blob(&plan, cmdline), b"console=ttyS0\0");
    let map = [
        (0, 0x9_fc00, 1),
        (0x9_fc00, 0x6_0400, 2),
        (0x10_0000, 0x3f0_0000, 1),
    ];
    assert_eq!(e820(page), map);

    // CS 0x10 is 64-bit code and DS 0x18 is writable data in the GDT that is there.
    let gdt = blob(&plan, plan.registers.gdtr.base);
    let selectors = (plan.registers.cs.selector, plan.registers.ds.selector);
    assert_eq!(selectors, (0x10, 0x18));
    assert_eq!(
        (word(gdt, 0x10, 8) >> 53 & 1, word(gdt, 0x18, 8) >> 41 & 1),
        (1, 1)
    );
}

#[test]
fn a_vmlinux_is_entered_by_either_protocol() {
    let with = |boot| {
        let request = Request {
            boot,
            initrd: Some(4096),
            ..request(5 << 10)
        };
        plan(&vmlinux()[..], &request).unwrap()
    };
    let auto = with(Boot::Auto);
    assert_eq!(
        (auto.protocol, auto.registers.rip),
        (Protocol::Linux64, 0x100_0000)
    );
    assert_eq!(auto.summary, "text=0x100 data=0x4+0xffffc");
    let page = blob(&auto, ZERO_PAGE);
    assert_eq!(
        (word(page, 0x1fe, 2), word(page, 0x202, 4)),
        (0xaa55, 0x5372_6448)
    );
    assert_eq!(e820(page)[3], (4 << 30, 2 << 30, 1));
    assert_eq!(auto.initrd, Some(0x8000_0000 - 4096));

    let pvh = with(Boot::Pvh);
    assert_eq!(
        (pvh.protocol, pvh.registers.rip),
        (Protocol::Pvh, 0x100_0040)
    );
    let info = blob(&pvh, pvh.registers.rbx);
    assert_eq!((word(info, 0, 4), word(info, 12, 4)), (0x336e_c578, 1));
    let module = blob(&pvh, word(info, 16, 8));
    assert_eq!(
        (word(module, 0, 8), word(module, 8, 8)),
        (0x7fff_f000, 4096)
    );
    assert_eq!(blob(&pvh, word(info, 24, 8)), b"\0");
    let map = blob(&pvh, word(info, 40, 8));
    assert_eq!(
        (word(info, 48, 4), word(map, 72, 8), word(map, 80, 8)),
        (4, 4 << 30, 2 << 30)
    );
}

#[test]
fn a_note_alone_makes_a_kernel_pvh() {
    let text = Ph::load(0x20_0000, 5, &[0xf4; 16], 16);
    let file = elf(0, 0x20_0000, &[text.clone(), xen_note(0x20_0008)]);
    let planned = plan(&file[..], &request(16)).unwrap();
    assert_eq!(
        (planned.protocol, planned.registers.rip),
        (Protocol::Pvh, 0x20_0008)
    );
    let info = blob(&planned, planned.registers.rbx);
    assert_eq!(
        (word(info, 12, 4), word(info, 16, 8)),
        (0, 0),
        "no module list"
    );
    let file = elf(0, 0x20_0000, &[text, xen_note(0x30_0000)]);
    assert!(failure(plan(&file[..], &request(16))).contains("0x300000 is in no loaded segment"));
}

#[test]
fn each_lie_of_a_bzimage_is_named() {
    let with = |at: usize, value: u64, len: usize| {
        let mut file = bzimage();
        file[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        failure(plan(&file[..], &request(64)))
    };
    assert!(with(0x202, 0, 4).contains("not a kernel"));
    assert!(with(0x1fe, 0, 2).contains("boot_flag is 0x0"));
    assert!(with(0x206, 0x20b, 2).contains("boot protocol is 2.11"));
    assert!(with(0x211, 0, 1).contains("zImage"));
    assert!(with(0x236, 2, 2).contains("32-bit kernel"));
    assert!(with(0x1f1, 0xff, 1).contains("truncated"));
    assert!(with(0x1f4, 0xffff_ffff, 4).contains("truncated"));
    assert!(with(0x1f4, 0, 4).contains("syssize 0x0"));
    assert!(with(0x258, 0, 8).contains("pref_address 0x0"));
    assert!(with(0x258, u64::MAX, 8).contains("pref_address"));
    assert!(with(0x258, 1 << 40, 8).contains("does not fit"));
    assert!(with(0x260, 0, 4).contains("init_size 0x0"));
    assert!(with(0x260, 0xffff_ffff, 4).contains("does not fit below 0x4000000"));
    assert!(with(0x230, 3, 4).contains("kernel_alignment 0x3"));
    assert!(with(0x230, 0x8000_0000, 4).contains("does not fit"));
    let file = bzimage();
    assert!(failure(plan(&file[..0x210], &request(64))).contains("ends in its setup header"));
    assert!(failure(plan(&file[..file.len() - 16], &request(64))).contains("truncated"));
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |file: Vec<u8>, request: Request<'_>| failure(plan(&file[..], &request));
    let long = "x".repeat(2048);
    let request = |cmdline, initrd| Request {
        cmdline,
        initrd,
        ..request(64)
    };
    for file in [bzimage(), vmlinux()] {
        let text = refused(file.clone(), request(Some(&long), None));
        assert!(
            text.contains("2048 bytes, but this kernel takes 2047"),
            "{text}"
        );
        let text = refused(file.clone(), request(None, Some(64 << 20)));
        assert!(
            text.contains("no room for the initial RAM disk (0x4000000 bytes)"),
            "{text}"
        );
        plan(&file[..], &request(Some(&long[1..]), Some(32 << 20))).unwrap();
    }
}

#[test]
fn a_kernel_that_can_takes_its_initrd_above_4_gib() {
    let big = Request {
        initrd: Some(3 << 30),
        ..request(8 << 10)
    };
    let mut file = bzimage();
    assert!(failure(plan(&file[..], &big)).contains("no room for the initial RAM disk"));
    file[0x236] = 3;
    let planned = plan(&file[..], &big).unwrap();
    // 3 GiB of lowmem leave 5 GiB from 4 GiB on.
    assert_eq!(planned.initrd, Some(6 << 30));
    let page = blob(&planned, ZERO_PAGE);
    assert_eq!(
        (word(page, 0x218, 4), word(page, 0xc0, 4)),
        (0x8000_0000, 1)
    );
}

#[test]
fn options_of_another_protocol_are_refused() {
    let env = ["a=1".parse().unwrap()];
    let with = |boot, file: Vec<u8>| {
        let request = Request {
            env: &env,
            boot,
            ..request(64)
        };
        failure(plan(&file[..], &request))
    };
    assert!(with(Boot::Auto, bzimage()).contains("-e is not for linux64 kernels"));
    assert!(with(Boot::Auto, vmlinux()).contains("-e is not for linux64 kernels"));
    assert!(with(Boot::Pvh, vmlinux()).contains("-e is not for pvh kernels"));
    assert!(with(Boot::Pvh, bzimage()).contains("only the linux64 entry"));
    let plain = Request {
        boot: Boot::Pvh,
        ..request(64)
    };
    let text = failure(plan(&crate::kernels::plain()[..], &plain));
    assert!(text.contains("no PVH entry point"), "{text}");
}

proptest! {
    #[test]
    fn mutated_setup_headers_never_panic(at in 0x1f1usize..0x26c, word in any::<u64>(),
                                         shift in 0u32..64, cut in 0usize..0x1_0a00) {
        let mut file = bzimage();
        file[at..at + 8].copy_from_slice(&(word >> shift).to_le_bytes());
        check(&file);
        file.truncate(cut);
        check(&file);
    }

    #[test]
    fn mutated_vmlinuxes_never_panic(at in 0usize..29, word in any::<u64>(), shift in 0u32..64) {
        let mut file = vmlinux();
        file[8 * at..8 * at + 8].copy_from_slice(&(word >> shift).to_le_bytes());
        check(&file);
    }

    #[test]
    fn mutated_notes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), align in any::<u64>()) {
        let mut note = xen_note(0x20_0000);
        let len = bytes.len().min(note.bytes.len());
        note.bytes[..len].copy_from_slice(&bytes[..len]);
        let mut file = elf(0, 0x20_0000, &[Ph::load(0x20_0000, 5, b"x", 1), note]);
        file[64 + 56 + 48..64 + 56 + 56].copy_from_slice(&align.to_le_bytes());
        check(&file);
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        check(&bytes);
    }
}
