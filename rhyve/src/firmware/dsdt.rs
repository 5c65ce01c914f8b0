//! The DSDT: soft off, the PCI roots with their windows and interrupts, and the ISA devices a guest
//! cannot find by itself.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, PackageBuilder, ResourceTemplate, Scope,
};

use super::acpi::bytes;
use super::{FirmwareSpec, PciRoot, pm};
use crate::config::ComPort;

/// Where the hole below 4 GiB begins, which has PCI's memory window, the APICs and no RAM.
pub const PCI_HOLE: u32 = 0xc000_0000;

/// The definition block's contents.
pub(super) fn build(spec: &FirmwareSpec) -> Vec<u8> {
    let s5 = Name::new(
        "_S5_".into(),
        &Package::new(vec![&pm::S5_SLP_TYP, &pm::S5_SLP_TYP, &0u8, &0u8]),
    );
    let roots = spec.roots.iter().map(|root| pci_root(spec, root));
    let mut devices: Vec<Vec<u8>> = roots.chain([clock()]).collect();
    for port in &spec.com {
        let shared = spec
            .com
            .iter()
            .filter(|other| other.irq() == port.irq())
            .count()
            > 1;
        devices.push(com(*port, shared));
    }
    if let Some(ecam) = spec.ecam {
        devices.push(reserved(ecam.base, (u32::from(ecam.last_bus) + 1) << 20));
    }
    let devices: Vec<Raw> = devices.into_iter().map(Raw).collect();
    let devices = devices.iter().map(|device| device as &dyn Aml).collect();
    [bytes(&s5), bytes(&Scope::new("_SB_".into(), devices))].concat()
}

/// AML that is made already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// A device with a PNP id, current resources and whatever else.
fn device(name: &str, pnp: &str, resources: Vec<&dyn Aml>, rest: Vec<&dyn Aml>) -> Vec<u8> {
    let hid = Name::new("_HID".into(), &EISAName::new(pnp));
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let mut objects: Vec<&dyn Aml> = vec![&hid, &crs];
    objects.extend(rest);
    bytes(&Device::new(name.into(), objects))
}

/// A PCI root: its bus, port and memory windows, interrupt routing by plain GSIs. As in bhyve, each
/// bus is one (usr.sbin/bhyve/pci_emul.c), and has no _ADR, for which a device with a _HID has no use
/// (ACPI 6.5, 6.1): FreeBSD up to 10 says that it could not evaluate it, and goes on.
fn pci_root(spec: &FirmwareSpec, root: &PciRoot) -> Vec<u8> {
    let number = root.bus;
    let bus = AddressSpace::new_bus_number(u16::from(number), number.into());
    // The first one's own: configuration address and data, and the legacy devices' ports.
    let config = IO::new(0xcf8, 0xcf8, 1, 8);
    let low_ports = AddressSpace::new_io(0u16, 0xcf7, None);
    let mut resources: Vec<&dyn Aml> = vec![&bus];
    let mut ports = root.ports.clone();
    if number == 0 {
        resources.extend([&config as &dyn Aml, &low_ports]);
        ports.start = 0xd00;
    }
    let ports = (!ports.is_empty()).then(|| {
        let (first, last) = (ports.start as u16, (ports.end - 1) as u16);
        AddressSpace::new_io(first, last, None)
    });
    let memory = (!root.memory.is_empty()).then(|| {
        let not_cacheable = AddressSpaceCacheable::NotCacheable;
        let Range { start, end } = root.memory;
        AddressSpace::new_memory(not_cacheable, true, start, end - 1, None)
    });
    resources.extend(ports.iter().map(|window| window as &dyn Aml));
    resources.extend(memory.iter().map(|window| window as &dyn Aml));

    let uid = Name::new("_UID".into(), &number);
    let bbn = Name::new("_BBN".into(), &number);
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let mut routing = PackageBuilder::new();
    let routes = spec.intx.iter().filter(|route| route.bus == number);
    for route in routes.clone() {
        // All functions of the device, INTA as 0, no link device, GSI (ACPI 6.5, 6.2.13).
        let address = u32::from(route.slot) << 16 | 0xffff;
        let (pin, gsi) = (route.pin - 1, route.gsi);
        routing.add_element(&Package::new(vec![&address, &pin, &0u8, &gsi]));
    }
    let routing = Name::new("_PRT".into(), &routing);
    let mut rest: Vec<&dyn Aml> = vec![&uid, &bbn];
    if spec.ecam.is_some() {
        rest.push(&cid);
    }
    if routes.count() != 0 {
        rest.push(&routing);
    }
    let pnp = if spec.ecam.is_some() {
        "PNP0A08"
    } else {
        "PNP0A03"
    };
    device(&format!("PC{number:02X}"), pnp, resources, rest)
}

/// The CMOS clock.
fn clock() -> Vec<u8> {
    let ports = IO::new(0x70, 0x70, 1, 2);
    let irq = Interrupt::new(true, true, false, false, 8);
    device("RTC_", "PNP0B00", vec![&ports, &irq], vec![])
}

/// A 16550A serial port; com1 and com3, com2 and com4 share an interrupt if both are there.
fn com(port: ComPort, shared: bool) -> Vec<u8> {
    let (base, number) = (port.io_base(), port.index() as u8 + 1);
    let ports = IO::new(base, base, 1, 8);
    let irq = Interrupt::new(true, true, false, shared, port.irq().into());
    let uid = Name::new("_UID".into(), &number);
    let name = format!("COM{number}");
    device(&name, "PNP0501", vec![&ports, &irq], vec![&uid])
}

/// Memory that is nobody's to give away: Linux uses ECAM only if it is reserved so.
fn reserved(base: u32, length: u32) -> Vec<u8> {
    let window = Memory32Fixed::new(true, base, length);
    device("MBRD", "PNP0C02", vec![&window], vec![])
}
