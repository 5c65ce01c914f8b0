//! The BVM console, which FreeBSD's `device bvmconsole` and the probe kernels write to.

use std::sync::Arc;

use super::BytePort;
use super::byteport::PORTS;
use crate::bus::{InOut, IoSize, Overlap, PortBus};
use crate::console::Console;

/// Its port.
pub const CONSPORT: u16 = 0x220;
/// "bv".
const SIGNATURE: u16 = 0x6276;

/// The device.
struct ConsPort(BytePort);

/// Puts a console at [`CONSPORT`] whose other end is `wire`. The kernel polls for input, so nothing
/// tells it that some has come.
///
/// # Errors
/// [`Overlap`].
pub fn consport(wire: Arc<Console>, bus: &PortBus) -> Result<(), Overlap> {
    let port = ConsPort(BytePort::new(CONSPORT, SIGNATURE, wire));
    bus.register(CONSPORT..=CONSPORT + PORTS - 1, "bvmcons", Arc::new(port))
}

impl InOut for ConsPort {
    // It has no state but its wire.
    fn saved(&self) -> bool {
        true
    }

    fn width(&self) -> IoSize {
        IoSize::Dword
    }

    fn read(&self, port: u16, size: IoSize) -> u32 {
        self.0.read(port, size)
    }

    fn write(&self, port: u16, size: IoSize, value: u32) {
        self.0.write(port, size, value);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn device() -> (PortBus, Arc<Console>) {
        let (bus, wire) = (PortBus::new(), Console::new());
        consport(wire.clone(), &bus).unwrap();
        (bus, wire)
    }

    #[test]
    fn a_kernel_finds_it_and_bytes_go_both_ways() {
        let (bus, wire) = device();
        assert_eq!(bus.read(CONSPORT, IoSize::Word), Ok(0x6276));
        assert_eq!(bus.read(CONSPORT, IoSize::Byte), Ok(0xff));
        assert_eq!(bus.read(CONSPORT, IoSize::Dword), Ok(u32::MAX));
        wire.push_input(&[0, b'a', 0xff]);
        for byte in [0, 0x61, 0xff, u32::MAX] {
            assert_eq!(bus.read(CONSPORT, IoSize::Dword), Ok(byte));
        }
        // The low byte of 32-bit writes, and nothing else.
        bus.write(CONSPORT, IoSize::Dword, 0x1234_5641).unwrap();
        bus.write(CONSPORT, IoSize::Byte, 0x42).unwrap();
        bus.write(CONSPORT, IoSize::Word, 0x43).unwrap();
        bus.write(CONSPORT + 1, IoSize::Byte, 0x44).unwrap();
        let mut sent = [0; 8];
        assert_eq!(wire.peek_output(&mut sent), 1);
        assert_eq!(sent[0], b'A');
    }

    #[test]
    fn a_reader_that_stopped_is_waited_for_once() {
        let (bus, wire) = device();
        let start = Instant::now();
        for _ in 0..8192 {
            bus.write(CONSPORT, IoSize::Dword, b'.'.into()).unwrap();
        }
        let waited = start.elapsed();
        assert!(waited >= Duration::from_millis(900), "{waited:?}");
        assert!(waited < Duration::from_secs(10), "{waited:?}");
        // Once it reads again, nothing is lost.
        wire.consume_output(4096);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0..6000u32 {
                    bus.write(CONSPORT, IoSize::Dword, n % 251).unwrap();
                }
            });
            let mut got = Vec::new();
            let deadline = Instant::now() + Duration::from_secs(30);
            while got.len() < 6000 && Instant::now() < deadline {
                let mut piece = [0; 100];
                let count = wire.peek_output(&mut piece);
                got.extend_from_slice(&piece[..count]);
                wire.consume_output(count);
            }
            assert!(
                got.iter()
                    .copied()
                    .eq((0..6000u32).map(|n| (n % 251) as u8))
            );
        });
    }
}
