//! Compressed kernels.

use std::io::Write;

use proptest::prelude::*;
use rhyveload::plan_kernel;

use crate::kernels::{bzimage, vmlinux};

type Compress = fn(&[u8]) -> Vec<u8>;

const KINDS: [(&str, Compress); 5] = [
    ("gzip", |bytes| {
        let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        to.write_all(bytes).unwrap();
        to.finish().unwrap()
    }),
    ("zstd", |bytes| zstd::encode_all(bytes, 3).unwrap()),
    ("xz", |bytes| {
        // As Linux's build does it, with the filter for x86 code.
        let mut filters = liblzma::stream::Filters::new();
        let options = liblzma::stream::LzmaOptions::new_preset(1).unwrap();
        filters.x86().lzma2(&options);
        let check = liblzma::stream::Check::Crc32;
        let stream = liblzma::stream::Stream::new_stream_encoder(&filters, check).unwrap();
        let mut to = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
        to.write_all(bytes).unwrap();
        to.finish().unwrap()
    }),
    ("lz4", |bytes| lz4(bytes, false)),
    ("lz4", |bytes| lz4(bytes, true)),
];

fn lz4(bytes: &[u8], legacy: bool) -> Vec<u8> {
    let info = lz4_flex::frame::FrameInfo::new().legacy_frame(legacy);
    let mut to = lz4_flex::frame::FrameEncoder::with_frame_info(info, Vec::new());
    to.write_all(bytes).unwrap();
    to.finish().unwrap()
}

#[test]
fn each_compression_gives_the_plan_of_what_is_inside() {
    for kernel in [vmlinux(), bzimage()] {
        let plan = plan_kernel(&kernel).unwrap();
        for (name, compress) in KINDS {
            let compressed = compress(&kernel);
            assert_eq!(plan_kernel(&compressed).unwrap(), plan, "{name}");
        }
    }
}

#[test]
fn damage_is_named() {
    for (name, compress) in KINDS {
        let compressed = compress(&vmlinux());
        let cut = &compressed[..compressed.len() / 2];
        let text = plan_kernel(cut).unwrap_err().to_string();
        assert!(
            text.contains(&format!("cannot decompress it ({name})")),
            "{text}"
        );
        let text = plan_kernel(&compress(b"hello")).unwrap_err().to_string();
        assert!(
            text.contains(&format!("compressed with {name}, but there is no kernel")),
            "{text}"
        );
    }
}

#[test]
fn what_would_expand_without_end_is_refused_unexpanded() {
    let mut kernel = vmlinux();
    // The first segment claims to have a terabyte.
    kernel[64 + 32..64 + 40].copy_from_slice(&(1u64 << 40).to_le_bytes());
    kernel[64 + 40..64 + 48].copy_from_slice(&(1u64 << 40).to_le_bytes());
    for (_, compress) in KINDS {
        let text = plan_kernel(&compress(&kernel)).unwrap_err().to_string();
        assert!(text.contains("far more than the VM's memory"), "{text}");
    }
}

proptest! {
    #[test]
    fn damaged_streams_never_panic(kind in 0usize..5, at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut compressed = KINDS[kind].1(&vmlinux());
        let at = at.index(compressed.len());
        compressed[at] = byte;
        crate::elf::check(&compressed);
    }
}
