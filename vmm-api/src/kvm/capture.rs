//! All that a vCPU is made of, out of KVM and back into it.

use std::collections::BTreeMap;
use std::ptr;

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, KVMIO, Msrs, Xsave, kvm_lapic_state, kvm_msr_entry, kvm_sregs2,
    kvm_xcrs, kvm_xsave, kvm_xsave2,
};
use kvm_ioctls::Cap;
use nix::libc;
use vmm_sys_util::fam::FamStruct;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_ior_nr;

use super::{Away, KvmError, KvmVcpu, convert, host_ns, ioctl};
use crate::inspect::MSR_APIC_BASE;
use crate::regs::Registers;
use crate::state::VcpuState;

const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
const MSR_TSC: u32 = 0x10;

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);

impl KvmVcpu {
    /// All registers, consistent only after [`KvmVcpu::complete`].
    ///
    /// # Errors
    ///
    /// KVM refuses a read; the error says which.
    pub fn registers(&self) -> Result<Registers, KvmError> {
        let mut regs = Registers::default();
        convert::from_regs(
            &self.fd.get_regs().map_err(ioctl("read registers"))?,
            &mut regs,
        );
        let sregs = self
            .fd
            .get_sregs()
            .map_err(ioctl("read system registers"))?;
        convert::from_sregs(&sregs, &mut regs);
        regs.pdpte = self.pdpte(&regs);
        let debug = self
            .fd
            .get_debug_regs()
            .map_err(ioctl("read debug registers"))?;
        convert::from_debugregs(&debug, &mut regs);
        // A processor without XSAVE has no XCR0: the reset value stands for it.
        regs.xcr0 = self.fd.get_xcrs().ok().and_then(|x| xcr0(&x)).unwrap_or(1);
        regs.kgs_base = self.msr(MSR_KERNEL_GS_BASE)?;
        let events = self
            .fd
            .get_vcpu_events()
            .map_err(ioctl("read pending events"))?;
        regs.intr_shadow = events.interrupt.shadow.into();
        Ok(regs)
    }

    /// The page directory pointers, which only PAE paging loads into the processor.
    fn pdpte(&self, regs: &Registers) -> Option<[u64; 4]> {
        const CR0_PG: u64 = 1 << 31;
        const CR4_PAE: u64 = 1 << 5;
        const EFER_LMA: u64 = 1 << 10;
        if regs.cr0 & CR0_PG == 0 || regs.cr4 & CR4_PAE == 0 || regs.efer & EFER_LMA != 0 {
            return None;
        }
        let mut sregs = kvm_sregs2::default();
        // SAFETY: the ioctl fills exactly this structure; an older KVM refuses it.
        let got = unsafe { ioctl_with_mut_ref(&self.fd, KVM_GET_SREGS2(), &mut sregs) };
        let valid = sregs.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
        (got == 0 && valid).then_some(sregs.pdptrs)
    }

    /// Sets those registers that differ from what the vCPU has.
    ///
    /// # Errors
    ///
    /// KVM refuses a value, as a processor would; what was set before it stays.
    pub fn set_registers(&self, regs: &Registers) -> Result<(), KvmError> {
        let old = self.registers()?;
        let sregs = self
            .fd
            .get_sregs()
            .map_err(ioctl("read system registers"))?;
        let wanted = convert::to_sregs(regs, &sregs);
        if wanted != sregs {
            self.fd
                .set_sregs(&wanted)
                .map_err(ioctl("set these segments, control registers or EFER"))?;
        }
        let wanted = convert::to_regs(regs);
        if wanted != convert::to_regs(&old) {
            self.fd
                .set_regs(&wanted)
                .map_err(ioctl("set these registers"))?;
        }
        let wanted = convert::to_debugregs(regs);
        if wanted != convert::to_debugregs(&old) {
            self.fd
                .set_debug_regs(&wanted)
                .map_err(ioctl("set these debug registers"))?;
        }
        if regs.xcr0 != old.xcr0 {
            self.fd
                .set_xcrs(&xcrs(regs.xcr0))
                .map_err(ioctl("set this XCR0"))?;
        }
        if regs.kgs_base != old.kgs_base {
            self.set_msrs(&[(MSR_KERNEL_GS_BASE, regs.kgs_base)])?;
        }
        if regs.intr_shadow != old.intr_shadow {
            let mut events = self
                .fd
                .get_vcpu_events()
                .map_err(ioctl("read pending events"))?;
            events.interrupt.shadow = (regs.intr_shadow & 3) as u8;
            events.flags = kvm_bindings::KVM_VCPUEVENT_VALID_SHADOW;
            self.fd
                .set_vcpu_events(&events)
                .map_err(ioctl("set the interrupt shadow"))?;
        }
        Ok(())
    }

