//! A whole machine's state, told and taken: vCPUs, KVM's chips, every device.
//!
//! Telling it: hold the vCPUs, freeze the devices, ask each of them, then KVM's chips, then the
//! vCPUs, because an interrupt goes from the first to the last. Taking it is the other way round:
//! vCPUs with their local APICs, chips, then the devices, which assert their lines again.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use vmm_api::control::Refusal;
use vmm_api::kvm::{Away, ChipState, KvmVm, host_ns};
use vmm_api::name::VmName;
use vmm_api::state::{DeviceState, Phase, RunInfo, StateError, VcpuState, VmState, WrittenDisk};
use vmm_api::vm::{Images, snapshot};

use crate::lifecycle::{self, Lifecycle};
use crate::machine::Machine;
use crate::pci::PciBus;
use crate::sequencer::Cause;

/// The CMOS clock's battery, which outlives every run.
const BATTERY: &str = "rtc";

/// Devices whose state is saved, by name.
#[derive(Default)]
pub struct Savers {
    /// Those that are not on PCI.
    pub isa: Vec<(String, Arc<dyn Lifecycle>)>,
    /// Those that are.
    pub pci: Arc<PciBus>,
}

/// What a machine goes on from.
#[derive(Clone, Debug)]
pub struct SavedMachine {
    /// The vCPUs by index.
    pub vcpus: Vec<VcpuState>,
    /// Chips and devices by name.
    pub devices: BTreeMap<String, DeviceState>,
    /// How it was run.
    pub run: RunInfo,
}

impl SavedMachine {
    /// Puts it into a stored state, whose machine is suspended then.
    pub fn store(self, state: &mut VmState) {
        for (at, mut vcpu) in self.vcpus.into_iter().enumerate() {
            // Where a vCPU is to run is not its own affair.
            if let Some(place) = state.vcpus.get_mut(at) {
                vcpu.pinning = std::mem::take(&mut place.pinning);
                *place = vcpu;
            } else {
                state.vcpus.push(vcpu);
            }
        }
        state.devices.retain(|name, _| name == BATTERY);
        state.devices.extend(self.devices);
        state.machine.run = Some(self.run);
        state.phase = Phase::Suspended;
    }
}

/// Removes from a state what only a suspended machine has.
pub fn forget(state: &mut VmState) {
    state.devices.retain(|name, _| name == BATTERY);
    state.machine.run = None;
}

impl Savers {
    fn each<E>(
        &self,
        mut call: impl FnMut(String, &dyn Lifecycle) -> Result<(), E>,
    ) -> Result<(), E> {
        for (name, device) in &self.isa {
            call(name.clone(), &**device)?;
        }
        for (at, function) in self.pci.functions() {
            if let Some(device) = function.lifecycle() {
                call(format!("pci {at} {}", function.name()), device)?;
            }
        }
        Ok(())
    }

    fn freeze(&self) {
        let _ = self.each(|_, device| {
            device.freeze();
            Ok::<_, ()>(())
        });
    }

    fn thaw(&self) {
        let _ = self.each(|_, device| {
            device.thaw();
            Ok::<_, ()>(())
        });
    }

    fn save(&self) -> Result<BTreeMap<String, DeviceState>, Refusal> {
        let mut devices = BTreeMap::new();
        self.each(|name, device| {
            let state = device.save();
            let state = state.map_err(|why| Refusal::Unsupported(format!("{name}: {why}")))?;
            devices.insert(name, state);
            Ok::<_, Refusal>(())
        })?;
        Ok(devices)
    }

    /// Gives KVM's chips and every device the state that a suspended machine had.
    ///
    /// # Errors
    ///
    /// The machine has not the same devices, or one of them cannot go on from there.
    pub fn restore(&self, vm: &KvmVm, state: &VmState, away: Away) -> Result<(), RestoreError> {
        let mut rest = state.devices.clone();
        rest.remove(BATTERY);
        let chips = rest.remove(ChipState::NAME).ok_or_else(missing("KVM"))?;
        let chips: ChipState = lifecycle::load(ChipState::NAME, ChipState::VERSION, &chips)
            .map_err(RestoreError::Chips)?;
        vm.restore_chips(&chips, away)?;
        self.each(|name, device| {
            let state = rest.remove(&name).ok_or_else(missing(&name))?;
            device
                .restore(&state)
                .map_err(|source| RestoreError::Device {
                    device: name,
                    source,
                })
        })?;
        self.pci.claim_bars();
        match rest.into_keys().next() {
            Some(name) => Err(RestoreError::Absent(name)),
            None => Ok(()),
        }
    }
}

