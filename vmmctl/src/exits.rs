//! `--get-exits`: why each vCPU left the guest, by place and caller, what took the host longest first.

use serde_json::{Value, json};
use vmm_api::guest::Symbols;
use vmm_api::profile::{Caller, ExitStat, ExitStats};

use crate::cli::Work;
use crate::error::Error;
use crate::look;
use crate::output::{Output, hex};
use crate::target::VcpuAccess;

/// Callers that are shown of one place.
const CALLERS: usize = 3;

/// Shows the `top` places of each vCPU.
///
/// # Errors
///
/// The VM does not run.
pub fn show(
    access: &mut dyn VcpuAccess,
    work: &Work,
    top: usize,
    output: &mut Output,
) -> Result<(), Error> {
    let vcpus = access.vcpus()?;
    let all: Vec<_> = (0..vcpus)
        .map(|vcpu| Ok(access.live()?.exits(vcpu)?))
        .collect::<Result<_, Error>>()?;
    let kernel = look::named(access, work)?;
    let symbols = kernel.map(|kernel| kernel.symbols);
    let mut values = Vec::new();
    for (vcpu, stats) in all.iter().enumerate() {
        let mut lines = lines(stats, top, symbols.as_ref());
        lines.insert(0, format!("vcpu{vcpu}: {}", summary(stats)));
        lines.iter().for_each(|line| output.line(line));
        let exits = stats.exits.iter().take(top);
        let exits = exits.map(|exit| value(exit, symbols.as_ref()));
        values.push(json!({ "span_ns": stats.span_ns, "exits": Value::from_iter(exits) }));
    }
    output.field("exits", values);
    Ok(())
}

pub(crate) fn summary(stats: &ExitStats) -> String {
    let count: u64 = stats.exits.iter().map(|e| e.count).sum();
    let host: u64 = stats.exits.iter().map(|e| e.host_ns).sum();
    let (span, host) = (seconds(stats.span_ns), seconds(host));
    format!("{count} exits to rhyve in {span:.3} s, which took it {host:.6} s")
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn lines(stats: &ExitStats, top: usize, symbols: Option<&Symbols>) -> Vec<String> {
    let shown = stats.exits.iter().take(top);
    let mut lines = Vec::new();
    for exit in shown {
        if lines.is_empty() {
            lines.push(format!(
                "{:>10}  {:>12}  {:>9}  exit",
                "count", "host us", "each us"
            ));
        }
        let us = exit.host_ns as f64 / 1e3;
        let each = us / exit.count.max(1) as f64;
        let what = what(exit);
        lines.push(format!(
            "{:>10}  {us:>12.1}  {each:>9.2}  {what}",
            exit.count
        ));
        for Caller { rip, count } in exit.callers.iter().take(CALLERS) {
            let name = symbols.and_then(|s| s.name(rip.0)).unwrap_or_default();
            let line = format!("{count:>10}  {:12}  {:9}    {:#018x} {name}", "", "", rip.0);
            lines.push(line.trim_end().to_owned());
        }
    }
    let rest = stats.exits.len().saturating_sub(top);
    if rest > 0 {
        lines.push(format!(
            "{:>10}  more places: --get-exits={}",
            rest,
            stats.exits.len()
        ));
    }
    lines
}

/// What the guest did, as an assembler would say it, and to whom.
pub(crate) fn what(exit: &ExitStat) -> String {
    let verb = match (&*exit.reason, exit.write) {
        ("inout", Some(true)) => "out",
        ("inout", Some(false)) => "in",
        ("mmio", Some(true)) => "mmio write",
        ("mmio", Some(false)) => "mmio read",
        (reason, _) => reason,
    };
    let place = match (&exit.place, exit.write) {
        (Some(place), _) => format!(" {:#x}", place.0),
        (None, Some(_)) => " elsewhere".to_owned(),
        (None, None) => String::new(),
    };
    let device = exit.device.as_ref().map(|d| format!(" ({d})"));
    format!("{verb}{place}{}", device.unwrap_or_default())
}

fn value(exit: &ExitStat, symbols: Option<&Symbols>) -> Value {
    let callers = exit.callers.iter().map(|Caller { rip, count }| {
        let name = symbols.and_then(|s| s.name(rip.0));
        json!({ "rip": hex(rip.0), "name": name, "count": count })
    });
    json!({
        "reason": exit.reason,
        "write": exit.write,
        "place": exit.place.map(|place| hex(place.0)),
        "device": exit.device,
        "count": exit.count,
        "host_ns": exit.host_ns,
        "callers": Value::from_iter(callers),
    })
}

#[cfg(test)]
mod tests {
    use vmm_api::state::Hex;

    use super::*;

    fn exit(reason: &str, write: Option<bool>, place: Option<u64>) -> ExitStat {
        ExitStat {
            reason: reason.into(),
            write,
            place: place.map(Hex),
            device: None,
            count: 4,
            host_ns: 10_000,
            callers: vec![Caller {
                rip: Hex(0x1234),
                count: 4,
            }],
        }
    }

    #[test]
    fn exits_read_like_instructions() {
        let mut com = exit("inout", Some(true), Some(0x3f8));
        com.device = Some("com1".into());
        assert_eq!(what(&com), "out 0x3f8 (com1)");
        assert_eq!(
            what(&exit("mmio", Some(false), None)),
            "mmio read elsewhere"
        );
        assert_eq!(what(&exit("wrmsr", None, Some(0x10))), "wrmsr 0x10");
        assert_eq!(what(&exit("interrupted", None, None)), "interrupted");
    }

    #[test]
    fn the_top_is_shown_with_its_callers_and_the_rest_is_counted() {
        let stats = ExitStats {
            span_ns: 2_000_000_000,
            exits: vec![exit("hlt", None, None); 3],
        };
        let symbols = Symbols::parse(b"0000000000001000 T idle\n").unwrap();
        let text = lines(&stats, 1, Some(&symbols)).join("\n");
        assert_eq!(
            text,
            "     count       host us    each us  exit\n         4          10.0       2.50  hlt\n         4                             0x0000000000001234 idle+0x234\n         2  more places: --get-exits=3"
        );
        assert!(summary(&stats).starts_with("12 exits to rhyve in 2.000 s"));
    }
}
