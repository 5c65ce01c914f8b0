//! A network card's configuration: what it is plugged into, and options as bhyve(8) names them.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vmm_api::name::VmName;

use super::virtio::transport;
use super::{PciAddress, SlotError};
use crate::virtio::transport::Transport;

/// More queue pairs than any guest has CPUs to fill; each has two threads.
const MAX_QUEUES: u16 = 16;
/// The smallest packet that IPv4 is content with, and the largest there is.
const MTUS: std::ops::RangeInclusive<u16> = 68..=65535;
/// Bytes of an interface's name, without its NUL (IFNAMSIZ).
const MAX_NAME: usize = 15;

/// What `-s help` says of a card's configuration.
pub(super) const HELP: &str = "  virtio-net,BACKEND takes
    tap                   a new tap interface, with a name by the kernel
    tapN, tap:NAME        this tap interface, made if there is none
    fd=N[:N...]           tap descriptors that were inherited, one for each queue
    user                  a network of its own, without privileges: the guest gets 10.0.2.15 by
                          DHCP, and reaches and is reached by what is forwarded alone
    socket                another rhyve's card, at a unix socket
    mac=ADDRESS           the card's address; made of the VM's name and the slot without it
    mtu=N                 bytes of the largest packet
    queues=N              pairs of queues, each with two threads; 1
    pcap=FILE             write what passes behind what is in FILE, as tcpdump would
    bridge=NAME           for tap: plug it into this bridge
    hostfwd=tcp:[ADDR]:PORT-[ADDR]:PORT
                          for user: connections to this address of the host (127.0.0.1 if
                          there is none) go to the guest
    guestfwd=tcp:[ADDR]:PORT-[ADDR]:PORT
                          for user: the guest's connections to this address go to the host's
    listen=PATH           for socket: be the end that waits for the other
    connect=PATH          for socket: be the end that connects to the other, once it is there
";

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// The address bhyve gave a card of this VM in this place (usr.sbin/bhyve/pci_virtio_net.c of
    /// 2012): NetApp's prefix, and three bytes of an MD5 over the VM's name, with the place before
    /// it unless that is slot 1.
    pub fn customary(vm: &VmName, place: PciAddress) -> Self {
        let PciAddress {
            bus,
            slot,
            function,
        } = place;
        let text = match (bus, slot, function) {
            (0, 1, 0) => vm.to_string(),
            (0, ..) => format!("{slot}-{function}-{vm}"),
            // bhyve leaves the bus out, so that two of its cards may have one address.
            _ => format!("{bus}-{slot}-{function}-{vm}"),
        };
        let [a, b, c, ..] = md5::compute(text).0;
        Self([0x00, 0xa0, 0x98, a, b, c])
    }

    /// Whether a card can have it: it is one card's, and not 0.
    pub fn is_unicast(self) -> bool {
        let [first, ..] = self.0;
        first & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = NetConfError;

    fn from_str(text: &str) -> Result<Self, NetConfError> {
        let error = || NetConfError::Mac(text.to_owned());
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|byte| {
                let digits = byte.len() == 2 && byte.bytes().all(|b| b.is_ascii_hexdigit());
                digits.then(|| u8::from_str_radix(byte, 16).ok())?
            })
            .collect();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        let mac = Self(bytes.ok_or_else(error)?);
        if mac.is_unicast() {
            Ok(mac)
        } else {
            Err(error())
        }
    }
}

/// A way from one TCP address to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Where connections are taken.
    pub from: SocketAddrV4,
    /// Where they go.
    pub to: SocketAddrV4,
}

/// What the `user` network is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserSpec {
    /// From addresses of the host to addresses of the guest.
    pub hostfwd: Vec<Forward>,
    /// From addresses the guest sees to addresses of the host.
    pub guestfwd: Vec<Forward>,
}

