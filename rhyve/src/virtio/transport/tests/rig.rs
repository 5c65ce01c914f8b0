//! A machine with nothing but an echo device, and drivers' registers.

use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use nix::sys::eventfd::EventFd;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_api::kvm::Doorbell;
use vmm_api::state::{DeviceState, StateError};

use super::super::core::status::{DRIVER_OK, FEATURES_OK};
use super::super::*;
use crate::bus::PortBus;
use crate::config::PciAddress;
use crate::lifecycle;
use crate::mmio::MmioBus;
use crate::pci::{Intx, PciBus};
use crate::testing::{Buffer, FakeIrq, FakeMsi, GuestDriver};
use crate::virtio::{
    Activation, DeviceError, QueueReset, VirtioDevice, Virtqueue, device_id, feature,
};

pub const OWN: u64 = 1 << 5;
pub const ACKNOWLEDGE_DRIVER: u8 = 3;
pub const STATUS: u64 = 20;

/// Answers every request with what it was asked, and has eight bytes of configuration.
#[derive(Default)]
pub struct Echo {
    pub running: Mutex<Option<Activation>>,
    pub config: Mutex<[u8; 8]>,
    generation: AtomicU8,
}

impl Echo {
    /// Serves queue `index`, as a worker that was kicked.
    pub fn serve(&self, index: u16) {
        let mut running = self.running.lock().unwrap();
        let queue = running
            .iter_mut()
            .flat_map(|activation| &mut activation.queues)
            .find(|queue| queue.index() == index);
        if let Some(queue) = queue
            && queue.kick().read().is_ok()
        {
            while queue.serve(|memory, chain| {
                let mut bytes = vec![0; chain.readable_len() as usize];
                chain.reader(memory).read(&mut bytes);
                chain.writer(memory).write(&bytes) as u32
            }) {}
        }
    }

    pub fn features(&self) -> Option<u64> {
        let running = self.running.lock().unwrap();
        running.as_ref().map(|activation| activation.features)
    }

    pub fn queues(&self) -> Vec<u16> {
        let running = self.running.lock().unwrap();
        let queues = running.iter().flat_map(|activation| &activation.queues);
        queues.map(Virtqueue::index).collect()
    }
}

impl VirtioDevice for Echo {
    fn name(&self) -> &'static str {
        "virtio-echo"
    }

    fn id(&self) -> u16 {
        device_id::ENTROPY
    }

    fn features(&self) -> u64 {
        OWN
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }

    fn config_size(&self) -> usize {
        8
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let config = self.config.lock().unwrap();
        for (to, from) in data.iter_mut().zip(config.iter().skip(offset)) {
            *to = *from;
        }
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let mut config = self.config.lock().unwrap();
        for (to, from) in config.iter_mut().skip(offset).zip(data) {
            *to = *from;
        }
    }

    fn config_generation(&self) -> u8 {
        self.generation.load(SeqCst)
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        let before = self.running.lock().unwrap().replace(activation);
        assert!(before.is_none(), "activated twice");
        Ok(())
    }

    fn reset(&self) {
        *self.running.lock().unwrap() = None;
    }

    fn queue_reset(&self) -> Option<&dyn QueueReset> {
        Some(self)
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        Some(self)
    }
}

impl Lifecycle for Echo {
    fn save(&self) -> Result<DeviceState, String> {
        lifecycle::save("echo", 1, &*self.config.lock().unwrap())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        *self.config.lock().unwrap() = lifecycle::load("echo", 1, state)?;
        Ok(())
    }
}

impl QueueReset for Echo {
    fn stop_queue(&self, index: u16) {
        let mut running = self.running.lock().unwrap();
        let queues = &mut running.as_mut().expect("stopped while idle").queues;
        let before = queues.len();
        queues.retain(|queue| queue.index() != index);
        assert_eq!(
            queues.len() + 1,
            before,
            "a queue was stopped that did not run"
        );
    }

