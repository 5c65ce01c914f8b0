//! Consoles: what a guest's serial line is connected to on the host.
//!
//! A [`Console`] is the wire: two bounded buffers with a device model (a [`GuestEnd`]) on one side
//! and the host's terminal, socket or file (a [`HostEnd`]) on the other. Neither knows the other, and
//! neither ever waits for it: the device moves bytes on virtual CPU threads, the host's end moves
//! them on the event thread ([`attach`]).
//!
//! Flow control is by room, in both directions: the host's end reads no more than the wire takes,
//! so that input is never lost, and a device shows its guest a busy transmitter while the wire is
//! full, so that a reader that is slow, or stopped, loses nothing either.
//!
//! **Latency and cost.** A guest's byte is one exit; adding a system call to each would be waste. The
//! first byte into an empty wire arms a timer ([`COALESCE`]), and what has gathered when it expires
//! leaves with one write(2). Output that fills the wire is fetched at once.

mod attach;
mod conf;
mod driver;
mod endpoint;
mod escape;
mod terminal;

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

pub use attach::{Attached, ConsoleError, attach};
pub use conf::{ConfError, ConsoleConf};
pub use terminal::restore_terminals;

/// How long the first byte of a burst waits for company. A 16550A at 115200 baud needs 1.4 ms to
/// empty its FIFO, so no guest sees a slower line than it would on a board.
pub const COALESCE: Duration = Duration::from_millis(1);

/// When a guest first had something to say on any wire of this process.
static FIRST_OUTPUT: OnceLock<Instant> = OnceLock::new();

/// When the guest sent its first byte to a console, if it has.
pub fn first_output() -> Option<Instant> {
    FIRST_OUTPUT.get().copied()
}

/// Bytes of output the wire holds.
const OUTPUT_CAPACITY: usize = 4096;
/// Bytes of input the wire holds.
const INPUT_CAPACITY: usize = 1024;

/// When the host's end is wanted on the event thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Within [`COALESCE`].
    Soon,
    /// As soon as possible.
    Now,
}

/// The host's end of a wire.
pub trait HostEnd: Send + Sync {
    /// There is output to fetch or room for input. Called with a device's lock held: it only posts.
    fn wake(&self, when: Wake);
}

/// The device's end of a wire.
pub trait GuestEnd: Send + Sync {
    /// Input has come, output has gone, or a wake-up the device asked for is due. Called on the event
    /// thread without locks.
    fn console_event(&self);
}

#[derive(Default)]
struct Buffers {
    input: VecDeque<u8>,
    output: VecDeque<u8>,
    /// Bytes of output dropped because nobody was there.
    dropped: u64,
    /// The host's end was there, and left.
    host_gone: bool,
    /// Somebody is at the host's end: a client, a terminal, a file.
    attended: bool,
    /// Columns and rows of the terminal there.
    size: Option<(u16, u16)>,
}

/// A wire between a device model and the host.
///
/// Without a host's end it keeps what is sent until it is full, which is what tests want; once its
/// host's end is gone, it drops what is sent, and counts it.
#[derive(Default)]
pub struct Console {
    buffers: Mutex<Buffers>,
    /// Output has gone.
    room: Condvar,
    host: OnceLock<Weak<dyn HostEnd>>,
    guest: OnceLock<Weak<dyn GuestEnd>>,
}

impl Console {
    /// A wire with both ends open.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn buffers(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects the device. The first one stays.
    pub fn connect_guest(&self, guest: Weak<dyn GuestEnd>) {
        let _ = self.guest.set(guest);
    }

    /// Connects the host. The first one stays.
    pub fn connect_host(&self, host: Weak<dyn HostEnd>) {
        let _ = self.host.set(host);
    }

    /// Host: leaves. From now on what is sent is dropped.
    pub fn disconnect_host(&self) {
        self.buffers().host_gone = true;
        self.discard_output();
    }

    /// Device: as [`Console::send`], for one that has no busy transmitter to show: waits up to
    /// `patience` for room.
    pub fn send_within(&self, byte: u8, patience: Duration) -> bool {
        if self.send(byte) {
            return true;
        }
        self.wake(Wake::Now);
        let full = |buffers: &mut Buffers| buffers.output.len() >= OUTPUT_CAPACITY;
        let waited = self
            .room
            .wait_timeout_while(self.buffers(), patience, full)
            .unwrap_or_else(PoisonError::into_inner);
        drop(waited);
        self.send(byte)
    }

    /// Device: asks for a [`GuestEnd::console_event`].
    pub fn wake(&self, when: Wake) {
        if let Some(host) = self.host.get().and_then(Weak::upgrade) {
            host.wake(when);
        }
    }

    /// Device: one byte to the host; false, and the byte not taken, if the wire is full.
    pub fn send(&self, byte: u8) -> bool {
        self.send_some(&[byte]) == 1
    }

