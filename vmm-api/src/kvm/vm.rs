//! A KVM virtual machine: its memory slots and its in-kernel interrupt controllers.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting,
    kvm_enable_cap, kvm_irq_routing_entry, kvm_irqchip, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, MsrExitReason, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{CpuidPolicy, KvmError, KvmVcpu, ioctl};
use crate::memory::GuestRam;

/// Three pages that Intel processors without "unrestricted guest" need for real mode, and one for
/// their identity map: below the BIOS's usual place at the top of 4 GiB, inside the PCI hole.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// What is decided once for a whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmPolicy {
    /// CPUID of all vCPUs.
    pub cpuid: CpuidPolicy,
    /// Accesses to MSRs that KVM does not know come to user space instead of a #GP in the guest.
    pub unknown_msr_exits: bool,
}

/// A KVM virtual machine.
#[derive(Debug)]
pub struct KvmVm {
    pub(super) kvm: Kvm,
    pub(super) fd: VmFd,
    pub(super) policy: VmPolicy,
    pub(super) supported_cpuid: CpuId,
    /// The MSRs that are part of a vCPU's state.
    pub(super) msrs: Vec<u32>,
    /// Bytes of the XSAVE area.
    pub(super) xsave_size: usize,
    // Keeps the mapping alive as long as KVM's slots point into it.
    _ram: GuestRam,
}

impl KvmVm {
    /// Makes a machine on `kvm` with this RAM, PIC, I/O APIC and PIT.
    ///
    /// # Errors
    ///
    /// KVM refuses a step; the error says which.
    pub fn new(kvm: Kvm, ram: GuestRam, policy: VmPolicy) -> Result<Arc<Self>, KvmError> {
        let fd = loop {
            match kvm.create_vm() {
                // A signal while the kernel allocates.
                Err(e) if e.errno() == nix::libc::EINTR => {}
                other => break other.map_err(ioctl("create a virtual machine"))?,
            }
        };
        fd.set_identity_map_address(IDENTITY_MAP)
            .map_err(ioctl("place the identity map"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(ioctl("place the task state segment"))?;
        fd.create_irq_chip()
            .map_err(ioctl("make the interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..kvm_pit_config::default()
        };
        fd.create_pit2(pit)
            .map_err(ioctl("make the interval timer"))?;
        let routing = KvmIrqRouting::from_entries(&legacy_routing())
            .map_err(|e| KvmError::State(format!("routing: {e:?}")))?;
        fd.set_gsi_routing(&routing)
            .map_err(ioctl("route interrupts"))?;
        if policy.unknown_msr_exits {
            let mut cap = kvm_enable_cap {
                cap: Cap::X86UserSpaceMsr as u32,
                ..kvm_enable_cap::default()
            };
            cap.args[0] = MsrExitReason::Unknown.bits().into();
            fd.enable_cap(&cap)
                .map_err(ioctl("pass unknown MSRs to user space"))?;
        }
        set_memory(&fd, &ram)?;
        let supported_cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("tell its CPUID"))?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(ioctl("list its MSRs"))?
            .as_slice()
            .to_vec();
        let xsave_size = usize::try_from(fd.check_extension_int(Cap::Xsave2))
            .unwrap_or(0)
            .max(4096);
        Ok(Arc::new(Self {
            kvm,
            fd,
            policy,
            supported_cpuid,
            msrs,
            xsave_size,
            _ram: ram,
        }))
    }

    /// Makes the vCPU with this index; its KVM id is its APIC id.
    ///
    /// # Errors
    ///
    /// KVM refuses a step; the error says which.
    pub fn create_vcpu(self: &Arc<Self>, index: u32) -> Result<KvmVcpu, KvmError> {
        KvmVcpu::new(self.clone(), index)
    }

    /// Drives an interrupt line: a GSI of the PIC and I/O APIC.
    ///
    /// # Errors
    ///
    /// There is no such GSI.
    pub fn set_irq_line(&self, gsi: u32, asserted: bool) -> Result<(), KvmError> {
        self.fd
            .set_irq_line(gsi, asserted)
            .map_err(ioctl("drive an interrupt line"))
    }

    /// Makes these inputs of the two 8259s, 0 to 15, level triggered, as firmware does by the ELCR
    /// for those that PCI shares. KVM takes no others than 3 to 7, 9 to 12, 14 and 15.
    ///
    /// # Errors
    ///
    /// KVM does not give or take the state of its chips.
    pub fn set_level_triggered(&self, irqs: &[u8]) -> Result<(), KvmError> {
        for (chip_id, first) in [(KVM_IRQCHIP_PIC_MASTER, 0), (KVM_IRQCHIP_PIC_SLAVE, 8)] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..kvm_irqchip::default()
            };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(ioctl("tell the state of an 8259"))?;
            let mask = irqs
                .iter()
                .filter(|irq| (first..first + 8).contains(*irq))
                .fold(0, |mask, irq| mask | 1 << (irq - first));
            // SAFETY: the union holds an 8259's state, for that is the chip asked for; it is bytes.
            unsafe { chip.chip.pic.elcr |= mask };
            self.fd
                .set_irqchip(&chip)
                .map_err(ioctl("take the state of an 8259"))?;
        }
        Ok(())
    }

    /// The VM's KVM statistics, as a file to read with [`crate::stats`].
    ///
    /// # Errors
    ///
    /// This KVM has no binary statistics (before Linux 5.14).
    pub fn stats_file(&self) -> Result<std::fs::File, KvmError> {
        super::vcpu::stats_file(&self.fd)
    }
}

/// GSI 0-15 reach PIC and I/O APIC, 16-23 the I/O APIC alone, each at the pin of its number; but
/// the PIT (GSI 0) is at pin 2 of the I/O APIC, as on every PC, and nothing else is (the PIC's
/// IRQ 2 is its cascade). The MPtable and the MADT describe exactly this.
pub(super) fn legacy_routing() -> Vec<kvm_irq_routing_entry> {
    let entry = |gsi: u32, irqchip: u32, pin: u32| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..kvm_irq_routing_entry::default()
        };
        entry.u.irqchip.irqchip = irqchip;
        entry.u.irqchip.pin = pin;
        entry
    };
    let mut entries = Vec::new();
    for gsi in (0..24).filter(|&gsi| gsi != 2) {
        match gsi {
            0..=7 => entries.push(entry(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            8..=15 => entries.push(entry(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
            _ => {}
        }
        entries.push(entry(
            gsi,
            KVM_IRQCHIP_IOAPIC,
            if gsi == 0 { 2 } else { gsi },
        ));
    }
    entries
}

fn set_memory(fd: &VmFd, ram: &GuestRam) -> Result<(), KvmError> {
    for (slot, (base, len, _)) in (0u32..).zip(ram.layout().segments()) {
        let host = ram
            .memory()
            .get_host_address(GuestAddress(base))
            .map_err(|e| KvmError::State(format!("memory at {base:#x}: {e}")))?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: base,
            memory_size: len,
            userspace_addr: host as u64,
        };
        // SAFETY: the region lies in `ram`'s mapping, which the KvmVm keeps as long as this VM.
        unsafe { fd.set_user_memory_region(region) }.map_err(ioctl("take the memory"))?;
    }
    Ok(())
}
