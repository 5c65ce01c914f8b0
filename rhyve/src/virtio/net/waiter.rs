//! What a card's thread waits for.
//!
//! By epoll(7), as its set stays the same from wait to wait: a wait is one system call. The driver's kick
//! is told by its edge, so that nobody needs to read the counter.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vm_memory::VolatileSlice;

use super::bell::Bell;
use crate::net::{Port, Wait};

/// A port to wait for, to read or to write.
type Ready = (Arc<OwnedFd>, EpollFlags);

/// Waits for the bell, the driver's kick, and a port.
pub(super) struct Waiter {
    bell: Arc<Bell>,
    epoll: Epoll,
    /// What is in the set besides the bell and the kick.
    port: Option<Ready>,
    /// The thread waits in a port's receive.
    away: bool,
}

/// What [`Waiter::wait`] knows the bell by.
const BELL: u64 = 0;
const OTHER: u64 = 1;
/// How long to wait if the host has no room to say what for.
const BLIND: Duration = Duration::from_millis(10);

impl Waiter {
    /// For a queue whose driver kicks by `kick`.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(bell: Arc<Bell>, kick: impl AsFd) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL))?;
        let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        epoll.add(kick, EpollEvent::new(edge, OTHER))?;
        Ok(Self {
            bell,
            epoll,
            port: None,
            away: false,
        })
    }

    /// Whether the thread is to end.
    pub fn stopped(&self) -> bool {
        self.bell.stopped()
    }

    /// Waits for the bell, for a kick since the last time, for `port`, which is readable or writable by
    /// `flags`, and at most for `timeout`; false if nothing came in this time. A thread that is to end waits
    /// for nothing, for an earlier wait may have taken the ring that told it.
    pub fn wait(&mut self, port: Option<(&Wait, EpollFlags)>, timeout: Option<Duration>) -> bool {
        self.come_back();
        if self.stopped() {
            return true;
        }
        let mut timeout = timeout;
        let mut sooner = |limit| timeout = Some(timeout.map_or(limit, |now| now.min(limit)));
        let mut ready = None;
        if let Some((wait, flags)) = port {
            wait.timeout.into_iter().for_each(&mut sooner);
            ready = wait.fd.clone().map(|fd| (fd, flags));
        }
        if self.choose(ready).is_err() {
            sooner(BLIND);
        }
        let timeout = timeout.map_or(EpollTimeout::NONE, |timeout| {
            EpollTimeout::try_from(timeout).unwrap_or(EpollTimeout::MAX)
        });
        let mut events = [EpollEvent::empty(); 3];
        // Interrupted, for one: the caller looks at everything.
        let Ok(count) = self.epoll.wait(&mut events, timeout) else {
            return true;
        };
        if events.iter().take(count).any(|event| event.data() == BELL) {
            self.bell.hear();
        }
        count > 0
    }

    /// Receives a frame, and waits for it as long as the bell does not ring: in the port itself, if that can
    /// wait. Whatever else is done with the port then, [`Waiter::come_back`] comes first.
    ///
    /// # Errors
    /// `WouldBlock` if there may be something else to do; and those of the port.
    pub fn receive(
        &mut self,
        port: &Arc<dyn Port>,
        into: &[VolatileSlice<'_>],
    ) -> io::Result<usize> {
        if !self.away {
            self.away = self.bell.go_away(port);
        }
        if !self.away {
            self.wait(Some((&port.wait(), EpollFlags::EPOLLIN)), None);
        } else if self.bell.has_rung() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        port.receive(into)
    }

    /// The port does not wait any more.
    pub fn come_back(&mut self) {
        if std::mem::take(&mut self.away) {
            self.bell.come_back();
        }
    }

    /// Has `ready`, and no other port, in the set.
    fn choose(&mut self, ready: Option<Ready>) -> nix::Result<()> {
        let same = match (&self.port, &ready) {
            (Some(a), Some(b)) => Arc::ptr_eq(&a.0, &b.0) && a.1 == b.1,
            (None, None) => true,
            _ => false,
        };
        if same {
            return Ok(());
        }
        if let Some((fd, _)) = self.port.take() {
            self.epoll.delete(&fd)?;
        }
        if let Some((fd, flags)) = &ready {
            self.epoll.add(fd, EpollEvent::new(*flags, OTHER))?;
        }
        self.port = ready;
        Ok(())
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.come_back();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    const LONG: Option<Duration> = Some(Duration::from_secs(10));
    const NONE: Option<Duration> = Some(Duration::ZERO);

    fn waiter() -> (Arc<Bell>, EventFd, Waiter) {
        let bell = Arc::new(Bell::new().unwrap());
        let kick = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let waiter = Waiter::new(bell.clone(), &kick).unwrap();
        (bell, kick, waiter)
    }

    #[test]
    fn a_bell_rings_once_and_a_kick_kicks_once() {
        let (bell, kick, mut waiter) = waiter();
        assert!(!waiter.wait(None, NONE));
        bell.ring();
        assert!(waiter.wait(None, LONG));
        assert!(!waiter.wait(None, NONE));
        for _ in 0..3 {
            kick.write(1).unwrap();
            assert!(waiter.wait(None, LONG));
            assert!(!waiter.wait(None, NONE));
        }
        assert!(!waiter.stopped());
        bell.stop();
        assert!(waiter.stopped());
        for _ in 0..2 {
            assert!(waiter.wait(None, LONG), "it waits no more");
        }
    }

    #[test]
    fn a_port_is_waited_for_until_it_is_not() {
        let (_bell, _kick, mut waiter) = waiter();
        let (near, mut far) = UnixStream::pair().unwrap();
        let wait = Wait {
            fd: Some(Arc::new(near.try_clone().unwrap().into())),
            timeout: None,
        };
        let readable = Some((&wait, EpollFlags::EPOLLIN));
        assert!(!waiter.wait(readable, NONE));
        far.write_all(b"xy").unwrap();
        for _ in 0..2 {
            assert!(waiter.wait(readable, LONG), "there are bytes still");
        }
        assert!(!waiter.wait(None, NONE));
        (&near).read_exact(&mut [0]).unwrap();
        assert!(waiter.wait(readable, LONG), "there is one still");
        (&near).read_exact(&mut [0]).unwrap();
        assert!(!waiter.wait(readable, NONE));
        assert!(waiter.wait(Some((&wait, EpollFlags::EPOLLOUT)), LONG));
    }

    /// A port whose receive waits, or not, as a socket does.
    struct Waiting(OwnedFd);

    impl Port for Waiting {
        fn wait(&self) -> Wait {
            Wait::default()
        }

        fn receive(&self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
            vmm_api::scatter::receive(&self.0, into)
        }

        fn wait_in_receive(&self, wait: bool) -> bool {
            use nix::fcntl::{FcntlArg, OFlag, fcntl};
            let mut flags = OFlag::O_NONBLOCK;
            flags.set(OFlag::O_NONBLOCK, !wait);
            fcntl(&self.0, FcntlArg::F_SETFL(flags)).is_ok()
        }

        fn send(&self, _: &[VolatileSlice<'_>]) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn no_ring_is_lost_on_a_thread_that_waits_elsewhere() {
        let (bell, _kick, mut waiter) = waiter();
        let (near, far) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let port: Arc<dyn Port> = Arc::new(Waiting(near.into()));
        let heard = Arc::new(AtomicU32::new(0));
        let thread = std::thread::spawn({
            let heard = heard.clone();
            move || {
                let mut bytes = [0; 8];
                let mut frames = 0;
                while !waiter.stopped() {
                    match waiter.receive(&port, &[bytes.as_mut_slice().into()]) {
                        Ok(_) => frames += 1,
                        Err(error) => {
                            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                            assert!(waiter.wait(None, LONG));
                            heard.fetch_add(1, Relaxed);
                        }
                    }
                }
                frames
            }
        });
        let end = std::time::Instant::now() + Duration::from_secs(60);
        for ring in 0..3000 {
            let before = heard.load(Relaxed);
            if ring % 3 == 0 {
                far.send(&[0]).unwrap();
            }
            bell.ring();
            while heard.load(Relaxed) == before {
                assert!(std::time::Instant::now() < end, "ring {ring}");
                std::hint::spin_loop();
            }
        }
        bell.stop();
        let frames = thread.join().unwrap();
        assert!((1..=1000).contains(&frames), "{frames}");
    }

    #[test]
    fn the_shorter_time_counts() {
        let (_bell, _kick, mut waiter) = waiter();
        let wait = Wait {
            fd: None,
            timeout: NONE,
        };
        assert!(!waiter.wait(Some((&wait, EpollFlags::EPOLLIN)), LONG));
        assert!(!waiter.wait(Some((&wait, EpollFlags::EPOLLIN)), None));
    }
}
