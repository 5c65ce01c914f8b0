//! The machine while it runs: its vCPUs, how to reach them, and what belongs to all of them.
//!
//! Lock order: PCI configuration < virtio transport < device < interrupt (MSI-X, INTx, shared line,
//! GSI table) < console wire < mailbox. The locks of the buses are taken within any of these, for
//! the map is changed and read with nothing else done under them: they are released before a
//! handler runs, as a mailbox's is before a query runs.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use nix::sys::eventfd::EventFd;
use vmm_api::control::Refusal;
use vmm_api::kvm::{Counters, Doorbell, GsiRouter, KvmVcpu, KvmVm, MsiMessage, MsiRoute};
use vmm_api::memory::{GuestRam, MemoryLayout};
use vmm_api::root::Root;
use vmm_api::state::{RunInfo, VmState};
use vmm_api::topology::Topology;

use crate::bus::PortBus;
use crate::config::PciAddress;
use crate::gdb::Debugger;
use crate::irq::IrqLine;
use crate::isa::pm::Pm;
use crate::isa::rtc::Rtc;
use crate::mmio::MmioBus;
use crate::pci::{MsiSink, MsiVector};
use crate::saving::{SavedMachine, Savers};
use crate::sequencer::{Ending, Mailbox};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::net::Net;
use crate::virtio::transport::{BoundDoorbell, Doorbells, VirtioPci};

/// A function on the PCI bus.
pub struct Function {
    /// Where.
    pub address: PciAddress,
    /// What `-s` calls it.
    pub kind: &'static str,
    /// The virtio device it is, which works by itself.
    pub virtio: Option<Arc<VirtioPci>>,
}

/// What is kept of a vCPU outside of its own thread.
pub struct Seat {
    /// Notes to its thread.
    pub mailbox: Arc<Mailbox>,
    /// What it counts.
    pub counters: Arc<Counters>,
    /// KVM's statistics of it, where there are any.
    pub stats: Option<File>,
}

/// A machine whose vCPUs run.
pub struct Machine {
    /// The vCPUs by index.
    pub seats: Vec<Seat>,
    /// Who answers at which port.
    pub ports: Arc<PortBus>,
    /// Who answers where there is no RAM.
    pub mmio: Arc<MmioBus>,
    /// How it ends.
    pub ending: Arc<Ending>,
    /// Power management: the power button.
    pub pm: Arc<Pm>,
    /// The CMOS clock.
    pub rtc: Arc<Rtc>,
    /// How the vCPUs are grouped.
    pub topology: Topology,
    /// How many there could be.
    pub max_vcpus: usize,
    /// What is on the PCI bus, by address.
    pub functions: Vec<Function>,
    /// Its balloon, if it has one.
    pub balloon: Option<Arc<Balloon>>,
    /// Its disks, by address.
    pub disks: Vec<(PciAddress, Arc<Blk>)>,
    /// Its network cards, by address.
    pub cards: Vec<(PciAddress, Arc<Net>)>,
    /// Where RAM lies.
    pub layout: MemoryLayout,
    /// It is locked in the host's memory.
    pub wired: bool,
    /// KVM's statistics of the VM, where there are any.
    pub stats: Option<File>,
    /// When the vCPUs started.
    pub started: Instant,
    /// When the counting began anew, if it did.
    pub counting: Mutex<Option<Instant>>,
    /// Held by whoever pauses or resumes.
    pub paused: Mutex<bool>,
    /// KVM's side of it.
    pub vm: Arc<KvmVm>,
    /// Where vCPUs tell that they stopped for a debugger.
    pub debugger: Arc<Debugger>,
    /// Whose state is saved.
    pub savers: Savers,
    /// How it is run, for whoever runs it again.
    pub run: RunInfo,
    /// Its RAM.
    pub ram: GuestRam,
    /// Where its object is, and what is stored there beside what runs.
    pub object: OnceLock<(Root, VmState)>,
    /// What is to be stored, once it was suspended.
    pub suspended: Mutex<Option<SavedMachine>>,
}

impl Machine {
    /// Number of vCPUs.
    pub fn vcpu_count(&self) -> u32 {
        u32::try_from(self.seats.len()).unwrap_or(u32::MAX)
    }

    /// Since when exits and times are counted.
    pub fn counting_since(&self) -> Instant {
        let anew = *self.counting.lock().unwrap_or_else(PoisonError::into_inner);
        anew.unwrap_or(self.started)
    }

    /// Says that everything was set to 0.
    pub fn count_anew(&self) {
        let mut since = self.counting.lock().unwrap_or_else(PoisonError::into_inner);
        *since = Some(Instant::now());
    }

    /// Whether the machine is paused.
    pub fn is_paused(&self) -> bool {
        *self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is kept of a vCPU.
    ///
    /// # Errors
    ///
    /// There is no such vCPU.
    pub fn seat(&self, vcpu: u32) -> Result<&Seat, Refusal> {
        let seat = usize::try_from(vcpu).ok().and_then(|n| self.seats.get(n));
        seat.ok_or(Refusal::NoSuchVcpu {
            vcpu,
            vcpus: self.vcpu_count(),
        })
    }

    /// Has a vCPU's thread do something between two entries, with its registers consistent.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, or it does not come out of the guest.
    pub fn ask<T: Send + 'static>(
        &self,
        vcpu: u32,
        query: impl FnOnce(&mut KvmVcpu) -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        self.seat(vcpu)?
            .mailbox
            .ask(query)
            .ok_or(Refusal::Timeout { vcpu })
    }

