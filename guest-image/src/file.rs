//! What goes wrong with the host's files.

use std::io;
use std::path::{Path, PathBuf};

/// A file or a directory cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{path}")]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// What happened.
    pub source: io::Error,
}

/// Says of an error which file it is about.
pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError { path, source }
}
