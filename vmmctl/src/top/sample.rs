//! What `top` knows of the VMs: taken once a period, made into rates by the one before.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_api::control::{Client, RunPhase};
use vmm_api::name::VmName;
use vmm_api::profile::ExitStats;
use vmm_api::root::Root;
use vmm_api::vm::Vm;

use crate::error::Error;

/// How long one VM may hold the others up.
const PATIENCE: Duration = Duration::from_millis(500);
/// Points of a sparkline.
pub const HISTORY: usize = 60;
/// Processor time in /proc is counted in these a second (USER_HZ, fixed at 100).
const TICKS: f64 = 100.0;

/// A VM, as it is now.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// running, paused, or why it does not.
    pub phase: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Percent of one processor: in the guest.
    pub guest: f64,
    /// Percent of one processor: in rhyve and the kernel for it.
    pub host: f64,
    /// Exits to rhyve in a second, by reason.
    pub exits: BTreeMap<String, f64>,
    /// Accesses to devices in a second, by device.
    pub devices: BTreeMap<String, f64>,
    /// Bytes that its virtio devices move in a second, by slot and kind.
    pub moved: BTreeMap<String, f64>,
    /// Bytes of memory that are really there.
    pub resident: u64,
    /// Bytes of memory that it has.
    pub memory: u64,
    /// Percent in the guest, the newest last.
    pub history: VecDeque<u64>,
    /// Of each vCPU, what it left the guest for.
    pub places: Vec<ExitStats>,
}

impl Row {
    /// All exits in a second.
    pub fn exits_a_second(&self) -> f64 {
        self.exits.values().sum()
    }

    /// All bytes moved in a second.
    pub fn moved_a_second(&self) -> f64 {
        self.moved.values().sum()
    }

    /// It can be paused or resumed.
    pub fn is_live(&self) -> bool {
        self.phase == "running" || self.phase == "paused"
    }
}

/// What has been counted up to a moment.
#[derive(Clone, Debug, Default)]
struct Counts {
    guest: f64,
    total: f64,
    exits: BTreeMap<String, u64>,
    devices: BTreeMap<String, u64>,
    moved: BTreeMap<String, u64>,
}

/// Takes samples of all VMs.
pub struct Sampler {
    root: Root,
    last: BTreeMap<VmName, (Instant, Counts, VecDeque<u64>)>,
}

impl Sampler {
    /// Of the VMs below a root.
    pub fn new(root: Root) -> Self {
        Self {
            root,
            last: BTreeMap::new(),
        }
    }

    /// Where the VMs are.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// All VMs as they are now.
    ///
    /// # Errors
    ///
    /// The root cannot be read.
    pub fn take(&mut self) -> Result<Vec<Row>, Error> {
        let names = self.root.list()?;
        let mut rows = Vec::new();
        let mut last = BTreeMap::new();
        for name in names {
            let mut row = Row {
                name: name.to_string(),
                phase: "unreadable".into(),
                ..Row::default()
            };
            let counts = match describe(&self.root, &name, &mut row) {
                Ok(counts) => counts,
                // Gone in the meantime.
                Err(Error::Vm(vmm_api::vm::VmError::NotFound(_))) => continue,
                Err(_) => None,
            };
            if let Some(counts) = counts {
                let now = Instant::now();
                let mut history = VecDeque::new();
                if let Some((then, before, seen)) = self.last.remove(&name) {
                    history = seen;
                    rates(&mut row, &before, &counts, now.duration_since(then));
                    history.push_back(row.guest.round().max(0.0) as u64);
                    if history.len() > HISTORY {
                        history.pop_front();
                    }
                }
                row.history.clone_from(&history);
                last.insert(name, (now, counts, history));
            }
            rows.push(row);
        }
        self.last = last;
        Ok(rows)
    }
}

