//! File I/O straight into and out of guest memory.
//!
//! preadv(2) and pwritev2(2), and readv(2) and writev(2) for what comes in datagrams, over
//! [`VolatileSlice`]s: the kernel copies between what it has and the guest's pages, no buffer of ours
//! is in between and no reference to guest memory is formed. Guest pages that cannot be had (their
//! file system is full) are an error here (EFAULT), not a signal.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::libc;
use smallvec::SmallVec;
use vm_memory::VolatileSlice;

/// Most buffers of one system call (UIO_MAXIOV).
pub(crate) const MAX_BUFFERS: usize = 1024;

/// Buffers of most calls, without an allocation.
const FEW: usize = 4;

/// Pieces of guest memory for one call.
pub type Slices<'m> = SmallVec<[VolatileSlice<'m>; FEW]>;

/// Fills `to`, one slice after the other, from `offset` on.
///
/// # Errors
///
/// `UnexpectedEof` if the file ends before; otherwise what the system says. Some of the slices may
/// have been written then.
pub fn read_exact_at(file: impl AsFd, to: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    transfer(to, offset, io::ErrorKind::UnexpectedEof, |buffers, at| {
        let count = buffers.len() as libc::c_int;
        // SAFETY: each buffer is a part of a live mapping, kept so by the guards in `transfer`, and
        // the memory is volatile: nothing assumes that it does not change.
        unsafe { libc::preadv(fd, buffers.as_ptr(), count, at) }
    })
}

/// Writes all of `from` to `offset`. If `durable`, it and what is needed to find it are on stable
/// storage when this returns (RWF_DSYNC).
///
/// # Errors
///
/// What the system says. Some of it may have been written then.
pub fn write_all_at(
    file: impl AsFd,
    from: &[VolatileSlice<'_>],
    offset: u64,
    durable: bool,
) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    transfer(from, offset, io::ErrorKind::WriteZero, |buffers, at| {
        let count = buffers.len() as libc::c_int;
        // SAFETY: as in `read_exact_at`; the kernel only reads them.
        unsafe { libc::pwritev2(fd, buffers.as_ptr(), count, at, flags) }
    })
}

/// Receives one datagram or frame into `to`, one slice after the other, and returns its bytes.
///
/// # Errors
///
/// What the system says; `InvalidInput` for more than 1024 slices.
pub fn receive(file: impl AsFd, to: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let fd = file.as_fd().as_raw_fd();
    once(to, |buffers, count| {
        // SAFETY: as in `read_exact_at`.
        unsafe { libc::readv(fd, buffers, count) }
    })
}

/// Sends one datagram or frame, and returns how many of its bytes were taken.
///
/// # Errors
///
/// What the system says; `InvalidInput` for more than 1024 slices.
pub fn send(file: impl AsFd, from: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let fd = file.as_fd().as_raw_fd();
    once(from, |buffers, count| {
        // SAFETY: as in `read_exact_at`; the kernel only reads them.
        unsafe { libc::writev(fd, buffers, count) }
    })
}

