//! Interrupts and notifications that pass KVM without a system call of the monitor's vCPU threads:
//! message signalled interrupts by irqfd, doorbells by ioeventfd.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::vm::legacy_routing;
use super::{KvmError, KvmVm, ioctl};

/// GSIs below are pins of the interrupt controllers.
const FIRST_MSI: u32 = 24;
/// KVM_MAX_IRQ_ROUTES, less those of the pins.
const MAX_ROUTES: usize = 4096 - 64;

/// What a device writes to interrupt (PCI Local Bus 3.0, 6.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where to.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// KVM's table of GSIs: the pins as they are, and message signalled interrupts as devices want them.
#[derive(Debug)]
pub struct GsiRouter {
    vm: Arc<KvmVm>,
    /// By GSI from [`FIRST_MSI`] on; a GSI that is free has none.
    routes: Mutex<Vec<Option<MsiMessage>>>,
}

impl GsiRouter {
    /// The only one of `vm`.
    pub fn new(vm: Arc<KvmVm>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            routes: Mutex::default(),
        })
    }

    /// A new interrupt that sends `message`.
    ///
    /// # Errors
    ///
    /// There is no room in KVM's table, or no descriptor to be had.
    pub fn route(self: &Arc<Self>, message: MsiMessage) -> Result<MsiRoute, KvmError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_flags(flags).map_err(|e| KvmError::Ioctl {
            action: "make an event descriptor",
            source: e.into(),
        })?;
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let at = routes.iter().position(Option::is_none);
        let at = at.unwrap_or(routes.len());
        if at >= MAX_ROUTES {
            return Err(KvmError::State("KVM has no more interrupt routes".into()));
        }
        if at == routes.len() {
            routes.push(None);
        }
        let route = MsiRoute {
            router: self.clone(),
            at,
            event,
        };
        // On an error the route frees its place by its drop, for which the lock must be free.
        let set = self.set(&mut routes, at, Some(message));
        drop(routes);
        set?;
        let vm = &self.vm.fd;
        with_eventfd(route.event.as_fd(), |fd| vm.register_irqfd(fd, route.gsi()))
            .map_err(ioctl("take interrupts from a descriptor"))?;
        Ok(route)
    }

    fn set(
        &self,
        routes: &mut [Option<MsiMessage>],
        at: usize,
        message: Option<MsiMessage>,
    ) -> Result<(), KvmError> {
        if let Some(route) = routes.get_mut(at) {
            *route = message;
        }
        let mut entries = legacy_routing();
        for (gsi, message) in (FIRST_MSI..).zip(routes.iter()) {
            let Some(message) = message else { continue };
            let mut entry = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..kvm_irq_routing_entry::default()
            };
            entry.u.msi.address_lo = message.address as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
            entry.u.msi.data = message.data;
            entries.push(entry);
        }
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| KvmError::State(format!("routing: {e:?}")))?;
        self.vm
            .fd
            .set_gsi_routing(&routing)
            .map_err(ioctl("route interrupts"))
    }
}

/// One message signalled interrupt. Its drop gives the GSI back.
#[derive(Debug)]
pub struct MsiRoute {
    router: Arc<GsiRouter>,
    at: usize,
    event: EventFd,
}

impl MsiRoute {
    fn gsi(&self) -> u32 {
        // At most MAX_ROUTES.
        FIRST_MSI + self.at as u32
    }

    /// Sends another message from now on.
    ///
    /// # Errors
    ///
    /// KVM refuses the message.
    pub fn set(&self, message: MsiMessage) -> Result<(), KvmError> {
        let routes = self.router.routes.lock();
        let mut routes = routes.unwrap_or_else(PoisonError::into_inner);
        self.router.set(&mut routes, self.at, Some(message))
    }

    /// Interrupts.
    pub fn trigger(&self) {
        // The one failure, a counter at its maximum, means that KVM has not looked yet.
        let _ = self.event.write(1);
    }

    /// What to write to in order to interrupt.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for MsiRoute {
    fn drop(&mut self) {
        let vm = &self.router.vm.fd;
        // There is nothing to be done about an interrupt that KVM does not let go of.
        let _ = with_eventfd(self.event.as_fd(), |fd| vm.unregister_irqfd(fd, self.gsi()));
        let routes = self.router.routes.lock();
        let mut routes = routes.unwrap_or_else(PoisonError::into_inner);
        let _ = self.router.set(&mut routes, self.at, None);
    }
}

/// A write of the guest that KVM turns into an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbell {
    /// This 16-bit value to this port.
    Port(u16, u16),
    /// Anything to this guest-physical address.
    Memory(u64),
}

/// A doorbell that rings. Its drop ends that.
#[derive(Debug)]
pub struct BoundDoorbell {
    vm: Arc<KvmVm>,
    doorbell: Doorbell,
    event: EventFd,
}

impl KvmVm {
    /// Lets `doorbell` count up `event` instead of coming to user space.
    ///
    /// # Errors
    ///
    /// There is another doorbell at the same place, or too many of them.
    pub fn bind(
        self: &Arc<Self>,
        doorbell: Doorbell,
        event: BorrowedFd<'_>,
    ) -> Result<BoundDoorbell, KvmError> {
        let event = event.try_clone_to_owned().map_err(|e| KvmError::Ioctl {
            action: "duplicate an event descriptor",
            source: e,
        })?;
        // SAFETY: the descriptor is ours alone, and the duplicate of an event descriptor.
        let event = unsafe { EventFd::from_owned_fd(event) };
        let vm = &self.fd;
        with_eventfd(event.as_fd(), |fd| match doorbell {
            Doorbell::Port(port, value) => {
                vm.register_ioevent(fd, &IoEventAddress::Pio(port.into()), Word(value))
            }
            Doorbell::Memory(gpa) => {
                vm.register_ioevent(fd, &IoEventAddress::Mmio(gpa), NoDatamatch)
            }
        })
        .map_err(ioctl("turn a doorbell into an event"))?;
        Ok(BoundDoorbell {
            vm: self.clone(),
            doorbell,
            event,
        })
    }
}

impl Drop for BoundDoorbell {
    fn drop(&mut self) {
        let vm = &self.vm.fd;
        // There is nothing to be done about a doorbell that KVM does not let go of.
        let _ = with_eventfd(self.event.as_fd(), |fd| match self.doorbell {
            Doorbell::Port(port, value) => {
                vm.unregister_ioevent(fd, &IoEventAddress::Pio(port.into()), Word(value))
            }
            Doorbell::Memory(gpa) => {
                vm.unregister_ioevent(fd, &IoEventAddress::Mmio(gpa), NoDatamatch)
            }
        });
    }
}

/// A 16-bit value to match: kvm-ioctls takes the width from the type.
#[derive(Clone, Copy)]
struct Word(u16);

impl From<Word> for u64 {
    fn from(word: Word) -> Self {
        word.0.into()
    }
}

/// kvm-ioctls wants vmm-sys-util's type for an event descriptor.
fn with_eventfd<T>(
    fd: BorrowedFd<'_>,
    call: impl FnOnce(&vmm_sys_util::eventfd::EventFd) -> T,
) -> T {
    // SAFETY: the descriptor lives as long as the borrow, and is not closed by this.
    let event = unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(fd.as_raw_fd()) };
    call(&ManuallyDrop::new(event))
}
