//! `vmmctl top`: all VMs on a terminal, once a second: processor time in guest and host, exits by
//! reason, accesses to devices, memory that is really there. `sample` asks, `view` draws; here are
//! the keys.

mod sample;
mod view;

use std::io::{self, IsTerminal as _};
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use vmm_api::control::{Client, RunPhase};
use vmm_api::root::Root;
use vmm_api::vm::Vm;

use crate::error::{self, Error, Status};
use crate::interrupt::Interrupt;
use sample::{Row, Sampler};

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);

/// By what VMs are put in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sort {
    #[default]
    Name,
    Cpu,
    Exits,
    Memory,
}

/// What there is to be seen.
#[derive(Default)]
struct Top {
    rows: Vec<Row>,
    sort: Sort,
    /// The line that is selected.
    at: usize,
    /// Only that one, from near.
    near: bool,
    /// What went wrong.
    message: Option<String>,
}

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Nothing,
    Quit,
    Toggle,
}

impl Top {
    fn selected(&self) -> Option<&Row> {
        self.rows.get(self.at)
    }

    /// Takes new rows; what is selected stays selected.
    fn update(&mut self, rows: Vec<Row>) {
        let selected = self.selected().map(|row| row.name.clone());
        self.rows = rows;
        self.order(selected.as_deref());
    }

    /// Puts the rows in order, and selects one by its name.
    fn order(&mut self, selected: Option<&str>) {
        let rows = &mut self.rows;
        match self.sort {
            Sort::Name => rows.sort_by(|a, b| a.name.cmp(&b.name)),
            Sort::Cpu => rows.sort_by(|a, b| (b.guest + b.host).total_cmp(&(a.guest + a.host))),
            Sort::Exits => {
                rows.sort_by(|a, b| b.exits_a_second().total_cmp(&a.exits_a_second()));
            }
            Sort::Memory => rows.sort_by_key(|row| std::cmp::Reverse(row.resident)),
        }
        let found = rows.iter().position(|row| Some(&*row.name) == selected);
        self.near &= found.is_some();
        self.at = found.unwrap_or(self.at.min(rows.len().saturating_sub(1)));
    }

    fn key(&mut self, code: KeyCode, modifiers: KeyModifiers) -> Wish {
        self.message = None;
        match code {
            KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => return Wish::Quit,
            KeyCode::Char('q') => return Wish::Quit,
            KeyCode::Char('p') => return Wish::Toggle,
            KeyCode::Char('s') => {
                self.sort = match self.sort {
                    Sort::Name => Sort::Cpu,
                    Sort::Cpu => Sort::Exits,
                    Sort::Exits => Sort::Memory,
                    Sort::Memory => Sort::Name,
                };
                let selected = self.selected().map(|row| row.name.clone());
                self.order(selected.as_deref());
            }
            KeyCode::Up | KeyCode::Char('k') => self.at = self.at.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => {
                self.at = (self.at + 1).min(self.rows.len().saturating_sub(1));
            }
            KeyCode::Enter => self.near = self.selected().is_some(),
            KeyCode::Esc => self.near = false,
            _ => {}
        }
        Wish::Nothing
    }
}

/// Runs until it is told to quit.
///
/// # Errors
///
/// Standard output is no terminal, or the root cannot be read.
pub fn top() -> Result<Status, Error> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(Error::NoTerminal);
    }
    let mut sampler = Sampler::new(Root::open()?);
    let mut top = Top::default();
    top.update(sampler.take()?);
    let interrupt = Interrupt::new()?;
    let mut terminal = ratatui::try_init().map_err(Error::Terminal)?;
    let ended = follow(&mut terminal, &mut sampler, &mut top, &interrupt);
    ratatui::restore();
    ended.map(|()| Status::Done)
}

fn follow(
    terminal: &mut ratatui::DefaultTerminal,
    sampler: &mut Sampler,
    top: &mut Top,
    interrupt: &Interrupt,
) -> Result<(), Error> {
    let mut next = Instant::now() + PERIOD;
    // The signal ends the program when the terminal is what it was.
    while !interrupt.waits() {
        let drawn = terminal.draw(|frame| view::draw(frame, top));
        drawn.map_err(Error::Terminal)?;
        let left = next.saturating_duration_since(Instant::now());
        if event::poll(left).map_err(Error::Terminal)? {
            if let Event::Key(key) = event::read().map_err(Error::Terminal)?
                && key.kind == KeyEventKind::Press
            {
                match top.key(key.code, key.modifiers) {
                    Wish::Nothing => continue,
                    Wish::Quit => return Ok(()),
                    Wish::Toggle => {
                        let done = top.selected().map(|row| toggle(sampler.root(), &row.name));
                        if let Some(Err(error)) = done {
                            top.message = Some(error::chain(&error));
                        }
                    }
                }
            } else {
                continue;
            }
        }
        top.update(sampler.take()?);
        next = Instant::now() + PERIOD;
    }
    Ok(())
}

/// Pauses a VM that runs, lets one go on that is paused.
fn toggle(root: &Root, name: &str) -> Result<(), Error> {
    let Ok(name) = name.parse() else {
        return Ok(());
    };
    let mut client = Client::connect(&Vm::open(root, &name)?)?;
    match client.status()?.phase {
        RunPhase::Running => client.pause()?,
        RunPhase::Paused => client.resume()?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, guest: f64) -> Row {
        Row {
            name: name.into(),
            guest,
            ..Row::default()
        }
    }

    #[test]
    fn what_is_selected_stays_selected() {
        let mut top = Top::default();
        top.update(vec![row("b", 1.0), row("a", 2.0), row("c", 3.0)]);
        let names = |top: &Top| -> String { top.rows.iter().map(|r| &*r.name).collect() };
        assert_eq!(names(&top), "abc");
        top.key(KeyCode::Down, KeyModifiers::NONE);
        assert_eq!(top.selected().unwrap().name, "b");
        top.key(KeyCode::Enter, KeyModifiers::NONE);
        top.key(KeyCode::Char('s'), KeyModifiers::NONE);
        assert_eq!(names(&top), "cab");
        assert_eq!(top.selected().unwrap().name, "b");
        assert!(top.near);
        top.update(vec![row("a", 2.0)]);
        assert!(!top.near && top.at == 0);
        assert_eq!(top.key(KeyCode::Char('q'), KeyModifiers::NONE), Wish::Quit);
        let control = KeyModifiers::CONTROL;
        assert_eq!(top.key(KeyCode::Char('c'), control), Wish::Quit);
        top.update(Vec::new());
        top.key(KeyCode::Down, KeyModifiers::NONE);
        top.key(KeyCode::Enter, KeyModifiers::NONE);
        assert!(!top.near);
    }
}