    /// The whole vCPU. KVM_GET_MP_STATE comes first, because it may still deliver an INIT or SIPI,
    /// and the pending events last, because reading other state may change them.
    ///
    /// # Errors
    ///
    /// KVM refuses a read; the error says which.
    pub fn capture(&self) -> Result<VcpuState, KvmError> {
        let mp_state = self
            .fd
            .get_mp_state()
            .map_err(ioctl("read a vCPU's activity"))?;
        let registers = self.registers()?;
        let lapic = self.fd.get_lapic().map_err(ioctl("read a local APIC"))?;
        let mut msrs = self.all_msrs()?;
        let tsc_at_ns = host_ns();
        msrs.insert(MSR_TSC, self.msr(MSR_TSC)?);
        Ok(VcpuState {
            registers,
            activity: convert::activity(&mp_state),
            msrs,
            tsc_at_ns: Some(tsc_at_ns),
            xsave: self.xsave()?,
            lapic: lapic.regs.iter().map(|&c| c as u8).collect(),
            tsc_khz: self.fd.get_tsc_khz().ok(),
            pinning: [].into(),
            events: Some(convert::events(
                &self
                    .fd
                    .get_vcpu_events()
                    .map_err(ioctl("read pending events"))?,
            )),
        })
    }

    /// Puts a captured or a loaded state in place; what the state leaves out stays as KVM made it.
    /// The local APIC comes after the system registers, which hold its base, and before the MSRs,
    /// of which the TSC deadline needs its timer mode; the activity comes last. The time stamp counter
    /// goes on as `away` says, if the machine was away.
    ///
    /// # Errors
    ///
    /// KVM refuses a part; the error says which.
    pub fn restore(&mut self, state: &VcpuState) -> Result<(), KvmError> {
        self.restore_after(state, None)
    }

    /// The same for a machine that was suspended and now goes on.
    ///
    /// # Errors
    ///
    /// As [`KvmVcpu::restore`].
    pub fn restore_after(&mut self, state: &VcpuState, away: Option<Away>) -> Result<(), KvmError> {
        if let Some(khz) = state
            .tsc_khz
            .filter(|_| self.vm.kvm.check_extension(Cap::TscControl))
        {
            self.fd
                .set_tsc_khz(khz)
                .map_err(ioctl("set the time stamp counter's frequency"))?;
        }
        self.set_registers(&state.registers)?;
        if !state.xsave.is_empty() {
            self.set_xsave(&state.xsave)?;
        }
        if let Some(&base) = state.msrs.get(&MSR_APIC_BASE) {
            // The page is read by the mode that this says.
            self.set_msrs(&[(MSR_APIC_BASE, base)])?;
        }
        if !state.lapic.is_empty() {
            self.set_lapic(&state.lapic)?;
        }
        if let Some(&tsc) = state.msrs.get(&MSR_TSC) {
            let khz = state.tsc_khz.or_else(|| self.fd.get_tsc_khz().ok());
            let hz = u64::from(khz.unwrap_or(0)) * 1000;
            let since = away.zip(state.tsc_at_ns);
            let passed = since.map_or(0, |(away, at_ns)| away.ticks_since(at_ns, hz));
            self.set_msrs(&[(MSR_TSC, tsc.wrapping_add(passed))])?;
        }
        let rest = state.msrs.iter().filter(|(index, _)| **index != MSR_TSC);
        let msrs: Vec<_> = rest.map(|(&index, &value)| (index, value)).collect();
        self.set_msrs(&msrs)?;
        if let Some(events) = &state.events {
            let events = convert::kvm_events(events, state.registers.intr_shadow);
            self.fd
                .set_vcpu_events(&events)
                .map_err(ioctl("set pending events"))?;
        }
        if let Some(activity) = state.activity {
            self.fd
                .set_mp_state(convert::mp_state(activity))
                .map_err(ioctl("set a vCPU's activity"))?;
        }
        Ok(())
    }

    pub(super) fn msr(&self, index: u32) -> Result<u64, KvmError> {
        let mut msrs = msr_list(&[(index, 0)])?;
        let got = self.fd.get_msrs(&mut msrs).map_err(ioctl("read an MSR"))?;
        Ok(msrs
            .as_slice()
            .first()
            .filter(|_| got == 1)
            .map_or(0, |m| m.data))
    }

