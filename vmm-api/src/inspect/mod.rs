//! What is known of a vCPU and of its machine beyond registers and statistics.
//!
//! [`VcpuDetail`] and [`MachineDetail`] are told by a running machine over its control socket, or
//! worked out of a stored state ([`VcpuDetail::stored`], [`MachineDetail::stored`]), so that both are
//! shown alike.

mod cmos;
mod device;
mod elfcore;
mod intinfo;
mod memmap;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

pub use cmos::CmosState;
pub use device::{DeviceDetail, QueueDetail, VirtioDetail};
pub use elfcore::{CoreError, CoreReport, write_core};
pub use intinfo::{IntInfo, IntKind};
pub use memmap::{MemoryMap, Region, RegionKind};

use crate::encoding::hex;
use crate::state::{Activity, Hex, Phase, VcpuEvents, VcpuState, VmState};
use crate::topology::Topology;

/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_SYSENTER_CS, _ESP and _EIP.
pub const MSR_SYSENTER: [u32; 3] = [0x174, 0x175, 0x176];
/// IA32_PAT.
pub const MSR_PAT: u32 = 0x277;

/// IA32_APIC_BASE: this is the processor that started the system.
const APIC_BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
const APIC_BASE_EXTD: u64 = 1 << 10;
/// IA32_APIC_BASE: the local APIC is on.
const APIC_BASE_ENABLE: u64 = 1 << 11;
/// IA32_APIC_BASE after power-on, without the processor's own bits (Intel SDM volume 3, 11.4.5).
const APIC_BASE_RESET: u64 = 0xfee0_0000 | APIC_BASE_ENABLE;
/// IA32_PAT after power-on (Intel SDM volume 3, 12.12.4).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// bhyve's names of what a vCPU can be told to do (libvmmapi's vm_capability_type2name), in its
/// order.
pub const CAPABILITIES: [&str; 9] = [
    "hlt_exit",
    "mtrap_exit",
    "pause_exit",
    "unrestricted_guest",
    "enable_invpcid",
    "bpt_exit",
    "rdpid",
    "rdtscp",
    "ipi_exit",
];

/// What is known of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuDetail {
    /// Whether it executes, halts or waits to be started; none: as KVM starts it.
    pub activity: Option<Activity>,
    /// Pending exceptions and interrupts.
    pub events: VcpuEvents,
    /// IA32_APIC_BASE.
    #[serde(with = "hex")]
    pub apic_base: u64,
    /// IA32_PAT.
    #[serde(with = "hex")]
    pub pat: u64,
    /// IA32_SYSENTER_CS.
    #[serde(with = "hex")]
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    #[serde(with = "hex")]
    pub sysenter_sp: u64,
    /// IA32_SYSENTER_EIP.
    #[serde(with = "hex")]
    pub sysenter_ip: u64,
    /// What is added to the host's time stamp counter, modulo 2^64; none where KVM does not tell, or
    /// the vCPU does not exist.
    #[serde(default)]
    pub tsc_offset: Option<Hex>,
    /// Why it left the guest last, kicks from outside not counted.
    #[serde(default)]
    pub exit: Option<LastExit>,
    /// Host processors that it is pinned to; empty if it is not.
    #[serde(default)]
    pub pinning: BTreeSet<usize>,
    /// Those of [`CAPABILITIES`] that there are, and whether they are set; empty if it does not run.
    #[serde(default)]
    pub capabilities: BTreeMap<String, bool>,
}

/// Why a vCPU left the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastExit {
    /// KVM_EXIT_* (linux/kvm.h).
    pub reason: u32,
    /// [`crate::exit::ExitKind`]'s name for it.
    pub name: String,
}

impl VcpuDetail {
    /// What a stored vCPU tells, or, where it says nothing, what KVM will begin with.
    pub fn stored(index: u32, state: &VcpuState) -> Self {
        let msr = |number: &u32, reset| state.msrs.get(number).copied().unwrap_or(reset);
        let [cs, sp, ip] = MSR_SYSENTER;
        let bsp = if index == 0 { APIC_BASE_BSP } else { 0 };
        Self {
            activity: state.activity,
            events: state.events.clone().unwrap_or_default(),
            apic_base: msr(&MSR_APIC_BASE, APIC_BASE_RESET | bsp),
            pat: msr(&MSR_PAT, PAT_RESET),
            sysenter_cs: msr(&cs, 0),
            sysenter_sp: msr(&sp, 0),
            sysenter_ip: msr(&ip, 0),
            pinning: state.pinning.clone(),
            ..Self::default()
        }
    }

