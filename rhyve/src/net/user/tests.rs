use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, IpCidr};

use super::frames::Frames;
use super::*;
use crate::config::{Forward, GATEWAY, GUEST};

const MAC: EthernetAddress = EthernetAddress([0, 0xa0, 0x98, 1, 2, 3]);

/// A guest on the network, with one TCP socket.
struct Guest {
    _user: User,
    frames: Frames,
    interface: Interface,
    sockets: SocketSet<'static>,
    tcp: SocketHandle,
}

impl Guest {
    fn new(spec: &UserSpec) -> Self {
        Self::with_mtu(spec, 1500)
    }

    fn with_mtu(spec: &UserSpec, mtu: u16) -> Self {
        let user = User::start(spec, Some(mtu)).unwrap();
        let mut frames = Frames::new(user.port.0.try_clone().unwrap(), mtu);
        // As a card does, or both ends would wait for each other.
        frames.most_waiting = usize::MAX;
        let config = Config::new(MAC.into());
        let mut interface = Interface::new(config, &mut frames, Instant::now());
        interface.update_ip_addrs(|all| all.push(IpCidr::new(GUEST.into(), 24)).unwrap());
        let mut sockets = SocketSet::new(Vec::new());
        let buffer = || tcp::SocketBuffer::new(vec![0; 32 << 10]);
        let tcp = sockets.add(tcp::Socket::new(buffer(), buffer()));
        Self {
            _user: user,
            frames,
            interface,
            sockets,
            tcp,
        }
    }

    fn tcp(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.tcp)
    }

    fn connect(&mut self, to: Ipv4Addr, port: u16) {
        let socket: &mut tcp::Socket<'_> = self.sockets.get_mut(self.tcp);
        let to = (to, port);
        socket.connect(self.interface.context(), to, 5555).unwrap();
    }

    /// Lives until something is so.
    fn until(&mut self, what: &str, mut so: impl FnMut(&mut tcp::Socket<'static>) -> bool) {
        let end = std::time::Instant::now() + Duration::from_secs(20);
        while !so(self.tcp()) {
            let (frames, sockets) = (&mut self.frames, &mut self.sockets);
            self.interface.poll(Instant::now(), frames, sockets);
            let state = self.tcp().state();
            assert!(std::time::Instant::now() < end, "in vain: {what}; {state}");
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Sends back whatever comes, until the other side ends and all of it has gone.
    fn echo(&mut self) {
        self.until("the other's end", |socket| {
            while socket.can_recv() && socket.can_send() {
                let mut bytes = [0; 1000];
                let room = socket.send_capacity() - socket.send_queue();
                let wanted = room.min(bytes.len());
                let got = socket.recv_slice(&mut bytes[..wanted]).unwrap();
                assert_eq!(socket.send_slice(&bytes[..got]).unwrap(), got);
            }
            !socket.may_recv() && !socket.can_recv()
        });
        self.tcp().close();
        self.until("its end", |socket| !socket.is_active());
    }
}

fn any_port() -> (TcpListener, SocketAddrV4) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let SocketAddr::V4(address) = listener.local_addr().unwrap() else {
        unreachable!("it is IPv4");
    };
    (listener, address)
}

/// What is written and read back over a connection, byte for byte.
fn mirrored(stream: &TcpStream) {
    let bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let sent = bytes.clone();
    let write = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    (&mut &*stream).read_to_end(&mut got).unwrap();
    write.join().unwrap();
    assert!(got == bytes, "{} bytes", got.len());
}

#[test]
fn the_hosts_connections_reach_the_guest() {
    let (listener, from) = any_port();
    drop(listener);
    let to = SocketAddrV4::new(GUEST, 22);
    let mut guest = Guest::new(&UserSpec {
        hostfwd: vec![Forward { from, to }],
        guestfwd: Vec::new(),
    });
    for _ in 0..2 {
        guest.tcp().abort();
        guest.tcp().listen(22).unwrap();
        let client = thread::spawn(move || mirrored(&TcpStream::connect(from).unwrap()));
        guest.until("a connection", |socket| socket.may_recv());
        let peer = guest.tcp().remote_endpoint().unwrap();
        assert_eq!(peer.addr, GATEWAY.into());
        guest.echo();
        client.join().unwrap();
    }
    // Nobody listens: the host hears of it.
    let mut stream = TcpStream::connect(from).unwrap();
    let client = thread::spawn(move || stream.read(&mut [0]).unwrap_err().kind());
    guest.until("a refusal", |_| client.is_finished());
    assert_eq!(client.join().unwrap(), io::ErrorKind::ConnectionReset);
}

#[test]
fn the_guest_reaches_what_is_forwarded_and_nothing_else() {
    let (listener, to) = any_port();
    let (closed, nowhere) = any_port();
    drop(closed);
    let forward = |port, to| Forward {
        from: SocketAddrV4::new(GATEWAY, port),
        to,
    };
    let mut guest = Guest::new(&UserSpec {
        hostfwd: Vec::new(),
        guestfwd: vec![forward(80, to), forward(81, nowhere)],
    });
    let server = thread::spawn(move || {
        for _ in 0..2 {
            mirrored(&listener.accept().unwrap().0);
        }
        listener
    });
    for _ in 0..2 {
        guest.connect(GATEWAY, 80);
        guest.until("a connection", |socket| socket.may_recv());
        guest.echo();
        guest.tcp().abort();
    }
    let listener = server.join().unwrap();
    // Forwarded to where nobody listens; the very port of the host's that another is forwarded to.
    for port in [81, to.port()] {
        guest.connect(GATEWAY, port);
        guest.until("a reset", |socket| !socket.is_open());
    }
    for other in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(10, 0, 2, 3)] {
        guest.connect(other, to.port());
        let start = std::time::Instant::now();
        guest.until("a while", |socket| {
            assert!(!socket.may_send(), "{other}");
            start.elapsed() > Duration::from_millis(300)
        });
        guest.tcp().abort();
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "nothing came");
}