    /// Device: bytes to the host; returns how many of them the wire takes.
    pub fn send_some(&self, bytes: &[u8]) -> usize {
        const HALF: usize = OUTPUT_CAPACITY / 2;
        FIRST_OUTPUT.get_or_init(Instant::now);
        let mut buffers = self.buffers();
        if buffers.host_gone {
            buffers.dropped += bytes.len() as u64;
            return bytes.len();
        }
        let before = buffers.output.len();
        let taken = bytes.len().min(OUTPUT_CAPACITY.saturating_sub(before));
        buffers.output.extend(bytes.iter().take(taken));
        drop(buffers);
        if before < HALF && before + taken >= HALF {
            self.wake(Wake::Now);
        } else if before == 0 && taken != 0 {
            self.wake(Wake::Soon);
        }
        taken
    }

    /// Device: whether somebody is at the host's end.
    pub fn is_attended(&self) -> bool {
        self.buffers().attended
    }

    /// Device: columns and rows of the terminal at the host's end, if there is one.
    pub fn size(&self) -> Option<(u16, u16)> {
        self.buffers().size
    }

    /// Host: whether somebody is there, and the size of the terminal. True if that is news, which the
    /// device is then to be told ([`Console::notify_guest`]).
    pub(crate) fn set_host(&self, attended: bool, size: Option<(u16, u16)>) -> bool {
        let mut buffers = self.buffers();
        // A terminal that is gone keeps its size.
        let size = size.or(buffers.size);
        let news = (buffers.attended, buffers.size) != (attended, size);
        (buffers.attended, buffers.size) = (attended, size);
        news
    }

    /// Device: how many bytes [`Console::send`] takes now.
    pub fn send_room(&self) -> usize {
        OUTPUT_CAPACITY - self.buffers().output.len()
    }

    /// Device: whether [`Console::receive`] has something.
    pub fn has_input(&self) -> bool {
        !self.buffers().input.is_empty()
    }

    /// Device: the next byte from the host.
    pub fn receive(&self) -> Option<u8> {
        let mut byte = [0];
        (self.receive_some(&mut byte) == 1).then_some(byte[0])
    }

    /// Device: what has come from the host, as far as there is room for it; returns how much.
    pub fn receive_some(&self, into: &mut [u8]) -> usize {
        const HALF: usize = INPUT_CAPACITY / 2;
        let mut buffers = self.buffers();
        let before = buffers.input.len();
        let taken = before.min(into.len());
        for (to, from) in into.iter_mut().zip(buffers.input.drain(..taken)) {
            *to = from;
        }
        drop(buffers);
        // The host's end stopped reading near the top, and starts again half-way down.
        if before >= HALF && before - taken < HALF {
            self.wake(Wake::Soon);
        }
        taken
    }

    /// Device: what there is to receive, without taking it.
    pub fn pending_input(&self) -> Vec<u8> {
        self.buffers().input.iter().copied().collect()
    }

    /// Device: puts input before what there is to receive.
    pub fn put_back(&self, bytes: &[u8]) {
        let mut buffers = self.buffers();
        for &byte in bytes.iter().rev() {
            buffers.input.push_front(byte);
        }
    }

    /// Host: how many bytes of input fit.
    pub fn input_room(&self) -> usize {
        INPUT_CAPACITY.saturating_sub(self.buffers().input.len())
    }

