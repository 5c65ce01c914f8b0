//! The system calls by which network interfaces are made and set up (netdevice(7), tun.rst).

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::libc;

/// Requests of <linux/if_tun.h>: type 'T' and their numbers, by _IOW and _IOR of an int.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
/// Likewise of <linux/sockios.h>.
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

/// An interface's name, or a place for one.
pub(super) type Name = [u8; libc::IFNAMSIZ];

/// A name with its NUL; one that is too long is cut.
pub(super) fn name(text: &str) -> Name {
    let mut name = [0; libc::IFNAMSIZ];
    let places = name.iter_mut().take(libc::IFNAMSIZ - 1);
    for (to, from) in places.zip(text.bytes()) {
        *to = from;
    }
    name
}

/// A name without its NULs.
pub(super) fn text(name: &Name) -> String {
    let bytes: Vec<u8> = name.iter().copied().take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// An ifreq whose union is 0.
fn request(name: &Name) -> libc::ifreq {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_map: MAP },
    }
}

const MAP: libc::__c_anonymous_ifru_map = libc::__c_anonymous_ifru_map {
    mem_start: 0,
    mem_end: 0,
    base_addr: 0,
    irq: 0,
    dma: 0,
    port: 0,
};

fn call(fd: impl AsFd, request: libc::c_ulong, ifr: &mut libc::ifreq) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: each request here reads and writes one ifreq, which lives and is not aliased.
    let result = unsafe { libc::ioctl(fd, request, std::ptr::from_mut(ifr)) };
    done(result)
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Attaches a descriptor of /dev/net/tun to an interface, and returns the interface's name.
pub(super) fn set_iff(tun: impl AsFd, name: &Name, flags: i32) -> io::Result<String> {
    let mut ifr = request(name);
    ifr.ifr_ifru.ifru_flags = flags as i16;
    call(tun, TUNSETIFF, &mut ifr)?;
    Ok(text(&ifr.ifr_name.map(|c| c.cast_unsigned())))
}

/// The interface a descriptor is attached to, and its flags.
pub(super) fn get_iff(tun: impl AsFd) -> io::Result<(String, i32)> {
    let mut ifr = request(&name(""));
    call(tun, TUNGETIFF, &mut ifr)?;
    // SAFETY: the kernel has just written the flags.
    let flags = unsafe { ifr.ifr_ifru.ifru_flags };
    let flags = i32::from(flags.cast_unsigned());
    Ok((text(&ifr.ifr_name.map(|c| c.cast_unsigned())), flags))
}

/// Attaches or detaches one queue of an interface.
pub(super) fn set_queue(tun: impl AsFd, flags: i32) -> io::Result<()> {
    let mut ifr = request(&name(""));
    ifr.ifr_ifru.ifru_flags = flags as i16;
    call(tun, TUNSETQUEUE, &mut ifr)
}

