//! Where a VM's registers are: stored in its object, or in a `rhyve` behind the control socket.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_api::control::{Change, Client, ClientError, Refusal, RtcState};
use vmm_api::inspect::{CmosState, MSR_APIC_BASE, MachineDetail, VcpuDetail, with_x2apic};
use vmm_api::memory::{MemFile, MemoryLayout};
use vmm_api::name::VmName;
use vmm_api::regs::Registers;
use vmm_api::root::Root;
use vmm_api::state::{BootInfo, Phase, VmState};
use vmm_api::stats::{VcpuStats, VmStats};
use vmm_api::vm::{self, Images, LockedVm, Vm, VmError};

use crate::error::Error;

/// How vmmctl names itself as a lock's holder.
pub const PROGRAM: &str = "vmmctl";

/// How long to wait for what takes a moment only: another vmmctl's lock.
const MOMENT: Duration = Duration::from_secs(1);

/// How long a rhyve may take to start: restoring a suspended machine takes seconds on a busy host.
const STARTING: Duration = Duration::from_secs(10);

const PAUSE: Duration = Duration::from_millis(2);

/// How long a large memory may take to copy.
const COPYING: Duration = Duration::from_secs(600);

/// A VM's vCPUs, alike whether it runs or not.
pub trait VcpuAccess {
    /// Where in its life the VM is, in one word.
    ///
    /// # Errors
    ///
    /// It cannot be asked.
    fn phase(&mut self) -> Result<String, Error>;

    /// The same, and how it ended if it has.
    ///
    /// # Errors
    ///
    /// It cannot be asked.
    fn ending(&mut self) -> Result<String, Error> {
        self.phase()
    }

    /// Where its RAM lies.
    ///
    /// # Errors
    ///
    /// It cannot be asked.
    fn memory(&mut self) -> Result<MemoryLayout, Error>;

    /// How many vCPUs it has.
    ///
    /// # Errors
    ///
    /// It cannot be asked.
    fn vcpus(&mut self) -> Result<u32, Error>;

    /// All registers of one vCPU.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or it cannot be asked.
    fn registers(&mut self, vcpu: u32) -> Result<Registers, Error>;

    /// Changes registers of one vCPU, all or none.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or a change is refused.
    fn update(&mut self, vcpu: u32, changes: Vec<Change>) -> Result<(), Error>;

    /// What one vCPU and the VM have counted.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or the VM does not run.
    fn stats(&mut self, vcpu: u32) -> Result<(VcpuStats, VmStats), Error>;

    /// What one vCPU has beyond registers.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or it cannot be asked.
    fn vcpu_detail(&mut self, vcpu: u32) -> Result<VcpuDetail, Error>;

    /// What the machine is made of.
    ///
    /// # Errors
    ///
    /// It cannot be asked.
    fn machine_detail(&mut self) -> Result<MachineDetail, Error>;

    /// Lets a vCPU run on these host processors only; on any, if there are none.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or no such processor.
    fn pin(&mut self, vcpu: u32, cpus: &BTreeSet<usize>) -> Result<(), Error>;

    /// Turns a local APIC's x2APIC mode on or off.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or it has no x2APIC.
    fn set_x2apic(&mut self, vcpu: u32, on: bool) -> Result<(), Error>;

    /// What the CMOS clock shows and holds.
    ///
    /// # Errors
    ///
    /// There is none yet.
    fn rtc(&mut self) -> Result<RtcState, Error>;

    /// Sets the CMOS clock: seconds since 1970 in its own time zone.
    ///
    /// # Errors
    ///
    /// The VM cannot be changed.
    fn set_rtc_time(&mut self, seconds: i64) -> Result<(), Error>;

    /// Writes a byte of the CMOS memory.
    ///
    /// # Errors
    ///
    /// The VM cannot be changed.
    fn set_rtc_nvram(&mut self, offset: u8, value: u8) -> Result<(), Error>;

    /// Guest memory, to be looked at.
    ///
    /// # Errors
    ///
    /// There is none.
    fn open_memory(&mut self) -> Result<MemFile, Error>;

