//! A vCPU: entering the guest, and what it comes back with.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR,
    KVM_SYNC_X86_REGS, KVMIO, kvm_run,
};
use kvm_ioctls::{Cap, SyncReg, VcpuExit, VcpuFd};
use nix::libc;
use vmm_sys_util::ioctl_io_nr;

use super::{Kick, KvmError, KvmVm, cpuid, ioctl, kick};
use crate::exit::{Direction, ExitKind, InternalError, PortAccess, VmExit};
use crate::inspect::LastExit;
use crate::profile::{ExitProfile, ExitStats};

const APIC_LVT1: usize = 0x360;
const APIC_MODE_NMI: u32 = 0x400;

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// KVM's binary statistics of a VM or a vCPU.
pub(super) fn stats_file(fd: &impl AsRawFd) -> Result<File, KvmError> {
    // SAFETY: the ioctl takes no argument and returns a new descriptor or -1.
    let stats = unsafe { vmm_sys_util::ioctl::ioctl(fd, KVM_GET_STATS_FD()) };
    if stats < 0 {
        let source = std::io::Error::last_os_error();
        return Err(KvmError::Ioctl {
            action: "open its statistics",
            source,
        });
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { File::from_raw_fd(stats) })
}

/// What a vCPU counts about itself; written by its thread, read by any.
#[derive(Debug, Default)]
pub struct Counters {
    exits: [AtomicU64; ExitKind::ALL.len()],
    guest_ns: AtomicU64,
    /// KVM's reason of the last exit but kicks, and above it 1 + the exit's kind; 0: none.
    last: AtomicU64,
}

impl Counters {
    /// Exits of one kind so far.
    pub fn exits(&self, kind: ExitKind) -> u64 {
        self.exits[kind as usize].load(Relaxed)
    }

    /// Counts from 0 again; only by the vCPU's own thread, which writes without looking.
    fn reset(&self) {
        self.exits.iter().for_each(|count| count.store(0, Relaxed));
        self.guest_ns.store(0, Relaxed);
    }

    /// Nanoseconds spent in KVM_RUN so far: guest code, and what KVM does for it in the kernel.
    pub fn guest_ns(&self) -> u64 {
        self.guest_ns.load(Relaxed)
    }

    /// Why it left the guest last, kicks not counted.
    pub fn last_exit(&self) -> Option<LastExit> {
        let last = self.last.load(Relaxed);
        let kind = usize::try_from(last >> 32).ok()?.checked_sub(1)?;
        Some(LastExit {
            reason: last as u32,
            name: ExitKind::ALL.get(kind)?.name().to_owned(),
        })
    }
}

/// A vCPU. It belongs to the thread that runs it.
#[derive(Debug)]
pub struct KvmVcpu {
    pub(super) fd: VcpuFd,
    pub(super) vm: Arc<KvmVm>,
    index: u32,
    counters: Arc<Counters>,
    profile: ExitProfile,
    /// KVM hands out the registers with each exit.
    synced: bool,
    armed: bool,
}

impl KvmVcpu {
    pub(super) fn new(vm: Arc<KvmVm>, index: u32) -> Result<Self, KvmError> {
        let apic_id = vm.policy.cpuid.topology.apic_id(index);
        let fd = vm
            .fd
            .create_vcpu(apic_id.into())
            .map_err(ioctl("create a vCPU"))?;
        let tsc_khz = fd.get_tsc_khz().ok();
        let deadline = vm.fd.check_extension(Cap::TscDeadlineTimer);
        let cpuid = cpuid::build(
            &vm.supported_cpuid,
            &vm.policy.cpuid,
            apic_id,
            tsc_khz,
            deadline,
        )?;
        fd.set_cpuid2(&cpuid).map_err(ioctl("set a vCPU's CPUID"))?;
        let synced = vm.fd.check_extension_int(Cap::SyncRegs) as u32 & KVM_SYNC_X86_REGS != 0;
        let mut vcpu = Self {
            fd,
            vm,
            index,
            counters: Arc::default(),
            profile: ExitProfile::default(),
            synced,
            armed: false,
        };
        if synced {
            vcpu.fd.set_sync_valid_reg(SyncReg::Register);
        }
        vcpu.wire_lint1()?;
        Ok(vcpu)
    }