/// Says what whoever reads the descriptor can do itself.
pub(super) fn set_offload(tun: impl AsFd, offloads: u32) -> io::Result<()> {
    let fd = tun.as_fd().as_raw_fd();
    // SAFETY: the request takes its argument by value.
    done(unsafe { libc::ioctl(fd, TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
}

/// Says how long the header in front of a frame is.
pub(super) fn set_header(tun: impl AsFd, len: usize) -> io::Result<()> {
    let fd = tun.as_fd().as_raw_fd();
    let len = len as libc::c_int;
    // SAFETY: the request reads one int, which lives.
    done(unsafe { libc::ioctl(fd, TUNSETVNETHDRSZ, std::ptr::from_ref(&len)) })
}

/// How many bytes a queue takes at most until they are delivered.
pub(super) fn send_buffer(tun: impl AsFd) -> io::Result<i32> {
    let fd = tun.as_fd().as_raw_fd();
    let mut size: libc::c_int = 0;
    // SAFETY: the request writes one int, which lives.
    done(unsafe { libc::ioctl(fd, libc::TUNGETSNDBUF, std::ptr::from_mut(&mut size)) })?;
    Ok(size)
}

/// A socket for the requests below.
pub(super) fn control() -> io::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socket(
        AddressFamily::Inet,
        SockType::Datagram,
        flags,
        None,
    )?)
}

/// Whether an interface is up.
pub(super) fn is_up(control: impl AsFd, name: &Name) -> io::Result<bool> {
    let mut ifr = request(name);
    call(control, libc::SIOCGIFFLAGS, &mut ifr)?;
    // SAFETY: the kernel has just written the flags.
    let flags = unsafe { ifr.ifr_ifru.ifru_flags };
    Ok(i32::from(flags) & libc::IFF_UP != 0)
}

/// Sets an interface up.
pub(super) fn up(control: impl AsFd, name: &Name) -> io::Result<()> {
    let mut ifr = request(name);
    call(&control, libc::SIOCGIFFLAGS, &mut ifr)?;
    // SAFETY: the kernel has just written the flags.
    let flags = unsafe { ifr.ifr_ifru.ifru_flags };
    ifr.ifr_ifru.ifru_flags = flags | libc::IFF_UP as i16;
    call(control, libc::SIOCSIFFLAGS, &mut ifr)
}

/// The largest packet of an interface.
pub(super) fn mtu(control: impl AsFd, name: &Name) -> io::Result<i32> {
    let mut ifr = request(name);
    call(control, libc::SIOCGIFMTU, &mut ifr)?;
    // SAFETY: the kernel has just written the size.
    Ok(unsafe { ifr.ifr_ifru.ifru_mtu })
}

/// Sets the largest packet of an interface.
pub(super) fn set_mtu(control: impl AsFd, name: &Name, mtu: u16) -> io::Result<()> {
    let mut ifr = request(name);
    ifr.ifr_ifru.ifru_mtu = mtu.into();
    call(control, libc::SIOCSIFMTU, &mut ifr)
}

/// The number of an interface.
pub(super) fn index(control: impl AsFd, name: &Name) -> io::Result<i32> {
    let mut ifr = request(name);
    call(control, libc::SIOCGIFINDEX, &mut ifr)?;
    // SAFETY: the kernel has just written the number.
    Ok(unsafe { ifr.ifr_ifru.ifru_ifindex })
}

/// Plugs an interface into a bridge.
pub(super) fn add_to_bridge(control: impl AsFd, bridge: &Name, port: i32) -> io::Result<()> {
    let mut ifr = request(bridge);
    ifr.ifr_ifru.ifru_ifindex = port;
    call(control, SIOCBRADDIF, &mut ifr)
}

/// A descriptor of our own for what a number that was inherited stands for. The number itself may be
/// anything, so it is left alone.
pub(super) fn duplicate(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers, and answers for one that is no descriptor.
    let ours = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    done(ours)?;
    // SAFETY: it was made just now, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(ours) })
}

/// Takes a connection at a socket, if there is one.
pub(super) fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    use nix::sys::socket::{SockFlag, accept4};
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = accept4(listener.as_fd().as_raw_fd(), flags)?;
    // SAFETY: it was made just now, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_and_come_back() {
        assert_eq!(text(&name("tap0")), "tap0");
        assert_eq!(text(&name("a-name-that-is-too-long")), "a-name-that-is-");
    }

    #[test]
    fn loopback_is_interface_one() {
        let control = control().unwrap();
        assert_eq!(index(&control, &name("lo")).unwrap(), 1);
        assert!(mtu(&control, &name("lo")).unwrap() >= 1500);
        let error = index(&control, &name("no-such-one")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        assert!(is_up(&control, &name("no-such-one")).is_err());
    }

    #[test]
    fn what_is_no_tap_says_so() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(get_iff(&file).is_err());
        assert!(set_header(&file, 12).is_err() && set_offload(&file, 0).is_err());
        assert!(set_queue(&file, 0).is_err());
        assert!(duplicate(9999).is_err() && duplicate(-1).is_err());
    }
}
