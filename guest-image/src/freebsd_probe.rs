//! The `freebsd-probe` profile: a kernel of ours that is handed over to as FreeBSD's, with two modules
//! and a preloaded disk, in the layout of bhyve's guests of 2012: `boot/` for the loader and
//! `diskdev`, the disk.
//!
//! Kernel and modules are compiled into this program (`guests/freebsd`, by the build script).

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::image::{Artifact, Image, Role};

/// The kernel: ELF64 at FreeBSD's KERNBASE, branded, with symbols and a dynamic section.
pub static KERNEL: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/freebsd.elf"));
/// A module that needs the kernel.
pub static BASE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/probe_base.ko"));
/// A module that needs [`BASE`].
pub static USER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/probe_user.ko"));

/// What the loader is told.
const LOADER_CONF: &str = "\
# The FreeBSD probe: what of the guest is loaded besides the kernel.
autoboot_delay=\"-1\"
beastie_disable=\"YES\"
probe_base_load=\"YES\"
probe_user_load=\"YES\"
mdroot_load=\"YES\"
mdroot_type=\"md_image\"
vfs.root.mountfrom=\"ufs:vtbd0\"
";
/// As much of FreeBSD's defaults as matters.
const DEFAULTS: &str = "\
kernel=\"kernel\"
bootfile=\"kernel\"
module_path=\"/boot/modules\"
loader_conf_files=\"/boot/device.hints /boot/loader.conf /boot/loader.conf.local\"
";

/// Bytes of the preloaded disk.
const MD_SIZE: u64 = 64 << 10;
/// Bytes of the other one: 819200 sectors, as in 2012.
const DISK_SIZE: u64 = 400 << 20;

/// Why the image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A directory or a file cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// What was written.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// The preloaded disk: a text, its length, the sum of the words that follow, and those.
#[must_use]
pub fn md_image() -> Vec<u8> {
    let word = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x7268_7976;
    let words: Vec<u64> = (4..MD_SIZE / 8).map(word).collect();
    let sum = words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
    let mut image = b"rhyve-md\0\0\0\0\0\0\0\0".to_vec();
    let head = [MD_SIZE, sum];
    image.extend(
        head.iter()
            .chain(&words)
            .flat_map(|word| word.to_le_bytes()),
    );
    image
}

/// Writes `boot/` and `diskdev` into `out`, which is created if it is missing.
///
/// # Errors
///
/// [`Error::Write`]: a directory or a file cannot be written.
pub fn make(out: &Path) -> Result<Image, Error> {
    let md_image = md_image();
    let boot: [(&str, Role, &[u8]); 6] = [
        ("boot/kernel/kernel", Role::Kernel, KERNEL),
        ("boot/kernel/probe_base.ko", Role::Module, BASE),
        ("boot/kernel/probe_user.ko", Role::Module, USER),
        ("boot/kernel/mdroot", Role::Disk, &md_image),
        (
            "boot/defaults/loader.conf",
            Role::Config,
            DEFAULTS.as_bytes(),
        ),
        ("boot/loader.conf", Role::Config, LOADER_CONF.as_bytes()),
    ];
    let mut files = Vec::new();
    for (name, role, bytes) in boot {
        let path = out.join(name);
        let parent = path.parent().unwrap_or(out);
        fs::create_dir_all(parent)
            .and_then(|()| fs::write(&path, bytes))
            .map_err(|source| Error::Write {
                path: path.clone(),
                source,
            })?;
        files.push(Artifact {
            role,
            path,
            bytes: bytes.len() as u64,
        });
    }
    let path = out.join("diskdev");
    File::create(&path)
        .and_then(|disk| disk.set_len(DISK_SIZE))
        .map_err(|source| Error::Write {
            path: path.clone(),
            source,
        })?;
    files.push(Artifact {
        role: Role::Disk,
        path,
        bytes: DISK_SIZE,
    });
    Ok(Image {
        profile: "freebsd-probe",
        source: format!("guest-image {}", env!("CARGO_PKG_VERSION")),
        files,
    })
}

#[cfg(test)]
mod tests {
    use object::read::elf::{FileHeader, ProgramHeader};
    use object::{Endianness, Object, ObjectSection, ObjectSymbol, elf};

    use super::*;

    #[test]
    fn the_kernel_is_one_of_freebsds() {
        let header = elf::FileHeader64::<Endianness>::parse(KERNEL).unwrap();
        let endian = header.endian().unwrap();
        assert_eq!(header.e_ident().os_abi, elf::ELFOSABI_FREEBSD);
        assert_eq!(header.e_type(endian), elf::ET_EXEC);
        let headers = header.program_headers(endian, KERNEL).unwrap();
        assert!(header.e_phoff(endian) as usize + size_of_val(headers) <= 4096);
        let of = |kind| {
            let same = headers
                .iter()
                .filter(|segment| segment.p_type(endian) == kind);
            same.collect::<Vec<_>>()
        };
        let loads = of(elf::PT_LOAD);
        assert_eq!(loads[0].p_vaddr(endian), 0xffff_ffff_8020_0000);
        assert_eq!(loads[0].p_offset(endian), 0, "the headers are loaded");
        assert!(
            loads
                .iter()
                .all(|load| load.p_paddr(endian) == load.p_vaddr(endian))
        );
        assert_eq!((loads.len(), of(elf::PT_DYNAMIC).len()), (2, 1));
        let file = object::File::parse(KERNEL).unwrap();
        assert_eq!(
            file.section_by_name("set_modmetadata_set").unwrap().size(),
            8
        );
        assert!(
            file.symbol_by_name("probe_kernel_double")
                .unwrap()
                .is_global()
        );
    }

    #[test]
    fn the_modules_are_relocatable_and_tell_of_themselves() {
        for (module, entries) in [(BASE, 3), (USER, 3)] {
            let header = elf::FileHeader64::<Endianness>::parse(module).unwrap();
            assert_eq!(header.e_type(Endianness::Little), elf::ET_REL);
            assert_eq!(header.e_ident().os_abi, elf::ELFOSABI_FREEBSD);
            let file = object::File::parse(module).unwrap();
            let sets = file
                .sections()
                .filter(|s| s.name() == Ok("set_modmetadata_set"));
            assert_eq!(
                sets.map(|set| set.size()).collect::<Vec<_>>(),
                [entries * 8]
            );
        }
    }

    #[test]
    fn make_writes_the_guests_layout() {
        let dir = tempfile::tempdir().unwrap();
        let image = make(dir.path()).unwrap();
        assert_eq!(
            fs::read(dir.path().join("boot/kernel/kernel")).unwrap(),
            KERNEL
        );
        let disk = fs::metadata(dir.path().join("diskdev")).unwrap();
        assert_eq!(disk.len() / 512, 819_200);
        assert_eq!(image.files.len(), 7);
        assert!(make(Path::new("/dev/null/x")).is_err());
    }

    #[test]
    fn the_preloaded_disk_is_as_long_as_it_says() {
        let image = md_image();
        assert_eq!(image.len() as u64, MD_SIZE);
        assert_eq!(image[16..24], MD_SIZE.to_le_bytes());
    }
}
