//! What the loader says while it works, and who answers.

use std::io::{self, Write};
use std::time::Duration;

use crate::terminal::{Entry, Key, Terminal};

/// Where the loader's lines go, and the terminal that commands come from, if there is one. Nobody
/// has to read them: a reader that is gone is no error.
pub struct Console<'a> {
    out: &'a mut dyn Write,
    errors: &'a mut dyn Write,
    terminal: Option<&'a mut dyn Terminal>,
}

impl<'a> Console<'a> {
    /// What is done goes to `out`, what goes wrong to `errors`; nobody is asked anything.
    pub fn new(out: &'a mut dyn Write, errors: &'a mut dyn Write) -> Self {
        Self {
            out,
            errors,
            terminal: None,
        }
    }

    /// Asks at a terminal.
    pub fn with_terminal(self, terminal: &'a mut dyn Terminal) -> Self {
        Self {
            terminal: Some(terminal),
            ..self
        }
    }

    /// Whether somebody can be asked.
    pub fn is_interactive(&self) -> bool {
        self.terminal.is_some()
    }

    /// Says what is done.
    pub fn say(&mut self, line: &str) {
        let _ = writeln!(self.out, "{line}");
    }

    /// Says something that is no whole line.
    pub fn print(&mut self, text: &str) {
        let _ = self.out.write_all(text.as_bytes());
        let _ = self.out.flush();
    }

    /// Says what goes wrong, without keeping the rest from going right.
    pub fn complain(&mut self, line: &str) {
        let _ = writeln!(self.errors, "{line}");
    }

    /// Waits for a key; see [`Terminal::key`].
    ///
    /// # Errors
    ///
    /// The terminal is gone, or there is none.
    pub fn key(&mut self, wait: Option<Duration>) -> io::Result<Option<Key>> {
        let _ = self.out.flush();
        match &mut self.terminal {
            Some(terminal) => terminal.key(wait),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Asks for a line; see [`Terminal::line`].
    ///
    /// # Errors
    ///
    /// The terminal does not work.
    pub fn line(&mut self, prompt: &str) -> io::Result<Entry> {
        let _ = self.out.flush();
        match &mut self.terminal {
            Some(terminal) => terminal.line(prompt),
            None => Ok(Entry::End),
        }
    }

    /// Says a long text, `rows` lines at a time if somebody reads it; `q` ends it.
    ///
    /// # Errors
    ///
    /// The terminal is gone.
    pub fn page(&mut self, text: &str, rows: usize) -> io::Result<()> {
        for (index, line) in text.lines().enumerate() {
            if self.is_interactive() && index != 0 && index.is_multiple_of(rows.max(2) - 1) {
                self.print("--More--  <space> page down, <q> quit");
                let key = self.key(None)?;
                self.print("\r                                     \r");
                if matches!(key, Some(Key::Char('q') | Key::Interrupt)) {
                    break;
                }
            }
            self.say(line);
        }
        Ok(())
    }
}

impl std::fmt::Debug for Console<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Console")
    }
}
