//! The `linux` profile.

use std::path::Path;

use crate::Image;

/// Why the image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This program was built without the profile.
    #[error("not part of this build yet")]
    Absent,
}

/// Makes the image in `out`.
///
/// # Errors
///
/// See [`Error`].
pub fn make(_out: &Path) -> Result<Image, Error> {
    Err(Error::Absent)
}