    fn start_queue(&self, queue: Virtqueue) -> Result<(), DeviceError> {
        let mut running = self.running.lock().unwrap();
        let queues = &mut running.as_mut().expect("started while idle").queues;
        assert!(queues.iter().all(|other| other.index() != queue.index()));
        queues.push(queue);
        Ok(())
    }
}

/// Remembers which doorbells are bound.
#[derive(Clone, Default)]
pub struct FakeDoorbells(Arc<Mutex<Vec<Doorbell>>>);

impl FakeDoorbells {
    pub fn bound(&self) -> Vec<Doorbell> {
        self.0.lock().unwrap().clone()
    }
}

pub struct FakeBound(FakeDoorbells, Doorbell);

impl Drop for FakeBound {
    fn drop(&mut self) {
        self.0
            .0
            .lock()
            .unwrap()
            .retain(|doorbell| *doorbell != self.1);
    }
}

impl Doorbells for FakeDoorbells {
    fn bind(&self, doorbell: Doorbell, _: &EventFd) -> Option<BoundDoorbell> {
        self.0.lock().unwrap().push(doorbell);
        Some(Box::new(FakeBound(self.clone(), doorbell)))
    }
}

pub const SLOT: PciAddress = PciAddress {
    bus: 0,
    slot: 2,
    function: 0,
};

/// A machine with nothing but an echo device in slot 2.
pub struct Rig {
    pub echo: Arc<Echo>,
    pub buses: Buses,
    pub pci: Arc<PciBus>,
    pub memory: GuestMemoryMmap,
    pub msi: FakeMsi,
    pub intx: Arc<FakeIrq>,
    pub doorbells: FakeDoorbells,
}

pub fn rig(transport: Transport) -> Rig {
    rig_on(transport, memory(), true)
}

pub fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap()
}

/// The same with memory that there is already, and with MSI-X or MSI.
pub fn rig_on(transport: Transport, memory: GuestMemoryMmap, msix: bool) -> Rig {
    let echo = Arc::<Echo>::default();
    let buses = Buses {
        ports: Arc::new(PortBus::new()),
        mmio: Arc::new(MmioBus::new()),
    };
    let (msi, intx) = (FakeMsi::default(), FakeIrq::new());
    let doorbells = FakeDoorbells::default();
    let board = Board {
        memory: memory.clone(),
        buses: buses.clone(),
        msi: Arc::new(msi.clone()),
        msix,
        doorbells: Arc::new(doorbells.clone()),
    };
    let pin = IntxPin {
        pin: 1,
        line: 10,
        intx: Intx::new(intx.clone()),
    };
    let mut placement = Placement::new(0x2000..0x1_0000, 0xc000_0000..0xe000_0000);
    let (_, function) =
        VirtioPci::new(echo.clone(), transport, &board, pin, &mut placement).unwrap();
    let pci = PciBus::new();
    pci.plug(SLOT, function).unwrap();
    Rig {
        echo,
        buses,
        pci,
        memory,
        msi,
        intx,
        doorbells,
    }
}

impl Rig {
    pub fn config(&self, register: u8, size: IoSize) -> u32 {
        self.pci.read(SLOT, register, size)
    }

    pub fn set_config(&self, register: u8, size: IoSize, value: u32) {
        self.pci.write(SLOT, register, size, value);
    }

    pub fn bar(&self, bar: u8) -> u64 {
        let low = self.config(0x10 + 4 * bar, IoSize::Dword);
        let mask = if low & 1 == 1 { !3 } else { !15 };
        u64::from(low & mask)
    }

    pub fn input(&self, register: u16, size: IoSize) -> u32 {
        let port = self.bar(0) as u16 + register;
        self.buses.ports.read(port, size).unwrap()
    }

    pub fn output(&self, register: u16, size: IoSize, value: u32) {
        let port = self.bar(0) as u16 + register;
        self.buses.ports.write(port, size, value).unwrap();
    }

    /// Reads the common configuration.
    pub fn get(&self, at: u64, len: usize) -> u64 {
        self.read(self.bar(4) + at, len)
    }