/// Why a suspended machine does not go on.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is a device that was not there.
    #[error("there was no {0} when the machine was suspended: run it with the options it had")]
    New(String),
    /// A device that was there is not.
    #[error("the machine was suspended with {0}: run it with the options it had")]
    Absent(String),
    /// Another number of vCPUs.
    #[error(
        "the machine was suspended with {then} vCPUs, not {now}: run it with the options it had"
    )]
    Vcpus {
        /// Then.
        then: usize,
        /// Now.
        now: u32,
    },
    /// KVM's chips.
    #[error("the stored interrupt controllers do not fit")]
    Chips(#[source] StateError),
    /// A device.
    #[error("{device} cannot go on")]
    Device {
        /// Which.
        device: String,
        /// Why.
        source: StateError,
    },
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] vmm_api::kvm::KvmError),
}

fn missing(name: &str) -> impl FnOnce() -> RestoreError {
    let name = name.to_owned();
    || RestoreError::New(name)
}

impl Machine {
    /// Tells the whole state and lets the machine go on as it was: running, or paused.
    ///
    /// # Errors
    ///
    /// A device cannot be saved, or a vCPU does not answer; the machine goes on all the same.
    pub fn save(&self) -> Result<SavedMachine, Refusal> {
        self.while_frozen(|machine| machine.saved())
    }

    /// Ends the machine in the middle, to be run again from there.
    ///
    /// # Errors
    ///
    /// As [`Machine::save`].
    pub fn suspend_whole(&self) -> Result<(), Refusal> {
        self.while_frozen(|machine| {
            let saved = machine.saved()?;
            let mut place = machine
                .suspended
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *place = Some(saved);
            machine.ending.end(Cause::suspended());
            Ok(())
        })
    }

    /// Makes a suspended VM that is as this machine is now, and lets this one go on.
    ///
    /// # Errors
    ///
    /// As [`Machine::save`]; or the other object, or a copy of a disk, cannot be made.
    pub fn snapshot_as(&self, name: &str) -> Result<(), Refusal> {
        let failed = |error: &dyn std::error::Error| Refusal::Failed(crate::chain(error));
        let name: VmName = name.parse().map_err(|e| failed(&e))?;
        let Some((root, stored)) = self.object.get() else {
            return Err(Refusal::Unsupported("a snapshot at the very start".into()));
        };
        self.while_frozen(|machine| {
            let mut state = stored.clone();
            machine.rtc.save().store(&mut state);
            machine.saved()?.store(&mut state);
            let memory = machine.ram.look().map_err(|e| failed(&e))?;
            snapshot(root, &name, "rhyve", &memory, &state, Images::Held).map_err(|e| failed(&e))
        })
    }

    /// Does something while nothing of the machine moves.
    ///
    /// # Errors
    ///
    /// A device cannot be saved, a vCPU does not answer, or what `work` says.
    pub fn while_frozen<T>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        self.can_be_saved()?;
        if self.debugger.is_attached() {
            let why = "a debugger is connected, whose breakpoints are in memory: detach it first";
            return Err(Refusal::Unsupported(why.into()));
        }
        let was_paused = self.is_paused();
        self.pause()?;
        self.savers.freeze();
        let done = work(self);
        // An ending machine's devices are stopped by whoever ends it.
        if self.ending.cause().is_none() {
            self.savers.thaw();
            if !was_paused {
                self.resume()?;
            }
        }
        done
    }

    /// Looks for devices that cannot be saved before anything is stopped.
    fn can_be_saved(&self) -> Result<(), Refusal> {
        let functions = self.savers.pci.functions();
        let function = functions.iter().find(|(_, f)| f.lifecycle().is_none());
        let unsaved =
            function.map(|(at, f)| format!("{} at {}:{}", f.name(), at.slot, at.function));
        let unsaved = unsaved.or_else(|| self.ports.unsaved());
        match unsaved.or_else(|| self.mmio.unsaved()) {
            Some(name) => Err(Refusal::Unsupported(format!(
                "the state of {name} cannot be saved"
            ))),
            None => Ok(()),
        }
    }

    fn saved(&self) -> Result<SavedMachine, Refusal> {
        let at_ns = host_ns();
        let mut devices = self.savers.save()?;
        let chips = self.vm.capture_chips().map_err(crate::control::refusal)?;
        let chips = lifecycle::save(ChipState::NAME, ChipState::VERSION, &chips);
        let chips = chips.map_err(Refusal::Unsupported)?;
        devices.insert(ChipState::NAME.into(), chips);
        let vcpu = |vcpu| {
            self.ask(vcpu, |kvm| kvm.capture())?
                .map_err(crate::control::refusal)
        };
        Ok(SavedMachine {
            vcpus: (0..self.vcpu_count()).map(vcpu).collect::<Result<_, _>>()?,
            devices,
            run: RunInfo {
                at_ns,
                disks: self.written_disks(),
                ..self.run.clone()
            },
        })
    }

    /// The images that the guest writes to; none if one of them has a name that cannot be stored.
    fn written_disks(&self) -> Option<Vec<WrittenDisk>> {
        let images = self.disks.iter().filter_map(|(_, disk)| disk.image());
        let storable = |image: &WrittenDisk| {
            let paths = [&image.named, &image.path];
            paths.iter().all(|path| path.to_str().is_some())
        };
        images
            .map(|image| storable(image).then(|| image.clone()))
            .collect()
    }
}
