//! What CPUID tells a guest: what KVM supports, with this vCPU's place in the machine.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::KvmError;
use crate::topology::Topology;

const SIGNATURE: u32 = 0x4000_0000;
const TIMING: u32 = 0x4000_0010;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;
/// KVM's APIC timer counts nanoseconds (APIC_BUS_CYCLE_NS is 1 by default): 1 GHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What is decided about CPUID for all vCPUs of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidPolicy {
    /// How the vCPUs are grouped.
    pub topology: Topology,
    /// Offer x2APIC mode.
    pub x2apic: bool,
}

/// The CPUID of the vCPU with this APIC id, from what KVM supports.
pub(super) fn build(
    supported: &CpuId,
    policy: &CpuidPolicy,
    apic_id: u32,
    tsc_khz: Option<u32>,
    tsc_deadline: bool,
) -> Result<CpuId, KvmError> {
    let topology = &policy.topology;
    let package_ids = 1u32 << topology.package_bits();
    let thread_ids = 1u32 << topology.thread_bits();
    let mut entries: Vec<_> = supported.as_slice().to_vec();
    // Leaf 0xb and 0x1f are made anew below; 0x1f only repeats 0xb where there are no dies.
    entries.retain(|e| !matches!(e.function, 0xb | 0x1f | TIMING));
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                let logical = package_ids.min(255);
                entry.ebx = entry.ebx & 0xffff | logical << 16 | (apic_id & 0xff) << 24;
                set(&mut entry.ecx, X2APIC, policy.x2apic);
                set(&mut entry.ecx, TSC_DEADLINE, tsc_deadline);
                set(&mut entry.ecx, HYPERVISOR, true);
                set(&mut entry.edx, HTT, package_ids > 1);
            }
            // Intel SDM volume 2, CPUID leaf 4: ids that share this cache, ids in the package.
            0x4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level < 3 { thread_ids } else { package_ids };
                entry.eax = entry.eax & 0x3fff | (sharing - 1) << 14;
                entry.eax |= (package_ids / thread_ids - 1).min(0x3f) << 26;
            }
            // AMD APM volume 3, E.4: the same three facts in AMD's leaves.
            0x8000_0008 => {
                entry.ecx &= !0xf0ff;
                if package_ids > 1 {
                    let threads = topology.cores * topology.threads;
                    entry.ecx |= (threads - 1).min(0xff) | topology.package_bits() << 12;
                }
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level < 3 { thread_ids } else { package_ids };
                entry.eax = entry.eax & !(0xfff << 14) | (sharing - 1) << 14;
            }
            0x8000_001e => {
                let core = apic_id >> topology.thread_bits() & (package_ids / thread_ids - 1);
                entry.eax = apic_id;
                entry.ebx = core | (topology.threads - 1) << 8;
                entry.ecx = apic_id >> topology.package_bits();
            }
            SIGNATURE if tsc_khz.is_some() => entry.eax = entry.eax.max(TIMING),
            _ => {}
        }
    }
    let highest = entries
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    if highest >= 0xb {
        entries.extend(extended_topology(topology, apic_id));
    }
    let has_signature = entries.iter().any(|e| e.function == SIGNATURE);
    if let Some(tsc_khz) = tsc_khz.filter(|_| has_signature) {
        entries.push(kvm_cpuid_entry2 {
            function: TIMING,
            eax: tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..kvm_cpuid_entry2::default()
        });
    }
    CpuId::from_entries(&entries).map_err(|e| KvmError::State(format!("CPUID: {e:?}")))
}

/// Leaf 0xb (Intel SDM volume 2): the levels thread and core, and the end.
fn extended_topology(topology: &Topology, apic_id: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: apic_id,
        ..kvm_cpuid_entry2::default()
    };
    [
        level(0, 1, topology.thread_bits(), topology.threads),
        level(
            1,
            2,
            topology.package_bits(),
            topology.cores * topology.threads,
        ),
        level(2, 0, 0, 0),
    ]
}

fn set(word: &mut u32, bit: u32, on: bool) {
    *word = if on { *word | bit } else { *word & !bit };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn supported() -> CpuId {
        let entries = [
            entry(0, 0x10),
            entry(1, 0),
            entry(0xb, 7),
            entry(SIGNATURE, SIGNATURE + 1),
        ];
        CpuId::from_entries(&entries).unwrap()
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = cpuid
            .as_slice()
            .iter()
            .find(|e| (e.function, e.index) == (function, index));
        *found.unwrap()
    }

    #[test]
    fn each_vcpu_finds_its_own_place() {
        let topology = Topology {
            sockets: 2,
            cores: 2,
            threads: 2,
        };
        let policy = CpuidPolicy {
            topology,
            x2apic: true,
        };
        let cpuid = build(&supported(), &policy, 5, Some(2_500_000), true).unwrap();
        let one = find(&cpuid, 1, 0);
        assert_eq!(one.ebx >> 16, 5 << 8 | 4);
        assert_eq!(
            one.ecx & (X2APIC | TSC_DEADLINE | HYPERVISOR),
            X2APIC | TSC_DEADLINE | HYPERVISOR
        );
        assert_eq!(find(&cpuid, 0xb, 0).eax, 1);
        assert_eq!((find(&cpuid, 0xb, 1).eax, find(&cpuid, 0xb, 1).ebx), (2, 4));
        assert_eq!(find(&cpuid, 0xb, 2).edx, 5);
        assert_eq!(
            (find(&cpuid, TIMING, 0).eax, find(&cpuid, SIGNATURE, 0).eax),
            (2_500_000, TIMING)
        );
    }

    #[test]
    fn x2apic_can_be_hidden() {
        let policy = CpuidPolicy {
            topology: Topology::packages(1),
            x2apic: false,
        };
        let cpuid = build(&supported(), &policy, 0, None, false).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ecx, HYPERVISOR);
        assert!(cpuid.as_slice().iter().all(|e| e.function != TIMING));
    }
}
