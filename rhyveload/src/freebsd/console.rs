//! What the loader says while it works.

use std::io::Write;

/// Where the loader's lines go. Nobody has to read them: a reader that is gone is no error.
pub struct Console<'a> {
    out: &'a mut dyn Write,
    errors: &'a mut dyn Write,
}

impl<'a> Console<'a> {
    /// What is done goes to `out`, what goes wrong to `errors`.
    pub fn new(out: &'a mut dyn Write, errors: &'a mut dyn Write) -> Self {
        Self { out, errors }
    }

    /// Says what is done.
    pub fn say(&mut self, line: &str) {
        let _ = writeln!(self.out, "{line}");
    }

    /// Says what goes wrong, without keeping the rest from going right.
    pub fn complain(&mut self, line: &str) {
        let _ = writeln!(self.errors, "{line}");
    }

    /// Runs a command that the configuration asks for at `origin`. Only `echo` is known.
    pub fn command(&mut self, origin: &str, command: &str) {
        match command.split_once(char::is_whitespace) {
            Some(("echo", text)) => self.say(text.trim()),
            _ if command.trim() == "echo" => self.say(""),
            _ => self.complain(&format!(
                "{origin}: '{command}' is not run: only echo is known here"
            )),
        }
    }
}

impl std::fmt::Debug for Console<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Console")
    }
}
