//! What `top` shows: a line for each VM, or one VM from near.

use std::collections::BTreeMap;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Cell, Paragraph, Row as Cells, Sparkline, Table, TableState};
use vmm_api::guest::report::printable;
use vmm_api::memory::MemSize;

use super::sample::Row;
use super::{Sort, Top};
use crate::exits;

/// Lines of exits from near.
const PLACES: usize = 12;

/// Draws all of it.
pub fn draw(frame: &mut Frame, top: &Top) {
    let [head, body, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(3),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let running = top.rows.iter().filter(|row| row.is_live()).count();
    let sum = |part: fn(&Row) -> f64| top.rows.iter().map(part).sum::<f64>();
    frame.render_widget(
        Line::from(format!(
            "{running} of {} VMs live, {:.0} % guest, {:.0} % host, {:.0} exits/s; by {}",
            top.rows.len(),
            sum(|row| row.guest),
            sum(|row| row.host),
            sum(Row::exits_a_second),
            top.sort.word(),
        ))
        .style(Style::new().add_modifier(Modifier::BOLD)),
        head,
    );
    match top.near.then(|| top.selected()).flatten() {
        Some(row) => near(frame, row, body),
        None => all(frame, top, body),
    }
    let keys = match &top.message {
        Some(message) => printable(message),
        None if top.near => "p pause or resume   Esc back   q quit".to_owned(),
        None => "up down select   s sort   p pause or resume   Enter look   q quit".to_owned(),
    };
    frame.render_widget(Line::from(keys), foot);
}

fn all(frame: &mut Frame, top: &Top, area: Rect) {
    let header = [
        "NAME", "PHASE", "VCPUS", "GUEST%", "HOST%", "EXITS/S", "INOUT", "MMIO", "OTHER", "IO/S",
        "MEMORY", "CPU",
    ];
    let lines = top.rows.iter().map(|row| {
        let reason = |name| row.exits.get(name).copied().unwrap_or(0.0);
        let (inout, mmio) = (reason("inout"), reason("mmio"));
        let other = row.exits_a_second() - inout - mmio;
        Cells::new([
            Cell::from(row.name.clone()),
            Cell::from(row.phase.clone()),
            number(row.vcpus.into()),
            number(row.guest),
            number(row.host),
            number(row.exits_a_second()),
            number(inout),
            number(mmio),
            number(other.max(0.0)),
            Cell::from(Line::from(bytes(row.moved_a_second())).right_aligned()),
            Cell::from(Line::from(memory(row)).right_aligned()),
            Cell::from(spark(row)),
        ])
    });
    let widths = [
        Constraint::Min(10),
        Constraint::Min(15),
        Constraint::Length(5),
        Constraint::Length(6),
        Constraint::Length(5),
        Constraint::Length(7),
        Constraint::Length(6),
        Constraint::Length(6),
        Constraint::Length(6),
        Constraint::Length(5),
        Constraint::Length(12),
        Constraint::Length(SPARK),
    ];
    let table = Table::new(lines, widths)
        .header(Cells::new(header).style(Style::new().add_modifier(Modifier::REVERSED)))
        .row_highlight_style(Style::new().add_modifier(Modifier::BOLD))
        .highlight_symbol("> ");
    let mut state = TableState::new().with_selected(Some(top.at));
    frame.render_stateful_widget(table, area, &mut state);
}

/// One VM.
fn near(frame: &mut Frame, row: &Row, area: Rect) {
    let [facts, spark, exits] = Layout::vertical([
        Constraint::Length(5),
        Constraint::Length(5),
        Constraint::Min(3),
    ])
    .areas(area);
    let list = |rates: &BTreeMap<String, f64>, write: fn(f64) -> String| {
        let mut rates: Vec<_> = rates.iter().filter(|(_, rate)| **rate >= 0.5).collect();
        rates.sort_by(|a, b| b.1.total_cmp(a.1));
        let texts: Vec<_> = rates
            .iter()
            .map(|(name, rate)| format!("{name} {}", write(**rate)))
            .collect();
        match texts.as_slice() {
            [] => "none".to_owned(),
            texts => texts.join(", "),
        }
    };
    frame.render_widget(
        Paragraph::new(vec![
            Line::from(format!(
                "{}: {}, {} vCPUs, {} of memory there",
                row.name,
                row.phase,
                row.vcpus,
                memory(row)
            )),
            Line::from(format!("guest {:.0} %, host {:.0} %", row.guest, row.host)),
            Line::from(format!("exits/s: {}", list(&row.exits, whole))),
            Line::from(format!(
                "devices, accesses/s: {}",
                list(&row.devices, whole)
            )),
            Line::from(format!("devices, bytes/s: {}", list(&row.moved, bytes))),
        ]),
        facts,
    );
    let history: Vec<u64> = row.history.iter().copied().collect();
    frame.render_widget(
        Sparkline::default()
            .block(Block::bordered().title("% in guest"))
            .max((100 * u64::from(row.vcpus)).max(1))
            .data(history),
        spark,
    );
    let mut lines = Vec::new();
    for (vcpu, stats) in row.places.iter().enumerate() {
        lines.push(Line::from(format!("vcpu{vcpu}: {}", exits::summary(stats))));
        let shown = stats.exits.iter().take(PLACES);
        lines.extend(shown.map(|exit| {
            let us = exit.host_ns as f64 / 1e3;
            Line::from(format!(
                "{:>10} {us:>12.0} us  {}",
                exit.count,
                exits::what(exit)
            ))
        }));
    }
    frame.render_widget(Paragraph::new(lines), exits);
}

fn number(value: f64) -> Cell<'static> {
    Cell::from(Line::from(whole(value)).right_aligned())
}

