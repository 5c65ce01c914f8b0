//! A tap interface of the host (Documentation/networking/tuntap.rst of Linux).
//!
//! Each pair of queues has a descriptor. With the header that the interface has in front of frames,
//! the host's stack and the guest's leave checksums and segments to each other, and one read or
//! write moves up to 64 KiB.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use vm_memory::VolatileSlice;
use vmm_api::scatter;

use super::{Backend, Info, NetError, Offloads, Port, Wait, ifreq};

/// What the reader of a descriptor can do itself (<linux/if_tun.h>).
const OFFLOADS: [(Offloads, u32); 5] = [
    (Offloads::CSUM, 0x01),
    (Offloads::TSO4, 0x02),
    (Offloads::TSO6, 0x04),
    (Offloads::ECN, 0x08),
    // Both protocols' UDP segments, from Linux 6.2 on.
    (Offloads::USO, 0x20 | 0x40),
];

/// A tap interface; one that was made for this goes with it.
pub struct Tap {
    info: Info,
    name: String,
    queues: Vec<Arc<Queue>>,
}

struct Queue {
    fd: Arc<OwnedFd>,
    /// Its send never waits, whatever the descriptor says: there is no end to what it takes.
    endless: bool,
}

impl Tap {
    /// Attaches to the interface `name` with this many queues, makes it if there is none, or makes
    /// one with a name by the kernel.
    ///
    /// # Errors
    /// [`NetError::Tap`].
    pub fn open(name: Option<&str>, queues: u16) -> Result<Self, NetError> {
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let mut known = name.unwrap_or("tap%d").to_owned();
        let mut fds = Vec::new();
        for _ in 0..queues {
            let error = |action| {
                let name = known.clone();
                move |source| NetError::Tap {
                    name,
                    action,
                    source,
                }
            };
            let fd = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open("/dev/net/tun")
                .map_err(error("open /dev/net/tun"))?;
            let attached = ifreq::set_iff(&fd, &ifreq::name(&known), flags);
            known = attached.map_err(error("attach to the interface"))?;
            fds.push(OwnedFd::from(fd));
        }
        Self::over(known, fds, true)
    }

