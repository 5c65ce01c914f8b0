//! What `vmmctl` may ask of a running machine: vmm-api's control protocol, answered.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::time::Duration;

use nix::errno::Errno;
use vmm_api::control::{Change, ControlTarget, Event, Refusal, RtcState, RunPhase, Status};
use vmm_api::exit::ExitKind;
use vmm_api::inspect::{DeviceDetail, MachineDetail, MemoryMap, Region, VcpuDetail};
use vmm_api::kvm::{KvmError, KvmVcpu};
use vmm_api::memory::MemSize;
use vmm_api::profile::ExitStats;
use vmm_api::regs::Registers;
use vmm_api::state::Activity;
use vmm_api::stats::{VcpuStats, VmStats};

use crate::config::{PciAddress, SlotError};
use crate::firmware::{IOAPIC_BASE, LAPIC_BASE};
use crate::machine::Machine;
use crate::sequencer::{Cause, pinning};
use crate::suspend::{SuspendHow, SuspendSink};

/// How long one request may let the machine run: other clients wait meanwhile.
const SLICE: Duration = Duration::from_millis(500);

impl ControlTarget for Machine {
    fn status(&self) -> Status {
        Status {
            phase: if self.is_paused() {
                RunPhase::Paused
            } else {
                RunPhase::Running
            },
            vcpus: self.vcpu_count(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            memory: self.layout,
        }
    }

    fn registers(&self, vcpu: u32) -> Result<Registers, Refusal> {
        self.ask(vcpu, |kvm| kvm.registers())?.map_err(refusal)
    }

    fn update(&self, vcpu: u32, changes: &[Change]) -> Result<(), Refusal> {
        let changes = changes.to_vec();
        self.ask(vcpu, move |kvm| update(kvm, &changes))?
    }

    fn vcpu_stats(&self, vcpu: u32) -> Result<VcpuStats, Refusal> {
        let seat = self.seat(vcpu)?;
        let exits = ExitKind::ALL.map(|kind| (kind.name().to_owned(), seat.counters.exits(kind)));
        let guest_ns = seat.counters.guest_ns();
        let since = self.counting_since();
        let uptime = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Ok(VcpuStats {
            exits: BTreeMap::from(exits),
            guest_ns,
            host_ns: uptime.saturating_sub(guest_ns),
            kvm: kvm_stats(seat.stats.as_ref()),
        })
    }

    fn vm_stats(&self) -> Result<VmStats, Refusal> {
        let mut counters = BTreeMap::new();
        for port in self.ports.stats() {
            let (first, last) = (port.ports.start(), port.ports.end());
            let name = format!("port {first:#x}-{last:#x} {}", port.name);
            counters.insert(format!("{name} reads"), port.reads);
            counters.insert(format!("{name} writes"), port.writes);
        }
        Ok(VmStats {
            counters,
            kvm: kvm_stats(self.stats.as_ref()),
        })
    }

    fn exits(&self, vcpu: u32) -> Result<ExitStats, Refusal> {
        let mut stats = self.ask(vcpu, |kvm| kvm.exits())?;
        for exit in &mut stats.exits {
            let place = exit.place.map(|place| place.0);
            exit.device = place.and_then(|place| match &*exit.reason {
                "inout" => self.ports.name(u16::try_from(place).ok()?),
                "mmio" => self.mmio.name(place),
                _ => None,
            });
        }
        Ok(stats)
    }

    fn reset_stats(&self) -> Result<(), Refusal> {
        for vcpu in 0..self.vcpu_count() {
            self.ask(vcpu, |kvm| kvm.reset_stats())?;
        }
        self.ports.reset_stats();
        self.count_anew();
        Ok(())
    }

    fn pause(&self) -> Result<(), Refusal> {
        Machine::pause(self)
    }

    fn suspend(&self) -> Result<(), Refusal> {
        self.suspend_whole()
    }

    fn settle(&self) -> Result<(), Refusal> {
        let kept = self.ram.keep();
        kept.map_err(|error| Refusal::Failed(crate::chain(&error)))
    }

    fn snapshot(&self, name: &str) -> Result<(), Refusal> {
        self.snapshot_as(name)
    }

    fn suspend_cpu(&self, vcpu: u32) -> Result<(), Refusal> {
        self.hold_one(vcpu)
    }

    fn resume_cpu(&self, vcpu: u32) -> Result<(), Refusal> {
        self.seat(vcpu)?;
        self.no_debugger()?;
        self.resume_some(|one| one == vcpu)
    }

    fn step(&self, vcpu: u32) -> Result<(), Refusal> {
        self.step_one(vcpu)
    }

    fn run_until(&self, address: u64, ms: u32) -> Result<Option<u32>, Refusal> {
        let patience = Duration::from_millis(ms.into()).min(SLICE);
        Machine::run_until(self, address, patience)
    }

    fn resume(&self) -> Result<(), Refusal> {
        self.no_debugger()?;
        Machine::resume(self)
    }

    fn stop(&self) -> Result<(), Refusal> {
        self.ending.end(Cause::stopped("control socket"));
        Ok(())
    }

    fn reset(&self) -> Result<(), Refusal> {
        self.ending.suspend(SuspendHow::Reset);
        Ok(())
    }

    fn power_button(&self) -> Result<(), Refusal> {
        if self.press_power_button() {
            return Ok(());
        }
        let why = "the guest does not listen to its power button; stop it with --force-poweroff";
        Err(Refusal::Unsupported(why.into()))
    }

    fn nmi(&self, vcpu: u32) -> Result<(), Refusal> {
        self.ask(vcpu, |kvm| kvm.nmi())?.map_err(refusal)
    }

    fn vcpu_detail(&self, vcpu: u32) -> Result<VcpuDetail, Refusal> {
        let (detail, pinning) = self.ask(vcpu, |kvm| (kvm.detail(), pinning::get()))?;
        let mut detail = detail.map_err(refusal)?;
        // This thread is pinned nowhere: what it may use is what an unpinned vCPU may use.
        let free = pinning::get().map_err(|e| unpinned(vcpu, e))?;
        let pinning = pinning.map_err(|e| unpinned(vcpu, e))?;
        if pinning != free {
            detail.pinning = pinning;
        }
        Ok(detail)
    }

    fn machine_detail(&self) -> Result<MachineDetail, Refusal> {
        let mut active = BTreeSet::new();
        for vcpu in 0..self.vcpu_count() {
            let activity = self.ask(vcpu, |kvm| kvm.activity())?.map_err(refusal)?;
            if activity.is_none_or(Activity::started) {
                active.insert(vcpu);
            }
        }
        let seats = (0..).zip(&self.seats);
        let held = seats.filter(|(_, seat)| seat.mailbox.is_on_hold());
        let held: BTreeSet<u32> = held.map(|(vcpu, _)| vcpu).collect();
        Ok(MachineDetail {
            topology: self.topology,
            max_vcpus: u32::try_from(self.max_vcpus).ok(),
            suspended: active.intersection(&held).copied().collect(),
            active,
            memory_map: MemoryMap::new(self.layout, self.wired, &kvm_devices()),
        })
    }

    fn devices(&self) -> Result<Vec<DeviceDetail>, Refusal> {
        let devices = self.functions.iter().map(|function| DeviceDetail {
            slot: function.address.to_string(),
            kind: function.kind.to_owned(),
            ..function
                .virtio
                .as_ref()
                .map(|v| v.inspect())
                .unwrap_or_default()
        });
        Ok(devices.collect())
    }

    fn set_balloon(&self, bytes: u64) -> Result<(), Refusal> {
        let Some(balloon) = &self.balloon else {
            let why = "the guest has no balloon: run it with -s SLOT,virtio-balloon";
            return Err(Refusal::Unsupported(why.into()));
        };
        let most = self.layout.total();
        if bytes > most {
            let (most, wanted) = (MemSize(most), MemSize(bytes));
            let why = format!("the guest has {most}, and cannot lend {wanted}");
            return Err(Refusal::Unsupported(why));
        }
        balloon.set_target(bytes);
        Ok(())
    }

    fn set_link(&self, slot: &str, up: bool) -> Result<(), Refusal> {
        at(&self.cards, slot, "network card")?.set_link(up);
        Ok(())
    }

    fn set_disk(&self, slot: &str, bytes: Option<u64>) -> Result<(), Refusal> {
        let disk = at(&self.disks, slot, "disk")?;
        let info = disk.info();
        let now = info.capacity;
        let capacity = disk.resize(bytes).map_err(|error| {
            Refusal::Unsupported(match error.kind() {
                ErrorKind::InvalidInput => format!(
                    "a disk only grows, by whole blocks: it has {now} bytes in blocks of {}",
                    info.logical
                ),
                ErrorKind::Unsupported => format!("another size of this disk than {now} bytes"),
                _ => format!("the disk stays at {now} bytes: {error}"),
            })
        })?;
        tracing::info!(target: "rhyve", slot, capacity, "the disk has another size");
        Ok(())
    }

    fn pin(&self, vcpu: u32, cpus: &BTreeSet<usize>) -> Result<(), Refusal> {
        let cpus = if cpus.is_empty() {
            pinning::get().map_err(|e| unpinned(vcpu, e))?
        } else {
            cpus.clone()
        };
        self.ask(vcpu, move |_| pinning::set(&cpus))?
            .map_err(|e| unpinned(vcpu, e))
    }

    fn set_x2apic(&self, vcpu: u32, on: bool) -> Result<(), Refusal> {
        self.ask(vcpu, move |kvm| kvm.set_x2apic(on))?
            .map_err(refusal)
    }

    fn inject(&self, vcpu: u32, event: Event) -> Result<(), Refusal> {
        let inject = move |kvm: &mut KvmVcpu| match event {
            Event::Interrupt { vector } => kvm.lapic_irq(vector),
            Event::LocalPin { pin } => kvm.lapic_local_irq(pin),
            Event::Exception { vector, error } => kvm.inject_exception(vector, error),
        };
        self.ask(vcpu, inject)?.map_err(refusal)
    }

    fn rtc(&self) -> Result<RtcState, Refusal> {
        let (seconds, nvram) = self.rtc.look();
        Ok(RtcState {
            seconds,
            nvram: nvram.to_vec(),
        })
    }

    fn set_rtc_time(&self, seconds: i64) -> Result<(), Refusal> {
        self.rtc.set_seconds(seconds);
        Ok(())
    }

    fn set_rtc_nvram(&self, offset: u8, value: u8) -> Result<(), Refusal> {
        if self.rtc.set_byte(offset, value) {
            return Ok(());
        }
        let why = format!("CMOS offset {offset} is not memory: that is 14 to 127, but for 50");
        Err(Refusal::Unsupported(why))
    }
}

impl Machine {
    /// Refuses to let the machine go on while a debugger has it stopped.
    fn no_debugger(&self) -> Result<(), Refusal> {
        if self.debugger.is_holding() {
            let why = "a debugger has stopped it: continue there, or detach";
            return Err(Refusal::Unsupported(why.into()));
        }
        Ok(())
    }
}

/// What is in a slot, as `-s` says it, among all of its kind.
fn at<'a, D>(devices: &'a [(PciAddress, D)], slot: &str, kind: &str) -> Result<&'a D, Refusal> {
    let address: PciAddress = slot
        .parse()
        .map_err(|error: SlotError| Refusal::Unsupported(error.to_string()))?;
    let mut places = devices.iter();
    let found = places.find(|(place, _)| *place == address);
    found.map(|(_, device)| device).ok_or_else(|| {
        let why = format!("there is no {kind} at {address}: see --get-devices");
        Refusal::Unsupported(why)
    })
}

