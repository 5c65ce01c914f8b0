//! The `probe` profile: our own freestanding kernel, compiled into this program (`guests/probe`, by
//! the build script).

use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::image::{Artifact, Image, Role};

/// The kernel: a static ELF64 executable, linked to run at 2 MiB in long mode, with a Xen note of
/// type 18 (PVH).
pub static PROBE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/probe.elf"));

/// Why the image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory or the file cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// What was written.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// Writes `probe.elf` into `out`, which is created if it is missing.
///
/// # Errors
///
/// [`Error::Write`]: the directory or the file cannot be written.
pub fn make(out: &Path) -> Result<Image, Error> {
    let path = out.join("probe.elf");
    fs::create_dir_all(out)
        .and_then(|()| fs::write(&path, PROBE))
        .map_err(|source| Error::Write {
            path: path.clone(),
            source,
        })?;
    Ok(Image {
        profile: "probe",
        source: format!("guest-image {}", env!("CARGO_PKG_VERSION")),
        files: vec![Artifact {
            role: Role::Kernel,
            path,
            bytes: PROBE.len() as u64,
        }],
    })
}

#[cfg(test)]
mod tests {
    use object::read::elf::{FileHeader, ProgramHeader};
    use object::{Endianness, elf};

    use super::*;

    fn header() -> &'static elf::FileHeader64<Endianness> {
        elf::FileHeader64::parse(PROBE).unwrap()
    }

    #[test]
    fn it_is_what_loaders_of_plain_elf_files_accept() {
        let header = header();
        let endian = header.endian().unwrap();
        assert_eq!(header.e_type(endian), elf::ET_EXEC);
        assert_eq!(header.e_machine(endian), elf::EM_X86_64);
        assert_eq!(header.e_ident().os_abi, elf::ELFOSABI_NONE);
        // FreeBSD's loader reads program headers from the first 4 KiB only.
        let headers = header.program_headers(endian, PROBE).unwrap();
        assert!(header.e_phoff(endian) as usize + size_of_val(headers) <= 4096);
        let loads: Vec<_> = headers
            .iter()
            .filter(|segment| segment.p_type(endian) == elf::PT_LOAD)
            .collect();
        assert!(!loads.is_empty());
        for load in &loads {
            // It runs where it is linked, above what loaders put below 1 MiB.
            assert_eq!(load.p_paddr(endian), load.p_vaddr(endian));
            assert!(load.p_paddr(endian) >= 0x20_0000);
        }
        let entry = header.e_entry(endian);
        assert!(loads.iter().any(|load| {
            let start = load.p_vaddr(endian);
            (start..start + load.p_filesz(endian)).contains(&entry)
        }));
    }

    #[test]
    fn it_names_a_32_bit_entry_in_a_xen_note() {
        let header = header();
        let endian = header.endian().unwrap();
        let entries: Vec<_> = header
            .program_headers(endian, PROBE)
            .unwrap()
            .iter()
            .filter_map(|segment| segment.notes(endian, PROBE).unwrap())
            .flat_map(|mut notes| std::iter::from_fn(move || notes.next().unwrap()))
            .filter(|note| note.name() == b"Xen" && note.n_type(endian).0 == 18)
            .map(|note| u32::from_le_bytes(note.desc().try_into().unwrap()))
            .collect();
        assert_eq!(entries.len(), 1);
        assert!(entries[0] >= 0x20_0000 && u64::from(entries[0]) != header.e_entry(endian));
    }

    #[test]
    fn make_writes_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let image = make(&dir.path().join("new")).unwrap();
        assert_eq!(fs::read(&image.files[0].path).unwrap(), PROBE);
        assert!(make(Path::new("/dev/null/x")).is_err());
    }
}