/// One call with all of `slices`.
fn once(
    slices: &[VolatileSlice<'_>],
    call: impl Fn(*const libc::iovec, libc::c_int) -> isize,
) -> io::Result<usize> {
    if slices.len() > MAX_BUFFERS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let guards: SmallVec<[_; FEW]> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let buffers: SmallVec<[_; FEW]> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    loop {
        let done = call(buffers.as_ptr(), buffers.len() as libc::c_int);
        match usize::try_from(done) {
            Ok(done) => return Ok(done),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// Repeats `call` until all of `slices` is through; a transfer of nothing is the error `at_end`.
fn transfer(
    slices: &[VolatileSlice<'_>],
    offset: u64,
    at_end: io::ErrorKind,
    call: impl Fn(&[libc::iovec], libc::off_t) -> isize,
) -> io::Result<()> {
    let guards: Vec<_> = slices
        .iter()
        .filter(|slice| !slice.is_empty())
        .map(|slice| slice.ptr_guard_mut())
        .collect();
    let mut buffers: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let mut rest = buffers.as_mut_slice();
    let mut at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(MAX_BUFFERS)];
        let done = match usize::try_from(call(now, at)) {
            Ok(0) => return Err(at_end.into()),
            Ok(done) => done,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        at = libc::off_t::try_from(done)
            .ok()
            .and_then(|done| at.checked_add(done))
            .ok_or(io::ErrorKind::InvalidInput)?;
        rest = advance(rest, done);
    }
    Ok(())
}

/// What is left of `buffers` after their first `done` bytes.
pub(crate) fn advance(mut buffers: &mut [libc::iovec], mut done: usize) -> &mut [libc::iovec] {
    while let Some(first) = buffers.first_mut() {
        if done < first.iov_len {
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
            first.iov_len -= done;
            break;
        }
        done -= first.iov_len;
        buffers = &mut buffers[1..];
    }
    buffers
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    use super::*;

    #[test]
    fn datagrams_pass_whole_and_are_cut_to_what_there_is_room_for() {
        let memory = memory();
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let slice = |at, len| memory.get_slice(GuestAddress(at), len).unwrap();
        memory.write_slice(b"hello", GuestAddress(0x10)).unwrap();
        let from = [slice(0x10, 2), slice(0x12, 3)];
        assert_eq!(send(&ours, &from).unwrap(), 5);
        assert_eq!(
            receive(&theirs, &[slice(0x100, 1), slice(0x200, 9)]).unwrap(),
            5
        );
        let mut got = [0; 4];
        memory.read_slice(&mut got, GuestAddress(0x200)).unwrap();
        assert_eq!(&got, b"ello");
        send(&ours, &from).unwrap();
        assert_eq!(receive(&theirs, &[slice(0x300, 3)]).unwrap(), 3);
        let many = vec![slice(0, 1); MAX_BUFFERS + 1];
        let error = send(&ours, &many).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap()
    }

    fn file(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    fn slices<'a>(memory: &'a GuestMemoryMmap, at: &[(u64, usize)]) -> Vec<VolatileSlice<'a>> {
        let slice = |&(gpa, len)| memory.get_slice(GuestAddress(gpa), len).unwrap();
        at.iter().map(slice).collect()
    }

    #[test]
    fn the_end_of_the_file_is_an_error() {
        let memory = memory();
        let file = file(b"abcdef");
        let to = slices(&memory, &[(0, 4), (100, 4)]);
        let error = read_exact_at(&file, &to, 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(
            memory.read_obj::<[u8; 4]>(GuestAddress(0)).unwrap(),
            *b"abcd"
        );
        read_exact_at(&file, &slices(&memory, &[(200, 2)]), 4).unwrap();
        assert_eq!(
            memory.read_obj::<[u8; 2]>(GuestAddress(200)).unwrap(),
            *b"ef"
        );
        assert!(read_exact_at(&file, &to, u64::MAX).is_err());
    }

    #[test]
    fn a_descriptor_that_cannot_be_written_says_so() {
        let memory = memory();
        let file = File::open("/dev/null").unwrap();
        let from = slices(&memory, &[(0, 4)]);
        let error = write_all_at(&file, &from, 0, false).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }

    proptest! {
        /// More buffers than one call takes among them.
        #[test]
        fn what_is_written_reads_back(
            lens in prop::collection::vec(0usize..40, 0..1500),
            offset in 0u64..5000,
            durable: bool,
        ) {
            let memory = memory();
            let mut gpa = 0;
            let ranges: Vec<_> = lens.iter().map(|&len| {
                gpa += len as u64 + 1;
                (gpa - len as u64, len)
            }).filter(|(gpa, len)| gpa + (*len as u64) < 1 << 16).collect();
            for &(gpa, len) in &ranges {
                let bytes: Vec<u8> = (0..len).map(|i| (gpa as usize + i) as u8).collect();
                memory.write_slice(&bytes, GuestAddress(gpa)).unwrap();
            }
            let file = file(b"");
            write_all_at(&file, &slices(&memory, &ranges), offset, durable).unwrap();
            let other = self::memory();
            read_exact_at(&file, &slices(&other, &ranges), offset).unwrap();
            for &(gpa, len) in &ranges {
                let (mut ours, mut theirs) = (vec![0; len], vec![0; len]);
                memory.read_slice(&mut ours, GuestAddress(gpa)).unwrap();
                other.read_slice(&mut theirs, GuestAddress(gpa)).unwrap();
                prop_assert_eq!(ours, theirs);
            }
        }
    }
}
