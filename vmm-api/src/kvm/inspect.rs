//! What a vCPU tells beyond its registers, and the events that can be put into it.

use std::collections::BTreeMap;
use std::fs;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_msi,
};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::{KvmError, KvmVcpu, convert, ioctl};
use crate::inspect::{MSR_APIC_BASE, MSR_PAT, MSR_SYSENTER, VcpuDetail, with_x2apic};
use crate::state::{Activity, Hex};

ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// LVT registers in the local APIC's page, in the order of bhyve's pin numbers (sys/x86/apicreg.h,
/// APIC_LVT_*): timer, LINT0, LINT1, error, performance counters, thermal, CMCI.
const LVT: [usize; 7] = [0x320, 0x350, 0x360, 0x370, 0x340, 0x330, 0x2f0];
const LVT_MASKED: u32 = 1 << 16;
/// Where a message-signalled interrupt is written; bits 12-19 are the APIC id (Intel SDM volume 3,
/// 11.11.1).
const MSI_ADDRESS: u32 = 0xfee0_0000;

impl KvmVcpu {
    /// What it is doing between instructions.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn activity(&self) -> Result<Option<Activity>, KvmError> {
        let state = self.fd.get_mp_state();
        state
            .map(|state| convert::activity(&state))
            .map_err(ioctl("read a vCPU's activity"))
    }

    /// Everything but its registers; pinning is its thread's affair.
    ///
    /// # Errors
    ///
    /// KVM refuses a read; the error says which.
    pub fn detail(&self) -> Result<VcpuDetail, KvmError> {
        let activity = self.activity()?;
        let [cs, sp, ip] = MSR_SYSENTER;
        let events = self
            .fd
            .get_vcpu_events()
            .map_err(ioctl("read pending events"))?;
        Ok(VcpuDetail {
            activity,
            events: convert::events(&events),
            apic_base: self.msr(MSR_APIC_BASE)?,
            pat: self.msr(MSR_PAT)?,
            sysenter_cs: self.msr(cs)?,
            sysenter_sp: self.msr(sp)?,
            sysenter_ip: self.msr(ip)?,
            tsc_offset: self.tsc_offset().map(Hex),
            exit: self.counters().last_exit(),
            pinning: [].into(),
            capabilities: self.capabilities(),
        })
    }

    /// What KVM adds to the host's time stamp counter (Linux 5.16 and later tell).
    fn tsc_offset(&self) -> Option<u64> {
        let mut offset = 0u64;
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_VCPU_TSC_CTRL,
            attr: u64::from(KVM_VCPU_TSC_OFFSET),
            addr: std::ptr::from_mut(&mut offset) as u64,
        };
        // SAFETY: the ioctl reads the structure and writes eight bytes to `addr`, which is a u64 that
        // outlives the call; a KVM without this attribute refuses it.
        let got = unsafe { ioctl_with_ref(&self.fd, KVM_GET_DEVICE_ATTR(), &attribute) };
        (got == 0).then_some(offset)
    }

    /// Those of bhyve's capabilities that KVM has. HLT always leaves the guest, as KVM is not told
    /// otherwise; the others are what the host's modules and the vCPU's CPUID say.
    fn capabilities(&self) -> BTreeMap<String, bool> {
        let cpuid = self.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).ok();
        let bit = |leaf: u32, pick: fn(&kvm_bindings::kvm_cpuid_entry2) -> u32, bit: u32| {
            let entries = cpuid.as_ref()?.as_slice();
            let entry = entries.iter().find(|e| e.function == leaf && e.index == 0);
            Some(entry.is_some_and(|e| pick(e) >> bit & 1 != 0))
        };
        let known = [
            ("hlt_exit", Some(true)),
            ("pause_exit", pause_exit()),
            ("unrestricted_guest", unrestricted_guest()),
            ("enable_invpcid", bit(7, |e| e.ebx, 10)),
            ("rdpid", bit(7, |e| e.ecx, 22)),
            ("rdtscp", bit(0x8000_0001, |e| e.edx, 27)),
        ];
        let known = known.into_iter();
        known
            .filter_map(|(name, set)| Some((name.to_owned(), set?)))
            .collect()
    }

    /// Turns the local APIC's x2APIC mode on or off (libvmmapi's vm_set_x2apic_state).
    ///
    /// # Errors
    ///
    /// The vCPU's CPUID has no x2APIC.
    pub fn set_x2apic(&self, on: bool) -> Result<(), KvmError> {
        let base = self.msr(MSR_APIC_BASE)?;
        self.set_msrs(&[(MSR_APIC_BASE, with_x2apic(base, on))])
    }

    /// Sends it an interrupt with this vector (libvmmapi's vm_lapic_irq).
    ///
    /// # Errors
    ///
    /// Its APIC id does not fit in a message, or KVM refuses.
    pub fn lapic_irq(&self, vector: u8) -> Result<(), KvmError> {
        let id = self.vm.policy.cpuid.topology.apic_id(self.index());
        let id = u8::try_from(id)
            .map_err(|_| KvmError::State(format!("APIC id {id} does not fit in a message")))?;
        let message = kvm_msi {
            address_lo: MSI_ADDRESS | u32::from(id) << 12,
            data: vector.into(),
            ..kvm_msi::default()
        };
        self.vm
            .fd
            .signal_msi(message)
            .map(drop)
            .map_err(ioctl("send an interrupt"))
    }

    /// Asserts a pin of its local APIC's vector table (libvmmapi's vm_lapic_local_irq): 0 timer,
    /// 1 LINT0, 2 LINT1, 3 error, 4 performance counters, 5 thermal, 6 CMCI. A masked one does
    /// nothing.
    ///
    /// # Errors
    ///
    /// There is no such pin, its delivery mode is one that KVM takes from nobody, or KVM refuses.
    pub fn lapic_local_irq(&self, pin: u32) -> Result<(), KvmError> {
        let offset = usize::try_from(pin).ok().and_then(|pin| LVT.get(pin));
        let offset = *offset.ok_or_else(|| {
            KvmError::State(format!("a local APIC has pins 0 to 6, there is no {pin}"))
        })?;
        let lapic = self.fd.get_lapic().map_err(ioctl("read a local APIC"))?;
        let bytes = lapic.regs.get(offset..offset + 4).unwrap_or(&[]);
        let entry = bytes
            .iter()
            .rev()
            .fold(0u32, |word, &byte| word << 8 | u32::from(byte as u8));
        if entry & LVT_MASKED != 0 {
            return Ok(());
        }
        // Delivery mode (Intel SDM volume 3, 11.5.1). A timer's entry has none: it is fixed.
        match entry >> 8 & 7 {
            0 => self.lapic_irq(entry as u8),
            4 => self.nmi(),
            mode => Err(KvmError::State(format!(
                "pin {pin} has delivery mode {mode}; only fixed (0) and NMI (4) can be asserted"
            ))),
        }
    }

    /// Has it begin with an exception when it enters the guest next (libvmmapi's
    /// vm_inject_exception).
    ///
    /// # Errors
    ///
    /// KVM refuses: the vector is none of an exception, or another event is being delivered.
    pub fn inject_exception(&self, vector: u8, error: Option<u32>) -> Result<(), KvmError> {
        const NMI: u8 = 2;
        if vector >= 32 || vector == NMI {
            return Err(KvmError::State(format!("vector {vector} is no exception")));
        }
        let mut events = self
            .fd
            .get_vcpu_events()
            .map_err(ioctl("read pending events"))?;
        if events.exception.injected != 0 || events.exception.pending != 0 {
            let other = events.exception.nr;
            return Err(KvmError::State(format!(
                "exception {other} is being delivered: try again"
            )));
        }
        events.exception.injected = 1;
        events.exception.nr = vector;
        events.exception.has_error_code = error.is_some().into();
        events.exception.error_code = error.unwrap_or(0);
        self.fd
            .set_vcpu_events(&events)
            .map_err(ioctl("inject an exception"))
    }
}

fn parameter(module: &str, name: &str) -> Option<String> {
    let path = format!("/sys/module/{module}/parameters/{name}");
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// Whether a vCPU that spins on PAUSE leaves the guest.
fn pause_exit() -> Option<bool> {
    let gap = parameter("kvm_intel", "ple_gap");
    let count = gap.or_else(|| parameter("kvm_amd", "pause_filter_count"));
    count.map(|count| count != "0")
}

/// Whether real mode runs on the processor itself; on AMD's it always does.
fn unrestricted_guest() -> Option<bool> {
    let intel = parameter("kvm_intel", "unrestricted_guest").map(|on| on == "Y");
    intel.or_else(|| parameter("kvm_amd", "npt").map(|_| true))
}