    /// Takes over descriptors that are attached to an interface already. It is left as it is set up.
    ///
    /// # Errors
    /// [`NetError::NotTap`] and [`NetError::Tap`].
    pub fn inherit(fds: &[i32]) -> Result<Self, NetError> {
        let mut known = None;
        let mut owned = Vec::new();
        for &fd in fds {
            let error = |source| NetError::NotTap { fd, source };
            let inherited = ifreq::duplicate(fd).map_err(error)?;
            let (name, flags) = ifreq::get_iff(&inherited).map_err(error)?;
            if flags & libc::IFF_TAP == 0 || flags & libc::IFF_NO_PI == 0 {
                let source = io::Error::other("it has no Ethernet frames, or more (IFF_NO_PI)");
                return Err(error(source));
            }
            fcntl(&inherited, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(|errno| error(errno.into()))?;
            known.get_or_insert((name, flags & libc::IFF_VNET_HDR != 0));
            owned.push(inherited);
        }
        let (name, header) = known.unwrap_or_default();
        Self::over(name, owned, header)
    }

    fn over(name: String, fds: Vec<OwnedFd>, header: bool) -> Result<Self, NetError> {
        let mut offloads = Offloads::empty();
        if header && let Some(first) = fds.first() {
            offloads = Offloads::all();
            if ifreq::set_offload(first, bits(offloads)).is_err() {
                offloads.remove(Offloads::USO);
            }
        }
        let tap = Self {
            info: Info {
                label: name.clone(),
                header,
                offloads,
            },
            name,
            queues: fds
                .into_iter()
                .map(|fd| {
                    let endless = ifreq::send_buffer(&fd).is_ok_and(|size| size == i32::MAX);
                    let fd = Arc::new(fd);
                    Arc::new(Queue { fd, endless })
                })
                .collect(),
        };
        tap.configure(12, Offloads::empty())
            .map_err(tap.error("set up its header"))?;
        Ok(tap)
    }

    /// Sets the interface up, with this size of packets and in this bridge. What is so already takes
    /// no privileges.
    ///
    /// # Errors
    /// [`NetError::Tap`].
    pub fn bring_up(&self, mtu: Option<u16>, bridge: Option<&str>) -> Result<(), NetError> {
        let name = ifreq::name(&self.name);
        let control = ifreq::control().map_err(self.error("open a socket"))?;
        if let Some(mtu) = mtu
            && !ifreq::mtu(&control, &name).is_ok_and(|now| now == i32::from(mtu))
        {
            let set = ifreq::set_mtu(&control, &name, mtu);
            set.map_err(self.error("set its mtu"))?;
        }
        if let Some(bridge) = bridge
            && !in_bridge(&self.name, bridge)
        {
            let index = ifreq::index(&control, &name);
            let index = index.map_err(self.error("find it again"))?;
            ifreq::add_to_bridge(&control, &ifreq::name(bridge), index).map_err(|source| {
                NetError::Bridge {
                    name: self.name.clone(),
                    bridge: bridge.to_owned(),
                    source,
                }
            })?;
        }
        if !ifreq::is_up(&control, &name).map_err(self.error("look whether it is up"))? {
            ifreq::up(&control, &name).map_err(self.error("set it up"))?;
        }
        Ok(())
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn error(&self, action: &'static str) -> impl FnOnce(io::Error) -> NetError {
        let name = self.name.clone();
        move |source| NetError::Tap {
            name,
            action,
            source,
        }
    }
}

/// Whether the interface is a port of this bridge.
fn in_bridge(name: &str, bridge: &str) -> bool {
    let master = std::fs::read_link(format!("/sys/class/net/{name}/master"));
    master.is_ok_and(|path| path.file_name().is_some_and(|name| name == bridge))
}

fn bits(offloads: Offloads) -> u32 {
    let of = OFFLOADS
        .iter()
        .filter(|(offload, _)| offloads.contains(*offload));
    of.fold(0, |bits, (_, bit)| bits | bit)
}

impl Backend for Tap {
    fn info(&self) -> &Info {
        &self.info
    }

    fn port(&self, pair: u16) -> Option<Arc<dyn Port>> {
        let queue = self.queues.get(usize::from(pair))?;
        Some(queue.clone())
    }

    fn configure(&self, header: usize, offloads: Offloads) -> io::Result<()> {
        if !self.info.header {
            return Ok(());
        }
        for queue in &self.queues {
            ifreq::set_header(&queue.fd, header)?;
        }
        // The interface's, not the queue's.
        match self.queues.first() {
            Some(queue) => ifreq::set_offload(&queue.fd, bits(offloads)),
            None => Ok(()),
        }
    }

    fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        if self.queues.len() < 2 {
            return Ok(());
        }
        for (at, queue) in self.queues.iter().enumerate() {
            let flag = if at < usize::from(pairs) {
                libc::IFF_ATTACH_QUEUE
            } else {
                libc::IFF_DETACH_QUEUE
            };
            match ifreq::set_queue(&queue.fd, flag) {
                // It is so already.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => result?,
            }
        }
        Ok(())
    }
}

impl Port for Queue {
    fn wait(&self) -> Wait {
        Wait {
            fd: Some(self.fd.clone()),
            timeout: None,
        }
    }

    fn receive(&self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        scatter::receive(&self.fd, into).map_err(|error| {
            if error.raw_os_error() != Some(libc::EFAULT) {
                return error;
            }
            // Who waits when the interface goes away hears that of an address. Others hear what it is.
            ifreq::get_iff(&self.fd).err().unwrap_or(error)
        })
    }

    fn wait_in_receive(&self, wait: bool) -> bool {
        // Both directions have one flag.
        let flags = if wait {
            OFlag::empty()
        } else {
            OFlag::O_NONBLOCK
        };
        self.endless && fcntl(&self.fd, FcntlArg::F_SETFL(flags)).is_ok()
    }

    fn send(&self, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        match scatter::send(&self.fd, from) {
            Ok(_) => Ok(()),
            // The interface is down: the frame has nowhere to go.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