fn whole(value: f64) -> String {
    // No sum of nothing is less than nothing.
    format!("{:.0}", value + 0.0)
}

/// Bytes in four or five characters, by powers of 1024 as sizes of memory are.
fn bytes(mut value: f64) -> String {
    let mut units = ["", "K", "M", "G"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for next in units {
        if value < 1000.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    match unit {
        "" => whole(value),
        _ if value < 9.95 => format!("{value:.1}{unit}"),
        _ => format!("{value:.0}{unit}"),
    }
}

fn memory(row: &Row) -> String {
    let used = MemSize(row.resident >> 20 << 20);
    format!("{used}/{}", MemSize(row.memory))
}

/// Samples that a line has room for.
const SPARK: u16 = 13;

/// The history as letters of rising height.
fn spark(row: &Row) -> String {
    const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = f64::from(100 * row.vcpus.max(1));
    let shown = row.history.iter().rev().take(SPARK.into()).rev();
    let level = |&percent: &u64| {
        let part = (percent as f64 / most * 8.0) as usize;
        LEVELS.get(part.min(7)).copied().unwrap_or(' ')
    };
    shown.map(level).collect()
}

impl Sort {
    fn word(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Cpu => "processor time",
            Self::Exits => "exits",
            Self::Memory => "memory",
        }
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use vmm_api::profile::{ExitStat, ExitStats};
    use vmm_api::state::Hex;

    use super::*;

    fn rows() -> Vec<Row> {
        let exit = ExitStat {
            reason: "inout".into(),
            write: Some(true),
            place: Some(Hex(0x3f8)),
            device: Some("com1".into()),
            count: 4711,
            host_ns: 9_000_000,
            callers: Vec::new(),
        };
        let guest0 = Row {
            name: "guest0".into(),
            phase: "running".into(),
            vcpus: 2,
            guest: 130.4,
            host: 20.0,
            exits: [("inout".into(), 1200.0), ("mmio".into(), 30.0)].into(),
            devices: [("com1".into(), 1200.0)].into(),
            moved: [("0:2:0 virtio-blk".into(), 3e6)].into(),
            resident: 70 << 20,
            memory: 512 << 20,
            history: (0..30).map(|n| n * 7).collect(),
            places: vec![ExitStats {
                span_ns: 4_000_000_000,
                exits: vec![exit],
            }],
        };
        let stopped = Row {
            name: "web".into(),
            phase: "stopped (reset)".into(),
            vcpus: 1,
            memory: 256 << 20,
            ..Row::default()
        };
        vec![guest0, stopped]
    }

    fn screen(top: &Top) -> String {
        let mut terminal = Terminal::new(TestBackend::new(110, 20)).unwrap();
        terminal.draw(|frame| draw(frame, top)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn bytes_have_the_unit_that_fits() {
        let said = [0.0, 999.0, 1000.0, 10_240.0, 3e6, 5e9, 9e15].map(bytes);
        assert_eq!(
            said,
            ["0", "999", "1.0K", "10K", "2.9M", "4.7G", "8381903G"]
        );
    }

    #[test]
    fn all_vms_and_one_from_near() {
        let mut top = Top {
            rows: rows(),
            ..Top::default()
        };
        insta::assert_snapshot!("all", screen(&top));
        top.near = true;
        insta::assert_snapshot!("near", screen(&top));
        top.message = Some("guest0\u{1b} is gone".into());
        assert!(screen(&top).contains("guest0\\u{1b} is gone"));
        top.rows.clear();
        assert!(screen(&top).contains("0 of 0 VMs live"));
    }
}
