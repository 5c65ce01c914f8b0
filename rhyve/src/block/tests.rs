//! Every kind of image against a plain array of bytes, and what images refuse.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use imago::format::builder::FormatCreateBuilder;
use imago::qcow2::Qcow2 as Driver;
use imago::{Storage, StorageCreateOptions};
use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::*;

const SIZE: u64 = 1 << 20;
const RAM: u64 = 1 << 20;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap()
}

fn raw_image(dir: &TempDir, name: &str, size: u64) -> PathBuf {
    let path = dir.path().join(name);
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn qcow2_image(dir: &TempDir, name: &str, backing: Option<(&str, &str)>) -> PathBuf {
    let path = dir.path().join(name);
    let options = StorageCreateOptions::new().filename(&path);
    let file = imago::file::File::create_open(options).unwrap();
    let mut builder = Driver::<imago::file::File>::create_builder(file).size(SIZE);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.to_owned(), format.to_owned());
    }
    builder.create().unwrap();
    path
}

/// Makes it one of version 2, which has no clusters that are zeros without being written. The third
/// version's header goes on where the second's ends, with numbers that are all 0 or 4 and 104: no
/// extensions, in the second's words.
fn old(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&2u32.to_be_bytes(), 4).unwrap();
}

fn open_with(path: &Path, options: &str) -> Result<Arc<dyn Backend>, BlockError> {
    let text = format!("{}{options}", path.display());
    super::open(&text.parse().unwrap())
}

/// Reads through guest memory that is in two pieces.
fn read(backend: &dyn Backend, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let memory = memory();
    let first = len / 2 / 512 * 512;
    let slices = [(0x1000, first), (0x8_0000, len - first)]
        .map(|(gpa, len)| memory.get_slice(GuestAddress(gpa), len).unwrap());
    backend.read(offset, &slices)?;
    let mut bytes = vec![0; len];
    slices[0].copy_to(&mut bytes[..first]);
    slices[1].copy_to(&mut bytes[first..]);
    Ok(bytes)
}

fn write(backend: &dyn Backend, offset: u64, bytes: &[u8], durable: bool) -> io::Result<()> {
    let memory = memory();
    // Off the alignment O_DIRECT wants, in two pieces.
    let first = bytes.len() / 3 / 512 * 512;
    let slices = [(0x1008, first), (0x8_0000, bytes.len() - first)]
        .map(|(gpa, len)| memory.get_slice(GuestAddress(gpa), len).unwrap());
    slices[0].copy_from(&bytes[..first]);
    slices[1].copy_from(&bytes[first..]);
    backend.write(offset, &slices, durable)
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8, bool),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sectors = SIZE / SECTOR;
    let range = (0..sectors, 1u64..300).prop_map(move |(first, count)| {
        let count = count.min(sectors - first);
        (first * SECTOR, count * SECTOR)
    });
    let step = prop_oneof![
        4 => (range.clone(), 1u8.., any::<bool>())
            .prop_map(|((at, len), byte, durable)| Step::Write(at, len, byte, durable)),
        1 => (range.clone(), any::<bool>()).prop_map(|((at, len), may)| Step::Zero(at, len, may)),
        1 => range.prop_map(|(at, len)| Step::Discard(at, len)),
        1 => Just(Step::Flush),
    ];
    prop::collection::vec(step, 1..25)
}

/// Takes the steps; `model` is what the disk holds, and follows.
fn follow(backend: &dyn Backend, steps: &[Step], model: &mut [u8]) {
    for step in steps {
        match *step {
            Step::Write(offset, len, byte, durable) => {
                let bytes: Vec<u8> = (0..len)
                    .map(|i| byte.wrapping_add((i / 512) as u8))
                    .collect();
                write(backend, offset, &bytes, durable).unwrap();
                model[offset as usize..(offset + len) as usize].copy_from_slice(&bytes);
            }
            Step::Zero(offset, len, may) => {
                backend.write_zeroes(Extent { offset, len }, may).unwrap();
                model[offset as usize..(offset + len) as usize].fill(0);
            }
            Step::Discard(offset, len) => {
                backend.discard(Extent { offset, len }).unwrap();
                // Anything may be read there; our backends all make it zeros.
                model[offset as usize..(offset + len) as usize].fill(0);
            }
            Step::Flush => backend.flush().unwrap(),
        }
    }
    compare(backend, model);
}