    /// Makes another VM that is as this one is now.
    ///
    /// # Errors
    ///
    /// There is one of this name, there is no room for it, or what is here cannot be copied.
    fn snapshot(&mut self, name: &VmName) -> Result<(), Error>;

    /// What the loader put there, if that is known.
    ///
    /// # Errors
    ///
    /// The state cannot be read.
    fn boot(&mut self) -> Result<Option<BootInfo>, Error>;

    /// The connection to a VM that runs.
    ///
    /// # Errors
    ///
    /// It does not.
    fn live(&mut self) -> Result<&mut Client, Error>;
}

/// Finds out whether a VM runs, and opens it accordingly.
///
/// # Errors
///
/// There is no such VM, another program is changing it, or its rhyve does not answer.
pub fn open<'a>(root: &'a Root, name: &VmName) -> Result<Box<dyn VcpuAccess + 'a>, Error> {
    let deadline = Instant::now() + STARTING;
    loop {
        let vm = Vm::open(root, name)?;
        match vm.holder()? {
            // What vmmctl changes is there at once and as a whole.
            None => return Ok(Box::new(Stored { root, vm })),
            Some(holder) if holder.program == PROGRAM => return Ok(Box::new(Stored { root, vm })),
            Some(holder) if holder.program == "rhyve" => match Client::connect(&vm) {
                Ok(client) => return Ok(Box::new(Live { client, vm })),
                Err(ClientError::Absent(_)) if Instant::now() < deadline => {}
                Err(error) => return Err(error.into()),
            },
            Some(holder) => {
                return Err(Error::Vm(VmError::Busy {
                    name: name.clone(),
                    holder,
                }));
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// Opens a VM that does not run, to change it.
///
/// # Errors
///
/// There is no such VM, it runs, or another program is changing it.
pub fn lock(root: &Root, name: &VmName) -> Result<LockedVm, Error> {
    let deadline = Instant::now() + MOMENT;
    loop {
        match Vm::open(root, name)?.lock(PROGRAM) {
            Err(VmError::Busy { holder, .. })
                if holder.program == PROGRAM && Instant::now() < deadline =>
            {
                std::thread::sleep(PAUSE);
            }
            other => return Ok(other?),
        }
    }
}

/// Makes a VM.
///
/// # Errors
///
/// It exists, or cannot be made.
pub fn create(root: &Root, name: &VmName) -> Result<LockedVm, Error> {
    Ok(Vm::create(root, name, PROGRAM)?)
}

/// Waits until nobody runs the VM any more.
///
/// # Errors
///
/// It still runs after `patience`.
pub fn wait_for_end(root: &Root, name: &VmName, patience: Duration) -> Result<(), Error> {
    let deadline = Instant::now() + patience;
    loop {
        match Vm::open(root, name) {
            // rhyve -D destroys it at the end.
            Err(VmError::NotFound(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
            Ok(vm) if vm.holder()?.is_none() => return Ok(()),
            Ok(_) if Instant::now() >= deadline => return Err(Error::NotEnding(name.clone())),
            Ok(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// A VM that does not run: vm.json.
struct Stored<'a> {
    root: &'a Root,
    vm: Vm,
}

impl Stored<'_> {
    fn state(&self) -> Result<VmState, Error> {
        Ok(self.vm.load_state()?)
    }

    /// Changes the stored state, whole or not at all.
    fn change(
        &self,
        change: impl FnOnce(&Self, &mut VmState) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut locked = lock(self.root, self.vm.name())?;
        let mut state = locked.load_state()?;
        change(self, &mut state)?;
        Ok(locked.store(&mut state)?)
    }

    fn cmos(&self, state: &VmState) -> Result<Option<CmosState>, Error> {
        CmosState::stored(state).map_err(|source| Error::State {
            vm: self.vm.name().clone(),
            source,
        })
    }

    /// Index of a vCPU that there is.
    fn index(&self, state: &VmState, vcpu: u32) -> Result<usize, Error> {
        let index = usize::try_from(vcpu).unwrap_or(usize::MAX);
        let vcpus = u32::try_from(state.vcpus.len()).unwrap_or(u32::MAX);
        if vcpu < vcpus {
            return Ok(index);
        }
        Err(Error::Refused {
            vm: self.vm.name().clone(),
            refusal: Refusal::NoSuchVcpu { vcpu, vcpus },
        })
    }

    fn not_running(&self) -> Result<Error, Error> {
        Ok(Error::NotRunning {
            vm: self.vm.name().clone(),
            phase: self.state()?.phase,
        })
    }
}

impl VcpuAccess for Stored<'_> {
    fn phase(&mut self) -> Result<String, Error> {
        Ok(self.state()?.phase.word().into())
    }

    fn ending(&mut self) -> Result<String, Error> {
        Ok(self.state()?.phase.words())
    }

    fn memory(&mut self) -> Result<MemoryLayout, Error> {
        Ok(self.state()?.machine.memory)
    }

    fn vcpus(&mut self) -> Result<u32, Error> {
        Ok(u32::try_from(self.state()?.vcpus.len()).unwrap_or(u32::MAX))
    }

    fn registers(&mut self, vcpu: u32) -> Result<Registers, Error> {
        let mut state = self.state()?;
        let index = self.index(&state, vcpu)?;
        Ok(state.vcpus.swap_remove(index).registers)
    }

    fn update(&mut self, vcpu: u32, changes: Vec<Change>) -> Result<(), Error> {
        self.change(|me, state| {
            let index = me.index(state, vcpu)?;
            let registers = &mut state.vcpus[index].registers;
            *registers =
                Change::apply_all(&changes, registers).map_err(|source| Error::Register {
                    vm: me.vm.name().clone(),
                    source,
                })?;
            if state.phase == Phase::Created {
                // Loaded by hand.
                state.phase = Phase::Loaded;
            }
            Ok(())
        })
    }

    fn vcpu_detail(&mut self, vcpu: u32) -> Result<VcpuDetail, Error> {
        let state = self.state()?;
        let index = self.index(&state, vcpu)?;
        Ok(VcpuDetail::stored(vcpu, &state.vcpus[index]))
    }

    fn machine_detail(&mut self) -> Result<MachineDetail, Error> {
        Ok(MachineDetail::stored(&self.state()?))
    }

    fn pin(&mut self, vcpu: u32, cpus: &BTreeSet<usize>) -> Result<(), Error> {
        for &cpu in cpus {
            if !Path::new(&format!("/sys/devices/system/cpu/cpu{cpu}")).exists() {
                return Err(Error::NoHostCpu(cpu));
            }
        }
        self.change(|me, state| {
            let index = me.index(state, vcpu)?;
            state.vcpus[index].pinning.clone_from(cpus);
            Ok(())
        })
    }

    fn set_x2apic(&mut self, vcpu: u32, on: bool) -> Result<(), Error> {
        self.change(|me, state| {
            let index = me.index(state, vcpu)?;
            let now = VcpuDetail::stored(vcpu, &state.vcpus[index]).apic_base;
            let msrs = &mut state.vcpus[index].msrs;
            msrs.insert(MSR_APIC_BASE, with_x2apic(now, on));
            Ok(())
        })
    }

    fn rtc(&mut self) -> Result<RtcState, Error> {
        let cmos = self.cmos(&self.state()?)?;
        let cmos = cmos.ok_or_else(|| Error::NoClock(self.vm.name().clone()))?;
        Ok(RtcState {
            seconds: cmos.seconds(),
            nvram: cmos.nvram,
        })
    }

    fn set_rtc_time(&mut self, seconds: i64) -> Result<(), Error> {
        self.change(|me, state| {
            let mut cmos = me.cmos(state)?.unwrap_or_default();
            cmos.set_seconds(seconds);
            cmos.store(state);
            Ok(())
        })
    }

    fn set_rtc_nvram(&mut self, offset: u8, value: u8) -> Result<(), Error> {
        self.change(|me, state| {
            let mut cmos = me.cmos(state)?.unwrap_or_default();
            if let Some(byte) = cmos.nvram.get_mut(usize::from(offset)) {
                *byte = value;
            }
            cmos.store(state);
            Ok(())
        })
    }

    fn open_memory(&mut self) -> Result<MemFile, Error> {
        Ok(self.vm.open_memory(&self.state()?)?)
    }

    fn snapshot(&mut self, name: &VmName) -> Result<(), Error> {
        let locked = lock(self.root, self.vm.name())?;
        let state = locked.load_state()?;
        let memory = locked.open_memory(&state)?;
        let images = Images::Free;
        Ok(vm::snapshot(
            self.root, name, PROGRAM, &memory, &state, images,
        )?)
    }

    fn boot(&mut self) -> Result<Option<BootInfo>, Error> {
        Ok(self.state()?.machine.boot)
    }

    fn stats(&mut self, _: u32) -> Result<(VcpuStats, VmStats), Error> {
        Err(self.not_running()?)
    }

    fn live(&mut self) -> Result<&mut Client, Error> {
        Err(self.not_running()?)
    }
}

/// A VM that runs: its control socket.
struct Live {
    client: Client,
    vm: Vm,
}

impl VcpuAccess for Live {
    fn phase(&mut self) -> Result<String, Error> {
        Ok(self.client.status()?.phase.word().into())
    }

    fn memory(&mut self) -> Result<MemoryLayout, Error> {
        Ok(self.client.status()?.memory)
    }

    fn vcpus(&mut self) -> Result<u32, Error> {
        Ok(self.client.hello().vcpus)
    }

    fn registers(&mut self, vcpu: u32) -> Result<Registers, Error> {
        Ok(self.client.registers(vcpu)?)
    }

    fn update(&mut self, vcpu: u32, changes: Vec<Change>) -> Result<(), Error> {
        Ok(self.client.update(vcpu, changes)?)
    }

    fn vcpu_detail(&mut self, vcpu: u32) -> Result<VcpuDetail, Error> {
        Ok(self.client.vcpu_detail(vcpu)?)
    }

    fn machine_detail(&mut self) -> Result<MachineDetail, Error> {
        Ok(self.client.machine_detail()?)
    }

    fn pin(&mut self, vcpu: u32, cpus: &BTreeSet<usize>) -> Result<(), Error> {
        Ok(self.client.pin(vcpu, cpus.clone())?)
    }

    fn set_x2apic(&mut self, vcpu: u32, on: bool) -> Result<(), Error> {
        Ok(self.client.set_x2apic(vcpu, on)?)
    }

    fn rtc(&mut self) -> Result<RtcState, Error> {
        Ok(self.client.rtc()?)
    }

    fn set_rtc_time(&mut self, seconds: i64) -> Result<(), Error> {
        Ok(self.client.set_rtc_time(seconds)?)
    }

    fn set_rtc_nvram(&mut self, offset: u8, value: u8) -> Result<(), Error> {
        Ok(self.client.set_rtc_nvram(offset, value)?)
    }

    fn open_memory(&mut self) -> Result<MemFile, Error> {
        if self.vm.is_clone()? {
            self.client.settle()?;
        }
        Ok(self.vm.open_memory(&self.vm.load_state()?)?)
    }

    fn snapshot(&mut self, name: &VmName) -> Result<(), Error> {
        // Nothing is done by halves: it takes as long as memory takes to copy.
        let mut patient = Client::connect_within(&self.vm, COPYING)?;
        Ok(patient.snapshot(name)?)
    }

    fn boot(&mut self) -> Result<Option<BootInfo>, Error> {
        Ok(self.vm.load_state()?.machine.boot)
    }

    fn stats(&mut self, vcpu: u32) -> Result<(VcpuStats, VmStats), Error> {
        Ok((self.client.vcpu_stats(vcpu)?, self.client.vm_stats()?))
    }

    fn live(&mut self) -> Result<&mut Client, Error> {
        Ok(&mut self.client)
    }
}