/// What a card is plugged into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetBackend {
    /// A tap interface of the host.
    Tap {
        /// Its name; none is one that the kernel chooses.
        name: Option<String>,
        /// A bridge to plug it into.
        bridge: Option<String>,
    },
    /// Descriptors of a tap interface, one for each queue pair.
    Fds(Vec<i32>),
    /// A network of its own, with what is forwarded.
    User(UserSpec),
    /// The end of a wire to another rhyve that waits at this unix socket.
    Listen(PathBuf),
    /// The end that connects to it.
    Connect(PathBuf),
}

/// A virtio-net device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// What it is plugged into.
    pub backend: NetBackend,
    /// Its address, if it was said.
    pub mac: Option<MacAddress>,
    /// The largest packet, if it was said.
    pub mtu: Option<u16>,
    /// Pairs of queues.
    pub queues: NonZeroU16,
    /// Where what passes is written to.
    pub pcap: Option<PathBuf>,
    /// Its registers.
    pub transport: Transport,
}

/// Why a card's configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetConfError {
    /// No backend.
    #[error("a card needs a backend: write virtio-net,tap0 or virtio-net,user; -s help lists them")]
    NoBackend,
    /// Not a backend.
    #[error("'{0}' is no backend: there are tap, tapN, tap:NAME, fd=N, user and socket")]
    Backend(String),
    /// Not an option of this backend.
    #[error("a card at {backend} has no option '{option}': -s help lists them")]
    Option {
        /// The backend.
        backend: &'static str,
        /// What was given.
        option: String,
    },
    /// Not an interface's name.
    #[error("'{0}' is no interface: a name has 1 to {MAX_NAME} characters and no '/' or blank")]
    Interface(String),
    /// Not descriptors.
    #[error("'{0}' are no descriptors: write numbers from 3 on, as in fd=3 or fd=3:4")]
    Fds(String),
    /// Descriptors and queues do not match.
    #[error("{fds} descriptors serve {fds} queues, not {queues}")]
    FdQueues {
        /// How many descriptors.
        fds: usize,
        /// How many queues.
        queues: u16,
    },
    /// Not an address.
    #[error("'{0}' is no address of a card: write six bytes, as in 00:a0:98:01:02:03")]
    Mac(String),
    /// Not an MTU.
    #[error("'{0}' is no packet size: write {first} to {last}", first = MTUS.start(), last = MTUS.end())]
    Mtu(String),
    /// Not a number of queues.
    #[error("a card has 1 to {MAX_QUEUES} pairs of queues, not '{0}'")]
    Queues(String),
    /// One queue only.
    #[error("{0} has one pair of queues: leave queues= out")]
    OneQueue(&'static str),
    /// Not a way.
    #[error(
        "'{0}' is no forwarding: write tcp:[ADDRESS]:PORT-[ADDRESS]:PORT, as in \
         tcp:127.0.0.1:2222-:22"
    )]
    Forward(String),
    /// An address that is not on the user network.
    #[error(
        "'{0}': the guest's network is 10.0.2.0/24, and the guest reaches the host as 10.0.2.2"
    )]
    NotThere(String),
    /// A socket without a place, or with two.
    #[error("a socket needs one of listen=PATH and connect=PATH")]
    Socket,
    /// No file is named.
    #[error("{0}= needs a path")]
    Path(&'static str),
}