fn compare(backend: &dyn Backend, model: &[u8]) {
    for (at, expected) in (0..).step_by(1 << 18).zip(model.chunks(1 << 18)) {
        let found = read(backend, at, expected.len()).unwrap();
        let differs = found.iter().zip(expected).position(|(a, b)| a != b);
        assert_eq!(differs, None, "behind byte {at:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_raw_image_is_the_bytes_of_its_file(steps in steps(), nocache: bool) {
        let dir = tempfile::tempdir().unwrap();
        let path = raw_image(&dir, "disk", SIZE);
        let mut model = vec![0; SIZE as usize];
        let backend = open_with(&path, if nocache { ",nocache" } else { "" }).unwrap();
        prop_assert_eq!(backend.info().capacity, SIZE);
        follow(&*backend, &steps, &mut model);
        drop(backend);
        prop_assert!(fs::read(&path).unwrap() == model);
    }

    #[test]
    fn a_qcow2_image_keeps_what_is_written(steps in steps(), version_2: bool) {
        let dir = tempfile::tempdir().unwrap();
        let path = qcow2_image(&dir, "disk.qcow2", None);
        let mut steps = steps;
        if version_2 {
            old(&path);
            for step in &mut steps {
                if let Step::Discard(at, len) = *step {
                    // A discard alone leaves parts of clusters as they are.
                    *step = Step::Zero(at, len, true);
                }
            }
        }
        let mut model = vec![0; SIZE as usize];
        follow(&*open_with(&path, "").unwrap(), &steps, &mut model);
        compare(&*open_with(&path, ",ro").unwrap(), &model);
    }

    #[test]
    fn a_backing_file_shows_through_and_stays(steps in steps(), deep: bool) {
        let dir = tempfile::tempdir().unwrap();
        let base = raw_image(&dir, "base.img", SIZE);
        let mut model: Vec<u8> = (0..SIZE).map(|i| (i / 512) as u8).collect();
        fs::write(&base, &model).unwrap();
        let before = model.clone();
        let mut path = qcow2_image(&dir, "top.qcow2", Some(("base.img", "raw")));
        if deep {
            path = qcow2_image(&dir, "higher.qcow2", Some(("top.qcow2", "qcow2")));
        }
        follow(&*open_with(&path, "").unwrap(), &steps, &mut model);
        compare(&*open_with(&path, "").unwrap(), &model);
        prop_assert!(fs::read(&base).unwrap() == before);
    }

    #[test]
    fn a_snapshot_forgets(steps in steps(), qcow2: bool) {
        let dir = tempfile::tempdir().unwrap();
        let mut model: Vec<u8> = vec![0; SIZE as usize];
        let path = if qcow2 {
            qcow2_image(&dir, "disk.qcow2", None)
        } else {
            let path = raw_image(&dir, "disk", SIZE);
            model.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i / 512) as u8);
            fs::write(&path, &model).unwrap();
            path
        };
        let before = (fs::read(&path).unwrap(), model.clone());
        // Two at a time: none writes the image.
        let (first, second) = (open_with(&path, ",snapshot"), open_with(&path, ",snapshot"));
        follow(&*first.unwrap(), &steps, &mut model);
        prop_assert!(fs::read(&path).unwrap() == before.0);
        compare(&*second.unwrap(), &before.1);
    }
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let dir = tempfile::tempdir().unwrap();
    let raw = raw_image(&dir, "disk", SIZE);
    let qcow2 = qcow2_image(&dir, "disk.qcow2", Some(("disk", "raw")));
    for path in [&raw, &qcow2] {
        let writer = open_with(path, "").unwrap();
        for options in ["", ",ro", ",snapshot"] {
            let refused = open_with(path, options).err().unwrap();
            assert!(matches!(refused, BlockError::InUse(_)), "{refused}");
        }
        drop(writer);
        let reader = open_with(path, ",ro").unwrap();
        assert!(open_with(path, "").is_err());
        open_with(path, ",snapshot").unwrap();
        drop(reader);
    }
    // What an image is based on is not to change under it.
    let top = open_with(&qcow2, "").unwrap();
    assert!(open_with(&raw, "").is_err());
    open_with(&raw, ",ro").unwrap();
    drop(top);
    open_with(&raw, "").unwrap();
}

#[test]
fn what_is_no_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let err = |path: &Path, options| open_with(path, options).err().unwrap();
    assert!(matches!(err(dir.path(), ""), BlockError::Kind(_)));
    assert!(matches!(
        err(Path::new("/dev/null"), ""),
        BlockError::Kind(_)
    ));
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(err(&fifo, ",ro"), BlockError::Kind(_)));
    let gone = err(&dir.path().join("gone"), "");
    assert!(
        matches!(gone, BlockError::Io { action: "find", .. }),
        "{gone}"
    );
    let small = raw_image(&dir, "small", 511);
    assert!(matches!(err(&small, ""), BlockError::Empty(_)));
    let qcow2 = qcow2_image(&dir, "disk.img", None);
    assert!(matches!(err(&qcow2, ""), BlockError::LooksLikeQcow2(_)));
    open_with(&qcow2, ",format=raw").unwrap();
    open_with(&qcow2, ",format=qcow2").unwrap();
    let plain = raw_image(&dir, "plain", SIZE);
    let not_qcow2 = err(&plain, ",format=qcow2");
    assert!(
        matches!(not_qcow2, BlockError::Io { action: "read", .. }),
        "{not_qcow2}"
    );
    let orphan = qcow2_image(&dir, "orphan.qcow2", Some(("nowhere", "raw")));
    let orphan = crate::chain(&err(&orphan, ""));
    assert!(
        orphan.contains("nowhere: cannot find: No such file or directory"),
        "{orphan}"
    );
}

