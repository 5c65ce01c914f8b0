//! File systems on disk images, made by Debian's makefs and mke2fs and read back byte for byte.

use std::fs;
use std::io::{Cursor, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use imago::file::File as Storage;
use imago::format::builder::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use imago::{
    FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, Storage as _,
    StorageCreateOptions,
};
use proptest::prelude::*;
use rhyveload::source::disk::{Disk, DiskError, Mounted};
use rhyveload::source::fat::{Fat, Width};
use rhyveload::source::ufs::Ufs;
use rhyveload::source::ufs::superblock::Version;
use rhyveload::source::{BootFs, FileKind, FsError, Slice, Source};
use tempfile::TempDir;

use crate::ufs_files::{BLOCK, Image, Pointers, small};

/// Debian's makefs: what `cargo xtask test` names in $MAKEFS, or the one that is installed.
pub fn makefs(options: &str, image: &Path, tree: &Path) {
    let program = std::env::var_os("MAKEFS").unwrap_or_else(|| "/usr/sbin/makefs".into());
    let output = Command::new(&program)
        .args([
            "-t", "ffs", "-B", "little", "-o", options, "-M", "8m", "-b", "50%", "-f", "100",
        ])
        .arg(image)
        .arg(tree)
        .output()
        .unwrap_or_else(|error| {
            panic!(
                "{}: {error}: install Debian's package makefs (apt-get install makefs), name the \
                program in $MAKEFS, or run the tests by `cargo xtask test`",
                program.display()
            )
        });
    assert!(output.status.success(), "{output:?}");
}

/// A tree, and room for images of it.
struct Place {
    tmp: TempDir,
    tree: PathBuf,
}

impl Place {
    fn new() -> Self {
        let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
        let tree = tmp.path().join("tree");
        fs::create_dir(&tree).unwrap();
        Self { tmp, tree }
    }

    fn ufs(&self, options: &str) -> Vec<u8> {
        let image = self.tmp.path().join("image");
        makefs(options, &image, &self.tree);
        fs::read(image).unwrap()
    }
}

/// Bytes that differ from place to place.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// What a boot tree has that is hard to read: files with fragments, indirect blocks and holes,
/// links of every length, a directory of many blocks.
fn fill(tree: &Path) {
    let file = |name: &str, bytes: &[u8]| fs::write(tree.join(name), bytes).unwrap();
    file("empty", b"");
    file("one", b"1");
    file("fragments", &pattern(5000, 2));
    file("direct", &pattern(12 * 4096, 3));
    file("single", &pattern(300_000, 4));
    // With 4 KiB blocks of 512 pointers: past 12 + 512 blocks.
    file("double", &pattern(3 << 20, 5));
    let sparse = fs::File::create(tree.join("sparse")).unwrap();
    use std::os::unix::fs::FileExt;
    sparse.write_all_at(&pattern(10_000, 6), 1 << 20).unwrap();
    sparse.set_len(9 << 20).unwrap();
    let many = tree.join("many");
    fs::create_dir(&many).unwrap();
    for n in 0..2000 {
        fs::write(many.join(format!("file-{n:04}")), n.to_string()).unwrap();
    }
    fs::create_dir_all(tree.join("a/b/c")).unwrap();
    fs::write(tree.join("a/b/c/deep"), "deep").unwrap();
    symlink("/a/b/c/deep", tree.join("absolute")).unwrap();
    symlink("../../../..//a/./b/c/../c/deep", tree.join("a/relative")).unwrap();
    symlink("loop", tree.join("loop")).unwrap();
    symlink("nothing", tree.join("dangling")).unwrap();
    for len in [59, 60, 119, 120, 300] {
        let target = format!("{}one", "/".repeat(len - 3));
        symlink(target, tree.join(format!("link-{len}"))).unwrap();
    }
}

/// Compares a file system with the tree that it was made of, below `path`.
fn compare(fs: &dyn BootFs, tree: &Path, path: &str) -> usize {
    let mut compared = 0;
    let mut names: Vec<String> = tree
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let entries = fs.read_dir(path).unwrap();
    let found = entries
        .iter()
        .map(|e| &e.name)
        .filter(|n| *n != "lost+found");
    assert_eq!(
        found.collect::<Vec<_>>(),
        names.iter().collect::<Vec<_>>(),
        "{path}"
    );
    // Every name is compared, but of thousands of small files only some are read.
    let stride = if entries.len() > 1000 { 20 } else { 1 };
    for entry in entries.iter().step_by(stride) {
        let (host, inside) = (tree.join(&entry.name), format!("{path}/{}", entry.name));
        match entry.kind {
            FileKind::Directory if entry.name == "lost+found" => {}
            FileKind::Directory => compared += compare(fs, &host, &inside),
            FileKind::File => {
                let bytes = fs.read_file(&inside, 64 << 20).expect(&inside);
                assert!(bytes == fs::read(&host).unwrap(), "{inside}");
                assert_eq!(fs.stat(&inside).unwrap().size, bytes.len() as u64);
                compared += 1;
            }
            kind => assert_eq!(kind, FileKind::Symlink, "{inside}"),
        }
    }
    compared
}

/// The file systems of a disk image, with their names.
fn volumes(image: &Path, unit: usize) -> Result<Vec<(String, Mounted)>, DiskError> {
    let disk = Disk::open(image, unit)?;
    let none = disk.without_file_system();
    let volumes = disk.volumes.into_iter();
    let found: Vec<_> = volumes.filter_map(|v| Some((v.name, v.fs?))).collect();
    if found.is_empty() {
        Err(none)
    } else {
        Ok(found)
    }
}

fn ufs(image: &[u8]) -> Ufs {
    let whole = Rc::new(image.to_vec());
    let slice = Slice::new(whole, 0, image.len() as u64);
    Ufs::probe(&slice).unwrap().expect("a UFS superblock")
}

#[test]
fn ufs_of_every_version_and_size_reads_back() {
    let place = Place::new();
    fill(&place.tree);
    for (options, version, bsize) in [
        ("version=2", Version::Ufs2, 8192),
        ("version=2,bsize=4096,fsize=512", Version::Ufs2, 4096),
        ("version=2,bsize=16384,fsize=2048", Version::Ufs2, 16384),
        ("version=2,bsize=65536,fsize=8192", Version::Ufs2, 65536),
        ("version=1", Version::Ufs1, 8192),
        ("version=1,bsize=4096,fsize=1024", Version::Ufs1, 4096),
        ("version=1,bsize=32768,fsize=4096", Version::Ufs1, 32768),
    ] {
        let fs = ufs(&place.ufs(options));
        let sb = fs.superblock();
        assert_eq!((sb.version, sb.bsize), (version, bsize), "{options}");
        assert_eq!(compare(&fs, &place.tree, ""), 108, "{options}");
        for name in ["absolute", "a/relative", "/a/b/../b/c/deep"] {
            assert_eq!(fs.read_file(name, 100).unwrap(), b"deep", "{name}");
        }
        for len in [59, 60, 119, 120, 300] {
            assert_eq!(fs.read_file(&format!("link-{len}"), 100).unwrap(), b"1");
        }
        assert!(matches!(fs.open("loop"), Err(FsError::Loop)));
        assert!(matches!(fs.open("dangling"), Err(FsError::NotFound)));
        assert!(matches!(fs.open("one/x"), Err(FsError::NotDirectory)));
        assert!(matches!(fs.open("many"), Err(FsError::NotFile)));
        assert!(matches!(fs.read_dir("one"), Err(FsError::NotDirectory)));
    }
}

#[test]
fn parts_of_a_file_read_as_the_whole_does() {
    let place = Place::new();
    fill(&place.tree);
    let fs = ufs(&place.ufs("version=2,bsize=4096,fsize=512"));
    let whole = fs::read(place.tree.join("double")).unwrap();
    let file = fs.open("double").unwrap();
    for (offset, len) in [(0, 1), (4095, 2), (49151, 5000), (2_200_000, 900_000)] {
        let mut bytes = vec![0; len];
        file.read(offset, &mut bytes).unwrap();
        assert!(bytes == whole[offset as usize..][..len], "{offset} {len}");
    }
    assert!(file.read(whole.len() as u64, &mut [0]).is_err());
    assert!(file.read(u64::MAX, &mut [0]).is_err());
}

#[test]
fn linux_file_systems_read_back() {
    let place = Place::new();
    fill(&place.tree);
    for (kind, files) in [("ext4", 108), ("ext3", 107), ("ext2", 107)] {
        let image = place.tmp.path().join(kind);
        let output = Command::new("/sbin/mke2fs")
            .args(["-q", "-t", kind, "-d"])
            .args([&place.tree, &image])
            .arg("64M")
            .output()
            .expect("mke2fs, of Debian's package e2fsprogs");
        assert!(output.status.success(), "{output:?}");
        let found = volumes(&image, 3).unwrap();
        assert_eq!(found[0].0, "disk3:");
        assert_eq!(compare(&*found[0].1.fs, &place.tree, ""), files, "{kind}");
        // The crate takes a hole where a block of pointers would be for damage.
        let _ = fs::remove_file(place.tree.join("sparse"));
        let deep = found[0].1.fs.read_file("/a/relative", 100).unwrap();
        assert_eq!(deep, b"deep");
    }
}

/// Makes a qcow2 image with these bytes, perhaps over another.
fn create_qcow2(path: &Path, size: u64, backing: Option<&Path>, bytes: &[u8]) {
    let file = Storage::create_open(StorageCreateOptions::new().filename(path)).unwrap();
    let mut builder = Qcow2::<Storage>::create_builder(file).size(size);
    if let Some(backing) = backing {
        builder = builder.backing(backing.to_str().unwrap().to_owned(), "qcow2".to_owned());
    }
    builder.create().unwrap();
    let image = Qcow2::<Storage>::builder_path(path)
        .write(true)
        .open(PermissiveImplicitOpenGate::default())
        .unwrap();
    let image = FormatAccess::new(image);
    if !bytes.is_empty() {
        image.write(bytes, 0).unwrap();
    }
    image.flush().unwrap();
}

#[test]
fn qcow2_images_read_back() {
    let place = Place::new();
    fs::write(place.tree.join("hello"), pattern(300_000, 9)).unwrap();
    let raw = place.tmp.path().join("raw");
    fs::write(&raw, in_a_slice(&place.ufs("version=2"))).unwrap();
    let image = place.tmp.path().join("qcow2");
    let overlay = place.tmp.path().join("overlay");
    let bytes = fs::read(&raw).unwrap();
    create_qcow2(&image, bytes.len() as u64, None, &bytes);
    create_qcow2(&overlay, bytes.len() as u64, Some(&image), &[]);
    for image in [image, overlay] {
        let found = volumes(&image, 0).unwrap();
        assert_eq!(found[0].0, "disk0s2:");
        compare(&*found[0].1.fs, &place.tree, "");
    }
}

#[test]
fn fat_file_systems_read_back() {
    let place = Place::new();
    let files = [
        ("KERNEL.BIN", 300_000),
        ("lower.txt", 1),
        ("a long name, with blanks.conf", 70_000),
        ("Größe", 5000),
        ("empty", 0),
    ];
    fs::create_dir(place.tree.join("boot")).unwrap();
    fs::create_dir(place.tree.join("many")).unwrap();
    for (index, (name, len)) in files.iter().enumerate() {
        for dir in ["", "boot"] {
            let bytes = pattern(*len, index as u64 + 3);
            fs::write(place.tree.join(dir).join(name), bytes).unwrap();
        }
    }
    for n in 0..200 {
        fs::write(
            place.tree.join(format!("many/file {n:03} of many")),
            n.to_string(),
        )
        .unwrap();
    }
    let image = place.tmp.path().join("fat");
    for (kind, size, width) in [
        (FatType::Fat12, 2u64 << 20, Width::Fat12),
        (FatType::Fat16, 20 << 20, Width::Fat16),
        (FatType::Fat32, 64 << 20, Width::Fat32),
    ] {
        let whole = Rc::new(fat(kind, size, &place.tree));
        fs::write(&image, &*whole).unwrap();
        let found = Fat::probe(&Slice::new(whole, 0, size)).unwrap().unwrap();
        assert_eq!(found.width(), width);
        assert_eq!(compare(&found, &place.tree, ""), 210);
        assert_eq!(
            found.read_file("BOOT/../Boot/LOWER.TXT", 9).unwrap().len(),
            1
        );
        assert!(matches!(found.open("boot"), Err(FsError::NotFile)));
        assert!(matches!(
            found.open("lower.txt/x"),
            Err(FsError::NotDirectory)
        ));
        let disk = volumes(&image, 1).unwrap();
        assert_eq!((disk[0].0.as_str(), disk[0].1.kind), ("disk1:", "FAT"));
    }
}

/// Makes a FAT file system of a tree by the fatfs crate.
fn fat(kind: FatType, size: u64, tree: &Path) -> Vec<u8> {
    let mut disk = Cursor::new(vec![0; size as usize]);
    let options = FormatVolumeOptions::new()
        .fat_type(kind)
        .bytes_per_cluster(512);
    fatfs::format_volume(&mut disk, options).unwrap();
    {
        let volume = FileSystem::new(&mut disk, FsOptions::new()).unwrap();
        copy_tree(tree, &volume.root_dir());
    }
    disk.into_inner()
}

fn copy_tree(from: &Path, to: &fatfs::Dir<'_, &mut Cursor<Vec<u8>>>) {
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &to.create_dir(&name).unwrap());
        } else {
            let bytes = fs::read(entry.path()).unwrap();
            to.create_file(&name).unwrap().write_all(&bytes).unwrap();
        }
    }
}

