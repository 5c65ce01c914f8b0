//! A loader from its banner to the boot: configuration, kernel and modules, menu, prompt.
//!
//! Without a terminal, or with `autoboot_delay=-1`, nobody is asked anything.

use std::io;
use std::time::{Duration, Instant};

use super::loader::{Loader, LoaderError, chain};
use super::menu::{Choice, Menu};
use super::shell::Flow;
use crate::terminal::{Entry, Key};

/// `autoboot_delay` when it is not set, in seconds.
const DELAY: u64 = 10;

/// Takes the cursor to the upper left corner and clears the screen (ECMA-48, CUP and ED).
const CLEAR: &str = "\x1b[H\x1b[2J";

/// How a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// What is loaded is to be booted.
    Boot,
    /// From the beginning.
    Reboot,
    /// Nothing is to be loaded.
    Quit,
}

impl Loader<'_, '_> {
    /// Does all that a loader does.
    ///
    /// # Errors
    ///
    /// There is nothing to boot, and nobody who could be asked.
    pub fn session(&mut self) -> Result<End, LoaderError> {
        self.configure();
        let loaded = self.load_configured();
        let ask = self.console.is_interactive()
            && (loaded.is_err() || self.env().get("autoboot_delay") != Some("-1"));
        if !ask {
            return loaded.map(|()| End::Boot);
        }
        let first = match loaded {
            Ok(()) => self.menu(),
            Err(error) => {
                self.console.complain(&chain(&error));
                Ok(Flow::Next)
            }
        };
        let mut flow = first.map_err(LoaderError::Terminal)?;
        loop {
            flow = match flow {
                Flow::Next => self.prompt(),
                Flow::Menu => self.menu(),
                Flow::Boot if self.files.is_empty() => {
                    self.console.complain("no kernel is loaded");
                    Ok(Flow::Next)
                }
                Flow::Boot => return Ok(End::Boot),
                Flow::Reboot => return Ok(End::Reboot),
                Flow::Quit => return Ok(End::Quit),
            }
            .map_err(LoaderError::Terminal)?;
        }
    }

    /// Seconds until the boot; none if it is to be waited for.
    pub(super) fn delay(&self) -> Option<u64> {
        match self.env().get("autoboot_delay") {
            Some(no) if no.eq_ignore_ascii_case("no") => None,
            delay => Some(delay.and_then(|delay| delay.parse().ok()).unwrap_or(DELAY)),
        }
    }

    /// Whether variables ask for plain text.
    fn is_plain(&self) -> bool {
        self.env()
            .get("loader_color")
            .is_some_and(|value| matches!(value, "0" | "NO" | "no"))
    }

    /// The menu, or the countdown in its place.
    fn menu(&mut self) -> io::Result<Flow> {
        let yes = |value: &str| value.eq_ignore_ascii_case("yes");
        if self.env().get("beastie_disable").is_some_and(yes) {
            return Ok(match self.delay() {
                None => Flow::Next,
                Some(seconds) if self.countdown(seconds)? => Flow::Boot,
                Some(_) => Flow::Next,
            });
        }
        let mut menu = Menu::new(self.devices, self.env());
        let mut left = self.delay();
        // What the loader has said stays to be read above the menu, until that changes.
        let mut clear = "";
        loop {
            self.console.print(clear);
            clear = if self.is_plain() { "" } else { CLEAR };
            self.console.print(&menu.draw());
            let key = match left.take() {
                Some(seconds) => self.count(seconds, |left| {
                    format!("Autoboot in {left} seconds. [Space] to pause ")
                })?,
                None => self.console.key(None)?,
            };
            let Some(key) = key else {
                return Ok(Flow::Boot);
            };
            match menu.press(key, &mut self.config.env) {
                Choice::Boot => return Ok(Flow::Boot),
                Choice::Prompt => {
                    // Whoever comes back from the prompt finds no countdown.
                    self.config.env.force("autoboot_delay", "NO");
                    return Ok(Flow::Next);
                }
                Choice::Reboot => return Ok(Flow::Reboot),
                Choice::Changed | Choice::None => {}
                Choice::Kernel => {
                    if let Err(error) = self.load_configured() {
                        self.console.complain(&chain(&error));
                        return Ok(Flow::Next);
                    }
                }
            }
        }
    }

    /// Counts down below a text. Answers with the key that ended it.
    fn count(&mut self, seconds: u64, text: impl Fn(u64) -> String) -> io::Result<Option<Key>> {
        let end = Instant::now() + Duration::from_secs(seconds.min(u32::MAX.into()));
        let mut shown = String::new();
        let key = loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break None;
            }
            let whole = left.as_secs() + u64::from(left.subsec_nanos() != 0);
            let line = text(whole);
            self.console.print(&format!("\r{line:<0$}", shown.len()));
            shown = line;
            // Until the number changes.
            let next = left - Duration::from_secs(whole - 1);
            if let Some(key) = self.console.key(Some(next))? {
                break Some(key);
            }
        };
        self.console.print(&format!("\r{:1$}\r", "", shown.len()));
        Ok(key)
    }

    /// Counts down to the boot; false if a key other than Enter ended it.
    pub(super) fn countdown(&mut self, seconds: u64) -> io::Result<bool> {
        if !self.console.is_interactive() {
            return Ok(true);
        }
        self.console
            .say("Hit [Enter] to boot immediately, or any other key for command prompt.");
        let kernel = self.env().get("kernelname").unwrap_or_default().to_owned();
        let key = self.count(seconds, |left| {
            let plural = if left == 1 { "" } else { "s" };
            format!("Booting [{kernel}] in {left} second{plural}... ")
        })?;
        Ok(matches!(key, None | Some(Key::Enter)))
    }

    /// Asks for commands until one leads away from the prompt.
    fn prompt(&mut self) -> io::Result<Flow> {
        self.console.say("'help' lists the commands.");
        loop {
            let line = match self.console.line(&self.prompt_text())? {
                Entry::Line(line) => line,
                Entry::Interrupted => continue,
                Entry::End => return Ok(Flow::Quit),
            };
            match self.execute(&line) {
                Ok(Flow::Next) => {}
                Ok(other) => return Ok(other),
                Err(error) => self.console.say(&error.to_string()),
            }
        }
    }

    fn prompt_text(&self) -> String {
        let prompt = self.env().get("prompt").unwrap_or("${interpret}");
        let words = super::words::words(prompt, |name| self.env().get(name));
        words.unwrap_or_default().join(" ") + " "
    }
}