/// What KVM itself puts into guest-physical space, where the MPtable and the MADT say it is.
fn kvm_devices() -> [Region; 2] {
    [
        Region::device("ioapic", IOAPIC_BASE.into(), 0x1000),
        Region::device("lapic", LAPIC_BASE.into(), 0x1000),
    ]
}

/// All changes or none.
fn update(kvm: &mut KvmVcpu, changes: &[Change]) -> Result<(), Refusal> {
    let before = kvm.registers().map_err(refusal)?;
    let after =
        Change::apply_all(changes, &before).map_err(|e| Refusal::Register(e.to_string()))?;
    if let Err(error) = kvm.set_registers(&after) {
        // KVM takes registers in groups: put back those that it had taken.
        kvm.set_registers(&before).map_err(refusal)?;
        return Err(refusal(error));
    }
    Ok(())
}

/// Why a vCPU's thread stays where it is.
fn unpinned(vcpu: u32, errno: Errno) -> Refusal {
    let why = match errno {
        Errno::EINVAL => "this machine has none of these processors for it".to_owned(),
        errno => errno.desc().to_owned(),
    };
    Refusal::Unsupported(format!("pinning vCPU {vcpu} there: {why}"))
}

fn kvm_stats(file: Option<&std::fs::File>) -> Vec<vmm_api::stats::Stat> {
    // Old KVMs have no binary statistics: then there are none to show.
    file.and_then(|file| vmm_api::stats::read(file).ok())
        .unwrap_or_default()
}

pub(crate) fn refusal(error: KvmError) -> Refusal {
    match error {
        KvmError::Ioctl { action, source } => Refusal::Kvm {
            action: action.into(),
            reason: source.to_string(),
        },
        other => Refusal::Register(crate::chain(&other)),
    }
}