#[test]
fn packets_are_as_large_as_is_said() {
    for mtu in [68, 576, 9000, 65_535] {
        let (listener, to) = any_port();
        let from = SocketAddrV4::new(GATEWAY, 80);
        let mut guest = Guest::with_mtu(
            &UserSpec {
                hostfwd: Vec::new(),
                guestfwd: vec![Forward { from, to }],
            },
            mtu,
        );
        let server = thread::spawn(move || mirrored(&listener.accept().unwrap().0));
        guest.connect(GATEWAY, 80);
        guest.until(&format!("a connection with {mtu}"), |socket| {
            socket.may_recv()
        });
        guest.echo();
        server.join().unwrap();
    }
}

#[test]
fn a_place_that_is_taken_is_an_error() {
    let (_listener, from) = any_port();
    let spec = UserSpec {
        hostfwd: vec![Forward {
            from,
            to: SocketAddrV4::new(GUEST, 22),
        }],
        guestfwd: Vec::new(),
    };
    let Err(error) = User::start(&spec, None) else {
        panic!("{from} was free");
    };
    let text = crate::chain(&error);
    assert!(
        text.contains(&format!("cannot listen at {from} for hostfwd: Address")),
        "{text}"
    );
}

/// A client's message.
fn message(kind: DhcpMessageType, wanted: Option<Ipv4Addr>, server: Option<Ipv4Addr>) -> Vec<u8> {
    let repr = DhcpRepr {
        message_type: kind,
        transaction_id: 0x1234_5678,
        secs: 1,
        client_hardware_address: MAC,
        client_ip: Ipv4Addr::UNSPECIFIED,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: false,
        requested_ip: wanted,
        client_identifier: Some(MAC),
        server_identifier: server,
        parameter_request_list: Some(&[1, 3, 6]),
        dns_servers: None,
        max_size: Some(1400),
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut DhcpPacket::new_unchecked(&mut bytes))
        .unwrap();
    bytes
}

#[test]
fn an_address_is_offered_lent_and_no_other() {
    use DhcpMessageType::*;
    let ask = |kind, wanted, server| {
        let answer = dhcp::answer(&message(kind, wanted, server), 1400)?;
        let packet = DhcpPacket::new_checked(&answer[..]).unwrap();
        let repr = DhcpRepr::parse(&packet).unwrap();
        assert_eq!(repr.transaction_id, 0x1234_5678);
        assert_eq!((repr.router, repr.server_identifier), (None, Some(GATEWAY)));
        let mtu = packet.options().find(|option| option.kind == 26);
        assert_eq!(
            mtu.is_some_and(|mtu| mtu.data == [5, 0x78]),
            repr.message_type != Nak
        );
        Some((repr.message_type, repr.your_ip))
    };
    assert_eq!(ask(Discover, None, None), Some((Offer, GUEST)));
    assert_eq!(ask(Request, Some(GUEST), Some(GATEWAY)), Some((Ack, GUEST)));
    let other = Ipv4Addr::new(192, 168, 1, 2);
    assert_eq!(
        ask(Request, Some(other), None),
        Some((Nak, Ipv4Addr::UNSPECIFIED))
    );
    assert_eq!(ask(Request, Some(GUEST), Some(other)), None);
    assert_eq!(ask(Release, None, None), None);
}

proptest! {
    #[test]
    fn any_message_is_answered_or_not(bytes: Vec<u8>, at: usize, value: u8) {
        let _ = dhcp::answer(&bytes, 1500);
        let mut nearly = message(DhcpMessageType::Discover, None, None);
        let at = at % nearly.len();
        nearly[at] = value;
        let _ = dhcp::answer(&nearly, 1500);
    }
}

#[test]
fn frames_that_make_no_sense_do_no_harm() {
    let mut guest = Guest::new(&UserSpec::default());
    let mut random = 1u32;
    for round in 0..3000 {
        let mut frame = vec![0u8; round % 200 + 1];
        for byte in &mut frame {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (random >> 24) as u8;
        }
        // To us, of a kind that is looked at.
        let head = [
            0x52,
            0x55,
            10,
            0,
            2,
            2,
            2,
            0,
            0,
            0,
            0,
            9,
            8,
            [0, 6][round % 2],
            0x45,
            0,
        ];
        let len = head.len().min(frame.len());
        frame[..len].copy_from_slice(&head[..len]);
        let port = &guest._user.port;
        while port.send(&[frame.as_mut_slice().into()]).is_err() {
            thread::sleep(Duration::from_micros(100));
        }
    }
    guest.connect(GATEWAY, 9);
    guest.until("a reset", |socket| !socket.is_open());
}
