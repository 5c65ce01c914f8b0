//! What a guest may ask of the shared directory: requests and their answers.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{AtFlags, FcntlArg, OFlag, fcntl, readlinkat, renameat};
use nix::libc;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fchmodat, mkdirat, mknodat, utimensat};
use nix::sys::statfs::fstatfs;
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use rustix::fs::RawDir;

use super::node::{Descriptors, MODE, Node, qid};
use super::wire::{Answer, Errno, HEADER, Parser, kind};

/// The longest message.
pub const MOST: u32 = 512 << 10;
/// The least that makes sense (QEMU, hw/9pfs/9p.c, P9_MIN_MSIZE).
pub(super) const LEAST: u32 = 4096;
/// What a read or a list of a directory takes beside its data: header and count.
const OVERHEAD: u32 = HEADER + 4;
/// Files a guest may have at a time; each takes a descriptor or two.
pub(super) const MOST_FIDS: usize = 8192;
/// Names in one walk.
const MOST_NAMES: u16 = 16;

/// The flags of an open file that count (Linux, include/net/9p/9p.h, P9_DOTL_*: those of x86).
const FLAGS: OFlag = OFlag::O_ACCMODE
    .union(OFlag::O_TRUNC)
    .union(OFlag::O_APPEND)
    .union(OFlag::O_EXCL)
    .union(OFlag::O_DSYNC)
    .union(OFlag::O_SYNC);

/// A file as the guest names it by a number.
pub(super) struct Fid {
    pub node: Node,
    pub open: Option<File>,
    /// A program of the guest may hold a lock on it.
    pub locked: bool,
}

/// What a session is about.
pub struct Share {
    pub root: Node,
    pub descriptors: Descriptors,
    pub read_only: bool,
}

/// A session: from one version message to the next.
pub struct Session {
    pub(super) share: Share,
    pub(super) fids: HashMap<u32, Fid>,
    /// Those whose files were not found again when the guest went on in another process.
    pub(super) stale: HashSet<u32>,
    /// The longest message that was agreed on; none before that.
    pub(super) most: u32,
}

/// What a request comes to: an answer's contents, or an error.
type Result<T = Answer> = std::result::Result<T, Errno>;