    /// LINT1 delivers NMIs, as firmware would have set it; KVM already has the PIC on LINT0.
    fn wire_lint1(&mut self) -> Result<(), KvmError> {
        let mut lapic = self.fd.get_lapic().map_err(ioctl("read a local APIC"))?;
        for (to, byte) in lapic.regs[APIC_LVT1..]
            .iter_mut()
            .zip(APIC_MODE_NMI.to_le_bytes())
        {
            *to = byte as libc::c_char;
        }
        self.fd.set_lapic(&lapic).map_err(ioctl("set a local APIC"))
    }

    /// The vCPU's number, from 0.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// What it counts.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// The vCPU's KVM statistics, as a file to read with [`crate::stats`].
    ///
    /// # Errors
    ///
    /// This KVM has no binary statistics (before Linux 5.14).
    pub fn stats_file(&self) -> Result<File, KvmError> {
        stats_file(&self.fd)
    }

    /// Where its time in user space went.
    pub fn exits(&self) -> ExitStats {
        self.profile.stats()
    }

    /// Counts exits and times from 0 again. KVM's own statistics go on.
    pub fn reset_stats(&mut self) {
        self.counters.reset();
        self.profile = ExitProfile::default();
    }

    /// The time until now was spent on no exit, as while the machine was paused.
    pub fn skip_time(&mut self) {
        self.profile.skip(Instant::now());
    }

    /// Makes the calling thread the one that runs this vCPU, and returns the means to interrupt it.
    pub fn bind_thread(&mut self) -> Kick {
        self.armed = true;
        let flag = ptr::from_mut(&mut self.fd.get_kvm_run().immediate_exit);
        // SAFETY: the flag is in the kvm_run mapping, which lives as long as `fd`; the destructor
        // disarms before that ends. A vCPU does not leave its thread once it is bound.
        unsafe { kick::arm(flag) }
    }

    /// Enters the guest until it needs user space.
    ///
    /// # Errors
    ///
    /// KVM_RUN failed for good.
    pub fn run(&mut self) -> Result<VmExit, KvmError> {
        let entry = Instant::now();
        self.profile.settle(entry);
        let exit = self.enter();
        let left = Instant::now();
        let spent = u64::try_from((left - entry).as_nanos()).unwrap_or(u64::MAX);
        self.counters
            .guest_ns
            .store(self.counters.guest_ns() + spent, Relaxed);
        self.fd.set_kvm_immediate_exit(0);
        if let Ok(exit) = &exit {
            let count = &self.counters.exits[exit.kind() as usize];
            count.store(count.load(Relaxed) + 1, Relaxed);
            let rip = self.synced.then(|| self.fd.sync_regs().regs.rip);
            self.profile.note(exit, rip, left);
            if exit.kind() != ExitKind::Interrupted {
                let kind = exit.kind() as u64 + 1;
                let reason = self.fd.get_kvm_run().exit_reason;
                let last = kind << 32 | u64::from(reason);
                self.counters.last.store(last, Relaxed);
            }
        }
        exit
    }

    /// Completes the access that the last exit was for, without running the guest any further:
    /// [`VmExit::Interrupted`] when the registers are consistent, another exit if the access has
    /// another part (which is to be served, then this called again).
    ///
    /// # Errors
    ///
    /// KVM_RUN failed for good.
    pub fn complete(&mut self) -> Result<VmExit, KvmError> {
        self.profile.settle(Instant::now());
        self.fd.set_kvm_immediate_exit(1);
        let exit = self.enter();
        self.fd.set_kvm_immediate_exit(0);
        exit
    }

