//! The kernel loaders: whatever is planned can be done, and nothing gets into the way of anything.

use std::io::Write;
use std::ops::Range;

use rhyveload::freebsd::env::EnvVar;
use rhyveload::image::{Compression, expand};
use rhyveload::linux::bzimage::BzImage;
use rhyveload::plan::{Boot, LoadPlan, Protocol, Request, plan};
use rhyveload::progress::Progress;
use rhyveload::space::{BIOS_AREA, BIOS_AREA_END};
use vmm_api::memory::{HIGHMEM_BASE, MemSize, MemoryLayout};

use crate::freebsd_files::{self, Meta};
use crate::kernels as files;

const BOOTS: [Boot; 5] = [
    Boot::Auto,
    Boot::Linux64,
    Boot::Pvh,
    Boot::Freebsd,
    Boot::Plain,
];

const MIB: u64 = 1 << 20;

const MEMORY: [u64; 4] = [16 * MIB, 256 * MIB, 3 << 30, 5 << 30];

const INITRDS: [Option<u64>; 4] = [None, Some(1), Some(9 * MIB), Some(2 << 30)];

/// Kernels inside of compressed files are not unpacked beyond this, so that each input is quick.
const EXPANDED_MAX: u64 = 4 * MIB;

/// The last byte says what is asked for, the others are the kernel. True if it can be loaded.
///
/// # Panics
///
/// A plan leaves RAM or the file, puts two things into one place, or enters where nothing is.
pub fn check(data: &[u8]) -> bool {
    let Some((&choice, file)) = data.split_last() else {
        return false;
    };
    let choice = usize::from(choice);
    let env: Vec<EnvVar> = "boot_verbose=YES".parse().into_iter().collect();
    let request = Request {
        boot: BOOTS[choice % 5],
        layout: MemoryLayout::split(MemSize(MEMORY[choice / 5 % 4])),
        initrd: INITRDS[choice / 20 % 4],
        cmdline: (choice / 80 % 2 == 0).then_some("console=ttyS0"),
        env: if choice / 160 == 0 { &[] } else { &env },
        kernel: "kernel",
    };
    let expanded = match Compression::of(file) {
        None => None,
        Some(kind) => match expand(kind, file, EXPANDED_MAX, &mut Progress::hidden()) {
            Ok(bytes) => Some(bytes),
            Err(_) => return false,
        },
    };
    let image = expanded.as_deref().unwrap_or(file);
    match plan(image, &request) {
        Ok(plan) => {
            verify(&plan, image, &request);
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

fn verify(plan: &LoadPlan, image: &[u8], request: &Request<'_>) {
    let mut places = Vec::new();
    for segment in &plan.segments {
        assert!(segment.filesz <= segment.memsz, "{segment:x?}");
        let end = segment.offset.checked_add(segment.filesz);
        assert!(end.is_some_and(|end| end <= image.len() as u64));
        places.push((segment.gpa, segment.memsz));
    }
    places.extend(plan.blobs.iter().map(|b| (b.gpa, b.bytes.len() as u64)));
    assert_eq!(plan.initrd.is_some(), request.initrd.is_some());
    places.extend(plan.initrd.zip(request.initrd));
    for &(gpa, len) in &places {
        let offset = request.layout.offset_of(gpa, len);
        assert!(offset.is_some(), "{gpa:#x} + {len:#x} is not RAM");
    }
    places.push((BIOS_AREA, BIOS_AREA_END - BIOS_AREA));
    apart(&places);
    verify_entry(plan);

    // A bzImage needs more than it fills: only it and its low pages may be there.
    if let (Protocol::Linux64, false) = (plan.protocol, image.starts_with(b"\x7fELF")) {
        let parsed = BzImage::parse(image, image.len() as u64);
        let (start, end) = parsed.map(|image| image.needs).unwrap_or_default();
        assert!(request.layout.offset_of(start, end - start).is_some());
        let mut others: Vec<_> = plan.initrd.zip(request.initrd).into_iter().collect();
        others.extend(plan.blobs.iter().map(|b| (b.gpa, b.bytes.len() as u64)));
        others.push((start, end - start));
        apart(&others);
    }
}

/// No two of these ranges share a byte.
fn apart(places: &[(u64, u64)]) {
    let mut ranges: Vec<Range<u64>> = places
        .iter()
        .filter(|(_, len)| *len != 0)
        .map(|&(gpa, len)| gpa..gpa + len)
        .collect();
    ranges.sort_by_key(|range| range.start);
    for pair in ranges.windows(2) {
        assert!(pair[0].end <= pair[1].start, "overlap: {pair:x?}");
    }
}

/// The first instruction is in a segment, at the address that the first page tables map it to.
fn verify_entry(plan: &LoadPlan) {
    let rip = match plan.protocol {
        Protocol::Linux64 | Protocol::Pvh => plan.registers.rip,
        Protocol::Freebsd | Protocol::Plain => plan.registers.rip % (1 << 30),
    };
    assert!(rip < HIGHMEM_BASE);
    let mut segments = plan.segments.iter();
    assert!(
        segments.any(|s| (s.gpa..s.gpa + s.memsz).contains(&rip)),
        "entry {rip:#x} is in no segment"
    );
}

/// Each kind of kernel file, and one of them compressed in each way.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut pvh = files::vmlinux();
    // Entered at its virtual address, so that only the note makes it PVH.
    pvh[24..32].copy_from_slice(&0u64.to_le_bytes());
    let text = files::Ph::load(0xffff_ffff_8020_0000, 5, b"\xf4text", 0x1000);
    let freebsd = files::elf(9, 0xffff_ffff_8020_0000, &[text]);
    let plain = files::plain();
    // Its kernel's bytes are never looked at: 1 KiB of them will do.
    let mut bzimage = files::bzimage();
    bzimage[0x1f4..0x1f8].copy_from_slice(&0x40u32.to_le_bytes());
    bzimage.truncate(5 * 512 + 0x400);
    let mut kernels = vec![
        plain.clone(),
        freebsd,
        files::vmlinux(),
        pvh,
        gzip(&plain),
        zstd::encode_all(&plain[..], 3).unwrap_or_default(),
        xz(&plain),
        lz4(&plain, false),
        lz4(&plain, true),
        bzimage,
        freebsd_files::kernel(&[Meta::Version("kernel", 1000), Meta::Version("pci", 1)]),
    ];
    // What is asked for: first choice of everything, but 256 MiB.
    kernels.iter_mut().for_each(|file| file.push(5));
    kernels
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    to.write_all(bytes)
        .and_then(|()| to.finish())
        .unwrap_or_default()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut to = liblzma::write::XzEncoder::new(Vec::new(), 0);
    to.write_all(bytes)
        .and_then(|()| to.finish())
        .unwrap_or_default()
}

fn lz4(bytes: &[u8], legacy: bool) -> Vec<u8> {
    let info = lz4_flex::frame::FrameInfo::new().legacy_frame(legacy);
    let mut to = lz4_flex::frame::FrameEncoder::with_frame_info(info, Vec::new());
    let written = to.write_all(bytes);
    written
        .ok()
        .and_then(|()| to.finish().ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_planned() {
        for (number, seed) in seeds().iter().enumerate() {
            assert!(check(seed), "seed {number}");
        }
    }
}
