//! `--list`: all VMs, one line each.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;
use vmm_api::control::{Client, ClientError};
use vmm_api::memory::MemSize;
use vmm_api::name::VmName;
use vmm_api::root::Root;
use vmm_api::say;
use vmm_api::state::Phase;
use vmm_api::vm::{Holder, Vm, VmError};

use crate::error::{self, Error, Status};
use crate::output::Output;

/// How long one VM may hold the list up.
const PATIENCE: Duration = Duration::from_millis(500);

/// One line of the list.
#[derive(Debug, Serialize)]
struct Entry {
    name: VmName,
    /// One word, and in brackets what more there is to say.
    phase: String,
    /// Bytes.
    memory: Option<u64>,
    vcpus: Option<u32>,
    /// Who holds it: rhyve, if it runs.
    pid: Option<u32>,
    /// Seconds.
    uptime: Option<u64>,
    /// Why there is no more to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Lists all VMs.
///
/// # Errors
///
/// The root cannot be read. What is wrong with one VM stands in its line.
pub fn list(output: &mut Output) -> Result<Status, Error> {
    let root = Root::open()?;
    let names = root.list()?;
    let entries: Vec<Entry> = names.iter().filter_map(|n| entry(&root, n)).collect();
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(["NAME", "PHASE", "MEMORY", "VCPUS", "PID", "UPTIME"]);
    for entry in &entries {
        let memory = entry.memory.map(|bytes| MemSize(bytes).to_string());
        table.add_row([
            Cell::new(&entry.name),
            Cell::new(&entry.phase),
            right(memory),
            right(entry.vcpus.map(|n| n.to_string())),
            right(entry.pid.map(|n| n.to_string())),
            right(entry.uptime.map(duration)),
        ]);
        if let Some(error) = &entry.error {
            say!("vmmctl: {error}");
        }
    }
    output.table(table, &entries);
    Ok(Status::Done)
}

fn right(text: Option<String>) -> Cell {
    Cell::new(text.unwrap_or_else(|| "-".into())).set_alignment(CellAlignment::Right)
}

/// One VM; none if it was destroyed in the meantime, or is no object.
fn entry(root: &Root, name: &VmName) -> Option<Entry> {
    let mut entry = Entry {
        name: name.clone(),
        phase: "unreadable".into(),
        memory: None,
        vcpus: None,
        pid: None,
        uptime: None,
        error: None,
    };
    match describe(root, &mut entry) {
        Err(Error::Vm(VmError::NotFound(_))) => return None,
        Err(error) => entry.error = Some(error::chain(&error)),
        Ok(()) => {}
    }
    Some(entry)
}

fn describe(root: &Root, entry: &mut Entry) -> Result<(), Error> {
    let vm = Vm::open(root, &entry.name)?;
    let holder = vm.holder()?;
    if let Some(holder) = &holder {
        entry.pid = (holder.pid != 0).then_some(holder.pid);
        entry.phase = match holder.program.as_str() {
            "rhyve" => "running".into(),
            "rhyveload" => "loading".into(),
            other => format!("busy ({other})"),
        };
    }
    if let Some(holder) = holder.filter(|h| h.program == "rhyve") {
        return running(&vm, &holder, entry);
    }
    let state = vm.load_state()?;
    if entry.pid.is_none() {
        entry.phase = match &state.phase {
            Phase::Stopped { reason, .. } => format!("stopped ({})", reason.words()),
            other => other.word().into(),
        };
    }
    entry.memory = Some(state.machine.memory.total());
    entry.vcpus = u32::try_from(state.vcpus.len()).ok();
    Ok(())
}

fn running(vm: &Vm, holder: &Holder, entry: &mut Entry) -> Result<(), Error> {
    let since = UNIX_EPOCH + Duration::from_secs(holder.since);
    entry.uptime = SystemTime::now()
        .duration_since(since)
        .ok()
        .map(|d| d.as_secs());
    let status = Client::connect_within(vm, PATIENCE).and_then(|mut c| c.status());
    let status = match status {
        Err(ClientError::Absent(_)) => {
            // It is starting or ending.
            entry.phase = "busy (rhyve)".into();
            entry.memory = vm.load_state().ok().map(|s| s.machine.memory.total());
            return Ok(());
        }
        other => other?,
    };
    entry.phase = status.phase.word().into();
    entry.memory = Some(status.memory.total());
    entry.vcpus = Some(status.vcpus);
    entry.uptime = Some(status.uptime_ms / 1000);
    Ok(())
}

/// Seconds in the two largest units that they fill.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{:02}s", seconds % 60),
        (0, _, _) => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_units() {
        let texts = [0, 59, 60, 3599, 3600, 86399, 86400, 1_000_000].map(duration);
        assert_eq!(
            texts,
            [
                "0s", "59s", "1m00s", "59m59s", "1h00m", "23h59m", "1d00h", "11d13h"
            ]
        );
    }
}