impl Session {
    pub fn new(share: Share) -> Self {
        Self {
            share,
            fids: HashMap::new(),
            stale: HashSet::new(),
            most: LEAST,
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.fids.clear();
        self.stale.clear();
        self.most = LEAST;
    }

    /// How many files are held.
    pub fn fids(&self) -> usize {
        self.fids.len()
    }

    /// The longest message now.
    pub fn most(&self) -> u32 {
        self.most
    }

    /// Answers a request, with `room` bytes at most. None if it is none: not even its header is
    /// there, or there is no room for an error.
    pub fn answer(&mut self, message: &[u8], room: u32) -> Option<Vec<u8>> {
        let mut parser = Parser::new(message);
        let (size, kind, tag) = (parser.u32().ok()?, parser.u8().ok()?, parser.u16().ok()?);
        if room < OVERHEAD {
            return None;
        }
        let whole = usize::try_from(size).is_ok_and(|size| size == message.len());
        let result = if whole && size <= self.most.max(LEAST) {
            self.request(kind, &mut parser, room)
        } else {
            Err(Errno::EBADMSG)
        };
        let (kind, answer) = match result {
            Ok(answer) if answer.len() + HEADER as usize <= room as usize => {
                (kind.wrapping_add(1), answer)
            }
            Ok(_) => (kind::LERROR + 1, error(Errno::EMSGSIZE)),
            Err(errno) => (kind::LERROR + 1, error(errno)),
        };
        Some(answer.message(kind, tag))
    }

    fn request(&mut self, kind: u8, parser: &mut Parser<'_>, room: u32) -> Result {
        let done = |()| Answer::default();
        match kind {
            kind::VERSION => self.version(parser),
            kind::ATTACH => self.attach(parser),
            // Requests are answered in their order: there is nothing to flush.
            kind::FLUSH => Ok(Answer::default()),
            kind::WALK => self.walk(parser),
            kind::CLUNK => {
                let fid = parser.u32()?;
                let known = self.fids.remove(&fid).is_some() || self.stale.remove(&fid);
                known.then(Answer::default).ok_or(Errno::EBADF)
            }
            kind::GETATTR => self.getattr(parser),
            kind::STATFS => self.statfs(parser),
            kind::READLINK => self.readlink(parser),
            kind::LOPEN => self.open(parser),
            kind::READ => self.read(parser, room),
            kind::READDIR => self.readdir(parser, room),
            kind::GETLOCK => self.getlock(parser),
            kind::LOCK => self.lock(parser),
            kind::WRITE => self.write(parser),
            kind::FSYNC => {
                let fid = self.fid(parser.u32()?)?;
                let file = fid.open.as_ref().ok_or(Errno::EBADF)?;
                file.sync_all().map_err(errno).map(done)
            }
            kind::LCREATE => self.create(parser),
            kind::SYMLINK => self.symlink(parser),
            kind::MKNOD => self.mknod(parser),
            kind::MKDIR => self.mkdir(parser),
            kind::LINK => self.link(parser),
            kind::SETATTR => self.setattr(parser).map(done),
            kind::RENAMEAT => self.rename(parser).map(done),
            kind::UNLINKAT => self.unlink(parser).map(done),
            // Authentication, extended attributes and what Linux does by others of these.
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    fn fid(&self, fid: u32) -> Result<&Fid> {
        self.fids.get(&fid).ok_or_else(|| self.unknown(fid))
    }

    fn unknown(&self, fid: u32) -> Errno {
        if self.stale.contains(&fid) {
            Errno::ESTALE
        } else {
            Errno::EBADF
        }
    }

    fn is_taken(&self, fid: u32) -> bool {
        self.fids.contains_key(&fid) || self.stale.contains(&fid)
    }

    fn node(&self, fid: u32) -> Result<&Node> {
        Ok(&self.fid(fid)?.node)
    }

    fn insert(&mut self, number: u32, node: Node) -> Result<()> {
        if self.fids.len() >= MOST_FIDS {
            return Err(Errno::ENFILE);
        }
        let fid = Fid {
            node,
            open: None,
            locked: false,
        };
        self.fids.insert(number, fid);
        Ok(())
    }

    fn writable(&self) -> Result<()> {
        if self.share.read_only {
            Err(Errno::EROFS)
        } else {
            Ok(())
        }
    }

    fn version(&mut self, parser: &mut Parser<'_>) -> Result {
        let (most, version) = (parser.u32()?, parser.string()?);
        if most < LEAST {
            return Err(Errno::EMSGSIZE);
        }
        // It begins a session, and ends the one before.
        self.clear();
        self.most = most.min(MOST);
        let version = match version {
            b"9P2000.L" => version,
            _ => b"unknown",
        };
        Ok(Answer::default().u32(self.most).string(version))
    }

    fn attach(&mut self, parser: &mut Parser<'_>) -> Result {
        let (fid, _afid) = (parser.u32()?, parser.u32()?);
        let (_user, path) = (parser.string()?, parser.string()?);
        if self.is_taken(fid) {
            return Err(Errno::EBADF);
        }
        let mut node = self.share.root.duplicate()?;
        for name in path.split(|&byte| byte == b'/').filter(|n| !n.is_empty()) {
            if matches!(name, b"." | b"..") || name.contains(&0) {
                return Err(Errno::EINVAL);
            }
            node = node.child(name)?;
        }
        let qid = node.qid()?;
        self.insert(fid, node)?;
        Ok(Answer::default().qid(qid))
    }

    fn walk(&mut self, parser: &mut Parser<'_>) -> Result {
        let (fid, new, count) = (parser.u32()?, parser.u32()?, parser.u16()?);
        if count > MOST_NAMES || (new != fid && self.is_taken(new)) {
            return Err(Errno::EINVAL);
        }
        let from = self.fid(fid)?;
        if from.open.is_some() && new == fid {
            return Err(Errno::EBUSY);
        }
        let mut node = from.node.duplicate()?;
        let mut qids = Vec::new();
        for _ in 0..count {
            let name = parser.name();
            match name.and_then(|name| node.child(name)) {
                Ok(child) => {
                    qids.push(child.qid()?);
                    node = child;
                }
                Err(errno) if qids.is_empty() => return Err(errno),
                // How far one can go is told, and the new fid is not made.
                Err(_) => break,
            }
        }
        if qids.len() == usize::from(count) {
            self.insert(new, node)?;
        }
        let answer = Answer::default().u16(qids.len() as u16);
        Ok(qids.into_iter().fold(answer, Answer::qid))
    }

    fn getattr(&self, parser: &mut Parser<'_>) -> Result {
        /// P9_STATS_BASIC: all but birth time, generation and data version.
        const BASIC: u64 = 0x7ff;
        let stat = self.node(parser.u32()?)?.stat()?;
        let unsigned = |value: i64| value as u64;
        Ok(Answer::default()
            .u64(BASIC)
            .qid(qid(&stat))
            .u32(stat.st_mode)
            .u32(stat.st_uid)
            .u32(stat.st_gid)
            .u64(stat.st_nlink)
            .u64(stat.st_rdev)
            .u64(unsigned(stat.st_size))
            .u64(unsigned(stat.st_blksize))
            .u64(unsigned(stat.st_blocks))
            .u64(unsigned(stat.st_atime))
            .u64(unsigned(stat.st_atime_nsec))
            .u64(unsigned(stat.st_mtime))
            .u64(unsigned(stat.st_mtime_nsec))
            .u64(unsigned(stat.st_ctime))
            .u64(unsigned(stat.st_ctime_nsec))
            .bytes(&[0; 32]))
    }

    fn statfs(&self, parser: &mut Parser<'_>) -> Result {
        // V9FS_MAGIC.
        const TYPE: u32 = 0x0102_1997;
        let node = self.node(parser.u32()?)?;
        let stat = fstatfs(node)?;
        Ok(Answer::default()
            .u32(TYPE)
            .u32(u32::try_from(stat.block_size()).unwrap_or(4096))
            .u64(stat.blocks())
            .u64(stat.blocks_free())
            .u64(stat.blocks_available())
            .u64(stat.files())
            .u64(stat.files_free())
            .u64(0)
            .u32(255))
    }

    fn readlink(&self, parser: &mut Parser<'_>) -> Result {
        let node = self.node(parser.u32()?)?;
        let target = readlinkat(node, "").map_err(|e| match e {
            Errno::ENOENT => Errno::EINVAL,
            other => other,
        })?;
        Ok(Answer::default().string(target.as_encoded_bytes()))
    }

    fn open(&mut self, parser: &mut Parser<'_>) -> Result {
        let (number, flags) = (parser.u32()?, parser.u32()?);
        let flags = OFlag::from_bits_truncate(flags as i32) & FLAGS;
        let writes = flags.intersects(OFlag::O_ACCMODE | OFlag::O_TRUNC | OFlag::O_APPEND);
        if writes {
            self.writable()?;
        }
        let unknown = self.unknown(number);
        let fid = self.fids.get_mut(&number).ok_or(unknown)?;
        if fid.open.is_some() {
            return Err(Errno::EBUSY);
        }
        let file = self.share.descriptors.reopen(&fid.node, flags)?;
        fid.open = Some(file);
        // No limit of our own for what is moved at once.
        Ok(Answer::default().qid(fid.node.qid()?).u32(0))
    }

    fn create(&mut self, parser: &mut Parser<'_>) -> Result {
        let (number, name) = (parser.u32()?, parser.name()?);
        let (flags, mode) = (parser.u32()?, parser.u32()?);
        self.writable()?;
        let flags = OFlag::from_bits_truncate(flags as i32) & FLAGS;
        let unknown = self.unknown(number);
        let fid = self.fids.get_mut(&number).ok_or(unknown)?;
        if fid.open.is_some() {
            return Err(Errno::EBUSY);
        }
        // The fid of the directory becomes that of the file.
        let (node, file) = fid.node.create(name, flags, mode)?;
        let qid = node.qid()?;
        *fid = Fid {
            node,
            open: Some(file),
            locked: false,
        };
        Ok(Answer::default().qid(qid).u32(0))
    }

    fn read(&self, parser: &mut Parser<'_>, room: u32) -> Result {
        let (fid, offset, count) = (parser.u32()?, parser.u64()?, parser.u32()?);
        let file = self.fid(fid)?.open.as_ref().ok_or(Errno::EBADF)?;
        let mut bytes = vec![0; self.data(count, room)];
        let count = file.read_at(&mut bytes, offset).map_err(errno)?;
        bytes.truncate(count);
        Ok(Answer::default().u32(count as u32).bytes(&bytes))
    }

    /// How many bytes of data an answer can have.
    fn data(&self, wanted: u32, room: u32) -> usize {
        let most = self.most.min(room).saturating_sub(OVERHEAD);
        wanted.min(most) as usize
    }

    fn write(&self, parser: &mut Parser<'_>) -> Result {
        let (fid, offset, count) = (parser.u32()?, parser.u64()?, parser.u32()?);
        let bytes = parser.bytes(count as usize)?;
        self.writable()?;
        let file = self.fid(fid)?.open.as_ref().ok_or(Errno::EBADF)?;
        let count = file.write_at(bytes, offset).map_err(errno)?;
        Ok(Answer::default().u32(count as u32))
    }

    fn readdir(&self, parser: &mut Parser<'_>, room: u32) -> Result {
        /// Bytes of entries that are fetched at once.
        const PIECE: usize = 32 << 10;
        let (fid, offset, count) = (parser.u32()?, parser.u64()?, parser.u32()?);
        let file = self.fid(fid)?.open.as_ref().ok_or(Errno::EBADF)?;
        let room = self.data(count, room);
        rustix::fs::seek(file, rustix::fs::SeekFrom::Start(offset)).map_err(rustix_errno)?;
        let mut buffer = vec![MaybeUninit::uninit(); PIECE];
        let mut entries = RawDir::new(file, &mut buffer);
        let mut list = Answer::default();
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(rustix_errno)?;
            let name = entry.file_name().to_bytes();
            // Qid, offset of the next, type, name.
            if list.len() + 13 + 8 + 1 + 2 + name.len() > room {
                break;
            }
            let kind = entry.file_type().as_raw_mode() & libc::S_IFMT;
            let mut id = super::wire::Qid {
                kind: super::node::qid_kind(kind),
                version: 0,
                path: entry.ino(),
            };
            // As its own attributes say, wherever it is of another file system.
            if !matches!(name, b"." | b"..")
                && let Ok(child) = self.fid(fid)?.node.child(name)
            {
                id = child.qid()?;
            }
            list = list
                .qid(id)
                .u64(entry.next_entry_cookie())
                .u8((kind >> 12) as u8)
                .string(name);
        }
        let count = list.len() as u32;
        Ok(Answer::default().u32(count).append(list))
    }

    fn mkdir(&self, parser: &mut Parser<'_>) -> Result {
        let (fid, name, mode) = (parser.u32()?, parser.name()?, parser.u32()?);
        self.writable()?;
        let node = self.node(fid)?;
        mkdirat(node, name, Mode::from_bits_truncate(mode & MODE))?;
        Ok(Answer::default().qid(node.child(name)?.qid()?))
    }

    fn symlink(&self, parser: &mut Parser<'_>) -> Result {
        let (fid, name, target) = (parser.u32()?, parser.name()?, parser.string()?);
        self.writable()?;
        let node = self.node(fid)?;
        // Wherever it leads: only the guest follows it.
        symlinkat(target, node, name)?;
        Ok(Answer::default().qid(node.child(name)?.qid()?))
    }

    fn mknod(&self, parser: &mut Parser<'_>) -> Result {
        let (fid, name, mode) = (parser.u32()?, parser.name()?, parser.u32()?);
        self.writable()?;
        let kind = SFlag::from_bits_truncate(mode & libc::S_IFMT);
        // Devices would be the host's.
        if !matches!(kind, SFlag::S_IFIFO | SFlag::S_IFSOCK | SFlag::S_IFREG) {
            return Err(Errno::EPERM);
        }
        let node = self.node(fid)?;
        mknodat(node, name, kind, Mode::from_bits_truncate(mode & MODE), 0)?;
        Ok(Answer::default().qid(node.child(name)?.qid()?))
    }

    fn link(&self, parser: &mut Parser<'_>) -> Result {
        let (directory, fid, name) = (parser.u32()?, parser.u32()?, parser.name()?);
        self.writable()?;
        let (descriptors, file) = self.share.descriptors.path(self.node(fid)?);
        let to = self.node(directory)?;
        linkat(
            descriptors,
            file.as_str(),
            to,
            name,
            AtFlags::AT_SYMLINK_FOLLOW,
        )?;
        Ok(Answer::default())
    }

    fn rename(&self, parser: &mut Parser<'_>) -> Result<()> {
        let (from, old) = (parser.u32()?, parser.name()?);
        let (to, new) = (parser.u32()?, parser.name()?);
        self.writable()?;
        renameat(self.node(from)?, old, self.node(to)?, new)
    }

    fn unlink(&self, parser: &mut Parser<'_>) -> Result<()> {
        const AT_REMOVEDIR: u32 = 0x200;
        let (fid, name, flags) = (parser.u32()?, parser.name()?, parser.u32()?);
        self.writable()?;
        let how = if flags & AT_REMOVEDIR != 0 {
            UnlinkatFlags::RemoveDir
        } else {
            UnlinkatFlags::NoRemoveDir
        };
        unlinkat(self.node(fid)?, name, how)
    }

    fn setattr(&self, parser: &mut Parser<'_>) -> Result<()> {
        /// Bits that say what is to be set (P9_ATTR_*).
        const MODE_BIT: u32 = 1 << 0;
        const UID: u32 = 1 << 1;
        const GID: u32 = 1 << 2;
        const SIZE: u32 = 1 << 3;
        const ATIME: u32 = 1 << 4;
        const MTIME: u32 = 1 << 5;
        const ATIME_SET: u32 = 1 << 7;
        const MTIME_SET: u32 = 1 << 8;
        let fid = self.fid(parser.u32()?)?;
        let (valid, mode) = (parser.u32()?, parser.u32()?);
        let (uid, gid, size) = (parser.u32()?, parser.u32()?, parser.u64()?);
        let mut time = |given: u32, set: u32| {
            let (seconds, nanoseconds) = (parser.u64()?, parser.u64()?);
            Ok(match (valid & given != 0, valid & set != 0) {
                (false, _) => TimeSpec::UTIME_OMIT,
                (true, false) => TimeSpec::UTIME_NOW,
                (true, true) => TimeSpec::new(seconds as i64, nanoseconds as i64),
            })
        };
        let (atime, mtime) = (time(ATIME, ATIME_SET)?, time(MTIME, MTIME_SET)?);
        self.writable()?;
        let (descriptors, file) = self.share.descriptors.path(&fid.node);
        let file = file.as_str();
        if valid & MODE_BIT != 0 {
            if fid.node.kind()? == SFlag::S_IFLNK {
                return Err(Errno::EOPNOTSUPP);
            }
            let mode = Mode::from_bits_truncate(mode & MODE);
            fchmodat(
                descriptors,
                file,
                mode,
                nix::sys::stat::FchmodatFlags::FollowSymlink,
            )?;
        }
        if valid & (UID | GID) != 0 {
            let uid = (valid & UID != 0).then(|| Uid::from_raw(uid));
            let gid = (valid & GID != 0).then(|| Gid::from_raw(gid));
            fchownat(descriptors, file, uid, gid, AtFlags::empty())?;
        }
        if valid & SIZE != 0 {
            let reopened;
            let file = match &fid.open {
                Some(file) if is_writable(file) => file,
                _ => {
                    let write = self.share.descriptors.reopen(&fid.node, OFlag::O_WRONLY);
                    reopened = write?;
                    &reopened
                }
            };
            file.set_len(size).map_err(errno)?;
        }
        if valid & (ATIME | MTIME) != 0 {
            let follow = UtimensatFlags::FollowSymlink;
            utimensat(descriptors, file, &atime, &mtime, follow)?;
        }
        Ok(())
    }

    fn lock(&mut self, parser: &mut Parser<'_>) -> Result {
        const SUCCESS: u8 = 0;
        const BLOCKED: u8 = 1;
        let number = parser.clone().u32()?;
        let (file, lock) = self.flock(parser, true)?;
        match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
            Ok(_) => {
                let taken = i32::from(lock.l_type) != libc::F_UNLCK;
                let all = lock.l_start == 0 && lock.l_len == 0;
                if let Some(fid) = self.fids.get_mut(&number) {
                    fid.locked = taken || fid.locked && !all;
                }
                Ok(Answer::default().u8(SUCCESS))
            }
            // The guest asks again, if it wants to wait.
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(Answer::default().u8(BLOCKED)),
            Err(errno) => Err(errno),
        }
    }

    fn getlock(&self, parser: &mut Parser<'_>) -> Result {
        let (file, mut lock) = self.flock(parser, false)?;
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        Ok(Answer::default()
            .u8(match i32::from(lock.l_type) {
                libc::F_RDLCK => 0,
                libc::F_WRLCK => 1,
                _ => 2,
            })
            .u64(lock.l_start as u64)
            .u64(lock.l_len as u64)
            .u32(0)
            .string(b"host"))
    }

    /// The range that a lock is about, and its file. Locks of the guest's own programs among each
    /// other are its kernel's affair: here they all belong to the open file.
    fn flock(&self, parser: &mut Parser<'_>, flags: bool) -> Result<(&File, libc::flock)> {
        let (fid, kind) = (parser.u32()?, parser.u8()?);
        if flags {
            parser.u32()?;
        }
        let (start, len) = (parser.u64()?, parser.u64()?);
        let file = self.fid(fid)?.open.as_ref().ok_or(Errno::EBADF)?;
        let kind = match kind {
            0 => libc::F_RDLCK,
            1 => libc::F_WRLCK,
            2 => libc::F_UNLCK,
            _ => return Err(Errno::EINVAL),
        };
        let offset = |value: u64| libc::off_t::try_from(value).map_err(|_| Errno::EINVAL);
        let lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: offset(start)?,
            l_len: offset(len)?,
            l_pid: 0,
        };
        Ok((file, lock))
    }
}

fn error(errno: Errno) -> Answer {
    Answer::default().u32(errno as i32 as u32)
}

fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn rustix_errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

fn is_writable(file: &File) -> bool {
    let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL);
    flags.is_ok_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
}
