//! What is written where zeros cannot be made otherwise.

use std::io;

use super::Extent;

/// Aligned for O_DIRECT.
#[repr(align(4096))]
struct Zeros([u8; 1 << 16]);

static ZEROS: Zeros = Zeros([0; 1 << 16]);

/// Has `write` write zeros at each byte offset of `extent`, 64 KiB at a time.
///
/// # Errors
/// Those of `write`, which is not called again then.
pub(super) fn write(
    extent: Extent,
    mut write: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = extent.offset;
    while at < extent.end() {
        let now = (extent.end() - at).min(ZEROS.0.len() as u64);
        write(&ZEROS.0[..now as usize], at)?;
        at += now;
    }
    Ok(())
}