#[test]
fn an_encrypted_image_is_not_taken_for_a_plain_one() {
    let dir = tempfile::tempdir().unwrap();
    let secret = qcow2_image(&dir, "secret.qcow2", None);
    // The header's encryption method (qcow2 specification, bytes 32 to 35): LUKS.
    let file = File::options().write(true).open(&secret).unwrap();
    file.write_all_at(&2u32.to_be_bytes(), 32).unwrap();
    let over = qcow2_image(&dir, "over.qcow2", Some(("secret.qcow2", "qcow2")));
    for (path, options) in [
        (&secret, ""),
        (&secret, ",ro"),
        (&over, ""),
        (&over, ",snapshot"),
    ] {
        let refused = open_with(path, options).err().map(|e| crate::chain(&e));
        let why = refused.expect("plain text would be written to it");
        assert!(why.contains("secret.qcow2 is encrypted"), "{why}");
    }
}

#[test]
fn geometry_follows_the_options() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw_image(&dir, "disk", SIZE + 1000);
    let info = |options| open_with(&path, options).unwrap().info();
    let plain = info("");
    assert_eq!((plain.capacity, plain.logical), (SIZE + 512, 512));
    assert!(plain.physical >= 512 && plain.physical.is_power_of_two());
    assert!(plain.discard && !plain.read_only);
    let sized = info(",sectorsize=4096/8192,nodelete");
    assert_eq!(
        (sized.capacity, sized.logical, sized.physical),
        (SIZE, 4096, 8192)
    );
    assert!(!sized.discard);
    let read_only = info(",ro");
    assert!(read_only.read_only && !read_only.discard);
    let snapshot = info(",snapshot");
    assert!(!snapshot.read_only && snapshot.discard);
    assert_eq!(snapshot.to_string(), "1MB (2049 512 byte sectors)");
}

#[test]
fn discards_give_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let raw = raw_image(&dir, "disk", SIZE);
    let [qcow2, version_2] = ["disk.qcow2", "old.qcow2"].map(|name| qcow2_image(&dir, name, None));
    old(&version_2);
    for path in [raw, qcow2, version_2] {
        let backend = open_with(&path, "").unwrap();
        write(&*backend, 0, &vec![1; 1 << 18], false).unwrap();
        backend.flush().unwrap();
        let before = fs::metadata(&path).unwrap();
        let extent = Extent {
            offset: 0,
            len: 1 << 18,
        };
        backend.discard(extent).unwrap();
        backend.flush().unwrap();
        let after = fs::metadata(&path).unwrap();
        assert!(after.blocks() < before.blocks(), "{}", path.display());
        assert_eq!(after.len(), before.len());
        // And zeros that may not be discarded take space.
        backend.write_zeroes(extent, false).unwrap();
        backend.flush().unwrap();
        assert!(fs::metadata(&path).unwrap().blocks() * 512 >= extent.len);
    }
}

#[test]
fn a_file_that_shrinks_is_an_error_where_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw_image(&dir, "disk", SIZE);
    let backend = open_with(&path, "").unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert!(read(&*backend, 0, 4096).is_ok());
    let error = read(&*backend, 4096, 1024).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn a_read_only_backend_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw_image(&dir, "disk", SIZE);
    let backend = open_with(&path, ",ro").unwrap();
    assert!(write(&*backend, 0, &[1; 512], false).is_err());
    assert!(
        backend
            .write_zeroes(
                Extent {
                    offset: 0,
                    len: 512
                },
                true
            )
            .is_err()
    );
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn with_sync_each_change_is_in_the_image_when_it_completes() {
    let dir = tempfile::tempdir().unwrap();
    let raw = raw_image(&dir, "disk", SIZE);
    let qcow2 = qcow2_image(&dir, "disk.qcow2", None);
    for path in [raw, qcow2] {
        let backend = open_with(&path, ",sync").unwrap();
        // As a crash would leave it.
        let left = || {
            let copy = path.with_file_name(format!("copy-{}", path.extension().is_some()));
            fs::copy(&path, &copy).unwrap();
            let format = path.extension().map_or("raw", |_| "qcow2");
            let copy = open_with(&copy, &format!(",ro,format={format}")).unwrap();
            read(&*copy, SIZE / 2, 1024).unwrap()
        };
        write(&*backend, SIZE / 2, &[7; 1024], false).unwrap();
        assert!(left() == [7; 1024], "{}", path.display());
        let extent = Extent {
            offset: SIZE / 2,
            len: 512,
        };
        backend.write_zeroes(extent, false).unwrap();
        assert!(left() == [[0; 512], [7; 512]].concat());
        backend
            .discard(Extent {
                len: SIZE / 2,
                ..extent
            })
            .unwrap();
        assert!(left() == [0; 1024]);
    }
}