/// A disk with an MBR whose second slice is FreeBSD's.
fn in_a_slice(fs: &[u8]) -> Vec<u8> {
    let start = 63u32;
    let mut disk = vec![0; 512 * start as usize];
    let mut put = |at: usize, bytes: &[u8]| disk[at..at + bytes.len()].copy_from_slice(bytes);
    put(446 + 16 + 4, &[0xa5]);
    put(446 + 16 + 8, &start.to_le_bytes());
    put(446 + 16 + 12, &((fs.len() / 512) as u32).to_le_bytes());
    put(510, &[0x55, 0xaa]);
    disk.extend_from_slice(fs);
    disk
}

#[test]
fn disks_are_searched_for_file_systems() {
    let place = Place::new();
    fs::write(place.tree.join("hello"), "hi").unwrap();
    let image = place.tmp.path().join("disk");
    let bare = place.ufs("version=2");
    for (disk, name) in [(bare.clone(), "disk0:"), (in_a_slice(&bare), "disk0s2:")] {
        fs::write(&image, disk).unwrap();
        let found = volumes(&image, 0).unwrap();
        let names: Vec<_> = found.iter().map(|v| v.0.as_str()).collect();
        assert_eq!(names, [name]);
        assert_eq!(found[0].1.fs.read_file("hello", 9).unwrap(), b"hi");
    }
    let refused = |bytes: &[u8]| {
        fs::write(&image, bytes).unwrap();
        volumes(&image, 0).unwrap_err().to_string()
    };
    assert!(refused(b"").contains("no UFS, ext2/3/4 or FAT file system found (looked at disk0:)"));
    assert!(refused(&in_a_slice(&[0; 512])).contains("disk0s2: disk0:"));
    assert!(refused(b"QFI\xfb....").contains("cannot open it"));
    let text = volumes(&place.tree, 0).unwrap_err().to_string();
    assert!(text.contains("cannot open it"), "{text}");
}

