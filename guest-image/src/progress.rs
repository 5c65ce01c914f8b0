//! One line of progress on a terminal; silence anywhere else.

use std::io::{self, IsTerminal, Write};

/// Where progress is shown, if anywhere.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    terminal: bool,
}

impl Progress {
    /// Progress on standard error, if that is a terminal.
    #[must_use]
    pub fn stderr() -> Self {
        Self {
            terminal: io::stderr().is_terminal(),
        }
    }

    /// Replaces the line. A terminal that fails loses the line, nothing else.
    pub fn say(self, text: &str) {
        if self.terminal {
            let _ = write!(io::stderr(), "\r\x1b[Kguest-image: {text} ...");
        }
    }

    /// Removes the line.
    pub fn clear(self) {
        if self.terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