    /// Every MSR that KVM lists and that can be read; KVM stops at each that cannot. It does not list
    /// the APIC base.
    fn all_msrs(&self) -> Result<BTreeMap<u32, u64>, KvmError> {
        let mut values = BTreeMap::from([(MSR_APIC_BASE, self.msr(MSR_APIC_BASE)?)]);
        let mut rest = self.vm.msrs.as_slice();
        while !rest.is_empty() {
            let batch: Vec<_> = rest.iter().take(256).map(|&index| (index, 0)).collect();
            let Ok(mut msrs) = msr_list(&batch) else {
                break;
            };
            let got = self.fd.get_msrs(&mut msrs).unwrap_or(0).min(batch.len());
            values.extend(msrs.as_slice()[..got].iter().map(|m| (m.index, m.data)));
            let unreadable = usize::from(got < batch.len());
            rest = &rest[got + unreadable..];
        }
        Ok(values)
    }

    /// Sets MSRs, skipping those that have the value already: KVM lists some that it will not set.
    pub(super) fn set_msrs(&self, msrs: &[(u32, u64)]) -> Result<(), KvmError> {
        for &(index, value) in msrs {
            if self.msr(index)? == value {
                continue;
            }
            let set = self
                .fd
                .set_msrs(&msr_list(&[(index, value)])?)
                .map_err(ioctl("set an MSR"))?;
            if set != 1 {
                return Err(KvmError::Msr { index, value });
            }
        }
        Ok(())
    }

    fn xsave(&self) -> Result<Vec<u8>, KvmError> {
        let mut area = self.xsave_area()?;
        if self.vm.fd.check_extension(Cap::Xsave2) {
            // SAFETY: the area has the size that KVM_CAP_XSAVE2 says.
            unsafe { self.fd.get_xsave2(&mut area) }.map_err(ioctl("read the XSAVE area"))?;
        } else {
            let plain = self.fd.get_xsave().map_err(ioctl("read the XSAVE area"))?;
            // SAFETY: only the fixed part is replaced; the (empty) array behind it stays.
            unsafe { area.as_mut_fam_struct() }.xsave = plain;
        }
        // SAFETY: kvm_xsave and the entries behind it are plain integers without padding, and the
        // wrapper allocated exactly `xsave_size` bytes of them, rounded up to an entry.
        Ok(unsafe {
            let start = ptr::from_ref(&area.as_fam_struct_ref().xsave).cast::<u8>();
            std::slice::from_raw_parts(start, self.vm.xsave_size)
        }
        .to_vec())
    }

    fn set_xsave(&self, bytes: &[u8]) -> Result<(), KvmError> {
        let size = self.vm.xsave_size;
        if bytes.len() != size {
            let text = format!("an XSAVE area of {} bytes, {size} here", bytes.len());
            return Err(KvmError::State(text));
        }
        let mut area = self.xsave_area()?;
        // SAFETY: as in `xsave`: the area has at least `size` bytes of plain integers.
        unsafe {
            let start = ptr::from_mut(&mut area.as_mut_fam_struct().xsave).cast::<u8>();
            ptr::copy_nonoverlapping(bytes.as_ptr(), start, size);
            self.fd.set_xsave2(&area)
        }
        .map_err(ioctl("set the XSAVE area"))
    }

    fn xsave_area(&self) -> Result<Xsave, KvmError> {
        let extra = self.vm.xsave_size - size_of::<kvm_xsave>();
        let entries = extra.div_ceil(size_of::<<kvm_xsave2 as FamStruct>::Entry>());
        Xsave::new(entries).map_err(|e| KvmError::State(format!("XSAVE area: {e:?}")))
    }

    fn set_lapic(&self, bytes: &[u8]) -> Result<(), KvmError> {
        let mut lapic = kvm_lapic_state::default();
        if bytes.len() != lapic.regs.len() {
            let text = format!("a local APIC of {} bytes", bytes.len());
            return Err(KvmError::State(text));
        }
        for (to, &from) in lapic.regs.iter_mut().zip(bytes) {
            *to = from as libc::c_char;
        }
        self.fd.set_lapic(&lapic).map_err(ioctl("set a local APIC"))
    }
}

fn msr_list(msrs: &[(u32, u64)]) -> Result<Msrs, KvmError> {
    let entry = |&(index, data): &(u32, u64)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries: Vec<_> = msrs.iter().map(entry).collect();
    Msrs::from_entries(&entries).map_err(|e| KvmError::State(format!("MSRs: {e:?}")))
}

fn xcr0(kvm: &kvm_xcrs) -> Option<u64> {
    let count = usize::try_from(kvm.nr_xcrs).ok()?;
    kvm.xcrs
        .iter()
        .take(count)
        .find(|x| x.xcr == 0)
        .map(|x| x.value)
}

fn xcrs(xcr0: u64) -> kvm_xcrs {
    let mut kvm = kvm_xcrs {
        nr_xcrs: 1,
        ..kvm_xcrs::default()
    };
    kvm.xcrs[0].value = xcr0;
    kvm
}
