use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::wire::{Answer, Errno, kind};
use super::*;
use crate::testing::{Buffer, FakeInterrupts, GuestDriver};

const ROOM: u32 = 64 << 10;

/// A directory with something in it, beside a secret, and a session that has attached it as fid 0.
struct Rig {
    dir: TempDir,
    session: Session,
}

impl Rig {
    fn new(read_only: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), "not yours").unwrap();
        let share = dir.path().join("share");
        fs::create_dir_all(share.join("sub/deep")).unwrap();
        fs::write(share.join("hello"), "hello there").unwrap();
        symlink("../secret", share.join("way-out")).unwrap();
        symlink("/", share.join("sub/root")).unwrap();
        let made = Share {
            root: Node::root(&share).unwrap(),
            descriptors: Descriptors::open().unwrap(),
            read_only,
        };
        let mut rig = Self {
            dir,
            session: Session::new(made),
        };
        let version = Answer::default().u32(8192).string(b"9P2000.L");
        let agreed = rig.ask(kind::VERSION, version).unwrap();
        assert_eq!(
            agreed,
            [&8192u32.to_le_bytes()[..], b"\x08\x009P2000.L"].concat()
        );
        let attach = Answer::default()
            .u32(0)
            .u32(u32::MAX)
            .string(b"")
            .string(b"");
        rig.ask(kind::ATTACH, attach.u32(0)).unwrap();
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("share").join(name)
    }

    /// What is in the answer, or the error.
    fn ask(&mut self, kind: u8, body: Answer) -> Result<Vec<u8>, Errno> {
        let answer = self.session.answer(&body.message(kind, 7), ROOM).unwrap();
        let size = u32::from_le_bytes(answer[..4].try_into().unwrap());
        assert_eq!((size as usize, &answer[5..7]), (answer.len(), &[7, 0][..]));
        let body = answer[7..].to_vec();
        if answer[4] == kind::LERROR + 1 {
            let errno = i32::from_le_bytes(body.try_into().unwrap());
            return Err(Errno::from_raw(errno));
        }
        assert_eq!(answer[4], kind + 1);
        Ok(body)
    }

    fn walk(&mut self, from: u32, to: u32, names: &[&str]) -> Result<usize, Errno> {
        let walk = Answer::default().u32(from).u32(to).u16(names.len() as u16);
        let walk = names
            .iter()
            .fold(walk, |walk, name| walk.string(name.as_bytes()));
        let answer = self.ask(kind::WALK, walk)?;
        Ok((answer.len() - 2) / 13)
    }

    fn open(&mut self, fid: u32, flags: u32) -> Result<Vec<u8>, Errno> {
        self.ask(kind::LOPEN, Answer::default().u32(fid).u32(flags))
    }

    fn create(&mut self, fid: u32, name: &[u8], mode: u32) -> Result<Vec<u8>, Errno> {
        let create = Answer::default().u32(fid).string(name).u32(0o102).u32(mode);
        self.ask(kind::LCREATE, create.u32(0))
    }

    fn read(&mut self, fid: u32, offset: u64, count: u32) -> Result<Vec<u8>, Errno> {
        let read = Answer::default().u32(fid).u64(offset).u32(count);
        Ok(self.ask(kind::READ, read)?.split_off(4))
    }
}