fn describe(root: &Root, name: &VmName, row: &mut Row) -> Result<Option<Counts>, Error> {
    let vm = Vm::open(root, name)?;
    let state = vm.load_state()?;
    row.memory = state.machine.memory.total();
    row.vcpus = u32::try_from(state.vcpus.len()).unwrap_or(u32::MAX);
    if let Ok(memory) = vm.open_memory(&state) {
        row.resident = memory.resident().unwrap_or(0);
    }
    let holder = vm.holder()?;
    let Some(holder) = holder.filter(|holder| holder.program == "rhyve") else {
        row.phase = state.phase.words();
        return Ok(None);
    };
    row.phase = "no answer".into();
    let mut client = Client::connect_within(&vm, PATIENCE)?;
    let status = client.status()?;
    row.phase = match status.phase {
        RunPhase::Running => "running".into(),
        RunPhase::Paused => "paused".into(),
    };
    row.vcpus = status.vcpus;
    let mut counts = Counts::default();
    if let Some((guest, total)) = processor_time(holder.pid) {
        (counts.guest, counts.total) = (guest, total);
    }
    for vcpu in 0..status.vcpus {
        let stats = client.exits(vcpu)?;
        for exit in &stats.exits {
            // What rhyve does for the guest is not the guest's.
            counts.guest -= exit.host_ns as f64 / 1e9;
            *counts.exits.entry(exit.reason.clone()).or_default() += exit.count;
            if let Some(device) = &exit.device {
                *counts.devices.entry(device.clone()).or_default() += exit.count;
            }
        }
        row.places.push(stats);
    }
    for device in client.devices()? {
        let bytes = device.counters.iter();
        let bytes = bytes.filter(|(name, _)| name.split(' ').any(|word| word == "bytes"));
        let bytes: Vec<u64> = bytes.map(|(_, count)| *count).collect();
        if !bytes.is_empty() {
            let name = format!("{} {}", device.slot, device.kind);
            counts.moved.insert(name, bytes.iter().sum());
        }
    }
    Ok(Some(counts))
}

/// Seconds of processor time that a rhyve's vCPUs took, and all of its threads. That of the guest alone,
/// which proc(5) has as guest_time, is not used: KVM-PVM hardly counts it.
fn processor_time(pid: u32) -> Option<(f64, f64)> {
    let (_, total) = times(Path::new(&format!("/proc/{pid}/stat")))?;
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let threads = threads.filter_map(|thread| times(&thread.ok()?.path().join("stat")));
    let vcpus = threads.filter(|(name, _)| name.starts_with("vcpu-"));
    Some((vcpus.map(|(_, time)| time).sum(), total))
}

/// The name of a process or thread, and the seconds of processor time that it took (proc(5)).
fn times(stat: &Path) -> Option<(String, f64)> {
    let stat = std::fs::read_to_string(stat).ok()?;
    // The name in brackets may hold anything; what follows it begins with field 3.
    let (name, rest) = stat.rsplit_once(')')?;
    let (_, name) = name.split_once('(')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    Some((name.to_owned(), (field(14)? + field(15)?) / TICKS))
}

fn rates(row: &mut Row, before: &Counts, now: &Counts, time: Duration) {
    let seconds = time.as_secs_f64().max(0.001);
    let each = |before: &BTreeMap<String, u64>, now: &BTreeMap<String, u64>| {
        let rate = |(name, count): (&String, &u64)| {
            let since = before.get(name).copied().unwrap_or(0);
            // Counting may have begun anew.
            (name.clone(), count.saturating_sub(since) as f64 / seconds)
        };
        now.iter().map(rate).collect()
    };
    row.exits = each(&before.exits, &now.exits);
    row.devices = each(&before.devices, &now.devices);
    row.moved = each(&before.moved, &now.moved);
    row.guest = 100.0 * (now.guest - before.guest).max(0.0) / seconds;
    let total = 100.0 * (now.total - before.total).max(0.0) / seconds;
    row.host = (total - row.guest).max(0.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences() {
        let counts = |guest, total, outs| Counts {
            guest,
            total,
            exits: [("inout".into(), outs)].into(),
            devices: [("com1".into(), outs / 2)].into(),
            moved: [("0:2:0 virtio-blk".into(), outs * 512)].into(),
        };
        let mut row = Row::default();
        let time = Duration::from_secs(2);
        rates(&mut row, &counts(1.0, 3.0, 10), &counts(2.0, 5.0, 30), time);
        assert_eq!((row.guest, row.host), (50.0, 50.0));
        assert_eq!((row.exits["inout"], row.devices["com1"]), (10.0, 5.0));
        assert_eq!(row.moved_a_second(), 5120.0);
        rates(&mut row, &counts(2.0, 5.0, 30), &counts(2.0, 5.0, 1), time);
        assert_eq!(row.exits_a_second(), 0.0);
        assert!(processor_time(std::process::id()).is_some());
    }
}