    /// Whether its local APIC is in x2APIC mode (libvmmapi's vm_get_x2apic_state).
    pub fn x2apic(&self) -> bool {
        self.apic_base & APIC_BASE_EXTD != 0
    }
}

/// IA32_APIC_BASE with x2APIC mode on or off; a guest itself has no way back from it but a reset.
pub fn with_x2apic(apic_base: u64, on: bool) -> u64 {
    if on {
        apic_base | APIC_BASE_EXTD | APIC_BASE_ENABLE
    } else {
        apic_base & !APIC_BASE_EXTD
    }
}

/// What is known of a machine as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDetail {
    /// Its vCPUs in cores and sockets.
    pub topology: Topology,
    /// How many vCPUs there could be; none where only a running machine knows.
    #[serde(default)]
    pub max_vcpus: Option<u32>,
    /// Those that were started.
    pub active: BTreeSet<u32>,
    /// Those of them that are held.
    pub suspended: BTreeSet<u32>,
    /// What lies where in guest-physical space.
    pub memory_map: MemoryMap,
}

impl MachineDetail {
    /// What a stored state tells.
    pub fn stored(state: &VmState) -> Self {
        let vcpus = u32::try_from(state.vcpus.len()).unwrap_or(u32::MAX);
        let starts = |(index, vcpu): &(u32, &VcpuState)| match vcpu.activity {
            // KVM starts the first, the others wait for it.
            None => *index == 0,
            Some(activity) => activity.started(),
        };
        let active = (0..).zip(&state.vcpus).filter(starts).map(|(n, _)| n);
        let active: BTreeSet<u32> = active.collect();
        let held = matches!(state.phase, Phase::Suspended | Phase::Stopped { .. });
        Self {
            topology: state
                .machine
                .topology
                .unwrap_or_else(|| Topology::packages(vcpus)),
            max_vcpus: None,
            suspended: if held {
                active.clone()
            } else {
                BTreeSet::new()
            },
            active,
            memory_map: MemoryMap::new(state.machine.memory, state.machine.wired, &[]),
        }
    }
}

impl Activity {
    /// It has been started, whatever it does now.
    pub fn started(self) -> bool {
        !matches!(self, Self::Uninitialized | Self::InitReceived)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_vcpu_begins_as_a_processor_does() {
        let detail = VcpuDetail::stored(0, &VcpuState::reset());
        assert_eq!(detail.apic_base, 0xfee0_0900);
        assert_eq!(
            VcpuDetail::stored(1, &VcpuState::reset()).apic_base,
            0xfee0_0800
        );
        assert_eq!(detail.pat, 0x0007_0406_0007_0406);
        assert!(!detail.x2apic());
        let mut state = VcpuState::reset();
        let base = with_x2apic(detail.apic_base, true);
        state.msrs.insert(MSR_APIC_BASE, base);
        assert!(VcpuDetail::stored(0, &state).x2apic());
        assert_eq!(with_x2apic(base, false), detail.apic_base);
    }

    #[test]
    fn stored_processors_are_active_once_they_were_started() {
        let mut state = VmState::created();
        state.vcpus = vec![VcpuState::reset(); 4];
        let detail = MachineDetail::stored(&state);
        assert_eq!((detail.active, detail.suspended), ([0].into(), [].into()));
        assert_eq!(detail.topology, Topology::packages(4));
        state.vcpus[0].activity = Some(Activity::Halted);
        state.vcpus[2].activity = Some(Activity::Runnable);
        state.vcpus[3].activity = Some(Activity::Uninitialized);
        state.phase = Phase::Suspended;
        let detail = MachineDetail::stored(&state);
        let both: BTreeSet<u32> = [0, 2].into();
        assert_eq!((detail.active, detail.suspended), (both.clone(), both));
    }

    #[test]
    fn details_survive_json() {
        let detail = VcpuDetail {
            tsc_offset: Some(Hex(u64::MAX)),
            exit: Some(LastExit {
                reason: 2,
                name: "inout".into(),
            }),
            pinning: [3, 1].into(),
            capabilities: [("rdpid".into(), true)].into(),
            ..VcpuDetail::stored(0, &VcpuState::reset())
        };
        let text = serde_json::to_string(&detail).unwrap();
        assert_eq!(serde_json::from_str::<VcpuDetail>(&text).unwrap(), detail);
    }
}