    pub fn set(&self, at: u64, len: usize, value: u64) {
        let gpa = self.bar(4) + at;
        let bytes = value.to_le_bytes();
        self.buses.mmio.write(gpa, &bytes[..len]).unwrap();
    }

    pub fn read(&self, gpa: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.buses.mmio.read(gpa, &mut data[..len]).unwrap();
        u64::from_le_bytes(data)
    }

    /// Places of the capabilities of this id.
    pub fn capabilities(&self, id: u8) -> Vec<u8> {
        let mut found = Vec::new();
        let mut at = self.config(0x34, IoSize::Byte) as u8;
        while at != 0 {
            if self.config(at, IoSize::Byte) as u8 == id {
                found.push(at);
            }
            at = self.config(at + 1, IoSize::Byte) as u8;
        }
        found
    }

    /// Enables MSI-X with vector n sending n.
    pub fn enable_msix(&self) {
        let at = self.capabilities(0x11)[0];
        for vector in 0..3u64 {
            let entry = self.bar(1) + 16 * vector;
            let message = [0xfee0_0000, vector];
            for (i, part) in message.iter().enumerate() {
                let bytes = part.to_le_bytes();
                self.buses.mmio.write(entry + 8 * i as u64, &bytes).unwrap();
            }
        }
        self.set_config(at + 2, IoSize::Word, 0x8000);
    }

    /// Enables MSI with this message.
    pub fn enable_msi(&self, data: u32) {
        let at = self.capabilities(0x05)[0];
        self.set_config(at + 4, IoSize::Dword, 0xfee0_0000);
        self.set_config(at + 12, IoSize::Word, data);
        self.set_config(at + 2, IoSize::Word, 1);
    }

    pub fn driver(&self, base: u64, size: u16) -> GuestDriver {
        GuestDriver::at(self.memory.clone(), base, size)
    }

    pub fn legacy_queue(&self, index: u16, size: u16) -> GuestDriver {
        let driver = self.driver(0x1_0000 + 0x1_0000 * u64::from(index), size);
        self.output(14, IoSize::Word, index.into());
        assert_eq!(self.input(12, IoSize::Word), u32::from(size));
        self.output(8, IoSize::Dword, (driver.rings().descriptors >> 12) as u32);
        driver
    }

    pub fn modern_features(&self, features: u64) -> bool {
        for half in 0..2 {
            self.set(8, 4, half);
            self.set(12, 4, features >> (32 * half) & 0xffff_ffff);
        }
        self.set(STATUS, 1, (ACKNOWLEDGE_DRIVER | FEATURES_OK).into());
        self.get(STATUS, 1) as u8 & FEATURES_OK != 0
    }

    pub fn modern_queue(&self, index: u16, size: u16) -> GuestDriver {
        let driver = self.driver(0x1_0000 + 0x1_0000 * u64::from(index), size);
        let rings = driver.rings();
        self.set(22, 2, index.into());
        self.set(24, 2, size.into());
        // In halves, as many drivers do.
        for (at, address) in [
            (32, rings.descriptors),
            (40, rings.available),
            (48, rings.used),
        ] {
            self.set(at, 4, address & 0xffff_ffff);
            self.set(at + 4, 4, address >> 32);
        }
        self.set(28, 2, 1);
        driver
    }

    pub fn modern_start(&self) -> GuestDriver {
        assert!(self.modern_features(feature::VERSION_1 | feature::RING_RESET | OWN));
        let driver = self.modern_queue(0, 4);
        self.set(
            STATUS,
            1,
            (ACKNOWLEDGE_DRIVER | FEATURES_OK | DRIVER_OK).into(),
        );
        driver
    }

    pub fn exchange(&self, driver: &mut GuestDriver, kick: impl FnOnce()) {
        let sent = driver.send(&[Buffer::Readable(b"hello".to_vec()), Buffer::Writable(8)]);
        kick();
        self.echo.serve(0);
        assert_eq!(driver.used(), Some((sent.head, 5)));
        assert_eq!(&driver.received(&sent)[..5], b"hello");
    }
}