#[test]
fn files_are_read_and_written() {
    let mut rig = Rig::new(false);
    assert_eq!(rig.walk(0, 1, &["hello"]), Ok(1));
    assert_eq!(rig.read(1, 0, 5), Err(Errno::EBADF));
    rig.open(1, 0).unwrap();
    assert_eq!(rig.read(1, 6, 100), Ok(b"there".to_vec()));
    assert_eq!(rig.read(1, u64::MAX, 1), Err(Errno::EINVAL));

    assert_eq!(rig.walk(0, 2, &[]), Ok(0));
    rig.create(2, b"new", 0o6755).unwrap();
    let write = Answer::default().u32(2).u64(2).u32(3).bytes(b"abc");
    assert_eq!(rig.ask(kind::WRITE, write), Ok(vec![3, 0, 0, 0]));
    rig.ask(kind::FSYNC, Answer::default().u32(2).u32(0))
        .unwrap();
    assert_eq!(fs::read(rig.path("new")).unwrap(), b"\0\0abc");
    // Nobody gets the rights of whoever runs this by way of it.
    let mode = fs::metadata(rig.path("new")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7000, 0);

    // Size 3, mode 0600, times.
    let set = Answer::default()
        .u32(2)
        .u32(0b1_1011_1001)
        .u32(0o4600)
        .u32(0)
        .u32(0)
        .u64(3);
    let set = set.u64(1_000_000_000).u64(5).u64(2_000_000_000).u64(6);
    rig.ask(kind::SETATTR, set).unwrap();
    let metadata = fs::metadata(rig.path("new")).unwrap();
    let mode = metadata.permissions().mode() & 0o7777;
    assert_eq!((metadata.len(), mode), (3, 0o600));
    let since = metadata
        .modified()
        .unwrap()
        .duration_since(std::time::UNIX_EPOCH);
    assert_eq!(since.unwrap().as_secs(), 2_000_000_000);
    let attributes = rig
        .ask(kind::GETATTR, Answer::default().u32(2).u64(u64::MAX))
        .unwrap();
    assert_eq!(attributes.len(), 153);
    assert_eq!(attributes[49..57], 3u64.to_le_bytes());
    assert!(
        rig.ask(kind::STATFS, Answer::default().u32(0))
            .unwrap()
            .len()
            == 60
    );
    let lock = Answer::default()
        .u32(2)
        .u8(1)
        .u32(0)
        .u64(0)
        .u64(0)
        .u32(1)
        .string(b"guest");
    assert_eq!(rig.ask(kind::LOCK, lock), Ok(vec![0]));
    let held = Answer::default()
        .u32(2)
        .u8(1)
        .u64(0)
        .u64(0)
        .u32(1)
        .string(b"guest");
    assert_eq!(rig.ask(kind::GETLOCK, held).unwrap()[0], 2, "its own");
    rig.ask(kind::CLUNK, Answer::default().u32(2)).unwrap();
    assert_eq!(
        rig.ask(kind::CLUNK, Answer::default().u32(2)),
        Err(Errno::EBADF)
    );
}

#[test]
fn directories_are_listed_made_renamed_and_removed() {
    let mut rig = Rig::new(false);
    let dir = |name: &[u8]| Answer::default().u32(0).string(name).u32(0o755).u32(0);
    rig.ask(kind::MKDIR, dir(b"made")).unwrap();
    assert_eq!(rig.ask(kind::MKDIR, dir(b"made")), Err(Errno::EEXIST));
    rig.walk(0, 1, &["made"]).unwrap();
    let rename = Answer::default()
        .u32(0)
        .string(b"hello")
        .u32(1)
        .string(b"moved");
    rig.ask(kind::RENAMEAT, rename).unwrap();
    rig.walk(1, 2, &["moved"]).unwrap();
    let link = Answer::default().u32(0).u32(2).string(b"again");
    rig.ask(kind::LINK, link).unwrap();
    assert_eq!(fs::read(rig.path("again")).unwrap(), b"hello there");
    let name = Answer::default()
        .u32(0)
        .string(b"link")
        .string(b"../../etc")
        .u32(0);
    rig.ask(kind::SYMLINK, name).unwrap();
    rig.walk(0, 3, &["link"]).unwrap();
    let target = rig.ask(kind::READLINK, Answer::default().u32(3)).unwrap();
    assert_eq!(target, b"\x09\x00../../etc");
    let fifo = Answer::default()
        .u32(0)
        .string(b"fifo")
        .u32(0o010_644)
        .u32(0)
        .u32(0)
        .u32(0);
    rig.ask(kind::MKNOD, fifo).unwrap();
    let device = Answer::default()
        .u32(0)
        .string(b"mem")
        .u32(0o020_644)
        .u32(1)
        .u32(1)
        .u32(0);
    assert_eq!(rig.ask(kind::MKNOD, device), Err(Errno::EPERM));

    rig.walk(0, 4, &[]).unwrap();
    rig.open(4, 0o200_000).unwrap();
    let mut names = Vec::new();
    let mut offset = 0;
    loop {
        // Room for two or three at a time.
        let list = Answer::default().u32(4).u64(offset).u32(80);
        let list = rig.ask(kind::READDIR, list).unwrap();
        let mut rest = &list[4..];
        if rest.is_empty() {
            break;
        }
        while !rest.is_empty() {
            offset = u64::from_le_bytes(rest[13..21].try_into().unwrap());
            let end = 24 + usize::from(u16::from_le_bytes([rest[22], rest[23]]));
            names.push(String::from_utf8(rest[24..end].to_vec()).unwrap());
            rest = &rest[end..];
        }
    }
    names.sort();
    assert_eq!(
        names,
        [".", "..", "again", "fifo", "link", "made", "sub", "way-out"]
    );
    let unlink = |name: &[u8], flags| Answer::default().u32(0).string(name).u32(flags);
    assert_eq!(
        rig.ask(kind::UNLINKAT, unlink(b"made", 0x200)),
        Err(Errno::ENOTEMPTY)
    );
    assert_eq!(
        rig.ask(kind::UNLINKAT, unlink(b"made", 0)),
        Err(Errno::EISDIR)
    );
    rig.ask(kind::UNLINKAT, unlink(b"again", 0)).unwrap();
    assert!(!rig.path("again").exists());
}

