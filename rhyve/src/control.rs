//! What `vmmctl` may ask of a running machine: vmm-api's control protocol, answered.

use std::collections::BTreeMap;

use vmm_api::control::{Change, ControlTarget, Refusal, RunPhase, Status};
use vmm_api::exit::ExitKind;
use vmm_api::kvm::{KvmError, KvmVcpu};
use vmm_api::regs::Registers;
use vmm_api::stats::{VcpuStats, VmStats};

use crate::machine::Machine;
use crate::sequencer::Cause;
use crate::suspend::{SuspendHow, SuspendSink};

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
        let uptime = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
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

    fn pause(&self) -> Result<(), Refusal> {
        Machine::pause(self)
    }

    fn resume(&self) -> Result<(), Refusal> {
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

fn kvm_stats(file: Option<&std::fs::File>) -> Vec<vmm_api::stats::Stat> {
    // Old KVMs have no binary statistics: then there are none to show.
    file.and_then(|file| vmm_api::stats::read(file).ok())
        .unwrap_or_default()
}

fn refusal(error: KvmError) -> Refusal {
    match error {
        KvmError::Ioctl { action, source } => Refusal::Kvm {
            action: action.into(),
            reason: source.to_string(),
        },
        other => Refusal::Register(crate::chain(&other)),
    }
}
