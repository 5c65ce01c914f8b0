//! A progress bar on a terminal, for work that takes long enough to be noticed.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Work that is done sooner shows nothing.
const PATIENCE: Duration = Duration::from_millis(300);

/// How far a load has come.
#[derive(Debug)]
pub struct Progress {
    shown: bool,
    start: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Shows a bar on standard error, if that is a terminal.
    pub fn on_terminal() -> Self {
        Self {
            shown: stderr().is_terminal(),
            ..Self::hidden()
        }
    }

    /// Shows nothing.
    pub fn hidden() -> Self {
        Self {
            shown: false,
            start: Instant::now(),
            bar: None,
        }
    }

    /// Says that `done` of `total` bytes of `what` are done.
    pub fn step(&mut self, what: &'static str, done: u64, total: u64) {
        if !self.shown || self.bar.is_none() && self.start.elapsed() < PATIENCE {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let template = "{msg} [{wide_bar}] {bytes}/{total_bytes}";
            let style = ProgressStyle::with_template(template);
            ProgressBar::new(total)
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        if bar.message() != what {
            bar.set_message(what);
        }
        bar.set_length(total);
        bar.set_position(done);
    }

    /// Begins anew: what came before, a user's thoughts for one, is not work.
    pub fn restart(&mut self) {
        self.clear();
        self.start = Instant::now();
    }

    /// Takes the bar away, so that lines can be printed.
    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