#[test]
fn nothing_leads_out() {
    let mut rig = Rig::new(false);
    for name in ["..", ".", "", "a/b", "/etc", "sub/../..", "x\0y"] {
        assert_eq!(rig.walk(0, 1, &[name]), Err(Errno::EINVAL), "{name:?}");
        assert_eq!(rig.create(0, name.as_bytes(), 0o644), Err(Errno::EINVAL));
    }
    assert_eq!(rig.walk(0, 1, &["sub", ".."]), Ok(1), "as far as it goes");
    assert_eq!(rig.session.fids(), 1);
    // A link is a link: not opened, not passed, not written through.
    rig.walk(0, 1, &["way-out"]).unwrap();
    assert_eq!(rig.open(1, 0), Err(Errno::EACCES));
    assert_eq!(rig.walk(1, 2, &["x"]), Err(Errno::ENOTDIR));
    assert_eq!(rig.walk(0, 2, &["sub", "root", "etc"]), Ok(2));
    assert_eq!(rig.create(0, b"way-out", 0o644), Err(Errno::ELOOP));
    let truncate = Answer::default()
        .u32(1)
        .u32(8)
        .u32(0)
        .u32(0)
        .u32(0)
        .u64(0)
        .bytes(&[0; 32]);
    assert_eq!(rig.ask(kind::SETATTR, truncate), Err(Errno::EACCES));
    let attach = |path: &[u8]| {
        Answer::default()
            .u32(9)
            .u32(0)
            .string(b"")
            .string(path)
            .u32(0)
    };
    assert_eq!(
        rig.ask(kind::ATTACH, attach(b"../secret")),
        Err(Errno::EINVAL)
    );
    assert!(rig.ask(kind::ATTACH, attach(b"sub/root/etc")).is_err());
    assert_eq!(
        fs::read(rig.dir.path().join("secret")).unwrap(),
        b"not yours"
    );
    // A directory that became a link while it was held is still the directory.
    rig.walk(0, 3, &["sub"]).unwrap();
    fs::rename(rig.path("sub"), rig.path("old")).unwrap();
    symlink("/", rig.path("sub")).unwrap();
    assert_eq!(rig.walk(3, 4, &["deep"]), Ok(1));
    assert_eq!(rig.walk(3, 5, &["etc"]), Err(Errno::ENOENT));
    // A FIFO would block whoever opens it.
    nix::unistd::mkfifo(&rig.path("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    rig.walk(0, 6, &["fifo"]).unwrap();
    assert_eq!(rig.open(6, 0), Err(Errno::EACCES));
    assert!(rig.create(0, b"fifo", 0o644).is_err());
}

#[test]
fn a_read_only_share_changes_nothing() {
    let mut rig = Rig::new(true);
    rig.walk(0, 1, &["hello"]).unwrap();
    for flags in [1, 2, 0o1000, 0o2000] {
        assert_eq!(rig.open(1, flags), Err(Errno::EROFS));
    }
    rig.open(1, 0).unwrap();
    assert_eq!(rig.create(0, b"x", 0o644), Err(Errno::EROFS));
    let write = Answer::default().u32(1).u64(0).u32(1).bytes(b"x");
    assert_eq!(rig.ask(kind::WRITE, write), Err(Errno::EROFS));
    let unlink = Answer::default().u32(0).string(b"hello").u32(0);
    assert_eq!(rig.ask(kind::UNLINKAT, unlink), Err(Errno::EROFS));
    let set = Answer::default()
        .u32(1)
        .u32(1)
        .u32(0)
        .u32(0)
        .u32(0)
        .u64(0)
        .bytes(&[0; 32]);
    assert_eq!(rig.ask(kind::SETATTR, set), Err(Errno::EROFS));
    assert_eq!(fs::read(rig.path("hello")).unwrap(), b"hello there");
}

#[test]
fn what_makes_no_sense_is_an_error() {
    let mut rig = Rig::new(false);
    assert_eq!(rig.session.answer(b"short", ROOM), None);
    let flush = Answer::default().u16(1).message(kind::FLUSH, 1);
    assert_eq!(rig.session.answer(&flush, 10), None);
    let mut longer = flush.clone();
    longer.push(0);
    assert_eq!(rig.session.answer(&longer, ROOM).unwrap()[4], 7);
    assert_eq!(rig.ask(kind::FLUSH, Answer::default().u16(1)), Ok(vec![]));
    // Authentication, extended attributes, whatever comes.
    for kind in [0, 20, 30, 32, 102, 122, 254] {
        let answer = rig.ask(kind, Answer::default().bytes(&[0; 64]));
        assert_eq!(answer, Err(Errno::EOPNOTSUPP), "{kind}");
    }
    assert_eq!(rig.walk(77, 1, &[]), Err(Errno::EBADF));
    let walk = Answer::default().u32(0).u32(1).u16(17).bytes(&[0; 34]);
    assert_eq!(rig.ask(kind::WALK, walk), Err(Errno::EINVAL));
    let small = Answer::default().u32(4095).string(b"9P2000.L");
    assert_eq!(rig.ask(kind::VERSION, small), Err(Errno::EMSGSIZE));
    let other = Answer::default().u32(u32::MAX).string(b"9P2000.u");
    let agreed = rig.ask(kind::VERSION, other).unwrap();
    assert_eq!(
        agreed,
        [&MOST.to_le_bytes()[..], b"\x07\x00unknown"].concat()
    );
    assert_eq!(rig.session.fids(), 0, "another session");
}

#[test]
fn the_device_answers_over_its_queue() {
    let dir = tempfile::tempdir().unwrap();
    let spec = ShareSpec::parse(&format!("src={}", dir.path().display())).unwrap();
    let device = P9::new(&spec).unwrap();
    let mut config = [0; 5];
    device.config_read(0, &mut config);
    assert_eq!(&config, b"\x03\x00src");
    let mut driver = GuestDriver::new(8);
    let activation = driver.activation(MOUNT_TAG, FakeInterrupts::new());
    device.activate(activation).unwrap();
    let version = Answer::default().u32(8192).string(b"9P2000.L");
    let (head, tail) = (version.message(kind::VERSION, 0xffff), vec![9; 20]);
    // In pieces, with something behind it, and an answer that does not fit into one.
    let (first, second) = head.split_at(5);
    let sent = driver.send(&[
        Buffer::Readable(first.to_vec()),
        Buffer::Readable([second, &tail].concat()),
        Buffer::Writable(6),
        Buffer::Writable(100),
    ]);
    driver.kick();
    assert_eq!(driver.wait_used(), (sent.head, 21));
    assert_eq!(driver.received(&sent)[4], kind::VERSION + 1);
    for buffers in [
        vec![Buffer::Writable(100)],
        vec![Buffer::Readable(head.clone())],
        vec![Buffer::Readable(vec![0xff; 16]), Buffer::Writable(9)],
    ] {
        let sent = driver.send(&buffers);
        driver.kick();
        assert_eq!(driver.wait_used(), (sent.head, 0));
    }
    let counted = || device.inspect().counters.split_off(3);
    assert_eq!(counted(), [("errors", 0), ("bad requests", 3)]);
    let unknown = Answer::default().u32(5).message(kind::CLUNK, 1);
    driver.send(&[Buffer::Readable(unknown), Buffer::Writable(100)]);
    driver.kick();
    driver.wait_used();
    assert_eq!(counted(), [("errors", 1), ("bad requests", 3)]);

    // Its queue is reset; what the driver has agreed on stays.
    let reset = device.queue_reset().unwrap();
    let attach = Answer::default().u32(0).u32(u32::MAX);
    let attach = attach.string(b"").string(b"").u32(0);
    let attach = Buffer::Readable(attach.message(kind::ATTACH, 1));
    driver.send(&[attach, Buffer::Writable(100)]);
    driver.kick();
    driver.wait_used();
    reset.stop_queue(0);
    driver.send(&[Buffer::Readable(head.clone()), Buffer::Writable(100)]);
    driver.kick();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(driver.used(), None);
    let mut driver = GuestDriver::new(8);
    let walk = Answer::default()
        .u32(0)
        .u32(1)
        .u16(0)
        .message(kind::WALK, 2);
    let sent = driver.send(&[Buffer::Readable(walk), Buffer::Writable(100)]);
    let queue = driver.virtqueue(0, FakeInterrupts::new());
    reset.start_queue(queue).unwrap();
    assert_eq!(driver.wait_used(), (sent.head, 9));
    assert_eq!(driver.received(&sent)[4], kind::WALK + 1);
    device.reset();
    assert!(P9::new(&ShareSpec::parse("a=/nowhere").unwrap()).is_err());
}

#[test]
fn another_process_finds_the_files_again_or_says_that_they_are_gone() {
    let mut rig = Rig::new(false);
    for (fid, names) in [
        (1, &["hello"][..]),
        (2, &["sub"]),
        (3, &["way-out"]),
        (4, &[]),
        (5, &["sub", "deep"]),
    ] {
        assert_eq!(rig.walk(0, fid, names), Ok(names.len()));
    }
    rig.open(1, 0o2).unwrap();
    rig.open(2, 0).unwrap();
    rig.create(4, b"doomed", 0o600).unwrap();
    fs::remove_file(rig.path("doomed")).unwrap();
    // Another one takes its place.
    fs::rename(rig.path("sub/deep"), rig.path("sub/moved")).unwrap();
    let lock = |kind: u8| {
        let range = Answer::default().u32(1).u8(kind).u32(0).u64(0).u64(0);
        range.u32(1).string(b"guest")
    };
    assert_eq!(rig.ask(kind::LOCK, lock(1)), Ok(vec![0]));
    assert!(rig.session.save().unwrap_err().contains("holds a lock"));
    assert_eq!(rig.ask(kind::LOCK, lock(2)), Ok(vec![0]));
    let saved = rig.session.save().unwrap();
    let text = serde_json::to_string(&saved).unwrap();
    fs::create_dir(rig.path("sub/deep")).unwrap();
    fs::rename(rig.path("sub/moved"), rig.path("moved")).unwrap();

    rig.session.clear();
    rig.session
        .restore(serde_json::from_str(&text).unwrap())
        .unwrap();
    assert_eq!(rig.session.most(), 8192);
    assert_eq!(rig.read(1, 6, 100), Ok(b"there".to_vec()));
    let write = Answer::default().u32(1).u64(0).u32(1).bytes(b"H");
    rig.ask(kind::WRITE, write).unwrap();
    assert_eq!(fs::read(rig.path("hello")).unwrap(), b"Hello there");
    let list = Answer::default().u32(2).u64(0).u32(4096);
    assert!(rig.ask(kind::READDIR, list).unwrap().len() > 4);
    let target = rig.ask(kind::READLINK, Answer::default().u32(3));
    assert_eq!(target.unwrap(), b"\x09\x00../secret");
    for stale in [4, 5] {
        let attributes = || Answer::default().u32(stale).u64(0x7ff);
        assert_eq!(
            rig.ask(kind::GETATTR, attributes()),
            Err(Errno::ESTALE),
            "{stale}"
        );
        assert_eq!(rig.walk(0, stale, &["hello"]), Err(Errno::EINVAL));
        rig.ask(kind::CLUNK, Answer::default().u32(stale)).unwrap();
        assert_eq!(rig.ask(kind::GETATTR, attributes()), Err(Errno::EBADF));
    }
    // A state may have come from anywhere.
    for (from, to) in [("8192", "1"), ("8192", "4294967295")] {
        let forged = serde_json::from_str(&text.replace(from, to)).unwrap();
        assert!(rig.session.restore(forged).is_err());
    }
    let (inside, outside) = ("hello".as_bytes(), b"../secret");
    let hex = |name: &[u8]| -> String { name.iter().map(|byte| format!("{byte:02x}")).collect() };
    let forged = text.replace(&hex(inside), &hex(outside));
    assert_ne!(forged, text);
    rig.session
        .restore(serde_json::from_str(&forged).unwrap())
        .unwrap();
    assert_eq!(rig.read(1, 0, 100), Err(Errno::ESTALE));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Whatever is asked, in whatever order: each request has its answer, and what is beside the
    /// directory stays as it is.
    #[test]
    fn anything_is_answered(
        requests in prop::collection::vec((any::<u8>(), prop::collection::vec(0u8..12, 0..48)), 1..24)
    ) {
        const KINDS: [u8; 23] = [
            8, 12, 14, 16, 18, 22, 24, 26, 40, 50, 52, 54, 70, 72, 74, 76, 100, 104, 108, 110, 116,
            118, 120,
        ];
        let mut rig = Rig::new(false);
        for (number, body) in requests {
            let kind = KINDS[usize::from(number) % KINDS.len()];
            let message = Answer::default().bytes(&body).message(kind, 1);
            let answer = rig.session.answer(&message, ROOM).unwrap();
            prop_assert_eq!(answer.len(), u32::from_le_bytes(answer[..4].try_into().unwrap()) as usize);
        }
        prop_assert_eq!(fs::read(rig.dir.path().join("secret")).unwrap(), b"not yours");
        prop_assert_eq!(fs::read_dir(rig.dir.path()).unwrap().count(), 2);
    }
}