    /// Host: input for the device; returns how much of it was taken.
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        let mut buffers = self.buffers();
        let room = INPUT_CAPACITY.saturating_sub(buffers.input.len());
        let taken = bytes.len().min(room);
        buffers.input.extend(bytes.iter().take(taken));
        drop(buffers);
        self.notify_guest();
        taken
    }

    /// Host: tells the device to look at the wire.
    pub fn notify_guest(&self) {
        if let Some(guest) = self.guest.get().and_then(Weak::upgrade) {
            guest.console_event();
        }
    }

    /// Host: copies pending output into `into` without taking it; returns how much.
    pub fn peek_output(&self, into: &mut [u8]) -> usize {
        let buffers = self.buffers();
        into.iter_mut()
            .zip(&buffers.output)
            .map(|(to, from)| *to = *from)
            .count()
    }

    /// Host: takes `count` bytes of output that were written out.
    pub fn consume_output(&self, count: usize) {
        let mut buffers = self.buffers();
        let count = count.min(buffers.output.len());
        buffers.output.drain(..count);
        self.room.notify_all();
    }

    /// Host: throws pending output away, because nobody is there to read it.
    pub fn discard_output(&self) {
        let mut buffers = self.buffers();
        buffers.dropped += buffers.output.len() as u64;
        buffers.output.clear();
        self.room.notify_all();
    }

    /// Bytes of output dropped because nobody was there.
    pub fn dropped(&self) -> u64 {
        self.buffers().dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mevent::Mevent;
    use crate::suspend::SuspendHow;
    use crate::testing::FakeSuspend;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Instant;

    /// Waits for `done`, and fails after ten seconds.
    fn until(what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(10), "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn send(console: &Console, text: &[u8]) {
        for &byte in text {
            until("room", || console.send(byte));
        }
    }

    fn received(console: &Console, count: usize) -> Vec<u8> {
        let mut got = Vec::new();
        until("input", || {
            got.extend(std::iter::from_fn(|| console.receive()));
            got.len() >= count
        });
        got
    }

    fn open(conf: &str) -> (Arc<Mevent>, Arc<Console>, Attached) {
        let (mevent, console) = (Mevent::start().unwrap(), Console::new());
        let conf = conf.parse().unwrap();
        let attached = attach(&mevent, "com1", &conf, &console, FakeSuspend::new()).unwrap();
        (mevent, console, attached)
    }

    fn exchange(console: &Console, mut client: impl Read + Write + Send) {
        // Until a client is let in, output goes nowhere.
        client.write_all(b"\r").unwrap();
        assert_eq!(received(console, 1), b"\r");
        send(console, b"login: ");
        let mut prompt = [0; 7];
        client.read_exact(&mut prompt).unwrap();
        assert_eq!(&prompt, b"login: ");
        let typed: Vec<u8> = (0..5000).map(|i| b'a' + (i % 26) as u8).collect();
        thread::scope(|scope| {
            scope.spawn(|| client.write_all(&typed).unwrap());
            assert_eq!(received(console, typed.len()), typed);
        });
    }

    #[test]
    fn tcp_serves_one_client_after_the_other() {
        let (_mevent, console, attached) = open("tcp=0");
        let address = attached.location().unwrap().to_owned();
        for _ in 0..2 {
            send(&console, b"nobody reads this");
            until("discarded", || console.send_room() == OUTPUT_CAPACITY);
            let first = TcpStream::connect(&address).unwrap();
            exchange(&console, &first);
            let mut second = TcpStream::connect(&address).unwrap();
            assert_eq!(second.read(&mut [0]).unwrap_or(0), 0, "refused");
            drop(first);
            // The next client is refused until the end of the first is noticed.
            thread::sleep(Duration::from_millis(50));
        }
        assert!(console.dropped() >= 17);
    }

    #[test]
    fn unix_socket_is_made_replaced_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("com1");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let conf = format!("unix:{}", path.display());
        let (mevent, console, attached) = open(&conf);
        let client = UnixStream::connect(&path).unwrap();
        exchange(&console, &client);
        let again = attach(
            &mevent,
            "com2",
            &conf.parse().unwrap(),
            &Console::new(),
            FakeSuspend::new(),
        );
        assert!(matches!(again, Err(ConsoleError::Open { .. })), "in use");
        send(&console, b"bye");
        drop(attached);
        assert!(!path.exists());
        let mut last = String::new();
        (&client).read_to_string(&mut last).unwrap();
        assert_eq!(last, "bye", "flushed at the end");
    }

    #[test]
    fn pty_waits_for_somebody_and_loses_nothing_then() {
        let (_mevent, console, attached) = open("pty");
        let path = attached.location().unwrap().to_owned();
        send(&console, &[b'.'; 3 * OUTPUT_CAPACITY]);
        until("discarded", || console.send_room() == OUTPUT_CAPACITY);
        for _ in 0..2 {
            let mut slave = File::options().read(true).write(true).open(&path).unwrap();
            thread::sleep(Duration::from_millis(300));
            slave.write_all(b"ls\r").unwrap();
            assert_eq!(received(&console, 3), b"ls\r");
            let sent: Vec<u8> = (0..40_000).map(|i| (i % 251) as u8).collect();
            thread::scope(|scope| {
                scope.spawn(|| send(&console, &sent));
                thread::sleep(Duration::from_millis(20));
                let mut got = vec![0; sent.len()];
                slave.read_exact(&mut got).unwrap();
                assert_eq!(got, sent);
            });
            drop(slave);
            thread::sleep(Duration::from_millis(50));
        }
    }

    #[test]
    fn file_is_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for _ in 0..2 {
            let (_mevent, console, attached) = open(&format!("file:{}", path.display()));
            send(&console, b"boot\n");
            drop(attached);
            send(&console, b"too late");
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "boot\nboot\n");
    }

    #[test]
    fn a_terminal_device_becomes_raw_and_is_given_back() {
        use nix::sys::termios::tcgetattr;
        let pty = nix::pty::openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let path = nix::unistd::ttyname(&pty.slave).unwrap();
        let (_mevent, console, attached) = open(path.to_str().unwrap());
        assert_ne!(tcgetattr(&pty.slave).unwrap(), before);
        exchange(&console, File::from(pty.master.try_clone().unwrap()));
        drop(attached);
        assert_eq!(tcgetattr(&pty.slave).unwrap(), before);
    }

    #[test]
    fn stdio_belongs_to_one_line() {
        // Standard input of a test may be anything, so nothing is read or written here.
        let mevent = Mevent::start().unwrap();
        let suspend = FakeSuspend::new();
        let attach = |name| {
            attach(
                &mevent,
                name,
                &ConsoleConf::Stdio,
                &Console::new(),
                suspend.clone(),
            )
        };
        let first = attach("com1").unwrap();
        let second = attach("com2").err().unwrap();
        assert_eq!(
            second.to_string(),
            "com2: standard input and output are another console's already"
        );
        drop(first);
        drop(attach("com2").unwrap());
        assert_eq!(suspend.requests(), Vec::<SuspendHow>::new());
    }
}