/// A file or a directory of a random tree.
#[derive(Clone, Debug)]
enum Node {
    File(usize),
    Dir(Vec<(String, Node)>),
}

fn nodes() -> impl Strategy<Value = Vec<(String, Node)>> {
    let sizes = prop_oneof![0usize..600, 3500usize..9000, 90_000usize..120_000];
    let leaf = sizes.prop_map(Node::File);
    let node = leaf.prop_recursive(3, 40, 8, |inner| {
        prop::collection::vec(("[a-zA-Z0-9_.-]{1,200}x", inner), 0..8).prop_map(Node::Dir)
    });
    prop::collection::vec(("[a-z]{1,12}", node), 1..12)
}

fn write(dir: &Path, nodes: &[(String, Node)]) {
    for (index, (name, node)) in nodes.iter().enumerate() {
        let path = dir.join(name);
        if path.exists() {
            continue;
        }
        match node {
            Node::File(len) => fs::write(path, pattern(*len, index as u64 + 7)).unwrap(),
            Node::Dir(nodes) => {
                fs::create_dir(&path).unwrap();
                write(&path, nodes);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn random_trees_read_back(nodes in nodes(), version in 1..3, shift in 0..4) {
        let place = Place::new();
        write(&place.tree, &nodes);
        let (bsize, fsize) = (4096 << shift, 512 << shift);
        let image = place.ufs(&format!("version={version},bsize={bsize},fsize={fsize}"));
        compare(&ufs(&image), &place.tree, "");
    }
}

/// Reads everything below a directory, whatever comes of it.
fn exhaust(fs: &dyn BootFs, path: &str, depth: usize) {
    let Ok(entries) = fs.read_dir(path) else {
        return;
    };
    for entry in entries.iter().take(64) {
        let path = format!("{path}/{}", entry.name);
        if let Ok(file) = fs.open(&path) {
            let mut bytes = vec![0; file.size().min(1 << 20) as usize];
            let _ = file.read(0, &mut bytes);
            let _ = file.read(file.size().saturating_sub(1), &mut [0]);
        }
        if depth > 0 {
            exhaust(fs, &path, depth - 1);
        }
    }
}

/// An image with other bytes somewhere.
#[derive(Debug)]
struct Patched(Rc<Vec<u8>>, u64, Vec<u8>);

impl Source for Patched {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        self.0.read(offset, bytes)?;
        for (index, &byte) in self.2.iter().enumerate() {
            if let Some(at) = (self.1 + index as u64).checked_sub(offset)
                && let Some(to) = bytes.get_mut(at as usize)
            {
                *to = byte;
            }
        }
        Ok(())
    }
}

#[test]
fn damaged_images_never_panic() {
    let place = Place::new();
    fs::create_dir(place.tree.join("dir")).unwrap();
    fs::write(place.tree.join("dir/file"), pattern(100_000, 1)).unwrap();
    symlink("dir/file", place.tree.join("link")).unwrap();
    for version in [
        "version=1,bsize=4096,fsize=512",
        "version=2,bsize=4096,fsize=512",
    ] {
        let good = place.ufs(version);
        let sb = ufs(&good).superblock().clone();
        let sb_at = sb.place as usize;
        let inodes = (sb.iblkno * sb.fsize) as usize;
        let good = Rc::new(good);
        let run = |at: usize, patch: &[u8]| {
            let image = Rc::new(Patched(good.clone(), at as u64, patch.to_vec()));
            if let Ok(Some(fs)) = Ufs::probe(&Slice::new(image, 0, good.size())) {
                exhaust(&fs, "", 2);
                let _ = fs.read_file("link", 1 << 20);
            }
        };
        // Every field that is read, in the superblock and in the first inodes, by several values.
        for value in [0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
            for at in [8, 16, 24, 28, 44, 48, 52, 56, 184, 188, 1000, 1320, 1372] {
                run(sb_at + at, &value.to_le_bytes());
            }
            for at in (2 * 128..8 * 256).step_by(4) {
                run(inodes + at, &value.to_le_bytes());
            }
        }
    }
}

/// An image of which only some blocks are kept.
#[derive(Debug)]
struct Sparse(Image, u64);

impl Source for Sparse {
    fn size(&self) -> u64 {
        self.1
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        for (index, byte) in bytes.iter_mut().enumerate() {
            let at = offset + index as u64;
            let block = self.0.at(at);
            *byte = block.map_or(0, |block| block[(at % BLOCK) as usize]);
        }
        Ok(())
    }
}

#[test]
fn a_superblock_is_found_in_each_of_its_places() {
    for ufs1 in [false, true] {
        for place in [65536, 8192, 0, 262144] {
            let image = small(ufs1, place);
            let fs = ufs(&image.bytes());
            assert_eq!(fs.superblock().place, place);
            for name in ["hello", "link", "long"] {
                assert_eq!(fs.read_file(name, 9).unwrap(), b"hello", "{ufs1} {place}");
            }
            let far = fs.read_file("far", 1 << 20).unwrap();
            assert_eq!(far.len() as u64, 16 * BLOCK - 1);
            let (zeros, sevens) = far.split_at(15 * BLOCK as usize);
            assert!(zeros.iter().all(|&byte| byte == 0) && sevens.iter().all(|&byte| byte == 7));
        }
    }
    // A copy of a UFS2 superblock is none: it knows where it should be.
    let mut bytes = small(false, 8192).bytes();
    bytes.resize(128 << 10, 0);
    bytes.copy_within(8192..8192 + 1376, 65536);
    bytes[8192..8192 + 1376].fill(0);
    let slice = Slice::new(Rc::new(bytes), 0, 1 << 20);
    assert!(Ufs::probe(&slice).unwrap().is_none());
}

#[test]
fn a_file_is_read_through_every_depth_of_pointers() {
    for ufs1 in [false, true] {
        let per = BLOCK / if ufs1 { 4 } else { 8 };
        let mut image = small(ufs1, 8192);
        // The last block that each depth reaches, and the first of the next one.
        let ends = [
            12,
            12 + per,
            12 + per + per * per,
            12 + per + per * per + per.pow(3),
        ];
        let mark = |number: u64| number.to_le_bytes().repeat(BLOCK as usize / 8);
        let mut indirect = [0; 3];
        for (depth, pointer) in indirect.iter_mut().enumerate() {
            let mut address = image.block(&mark(ends[depth + 1] - 1));
            for _ in 0..=depth {
                address = image.pointers(per - 1, address);
            }
            *pointer = address;
        }
        let mut direct = [0; 12];
        direct[11] = image.block(&mark(11));
        let size = ends[3] * BLOCK;
        image.inode(6, 0o100644, size, &Pointers { direct, indirect });
        let len = image.len();
        let sparse = Rc::new(Sparse(image, len));
        let fs = Ufs::probe(&Slice::new(sparse, 0, len)).unwrap().unwrap();
        let file = fs.open("far").unwrap();
        assert_eq!(file.size(), size);
        for end in ends {
            let mut two = vec![9; 2 * BLOCK as usize];
            let len = two.len().min((size - (end - 1) * BLOCK) as usize);
            file.read((end - 1) * BLOCK, &mut two[..len]).unwrap();
            let (last, next) = two[..len].split_at(BLOCK as usize);
            assert!(last == mark(end - 1), "{ufs1} {end}");
            assert!(next.iter().all(|&byte| byte == 0), "{ufs1} {end}");
        }
    }
}

#[test]
fn damaged_fat_images_never_panic() {
    let place = Place::new();
    fs::create_dir(place.tree.join("dir")).unwrap();
    fs::write(
        place.tree.join("dir/file with a long name"),
        pattern(9000, 1),
    )
    .unwrap();
    for (kind, size) in [(FatType::Fat12, 1 << 20), (FatType::Fat16, 6 << 20)] {
        let good = Rc::new(fat(kind, size, &place.tree));
        let run = |at: usize, patch: &[u8]| {
            let image = Rc::new(Patched(good.clone(), at as u64, patch.to_vec()));
            if let Ok(Some(fs)) = Fat::probe(&Slice::new(image, 0, good.size())) {
                exhaust(&fs, "", 2);
            }
        };
        let used = good.iter().rposition(|&byte| byte != 0).unwrap();
        // Boot sector, tables, root directory and data, in steps that meet every kind of field.
        for at in (0..64).chain((510..used.min(20_000)).step_by(53)) {
            for value in [1u16, 2, 0xfff7] {
                run(at, &value.to_le_bytes());
            }
        }
    }
}
