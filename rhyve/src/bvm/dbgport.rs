//! The BVM debug port: a debugger on the host talks to the guest kernel's own gdb stub.
//!
//! The stub is the guest's (FreeBSD: `options GDB` and `device bvmdbg`); bytes pass as they are. The
//! port listens on loopback for one debugger after the other. bhyve stops the guest at its first
//! access until a debugger connects; here the guest goes on polling, which is what a stub does.

use std::sync::{Arc, Mutex, PoisonError};

use vmm_api::say;

use super::BytePort;
use super::byteport::PORTS;
use crate::bus::{InOut, IoSize, Overlap, PortBus};
use crate::console::{Attached, Console, ConsoleError};

/// Its port.
pub const DBGPORT: u16 = 0x224;
/// "BV".
const SIGNATURE: u16 = 0x4256;

/// Where a debugger can connect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DebugPort {
    /// Nowhere: there is no debug port.
    #[default]
    Absent,
    /// At a free TCP port of loopback, which is told when the guest wants a debugger.
    OnDemand,
    /// At this TCP port of loopback; 0 is a free one.
    At(u16),
}

/// Begins to listen for debuggers.
pub type Listen = Box<dyn FnOnce() -> Result<Attached, ConsoleError> + Send>;

/// The other end of the wire.
enum Far {
    /// Nobody listens yet.
    Closed(Listen),
    /// Debuggers can connect, and the guest has asked for none yet.
    Listening(Attached),
    /// The guest has asked for one.
    Wanted {
        /// Kept open by this.
        _attached: Option<Attached>,
    },
}

/// The device.
pub struct DbgPort {
    port: BytePort,
    far: Mutex<Far>,
}

impl DbgPort {
    /// A port that listens once the guest wants a debugger.
    pub fn on_demand(wire: Arc<Console>, listen: Listen) -> Arc<Self> {
        Self::new(wire, Far::Closed(listen))
    }

    /// A port that listens already.
    pub fn listening(wire: Arc<Console>, attached: Attached) -> Arc<Self> {
        Self::new(wire, Far::Listening(attached))
    }

    fn new(wire: Arc<Console>, far: Far) -> Arc<Self> {
        Arc::new(Self {
            port: BytePort::new(DBGPORT, SIGNATURE, wire),
            far: Mutex::new(far),
        })
    }

    /// Puts it at [`DBGPORT`].
    ///
    /// # Errors
    /// [`Overlap`].
    pub fn register(self: &Arc<Self>, bus: &PortBus) -> Result<(), Overlap> {
        bus.register(DBGPORT..=DBGPORT + PORTS - 1, "bvmdbg", self.clone())
    }

    /// The guest wants a debugger: says so once, and where one can connect.
    fn wanted(&self) {
        let mut far = self.far.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*far, Far::Wanted { .. }) {
            return;
        }
        let attached = match std::mem::replace(&mut *far, Far::Wanted { _attached: None }) {
            Far::Closed(listen) => match listen() {
                Ok(attached) => Some(attached),
                Err(error) => {
                    tracing::error!(target: "rhyve::bvm", %error, "the guest wants a debugger");
                    None
                }
            },
            Far::Listening(attached) => Some(attached),
            Far::Wanted { _attached } => _attached,
        };
        if let Some(place) = attached.as_ref().and_then(Attached::location) {
            say!("rhyve: bvmdbg: waiting for connection from gdb at {place}");
        }
        *far = Far::Wanted {
            _attached: attached,
        };
    }
}

impl InOut for DbgPort {
    // It has no state but its wire.
    fn saved(&self) -> bool {
        true
    }

    fn width(&self) -> IoSize {
        IoSize::Dword
    }

    fn read(&self, port: u16, size: IoSize) -> u32 {
        if self.port.is_data(port, size) {
            self.wanted();
        }
        self.port.read(port, size)
    }

    fn write(&self, port: u16, size: IoSize, value: u32) {
        if self.port.is_data(port, size) {
            self.wanted();
        }
        self.port.write(port, size, value);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::console::attach;
    use crate::mevent::Mevent;
    use crate::testing::FakeSuspend;

    #[test]
    fn it_listens_when_the_guest_wants_a_debugger() {
        let (bus, wire, mevent) = (PortBus::new(), Console::new(), Mevent::start().unwrap());
        let (told, place) = mpsc::channel();
        let far = wire.clone();
        let listen: Listen = Box::new(move || {
            let conf = "tcp=0".parse().unwrap();
            let attached = attach(&mevent, "bvmdbg", &conf, &far, FakeSuspend::new())?;
            told.send(attached.location().unwrap().to_owned()).unwrap();
            Ok(attached)
        });
        let dbgport = DbgPort::on_demand(wire, listen);
        dbgport.register(&bus).unwrap();
        // To look for it is not to want it.
        assert_eq!(bus.read(DBGPORT, IoSize::Word), Ok(0x4256));
        assert!(place.try_recv().is_err());
        assert_eq!(bus.read(DBGPORT, IoSize::Dword), Ok(u32::MAX));
        let mut gdb = TcpStream::connect(place.try_recv().unwrap()).unwrap();
        gdb.write_all(b"+\xff").unwrap();
        let mut heard = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(10);
        while heard.len() < 2 && Instant::now() < deadline {
            match bus.read(DBGPORT, IoSize::Dword).unwrap() {
                u32::MAX => std::thread::sleep(Duration::from_millis(1)),
                byte => heard.push(byte),
            }
        }
        assert_eq!(heard, [0x2b, 0xff], "no sign is extended");
        bus.write(DBGPORT, IoSize::Dword, u32::from(b'$')).unwrap();
        let mut answer = [0];
        gdb.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"$");
    }

    #[test]
    fn without_a_place_to_listen_nobody_comes() {
        let bus = PortBus::new();
        let listen: Listen = Box::new(|| {
            Err(ConsoleError::StdioTaken {
                name: "bvmdbg".to_owned(),
            })
        });
        DbgPort::on_demand(Console::new(), listen)
            .register(&bus)
            .unwrap();
        for _ in 0..3 {
            assert_eq!(bus.read(DBGPORT, IoSize::Dword), Ok(u32::MAX));
            bus.write(DBGPORT, IoSize::Dword, 0x2b).unwrap();
        }
    }
}