    fn enter(&mut self) -> Result<VmExit, KvmError> {
        let exit = match self.fd.run() {
            Ok(exit) => match exit {
                VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => return Ok(self.port_exit()),
                VcpuExit::MmioRead(gpa, data) => VmExit::MmioRead {
                    gpa,
                    len: data.len(),
                },
                VcpuExit::MmioWrite(gpa, from) => {
                    let mut data = [0; 8];
                    data[..from.len()].copy_from_slice(from);
                    VmExit::MmioWrite {
                        gpa,
                        data,
                        len: from.len(),
                    }
                }
                VcpuExit::X86Rdmsr(msr) => VmExit::Rdmsr { index: msr.index },
                VcpuExit::X86Wrmsr(msr) => VmExit::Wrmsr {
                    index: msr.index,
                    value: msr.data,
                },
                VcpuExit::Hlt => VmExit::Hlt,
                VcpuExit::Shutdown => VmExit::Shutdown,
                VcpuExit::Intr => VmExit::Interrupted,
                VcpuExit::Debug(debug) => VmExit::Debug {
                    exception: debug.exception,
                    pc: debug.pc,
                    dr6: debug.dr6,
                },
                VcpuExit::SystemEvent(kind, _) => VmExit::SystemEvent(kind),
                VcpuExit::InternalError => return Ok(self.internal_error()),
                VcpuExit::FailEntry(reason, _) => VmExit::EntryFailed { reason },
                VcpuExit::MemoryFault { .. } => VmExit::OutOfMemory,
                _ => return Ok(VmExit::Other(self.fd.get_kvm_run().exit_reason)),
            },
            Err(e) => match e.errno() {
                // EAGAIN: this vCPU was started or stopped by another one.
                libc::EINTR | libc::EAGAIN => VmExit::Interrupted,
                libc::EFAULT | libc::ENOMEM | libc::ENOSPC => VmExit::OutOfMemory,
                _ => return Err(ioctl("run a vCPU")(e)),
            },
        };
        Ok(exit)
    }

    fn port_exit(&mut self) -> VmExit {
        // SAFETY: KVM filled this member, as the exit reason says.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        let direction = match u32::from(io.direction) {
            KVM_EXIT_IO_IN => Direction::In,
            _ => Direction::Out,
        };
        VmExit::Port(PortAccess {
            direction,
            port: io.port,
            size: io.size,
            count: io.count,
        })
    }

    fn internal_error(&mut self) -> VmExit {
        // SAFETY: KVM filled this member, as the exit reason says.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let count = usize::try_from(internal.ndata)
            .unwrap_or(0)
            .min(internal.data.len());
        let data = internal.data[..count].to_vec();
        VmExit::InternalError(InternalError {
            suberror: internal.suberror,
            data,
        })
    }

    /// The bytes of the port access that the last exit was for: `size * count` of them, to be read
    /// (OUT) or to be filled (IN) before the next entry. Empty after any other exit.
    pub fn pio_data(&mut self) -> &mut [u8] {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != KVM_EXIT_IO {
            return &mut [];
        }
        // SAFETY: KVM filled this member, as the exit reason says.
        let io = unsafe { run.__bindgen_anon_1.io };
        let start = ptr::from_mut::<kvm_run>(run).cast::<u8>();
        // SAFETY: KVM puts the data at this offset into the mapping that kvm_run begins, which
        // lives as long as `fd`; the slice borrows `self`, so no other reference exists.
        unsafe {
            let data = start.add(usize::try_from(io.data_offset).unwrap_or(0));
            std::slice::from_raw_parts_mut(data, usize::from(io.size) * io.count as usize)
        }
    }

    /// Answers the [`VmExit::MmioRead`] of the last exit, little endian.
    pub fn set_mmio_data(&mut self, value: u64) {
        let run = self.fd.get_kvm_run();
        if run.exit_reason == KVM_EXIT_MMIO {
            run.__bindgen_anon_1.mmio.data = value.to_le_bytes();
        }
    }

    /// Answers the [`VmExit::Rdmsr`] or [`VmExit::Wrmsr`] of the last exit: a value (which a write
    /// ignores), or none for a #GP in the guest.
    pub fn answer_msr(&mut self, value: Option<u64>) {
        let run = self.fd.get_kvm_run();
        if matches!(run.exit_reason, KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR) {
            run.__bindgen_anon_1.msr.error = value.is_none().into();
            run.__bindgen_anon_1.msr.data = value.unwrap_or(0);
        }
    }

    /// The guest-physical address of a linear one, by the vCPU's own page tables; none if they do
    /// not map it.
    ///
    /// # Errors
    ///
    /// KVM cannot walk them.
    pub fn translate(&self, linear: u64) -> Result<Option<u64>, KvmError> {
        let found = self
            .fd
            .translate_gva(linear)
            .map_err(ioctl("translate an address"))?;
        Ok((found.valid != 0).then_some(found.physical_address))
    }

    /// Sends a non-maskable interrupt.
    ///
    /// # Errors
    ///
    /// KVM refuses it.
    pub fn nmi(&self) -> Result<(), KvmError> {
        self.fd.nmi().map_err(ioctl("send an NMI"))
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        if self.armed {
            kick::disarm();
        }
    }
}