#[test]
fn parts_of_slices_are_those_bytes() {
    let memory = memory();
    memory.write_slice(b"abcdefgh", GuestAddress(0)).unwrap();
    let slices = [(0, 3), (3, 1), (4, 4)]
        .map(|(gpa, len)| memory.get_slice(GuestAddress(gpa), len).unwrap());
    for skip in 0..10u64 {
        for len in 0..10u64 {
            let bytes: Vec<u8> = part(&slices, skip, len)
                .iter()
                .flat_map(|slice| {
                    let mut bytes = vec![0; slice.len()];
                    slice.copy_to(&mut bytes);
                    bytes
                })
                .collect();
            let end = (skip + len).min(8) as usize;
            assert_eq!(bytes, b"abcdefgh"[(skip as usize).min(end)..end]);
        }
    }
}

#[test]
fn an_inline_channel_completes_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw_image(&dir, "disk", SIZE);
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .write_all_at(&[7; 512], 512)
        .unwrap();
    let memory = memory();
    let mut channel = engine::Inline::new(open_with(&path, "").unwrap());
    let slice = memory.get_slice(GuestAddress(0), 512).unwrap();
    let request = |operation| Request {
        operation,
        durable: true,
        barrier: false,
    };
    channel.submit(
        5,
        request(Operation::Read(512, [slice].into_iter().collect())),
    );
    channel.submit(
        4,
        request(Operation::Read(SIZE, [slice].into_iter().collect())),
    );
    channel.submit(6, request(Operation::Flush));
    let mut next = || {
        channel
            .complete()
            .map(|(token, result)| (token, result.is_ok()))
    };
    assert_eq!(
        [next(), next(), next()],
        [Some((5, true)), Some((4, false)), Some((6, true))]
    );
    assert_eq!(next(), None);
    let mut bytes = [0u8; 512];
    slice.copy_to(&mut bytes);
    assert_eq!(bytes, [7; 512]);
}

#[test]
fn a_file_in_memory_is_served_by_threads() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = raw_image(&dir, "disk", SIZE);
    let choose = |options: &str| {
        let text = format!("{}{options}", path.display());
        let spec = text.parse().unwrap();
        engine::Engine::choose(&spec, &*super::open(&spec).unwrap()).unwrap()
    };
    assert_eq!(choose(""), engine::Engine::Threads);
    assert_eq!(choose(",aio=threads").name(), "threads");
    assert_eq!(choose(",snapshot"), engine::Engine::Threads);
    // A device's node is in memory as well, but what it leads to is not.
    assert!(engine::in_memory(&File::open(&path).unwrap()));
    assert!(!engine::in_memory(&File::open("/dev/null").unwrap()));
}

#[test]
fn who_has_no_io_uring_is_told_why() {
    let dir = tempfile::tempdir().unwrap();
    let raw = raw_image(&dir, "disk", SIZE);
    let qcow2 = qcow2_image(&dir, "disk.qcow2", None);
    for (path, options) in [(&raw, ",snapshot,aio=io_uring"), (&qcow2, ",aio=io_uring")] {
        let spec = format!("{}{options}", path.display()).parse().unwrap();
        let refused = engine::Engine::choose(&spec, &*super::open(&spec).unwrap()).unwrap_err();
        let why = crate::chain(&refused);
        assert!(
            why.ends_with(": io_uring serves raw images only, and no snapshot: leave aio= out"),
            "{why}"
        );
    }
}

#[test]
fn a_qcow2_image_grows() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2_image(&dir, "disk.qcow2", None);
    let backend = open_with(&path, "").unwrap();
    write(&*backend, SIZE - 512, &[1; 512], false).unwrap();
    backend.resize(Some(4 * SIZE)).unwrap();
    assert_eq!(backend.info().capacity, 4 * SIZE);
    write(&*backend, 4 * SIZE - 512, &[2; 512], false).unwrap();
    assert!(backend.resize(Some(SIZE)).is_err());
    drop(backend);
    let backend = open_with(&path, ",ro").unwrap();
    assert_eq!(backend.info().capacity, 4 * SIZE);
    assert_eq!(read(&*backend, SIZE - 512, 512).unwrap(), [1; 512]);
    assert_eq!(read(&*backend, 4 * SIZE - 512, 512).unwrap(), [2; 512]);
}