impl NetBackend {
    /// Its word on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Tap { .. } => "tap",
            Self::Fds(_) => "fd",
            Self::User(_) => "user",
            Self::Listen(_) | Self::Connect(_) => "socket",
        }
    }

    /// Takes one `name=value`; whether there is such an option.
    fn option(&mut self, name: &str, value: &str) -> Result<bool, NetConfError> {
        match (self, name) {
            (Self::Tap { bridge, .. }, "bridge") => *bridge = Some(interface(value)?),
            (Self::User(user), "hostfwd") => {
                let forward = forward(value, Ipv4Addr::LOCALHOST, GUEST)?;
                let [a, b, c, host] = forward.to.ip().octets();
                if [a, b, c] != [10, 0, 2] || [0, 2, 255].contains(&host) {
                    return Err(NetConfError::NotThere(value.to_owned()));
                }
                user.hostfwd.push(forward);
            }
            (Self::User(user), "guestfwd") => {
                let forward = forward(value, GATEWAY, Ipv4Addr::LOCALHOST)?;
                if *forward.from.ip() != GATEWAY {
                    return Err(NetConfError::NotThere(value.to_owned()));
                }
                user.guestfwd.push(forward);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// The guest's address on the `user` network.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Ours, as seen by the guest.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

impl NetSpec {
    /// Reads `BACKEND[,OPTION...]`.
    ///
    /// # Errors
    /// [`SlotError::Net`] and [`SlotError::Value`].
    pub fn parse(conf: &str) -> Result<Self, SlotError> {
        let mut words = conf.split(',').filter(|word| !word.is_empty());
        let first = words.next().ok_or(NetConfError::NoBackend)?;
        let mut socket = None;
        let mut backend = match backend(first)? {
            Some(backend) => backend,
            // A socket's place comes as an option.
            None => NetBackend::Listen(PathBuf::new()),
        };
        let is_socket = first == "socket";
        let (mut mac, mut mtu, mut pcap) = (None, None, None);
        let mut queues = None;
        let mut registers = Transport::default();
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match name {
                "mac" => mac = Some(value.parse()?),
                "mtu" => {
                    let bytes = value.parse().ok().filter(|mtu| MTUS.contains(mtu));
                    mtu = Some(bytes.ok_or_else(|| NetConfError::Mtu(value.to_owned()))?);
                }
                "queues" => {
                    let count = value.parse().ok();
                    let count = count.filter(|n: &NonZeroU16| n.get() <= MAX_QUEUES);
                    queues = Some(count.ok_or_else(|| NetConfError::Queues(value.to_owned()))?);
                }
                "pcap" => pcap = Some(path("pcap", value)?),
                "virtio" => registers = transport(value)?,
                "listen" | "connect" if is_socket => {
                    let end = if name == "listen" {
                        NetBackend::Listen(path("listen", value)?)
                    } else {
                        NetBackend::Connect(path("connect", value)?)
                    };
                    if socket.replace(end).is_some() {
                        return Err(NetConfError::Socket.into());
                    }
                }
                _ if !is_socket && backend.option(name, value)? => {}
                _ => {
                    return Err(NetConfError::Option {
                        backend: backend.name(),
                        option: word.to_owned(),
                    }
                    .into());
                }
            }
        }
        if is_socket {
            backend = socket.ok_or(NetConfError::Socket)?;
        }
        let queues = match (&backend, queues) {
            (NetBackend::Tap { .. }, queues) => queues.unwrap_or(NonZeroU16::MIN),
            (NetBackend::Fds(fds), queues) => {
                let count = fds.len().try_into().ok().and_then(NonZeroU16::new);
                let count = count.unwrap_or(NonZeroU16::MIN);
                match queues {
                    Some(queues) if queues != count => {
                        let (fds, queues) = (fds.len(), queues.get());
                        return Err(NetConfError::FdQueues { fds, queues }.into());
                    }
                    _ => count,
                }
            }
            (_, None) => NonZeroU16::MIN,
            (_, Some(queues)) if queues == NonZeroU16::MIN => queues,
            (other, Some(_)) => return Err(NetConfError::OneQueue(other.name()).into()),
        };
        Ok(Self {
            backend,
            mac,
            mtu,
            queues,
            pcap,
            transport: registers,
        })
    }
}

/// What the first word says; none is a socket.
fn backend(word: &str) -> Result<Option<NetBackend>, NetConfError> {
    let tap = |name| NetBackend::Tap { name, bridge: None };
    Ok(Some(match word.split_once('=') {
        Some(("fd", value)) => {
            let fds: Option<Vec<i32>> = value.split(':').map(|fd| fd.parse().ok()).collect();
            let fds = fds.filter(|fds| {
                let distinct = (1..fds.len()).all(|n| !fds[..n].contains(&fds[n]));
                distinct && fds.len() <= MAX_QUEUES.into() && fds.iter().all(|fd| *fd > 2)
            });
            NetBackend::Fds(fds.ok_or_else(|| NetConfError::Fds(value.to_owned()))?)
        }
        Some(_) => return Err(NetConfError::Backend(word.to_owned())),
        None => match word {
            "tap" => tap(None),
            // bhyve's word for it is slirp.
            "user" | "slirp" => NetBackend::User(UserSpec::default()),
            "socket" => return Ok(None),
            _ => match word.strip_prefix("tap") {
                Some(rest) => {
                    let name = rest.strip_prefix(':').unwrap_or(word);
                    tap(Some(interface(name)?))
                }
                None => return Err(NetConfError::Backend(word.to_owned())),
            },
        },
    }))
}

fn interface(name: &str) -> Result<String, NetConfError> {
    let sensible = |c: char| !c.is_whitespace() && !c.is_control() && !"/:%".contains(c);
    let fits = (1..=MAX_NAME).contains(&name.len()) && name != "." && name != "..";
    if fits && name.chars().all(sensible) {
        Ok(name.to_owned())
    } else {
        Err(NetConfError::Interface(name.to_owned()))
    }
}

fn path(option: &'static str, value: &str) -> Result<PathBuf, NetConfError> {
    if value.is_empty() {
        return Err(NetConfError::Path(option));
    }
    Ok(value.into())
}

/// Reads `tcp:[addr]:port-[addr]:port`, with what an address is that is left out.
fn forward(text: &str, from: Ipv4Addr, to: Ipv4Addr) -> Result<Forward, NetConfError> {
    let error = || NetConfError::Forward(text.to_owned());
    let place = |text: &str, default: Ipv4Addr| {
        let (address, port) = text.rsplit_once(':')?;
        let address = match address {
            "" => default,
            address => address.parse().ok()?,
        };
        let port = port.parse().ok().filter(|port| *port != 0)?;
        Some(SocketAddrV4::new(address, port))
    };
    let ends = text.strip_prefix("tcp:").and_then(|r| r.split_once('-'));
    let (first, second) = ends.ok_or_else(error)?;
    Ok(Forward {
        from: place(first, from).ok_or_else(error)?,
        to: place(second, to).ok_or_else(error)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(conf: &str) -> NetSpec {
        NetSpec::parse(conf).unwrap_or_else(|error| panic!("{conf}: {error}"))
    }

    fn err(conf: &str) -> String {
        NetSpec::parse(conf).unwrap_err().to_string()
    }

    #[test]
    fn myguest_has_the_address_it_had() {
        let at = |slot, function| PciAddress {
            bus: 0,
            slot,
            function,
        };
        let name = "myguest".parse().unwrap();
        let mac = MacAddress::customary(&name, at(1, 0));
        assert_eq!(mac.to_string(), "00:a0:98:f6:70:6c");
        let bus = PciAddress { bus: 1, ..at(2, 0) };
        let others = [at(2, 0), at(1, 1), bus].map(|place| MacAddress::customary(&name, place));
        assert!(
            others
                .iter()
                .all(|other| *other != mac && other.is_unicast())
        );
        assert!(others[0] != others[1] && others[0] != others[2]);
    }

    #[test]
    fn backends_and_options_are_read() {
        let tap = |name: Option<&str>, bridge: Option<&str>| NetBackend::Tap {
            name: name.map(str::to_owned),
            bridge: bridge.map(str::to_owned),
        };
        assert_eq!(parse("tap").backend, tap(None, None));
        assert_eq!(parse("tap0,").backend, tap(Some("tap0"), None));
        let spec = parse("tap:vm-1,bridge=br0,mac=02:00:00:00:00:FE,mtu=9000,queues=4,pcap=a.pcap");
        assert_eq!(spec.backend, tap(Some("vm-1"), Some("br0")));
        assert_eq!(spec.mac, Some(MacAddress([2, 0, 0, 0, 0, 0xfe])));
        assert_eq!((spec.mtu, spec.queues.get()), (Some(9000), 4));
        assert_eq!(spec.pcap, Some("a.pcap".into()));
        let fds = parse("fd=3:5,virtio=modern");
        assert_eq!(fds.backend, NetBackend::Fds(vec![3, 5]));
        assert_eq!((fds.queues.get(), fds.transport), (2, Transport::Modern));
        let listen = NetBackend::Listen("/tmp/s".into());
        assert_eq!(parse("socket,listen=/tmp/s").backend, listen);
        let connect = NetBackend::Connect("/tmp/s".into());
        assert_eq!(parse("socket,mtu=9000,connect=/tmp/s").backend, connect);
        let user = parse("user,hostfwd=tcp::2222-:22,guestfwd=tcp::80-127.0.0.2:8080");
        let at = |ip: [u8; 4], port| SocketAddrV4::new(ip.into(), port);
        let spec = UserSpec {
            hostfwd: vec![Forward {
                from: at([127, 0, 0, 1], 2222),
                to: at([10, 0, 2, 15], 22),
            }],
            guestfwd: vec![Forward {
                from: at([10, 0, 2, 2], 80),
                to: at([127, 0, 0, 2], 8080),
            }],
        };
        assert_eq!(user.backend, NetBackend::User(spec));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (conf, word) in [
            ("", "needs a backend"),
            ("eth0", "'eth0' is no backend"),
            ("tap:", "'' is no interface"),
            ("tap/1", "'tap/1' is no interface"),
            ("tap012345678901234", "is no interface"),
            ("tap0,bridge=", "'' is no interface"),
            ("tap0,hostfwd=tcp::1-:2", "a card at tap has no option"),
            ("user,bridge=br0", "a card at user has no option"),
            ("fd=", "no descriptors"),
            ("fd=2", "no descriptors"),
            ("fd=3:3", "no descriptors"),
            ("fd=3:4,queues=3", "2 descriptors serve 2 queues, not 3"),
            ("tap0,mac=1:2:3:4:5:6", "no address of a card"),
            ("tap0,mac=01:00:00:00:00:00", "no address of a card"),
            ("tap0,mac=00:00:00:00:00:00", "no address of a card"),
            ("tap0,mtu=67", "no packet size"),
            ("tap0,mtu=65536", "no packet size"),
            ("tap0,queues=0", "1 to 16 pairs"),
            ("tap0,queues=17", "1 to 16 pairs"),
            ("user,queues=2", "user has one pair"),
            ("tap0,pcap=", "pcap= needs a path"),
            ("socket", "one of listen=PATH and connect=PATH"),
            ("socket,listen=a,connect=b", "one of listen"),
            ("user,hostfwd=udp::1-:2", "no forwarding"),
            ("user,hostfwd=tcp::0-:2", "no forwarding"),
            ("user,guestfwd=tcp:1-2", "no forwarding"),
            ("user,hostfwd=tcp::2222-192.168.0.1:22", "10.0.2.0/24"),
            ("user,guestfwd=tcp:10.0.2.3:80-:80", "as 10.0.2.2"),
            ("tap0,speed=1", "no option 'speed=1'"),
        ] {
            let error = err(conf);
            assert!(error.contains(word), "{conf}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_answered(text in "(tap|user|socket|fd=3)?[,a-z0-9=:.-]{0,40}") {
            if let Ok(spec) = NetSpec::parse(&text) {
                proptest::prop_assert!((1..=MAX_QUEUES).contains(&spec.queues.get()));
            }
        }

        #[test]
        fn an_address_reads_back(bytes: [u8; 6]) {
            let mac = MacAddress(bytes);
            proptest::prop_assert_eq!(mac.to_string().parse() == Ok(mac), mac.is_unicast());
        }
    }
}
