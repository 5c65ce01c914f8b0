//! The uncompressed kernel inside a bzImage (Linux, Documentation/arch/x86/boot.rst).
//!
//! The setup header says where the payload is; its first bytes say how it is compressed. The build
//! appends the uncompressed length to every payload but gzip's, which has it already.

use std::io::{self, Read};

use object::{Object, ObjectSegment};

/// Why a kernel cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No setup header with a payload (boot protocol 2.08).
    #[error("not a bzImage of boot protocol 2.08 or later")]
    NotBzImage,
    /// The payload lies outside the file.
    #[error("the payload at {offset:#x}, {length:#x} bytes long, ends behind the file")]
    Truncated {
        /// File offset, in bytes.
        offset: usize,
        /// Length in bytes.
        length: usize,
    },
    /// A compression this program does not know.
    #[error("unknown compression: the payload starts with {0:02x?}")]
    UnknownCompression(Vec<u8>),
    /// The payload does not decompress.
    #[error("the {0} payload is damaged")]
    Damaged(&'static str, #[source] io::Error),
    /// What came out is not an x86-64 kernel.
    #[error("the payload is no 64-bit x86 ELF executable: {0}")]
    NotKernel(String),
}

// Offsets in the setup header.
const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Unpacks the kernel of a bzImage and checks that it is one.
///
/// # Errors
///
/// See [`Error`].
pub fn extract(bzimage: &[u8]) -> Result<Vec<u8>, Error> {
    let payload = payload(bzimage)?;
    let sized = payload
        .get(..payload.len().saturating_sub(4))
        .unwrap_or_default();
    let mut kernel = Vec::new();
    let (name, result) = match payload {
        [0x1f, 0x8b, ..] => (
            "gzip",
            flate2::read::GzDecoder::new(payload).read_to_end(&mut kernel),
        ),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => (
            "xz",
            liblzma::read::XzDecoder::new(sized).read_to_end(&mut kernel),
        ),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = zstd::stream::read::Decoder::new(sized);
            (
                "zstd",
                decoder.and_then(|decoder| decoder.single_frame().read_to_end(&mut kernel)),
            )
        }
        [0x02, 0x21, 0x4c, 0x18, ..] => (
            "lz4",
            lz4_flex::frame::FrameDecoder::new(sized).read_to_end(&mut kernel),
        ),
        other => {
            return Err(Error::UnknownCompression(
                other[..other.len().min(6)].to_vec(),
            ));
        }
    };
    result.map_err(|source| Error::Damaged(name, source))?;
    check(&kernel)?;
    Ok(kernel)
}

/// The compressed payload.
fn payload(bzimage: &[u8]) -> Result<&[u8], Error> {
    let byte = |at: usize| bzimage.get(at).copied().ok_or(Error::NotBzImage);
    let word = |at: usize| -> Result<usize, Error> {
        let bytes = [byte(at)?, byte(at + 1)?, byte(at + 2)?, byte(at + 3)?];
        Ok(u32::from_le_bytes(bytes) as usize)
    };
    let version = u16::from_le_bytes([byte(VERSION)?, byte(VERSION + 1)?]);
    if word(HEADER_MAGIC)?.to_le_bytes()[..4] != *b"HdrS" || version < 0x208 {
        return Err(Error::NotBzImage);
    }
    // "If setup_sects is 0, the real value is 4"; the payload's offset counts from the protected-mode
    // code, which follows the boot sector and these.
    let setup_sects = match byte(SETUP_SECTS)? {
        0 => 4,
        sects => usize::from(sects),
    };
    let offset = (setup_sects + 1) * 512 + word(PAYLOAD_OFFSET)?;
    let length = word(PAYLOAD_LENGTH)?;
    offset
        .checked_add(length)
        .and_then(|end| bzimage.get(offset..end))
        .ok_or(Error::Truncated { offset, length })
}

/// Checks with an independent reader that the kernel is whole.
fn check(kernel: &[u8]) -> Result<(), Error> {
    let file = object::File::parse(kernel).map_err(|error| Error::NotKernel(error.to_string()))?;
    if file.architecture() != object::Architecture::X86_64
        || file.kind() != object::ObjectKind::Executable
    {
        return Err(Error::NotKernel(format!(
            "{:?} {:?}",
            file.architecture(),
            file.kind()
        )));
    }
    for segment in file.segments() {
        segment
            .data()
            .map_err(|error| Error::NotKernel(error.to_string()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 1024];
        file[SETUP_SECTS] = 1;
        file[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        file[VERSION..VERSION + 2].copy_from_slice(&0x20f_u16.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        file[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        file.extend_from_slice(payload);
        file
    }

    #[test]
    fn payloads_are_found_and_bad_ones_named() {
        assert!(matches!(extract(b"MZ"), Err(Error::NotBzImage)));
        let image = bzimage(b"BZh91AY");
        assert!(matches!(extract(&image), Err(Error::UnknownCompression(_))));
        assert!(matches!(
            extract(&image[..1026]),
            Err(Error::Truncated { .. })
        ));
        let damaged = bzimage(b"\xfd7zXZ\0garbage");
        assert!(matches!(extract(&damaged), Err(Error::Damaged("xz", _))));
    }

    #[test]
    fn what_is_unpacked_must_be_a_kernel() {
        let mut packed = zstd::encode_all(&b"not an ELF file"[..], 1).unwrap();
        packed.extend_from_slice(&15_u32.to_le_bytes());
        assert!(matches!(
            extract(&bzimage(&packed)),
            Err(Error::NotKernel(_))
        ));

        // This test's own program is a 64-bit x86 executable, if position-independent.
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let mut packed = zstd::encode_all(own.as_slice(), 1).unwrap();
        packed.extend_from_slice(&0_u32.to_le_bytes());
        match extract(&bzimage(&packed)) {
            Ok(kernel) => assert_eq!(kernel, own),
            Err(error) => assert!(error.to_string().contains("Dynamic"), "{error}"),
        }
    }
}
