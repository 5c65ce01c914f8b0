//! The lock on an object: an open-file-description lock, so that the kernel drops it on any death
//! of its holder, and so that others can ask who holds it without taking it.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use serde::{Deserialize, Serialize};

/// Length of the lock file, fixed when it is made: writing the holder into it later needs no room.
const FILE_LEN: usize = 256;

/// Who holds an object's lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Process id.
    pub pid: u32,
    /// The program: `rhyve` runs the VM, `rhyveload` and `vmmctl` work on it for a moment.
    pub program: String,
    /// When the lock was taken, in seconds since 1970.
    pub since: u64,
}

fn request(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Gives a new lock file its final length.
pub(crate) fn prepare(file: &File) -> std::io::Result<()> {
    file.write_all_at(&[b' '; FILE_LEN], 0)
}

/// Takes the lock without waiting; false if somebody else has it.
pub(crate) fn try_acquire(file: &File, program: &str) -> Result<bool, Errno> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&request(libc::F_WRLCK))) {
        Ok(_) => {}
        Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
        Err(errno) => return Err(errno),
    }
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let holder = Holder {
        pid: std::process::id(),
        program: program.to_owned(),
        since,
    };
    let mut text = serde_json::to_vec(&holder).map_err(|_| Errno::EINVAL)?;
    text.resize(FILE_LEN, b' ');
    file.write_all_at(&text, 0)
        .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))?;
    Ok(true)
}

/// Whether the file was unlinked after it was opened: then its lock guards nothing.
pub(crate) fn is_orphan(file: &File) -> bool {
    file.metadata().map_or(true, |m| m.nlink() == 0)
}

/// Who holds the lock, if anybody does.
pub(crate) fn holder(file: &File) -> Result<Option<Holder>, Errno> {
    let mut answer = request(libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut answer))?;
    if answer.l_type == libc::F_UNLCK as libc::c_short {
        return Ok(None);
    }
    let mut text = [0; FILE_LEN];
    let unknown = Holder {
        pid: 0,
        program: "another program".into(),
        since: 0,
    };
    let Ok(()) = file.read_exact_at(&mut text, 0) else {
        return Ok(Some(unknown));
    };
    Ok(Some(serde_json::from_slice(&text).unwrap_or(unknown)))
}
