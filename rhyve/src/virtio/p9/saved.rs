//! A share that goes on in another process: the guest's fids, by the paths of their files.
//!
//! A path is looked up again as a guest's would be, name by name and through no symbolic link, and is
//! believed if it leads to the same inode. What is not found again (it was removed while it was open,
//! or the host moved it meanwhile) is a stale fid: its guest gets ESTALE until it lets go of it, as
//! from a file server that was started again.

use std::collections::BTreeMap;
use std::fs::File;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};
use vmm_api::state::{DeviceState, StateError};

use super::node::Node;
use super::session::{Fid, LEAST, MOST, MOST_FIDS, Session};
use super::wire::Errno;
use super::{P9, kicks};
use crate::lifecycle::{self, Lifecycle};
use crate::virtio::VirtioDevice;

/// The flags of an open file that say more than how it came to be open.
const KEPT: OFlag = OFlag::O_ACCMODE
    .union(OFlag::O_APPEND)
    .union(OFlag::O_DSYNC)
    .union(OFlag::O_SYNC);

/// A session as it is stored.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Saved {
    most: u32,
    fids: BTreeMap<u32, SavedFid>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedFid {
    /// Below the shared directory; none if it is not there any more.
    path: Option<Name>,
    inode: u64,
    /// open(2)'s flags, if it is open.
    open: Option<i32>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Name(#[serde(with = "lifecycle::bytes")] Vec<u8>);

impl Session {
    /// Where all its files are.
    ///
    /// # Errors
    /// A lock is held, which another process would not have.
    pub(super) fn save(&self) -> Result<Saved, String> {
        if self.fids.values().any(|fid| fid.locked) {
            return Err("a program of the guest holds a lock on a shared file".into());
        }
        let root = self.share.descriptors.place(&self.share.root);
        let root = root.map_err(|error| format!("the shared directory: {error}"))?;
        let saved = self.fids.iter().map(|(&number, fid)| {
            let place = self.share.descriptors.place(&fid.node).ok();
            let path = place.and_then(|place| below(&root, &place).map(<[u8]>::to_vec));
            let flags = |file: &File| fcntl(file, FcntlArg::F_GETFL).ok();
            let saved = SavedFid {
                path: path.map(Name),
                inode: fid.node.stat().map_or(0, |stat| stat.st_ino),
                open: fid.open.as_ref().and_then(flags),
            };
            (number, saved)
        });
        let gone = self.stale.iter().map(|&number| {
            let saved = SavedFid {
                path: None,
                inode: 0,
                open: None,
            };
            (number, saved)
        });
        Ok(Saved {
            most: self.most,
            fids: saved.chain(gone).collect(),
        })
    }

    /// Takes the place of a session that was saved.
    ///
    /// # Errors
    /// There never was such a session.
    pub(super) fn restore(&mut self, saved: Saved) -> Result<(), StateError> {
        if !(LEAST..=MOST).contains(&saved.most) || saved.fids.len() > MOST_FIDS {
            return Err(StateError::Value("a session that cannot be".into()));
        }
        self.clear();
        self.most = saved.most;
        for (number, saved) in saved.fids {
            match self.find(&saved) {
                Ok(fid) => _ = self.fids.insert(number, fid),
                Err(_) => _ = self.stale.insert(number),
            }
        }
        Ok(())
    }

    fn find(&self, saved: &SavedFid) -> Result<Fid, Errno> {
        let Name(path) = saved.path.as_ref().ok_or(Errno::ENOENT)?;
        let mut node: Node = self.share.root.duplicate()?;
        for name in path.split(|&byte| byte == b'/').filter(|n| !n.is_empty()) {
            if matches!(name, b"." | b"..") || name.contains(&0) {
                return Err(Errno::EINVAL);
            }
            node = node.child(name)?;
        }
        if node.stat()?.st_ino != saved.inode {
            return Err(Errno::ENOENT);
        }
        let reopen = |flags: i32| {
            let flags = OFlag::from_bits_truncate(flags) & KEPT;
            let writes = flags.intersects(OFlag::O_ACCMODE | OFlag::O_APPEND);
            if writes && self.share.read_only {
                return Err(Errno::EROFS);
            }
            self.share.descriptors.reopen(&node, flags)
        };
        let open = saved.open.map(reopen).transpose()?;
        Ok(Fid {
            node,
            open,
            locked: false,
        })
    }
}

/// What is behind the directory in a path; nothing if that is the directory itself.
fn below<'a>(root: &[u8], path: &'a [u8]) -> Option<&'a [u8]> {
    let rest = path.strip_prefix(root.strip_suffix(b"/").unwrap_or(root))?;
    if rest.is_empty() {
        return Some(rest);
    }
    rest.strip_prefix(b"/")
}

impl Lifecycle for P9 {
    fn freeze(&self) {
        // The thread answers whatever it takes with this lock held.
        self.lock().frozen = true;
    }

    fn thaw(&self) {
        let mut state = self.lock();
        state.frozen = false;
        if let Some((queue, _)) = &state.running {
            kicks::again(queue);
        }
    }

    fn save(&self) -> Result<DeviceState, String> {
        lifecycle::save(self.name(), 1, &self.lock().session.save()?)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Saved = lifecycle::load(self.name(), 1, state)?;
        self.lock().session.restore(saved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_below_its_root_by_whole_names() {
        let below = |root: &str, path: &'static str| below(root.as_bytes(), path.as_bytes());
        assert_eq!(below("/a/b", "/a/b"), Some(&b""[..]));
        assert_eq!(below("/a/b", "/a/b/c/d"), Some(&b"c/d"[..]));
        assert_eq!(below("/", "/c"), Some(&b"c"[..]));
        assert_eq!(below("/a/b", "/a/bc"), None);
        assert_eq!(below("/a/b", "/x"), None);
    }
}