    /// Holds every vCPU; returns once none is in the guest.
    ///
    /// # Errors
    ///
    /// A vCPU does not come out, or the machine is ending.
    pub fn pause(&self) -> Result<(), Refusal> {
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        self.alive()?;
        self.hold()?;
        *paused = true;
        Ok(())
    }

    /// Has the vCPUs wait before their first instruction, as if the machine were paused.
    pub fn hold_before_start(&self) {
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        self.seats.iter().for_each(|seat| seat.mailbox.hold());
        *paused = true;
    }

    /// Lets the vCPUs go on.
    ///
    /// # Errors
    ///
    /// The machine is ending.
    pub fn resume(&self) -> Result<(), Refusal> {
        self.resume_some(|_| true)
    }

    /// Lets some vCPUs go on; the machine is not paused any more, but the others still wait.
    ///
    /// # Errors
    ///
    /// The machine is ending.
    pub fn resume_some(&self, which: impl Fn(u32) -> bool) -> Result<(), Refusal> {
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        self.alive()?;
        let seats = (0..).zip(&self.seats).filter(|(vcpu, _)| which(*vcpu));
        seats.for_each(|(_, seat)| seat.mailbox.release());
        *paused = false;
        Ok(())
    }

    /// Holds one vCPU; returns once it is not in the guest.
    ///
    /// # Errors
    ///
    /// There is no such vCPU, it does not come out, or the machine is ending.
    pub fn hold_one(&self, vcpu: u32) -> Result<(), Refusal> {
        let mailbox = &self.seat(vcpu)?.mailbox;
        self.alive()?;
        mailbox.hold();
        if mailbox.wait_held() {
            Ok(())
        } else {
            Err(Refusal::Timeout { vcpu })
        }
    }

    /// Holds every vCPU, whether the machine is ending or not.
    ///
    /// # Errors
    ///
    /// A vCPU does not come out.
    pub fn hold(&self) -> Result<(), Refusal> {
        self.seats.iter().for_each(|seat| seat.mailbox.hold());
        for (vcpu, seat) in (0..).zip(&self.seats) {
            if !seat.mailbox.wait_held() {
                return Err(Refusal::Timeout { vcpu });
            }
        }
        Ok(())
    }

    fn alive(&self) -> Result<(), Refusal> {
        if self.ending.cause().is_some() {
            Err(Refusal::Ending)
        } else {
            Ok(())
        }
    }

    /// Stops all devices: nobody but the vCPUs touches guest memory after that.
    pub fn stop_devices(&self) {
        let devices = self.functions.iter().filter_map(|f| f.virtio.as_ref());
        devices.for_each(|device| device.stop());
    }

    /// Presses the guest's power button; false if the guest has not enabled it.
    pub fn press_power_button(&self) -> bool {
        self.pm.power_button()
    }
}

/// A pin of KVM's interrupt controllers.
pub struct KvmIrq {
    vm: Arc<KvmVm>,
    gsi: u32,
    failed: AtomicBool,
}

impl KvmIrq {
    /// The line with this number (GSI 0-23).
    pub fn new(vm: Arc<KvmVm>, gsi: u32) -> Arc<Self> {
        Arc::new(Self {
            vm,
            gsi,
            failed: AtomicBool::new(false),
        })
    }
}

impl IrqLine for KvmIrq {
    fn set(&self, asserted: bool) {
        if let Err(error) = self.vm.set_irq_line(self.gsi, asserted) {
            // Once is enough: a line that fails does so at each interrupt.
            if !self.failed.swap(true, SeqCst) {
                tracing::error!(target: "rhyve::irq", "IRQ {}: {}", self.gsi, crate::chain(&error));
            }
        }
    }
}

/// KVM's way for message signalled interrupts and for kicks.
pub struct KvmEvents {
    vm: Arc<KvmVm>,
    router: Arc<GsiRouter>,
}

impl KvmEvents {
    /// Those of `vm`, of which there are no others.
    pub fn new(vm: Arc<KvmVm>) -> Arc<Self> {
        let router = GsiRouter::new(vm.clone());
        Arc::new(Self { vm, router })
    }
}

impl MsiSink for KvmEvents {
    fn vector(&self) -> Box<dyn MsiVector> {
        Box::new(KvmVector {
            router: self.router.clone(),
            route: None,
        })
    }
}

impl Doorbells for KvmEvents {
    fn bind(&self, doorbell: Doorbell, event: &EventFd) -> Option<BoundDoorbell> {
        match self.vm.bind(doorbell, event.as_fd()) {
            Ok(bound) => Some(Box::new(bound)),
            Err(error) => {
                let error = crate::chain(&error);
                tracing::debug!(target: "rhyve::virtio", "{doorbell:x?}: {error}");
                None
            }
        }
    }
}

/// A message that has a GSI from the first time it is set.
struct KvmVector {
    router: Arc<GsiRouter>,
    route: Option<MsiRoute>,
}

impl MsiVector for KvmVector {
    fn set(&mut self, message: MsiMessage) {
        let set = match &self.route {
            Some(route) => route.set(message),
            None => self
                .router
                .route(message)
                .map(|route| self.route = Some(route)),
        };
        if let Err(error) = set {
            tracing::error!(target: "rhyve::irq", "{message:x?}: {}", crate::chain(&error));
        }
    }

    fn trigger(&self) {
        if let Some(route) = &self.route {
            route.trigger();
        }
    }
}
