//! Plans of ELF kernels.

use proptest::prelude::*;
use rhyveload::plan::{Boot, LoadPlan, PlanError, Protocol, Request, plan};
use rhyveload::plan_kernel;
use vmm_api::memory::{MemSize, MemoryLayout};

use crate::kernels::{Ph, elf, plain};

pub fn request(mib: u64) -> Request<'static> {
    Request {
        layout: MemoryLayout::split(MemSize(mib << 20)),
        boot: Boot::Auto,
        kernel: "/boot/kernel",
        cmdline: None,
        env: &[],
        initrd: None,
    }
}

pub fn failure(result: Result<LoadPlan, PlanError>) -> String {
    result.unwrap_err().to_string()
}

pub fn blob(plan: &LoadPlan, gpa: u64) -> &[u8] {
    let blob = plan.blobs.iter().find(|blob| {
        let len = blob.bytes.len() as u64;
        (blob.gpa..blob.gpa + len).contains(&gpa)
    });
    let blob = blob.expect("a blob at this address");
    &blob.bytes[(gpa - blob.gpa) as usize..]
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn a_plain_kernel_goes_to_its_physical_addresses() {
    let env = ["a=1".parse().unwrap()];
    let request = Request {
        env: &env,
        cmdline: Some("hello world"),
        ..request(64)
    };
    let plan = plan(&plain()[..], &request).unwrap();
    assert_eq!(plan.protocol, Protocol::Plain);
    assert_eq!(plan.summary, "text=0x5 data=0x4+0x1ffc");
    assert_eq!(
        (plan.segments[0].gpa, plan.segments[1].gpa),
        (0x20_0000, 0x20_1000)
    );
    let regs = &plan.registers;
    assert_eq!((regs.rip, regs.rsp, regs.cr3), (0x20_0000, 0x1000, 0x2000));
    // The stack: an unused word, the module list, the first free byte.
    let stack = blob(&plan, 0x1000);
    assert_eq!(
        [0, 4, 8].map(|at| word32(stack, at)),
        [0, 0x20_4000, 0x20_5000]
    );
    assert_eq!(blob(&plan, 0x20_3000), b"a=1\0cmdline=hello world\0\0");
    assert!(blob(&plan, 0x20_4000)[8..].starts_with(b"/boot/kernel\0"));
}

#[test]
fn a_freebsd_kernel_goes_to_its_virtual_addresses_less_its_base() {
    const BASE: u64 = 0xffff_ffff_8000_0000;
    let text = Ph::load(BASE + 0x20_0000, 5, &[0x90; 64], 64);
    let data = Ph::load(BASE + 0x40_0000, 6, &[1; 16], 0x1_0000);
    let file = elf(9, BASE + 0x20_0010, &[text, data]);
    let plan = plan(&file[..], &request(64)).unwrap();
    assert_eq!(plan.protocol, Protocol::Freebsd);
    assert_eq!(
        (plan.segments[0].gpa, plan.segments[1].gpa),
        (0x20_0000, 0x40_0000)
    );
    assert_eq!(plan.registers.rip, BASE + 0x20_0010);
}

#[test]
fn what_is_no_kernel_is_refused_with_a_reason() {
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut file = plain();
        change(&mut file);
        failure(plan(&file[..], &request(64)))
    };
    let field = |at: usize, value: u64, len: usize| {
        with(&|file| file[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]))
    };
    assert!(failure(plan(&b""[..], &request(64))).contains("not a kernel"));
    assert!(failure(plan(&b"\x7fELF"[..], &request(64))).contains("64-bit"));
    assert!(field(4, 1, 1).contains("a 32-bit ELF file for x86-64"));
    assert!(field(4, 3, 1).contains("64-bit"));
    assert!(field(5, 2, 1).contains("little-endian"));
    assert!(field(18, 183, 2).contains("for arm64 (e_machine 183)"));
    assert!(field(16, 3, 2).contains("-no-pie"));
    assert!(field(16, 1, 2).contains("e_type 1"));
    assert!(field(32, 1 << 20, 8).contains("program headers"));
    assert!(field(56, 0xffff, 2).contains("program headers"));
    assert!(field(54, 32, 2).contains("program headers"));
    assert!(field(56, 0, 2).contains("no segment"));
    assert!(field(64, 3, 4).contains("interpreter"));
    assert!(field(24, 0x9999_0000, 8).contains("entry point 0x99990000 is in no loaded segment"));
    assert!(field(64 + 24, 0x30_0000, 8).contains("modulo 1 GiB"));
    assert!(field(64 + 8, u64::MAX, 8).contains("truncated"));
    assert!(with(&|file| drop(file.split_off(file.len() - 1))).contains("truncated"));
    assert!(field(64 + 40, 1, 8).contains("more bytes in the file"));
    assert!(field(64 + 40, u64::MAX, 8).contains("does not fit"));
    assert!(field(64 + 56 + 24, 0x20_0000, 8).contains("overlaps ELF segment 0"));
    assert!(field(64 + 56 + 24, 0x2000, 8).contains("the loader's own pages"));
    assert!(field(64 + 56 + 24, 0xa_0000, 8).contains("BIOS area"));
}

#[test]
fn options_without_a_meaning_are_refused() {
    let request = Request {
        initrd: Some(1),
        ..request(64)
    };
    assert!(failure(plan(&plain()[..], &request)).contains("--initrd is not for plain kernels"));
}

#[test]
fn a_kernel_larger_than_memory_is_refused() {
    let data = Ph::load(0x10_0000, 7, &[0; 16], 8 << 20);
    let file = elf(0, 0x10_0000, &[data]);
    let text = failure(plan(&file[..], &request(8)));
    assert!(
        text.contains("does not fit below 0x800000: give the VM more memory"),
        "{text}"
    );
    plan(&file[..], &request(16)).unwrap();
}

proptest! {
    #[test]
    fn mutated_headers_never_panic_and_plans_stay_in_ram(
        changes in prop::collection::vec((0usize..180, any::<u8>()), 0..6),
        cut in 0usize..400,
    ) {
        let mut file = plain();
        for (at, value) in changes {
            file[at] = value;
        }
        file.truncate(file.len() - cut.min(file.len()) / 2);
        check(&file);
    }

    #[test]
    fn mutated_words_never_panic(at in 0usize..22, word in any::<u64>(), shift in 0u32..64) {
        let mut file = plain();
        file[8 * at..8 * at + 8].copy_from_slice(&(word >> shift).to_le_bytes());
        check(&file);
    }
}

/// Whatever is planned stays inside of RAM and of the file.
pub fn check(file: &[u8]) {
    let Ok(plan) = plan_kernel(file) else { return };
    let ram = 256 << 20;
    for segment in &plan.segments {
        assert!(segment.gpa + segment.memsz <= ram);
        let compressed = rhyveload::image::Compression::of(file).is_some();
        assert!(compressed || segment.offset + segment.filesz <= file.len() as u64);
    }
    for blob in &plan.blobs {
        assert!(blob.gpa + blob.bytes.len() as u64 <= ram);
    }
}
