//! What a block device is asked for beyond what a file is.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

mod ioctl {
    // BLKDISCARD (linux/fs.h): first byte and number of bytes.
    nix::ioctl_write_ptr_bad!(discard, nix::request_code_none!(0x12, 119), [u64; 2]);
}

/// Gives back `len` bytes from `offset` on, both multiples of the device's logical block size; what
/// is there reads as anything then.
///
/// It is not fallocate(2) that does this: punching a hole writes zeros, which some devices that
/// discard cannot do by themselves (thin volumes).
///
/// # Errors
///
/// What the system says; ENOTTY if the file is no block device.
pub fn discard(device: &File, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    // SAFETY: the kernel reads the two numbers, and no memory of ours is given away.
    unsafe { ioctl::discard(device.as_raw_fd(), &[offset, len]) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    // On a device: rhyve's nested lane.
    #[test]
    fn a_file_is_no_block_device() {
        let file = tempfile::tempfile().unwrap();
        let refused = discard(&file, 0, 512).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(nix::libc::ENOTTY));
        discard(&file, 0, 0).unwrap();
    }
}
