//! From single flags and variables to a whole machine.

use crate::bvm::{CONSPORT, DBGPORT, DebugPort};
use crate::console::ConsoleConf;
use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;
use vmm_api::memory::{MemSize, MemoryLayout};
use vmm_api::name::VmName;

use super::com::{ComPort, io_port};
use super::{
    ConfigError, Era, GdbSpec, LpcSpec, MachineSpec, PciAddress, Problem, RtcBase, SlotDevice,
    SlotSpec, TopologyRequest,
};

/// Collects flags and variables until they are a [`MachineSpec`].
///
/// Every method takes one flag's argument and fails with the reason it cannot be had. Where a
/// machine has one of a thing, the last setting counts, as in bhyve.
#[derive(Clone, Debug)]
pub struct SpecBuilder {
    pub(super) era: Era,
    pub(super) name: Option<VmName>,
    pub(super) topology: TopologyRequest,
    pub(super) pins: BTreeMap<u16, BTreeSet<usize>>,
    /// First host CPU of 2012's `-p`: vCPU n runs on this + n.
    pin_base: Option<u16>,
    pub(super) memory: Option<MemSize>,
    highmem: Option<MemSize>,
    pub(super) wire_memory: bool,
    pub(super) guest_in_core: bool,
    pub(super) destroy_on_poweroff: bool,
    pub(super) acpi: Option<bool>,
    pub(super) mptable: Option<bool>,
    pub(super) x2apic: Option<bool>,
    pub(super) strict_io: bool,
    pub(super) strict_msr: bool,
    pub(super) rtc: RtcBase,
    pub(super) uuid: Option<Uuid>,
    pub(super) virtio_msix: bool,
    pub(super) slots: BTreeMap<PciAddress, SlotSpec>,
    pub(super) com: [Option<ConsoleConf>; 4],
    bvmcons: Option<ConsoleConf>,
    bvmdbg: Option<DebugPort>,
    debug_exit: Option<u16>,
    pub(super) gdb: Option<GdbSpec>,
}

impl SpecBuilder {
    /// A machine of `era` of which nothing has been said.
    pub fn new(era: Era) -> Self {
        Self {
            era,
            name: None,
            topology: TopologyRequest::default(),
            pins: BTreeMap::new(),
            pin_base: None,
            memory: None,
            highmem: None,
            wire_memory: false,
            guest_in_core: false,
            destroy_on_poweroff: false,
            acpi: None,
            mptable: None,
            x2apic: None,
            strict_io: false,
            strict_msr: true,
            rtc: RtcBase::default(),
            uuid: None,
            virtio_msix: true,
            slots: BTreeMap::new(),
            com: [const { None }; 4],
            bvmcons: None,
            bvmdbg: None,
            debug_exit: None,
            gdb: None,
        }
    }

    /// The name of the VM. It may be repeated, but not changed.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn set_name(&mut self, name: &str) -> Result<(), Problem> {
        let name: VmName = name.parse()?;
        match self.name.replace(name.clone()) {
            Some(other) if other != name => Err(Problem::TwoNames(other)),
            _ => Ok(()),
        }
    }

    /// `-c [cpus=]N[,sockets=N][,cores=N][,threads=N]`.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn cpus(&mut self, text: &str) -> Result<(), Problem> {
        Ok(self.topology.read(text)?)
    }

    /// 2012's `-M size`: memory from 4 GiB.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn highmem(&mut self, text: &str) -> Result<(), Problem> {
        self.highmem = Some(text.parse()?);
        Ok(())
    }

    /// `-p vcpu:hostcpu`, which may be repeated, or 2012's `-p hostcpu`.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn pin(&mut self, text: &str) -> Result<(), Problem> {
        match text.split_once(':') {
            Some((vcpu, host)) => {
                let vcpu = vcpu.parse().map_err(|_| Problem::Pin)?;
                let host: u16 = host.parse().map_err(|_| Problem::Pin)?;
                self.pins.entry(vcpu).or_default().insert(host.into());
            }
            None => {
                let base = text.parse().map_err(|_| Problem::Pin)?;
                if self.era != Era::Y2012 {
                    return Err(Problem::PinBase);
                }
                self.pin_base = Some(base);
            }
        }
        Ok(())
    }

    /// `-s slot,emulation[,conf]`.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn slot(&mut self, text: &str) -> Result<(), Problem> {
        let spec: SlotSpec = text.parse()?;
        let address = spec.address;
        match self.slots.insert(address, spec) {
            Some(_) => Err(Problem::SlotTaken(address)),
            None => Ok(()),
        }
    }

    /// `-l device[,conf]`.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn lpc(&mut self, text: &str) -> Result<(), Problem> {
        match text.parse()? {
            LpcSpec::Com(com) => self.com[com.port.index()] = Some(com.backend),
            LpcSpec::BvmCons(backend) => self.bvmcons = Some(backend),
            LpcSpec::DebugExit(port) => self.debug_exit = Some(port),
        }
        Ok(())
    }

    /// `-b`: bhyve's short form of `-l bvmcons,stdio`.
    pub fn bvm_console(&mut self) {
        self.bvmcons = Some(ConsoleConf::Stdio);
    }

    /// `-g PORT`: where a debugger reaches the BVM debug port; 0 is nowhere.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn bvm_debug(&mut self, port: &str) -> Result<(), Problem> {
        self.bvmdbg = Some(match port.parse() {
            Ok(0) => DebugPort::Absent,
            Ok(port) => DebugPort::At(port),
            Err(_) => return Err(Problem::TcpPort(port.to_owned())),
        });
        Ok(())
    }

    /// `-G [w][addr:]port`, or `-G [w]unix:path`.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn debug_server(&mut self, text: &str) -> Result<(), Problem> {
        self.gdb = Some(text.parse()?);
        Ok(())
    }

    /// `--debug-exit=PORT`.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn debug_exit(&mut self, port: &str) -> Result<(), Problem> {
        self.debug_exit = Some(io_port(port)?);
        Ok(())
    }

    /// The whole machine.
    ///
    /// # Errors
    /// What does not fit together.
    pub fn settle(mut self) -> Result<MachineSpec, ConfigError> {
        let fail = |at: &str, problem| ConfigError {
            at: at.to_owned(),
            problem,
        };
        let name = self
            .name
            .take()
            .ok_or_else(|| fail("VM", Problem::NoName))?;
        let topology = self
            .topology
            .settle()
            .map_err(|err| fail("-c", err.into()))?;
        let cpus = topology.cpus;

        if let Some(base) = self.pin_base {
            for vcpu in 0..cpus {
                let host = usize::from(base) + usize::from(vcpu);
                self.pins
                    .entry(vcpu)
                    .or_insert_with(|| BTreeSet::from([host]));
            }
        }
        if let Some((&vcpu, _)) = self.pins.range(cpus..).next() {
            return Err(fail("-p", Problem::NoSuchVcpu { vcpu, cpus }));
        }
        let memory = self
            .expected_memory()
            .map_err(|problem| fail("-m", problem))?;
        self.check_slots().map_err(|problem| fail("-s", problem))?;
        let era = self.era;
        if era == Era::Y2012 && !self.is_on_stdio() {
            self.bvmcons.get_or_insert(ConsoleConf::Stdio);
        }
        self.check_lpc().map_err(|problem| fail("-l", problem))?;

        Ok(MachineSpec {
            name,
            era,
            topology,
            pins: self.pins,
            memory,
            wire_memory: self.wire_memory,
            guest_in_core: self.guest_in_core,
            destroy_on_poweroff: self.destroy_on_poweroff,
            acpi: self.acpi.unwrap_or(era == Era::Today),
            mptable: self.mptable.unwrap_or(true),
            smbios: era != Era::Y2012 || self.uuid.is_some(),
            x2apic: self.x2apic.unwrap_or(era != Era::Y2014),
            strict_io: self.strict_io,
            strict_msr: self.strict_msr,
            rtc: self.rtc,
            uuid: self.uuid,
            virtio_msix: self.virtio_msix,
            slots: self.slots.into_values().collect(),
            com: self.com,
            bvmcons: self.bvmcons,
            bvmdbg: self.bvmdbg.unwrap_or(match era {
                Era::Y2012 => DebugPort::OnDemand,
                Era::Y2014 | Era::Today => DebugPort::Absent,
            }),
            debug_exit: self.debug_exit,
            gdb: self.gdb,
        })
    }

    /// How much memory is to be where: `-m` is all of it, or with `-M` that below 4 GiB.
    fn expected_memory(&self) -> Result<Option<MemoryLayout>, Problem> {
        let layout = match (self.memory, self.highmem) {
            (None, None) => return Ok(None),
            (None, Some(_)) => return Err(Problem::NoLowmem),
            (Some(all), None) => MemoryLayout::split(all),
            (Some(low), Some(high)) => MemoryLayout {
                lowmem: low.0,
                highmem: high.0,
            },
        };
        if layout.lowmem == 0 {
            return Err(Problem::NoMemory);
        }
        layout.validate().map_err(|_| Problem::Memory)?;
        Ok(Some(layout))
    }

    /// Puts a host bridge into slot 0 if nothing stands there, and looks for functions that no
    /// guest would find (PCI Local Bus 3.0, 3.2.2.3.4: function 0 is always required).
    fn check_slots(&mut self) -> Result<(), Problem> {
        let address = PciAddress::HOST_BRIDGE;
        let bridge = SlotSpec {
            address,
            device: SlotDevice::HostBridge,
        };
        self.slots.entry(address).or_insert(bridge);
        for address in self.slots.keys() {
            let first = PciAddress {
                function: 0,
                ..*address
            };
            if !self.slots.contains_key(&first) {
                return Err(Problem::NoFunctionZero(first));
            }
        }
        let isa = |slot: &&SlotSpec| slot.device == SlotDevice::Lpc;
        let bridges = self.slots.values().filter(isa).enumerate();
        let mut wrong = bridges.filter(|(number, slot)| *number > 0 || slot.address.bus != 0);
        match wrong.next() {
            Some((_, slot)) => Err(Problem::IsaBridge(slot.address)),
            None => Ok(()),
        }
    }

    /// The other ends of all consoles.
    fn consoles(&self) -> impl Iterator<Item = &ConsoleConf> {
        self.com.iter().chain([&self.bvmcons]).flatten()
    }

    fn is_on_stdio(&self) -> bool {
        self.consoles().any(|conf| *conf == ConsoleConf::Stdio)
    }

    /// Looks for two devices that would fight over one thing.
    fn check_lpc(&self) -> Result<(), Problem> {
        let on_stdio = self.consoles().filter(|conf| **conf == ConsoleConf::Stdio);
        if on_stdio.count() > 1 {
            return Err(Problem::Shared("standard input and output"));
        }
        if let Some(port) = self.debug_exit {
            let taken = |(first, last, owner)| {
                (first <= port && port <= last).then_some(Problem::PortTaken(port, owner))
            };
            let com = ComPort::ALL.map(|com| (com.io_base(), com.io_base() + 7, com.name()));
            if let Some(problem) = PLATFORM_PORTS.iter().copied().chain(com).find_map(taken) {
                return Err(problem);
            }
        }
        Ok(())
    }
}

/// I/O ports of the platform: first, last, whose they are.
const PLATFORM_PORTS: &[(u16, u16, &str)] = &[
    (0x20, 0x21, "the interrupt controller"),
    (0x40, 0x43, "the timer"),
    (0x60, 0x64, "the keyboard controller"),
    (0x70, 0x71, "the real-time clock"),
    (0x80, 0x80, "the POST code"),
    (0x84, 0x84, "the POST code"),
    (0xa0, 0xa1, "the interrupt controller"),
    (0xb2, 0xb3, "power management"),
    (CONSPORT, CONSPORT + 3, "the BVM console"),
    (DBGPORT, DBGPORT + 3, "the BVM debug port"),
    (0x400, 0x40b, "power management"),
    (0x4d0, 0x4d1, "the interrupt controller"),
    (0xcf8, 0xcff, "PCI configuration"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn named(era: Era) -> SpecBuilder {
        let mut builder = SpecBuilder::new(era);
        builder.set_name("guest0").unwrap();
        builder
    }

    /// What settling complains of after `prepare`.
    fn complaint(era: Era, prepare: impl FnOnce(&mut SpecBuilder)) -> String {
        let mut builder = named(era);
        prepare(&mut builder);
        builder.settle().unwrap_err().to_string()
    }

    #[test]
    fn nothing_said_is_one_cpu_and_a_host_bridge() {
        let spec = named(Era::Today).settle().unwrap();
        assert_eq!(spec.topology.cpus, 1);
        let bridge = SlotSpec {
            address: PciAddress::HOST_BRIDGE,
            device: SlotDevice::HostBridge,
        };
        assert_eq!(spec.slots, [bridge]);
        assert!(spec.acpi && spec.mptable && spec.smbios && spec.x2apic && spec.strict_msr);
        assert_eq!(spec.rtc, RtcBase::LocalTime);
        assert!(spec.com.iter().all(Option::is_none));
    }

    #[test]
    fn an_era_sets_what_nobody_said() {
        let spec = named(Era::Y2012).settle().unwrap();
        assert!(!spec.acpi && spec.mptable && !spec.smbios && spec.x2apic);
        let spec = named(Era::Y2014).settle().unwrap();
        assert!(!spec.acpi && spec.mptable && spec.smbios && !spec.x2apic);
        let mut builder = named(Era::Y2012);
        builder.variable("acpi_tables", "true").unwrap();
        builder.variable("x86.mptable", "false").unwrap();
        let spec = builder.settle().unwrap();
        assert!(spec.acpi && !spec.mptable);
    }

    #[test]
    fn the_console_of_2012_is_on_stdio_unless_something_else_is() {
        let settle = |era, devices: &[&str]| {
            let mut builder = named(era);
            for device in devices {
                builder.lpc(device).unwrap();
            }
            builder.settle().unwrap()
        };
        let spec = settle(Era::Y2012, &[]);
        assert_eq!(spec.bvmcons, Some(ConsoleConf::Stdio));
        assert_eq!(spec.bvmdbg, DebugPort::OnDemand);
        assert_eq!(settle(Era::Y2012, &["com1,stdio"]).bvmcons, None);
        let spec = settle(Era::Y2012, &["com1,stdio", "bvmcons,pty"]);
        assert_eq!(spec.bvmcons, Some(ConsoleConf::Pty));
        for era in [Era::Y2014, Era::Today] {
            let spec = settle(era, &[]);
            assert_eq!((spec.bvmcons, spec.bvmdbg), (None, DebugPort::Absent));
        }
    }

    #[test]
    fn the_last_setting_of_one_thing_counts() {
        let mut builder = named(Era::Today);
        builder.cpus("4").unwrap();
        builder.variable("cpus", "2").unwrap();
        builder.lpc("com1,pty").unwrap();
        builder.lpc("com1,stdio").unwrap();
        let spec = builder.settle().unwrap();
        assert_eq!(spec.topology.cpus, 2);
        assert_eq!(spec.com[0], Some(ConsoleConf::Stdio));
    }

    #[test]
    fn memory_is_split_or_given_in_two() {
        let memory = |low: &str, high: &str| {
            let mut builder = named(Era::Today);
            for (text, variable) in [(low, true), (high, false)] {
                match (text, variable) {
                    ("", _) => {}
                    (_, true) => builder.variable("memory.size", text).unwrap(),
                    (_, false) => builder.highmem(text).unwrap(),
                }
            }
            builder
                .settle()
                .map(|spec| spec.memory)
                .map_err(|err| err.to_string())
        };
        let layout = |lowmem, highmem| Ok(Some(MemoryLayout { lowmem, highmem }));
        assert_eq!(memory("", ""), Ok(None));
        assert_eq!(memory("5G", ""), layout(3 << 30, 2 << 30));
        assert_eq!(memory("768", "2048"), layout(768 << 20, 2 << 30));
        let err = |text: &str| Err(text.to_owned());
        assert_eq!(
            memory("0", ""),
            err("-m: a guest needs some memory, as in 512M")
        );
        let alone = "-m: memory above 4 GiB needs some below it: give -m as well";
        assert_eq!(memory("", "1G"), err(alone));
        assert!(memory("4G", "1G").is_err());
    }

    #[test]
    fn both_forms_of_pinning_work() {
        let mut builder = named(Era::Today);
        builder.cpus("2").unwrap();
        for pin in ["1:4", "1:5"] {
            builder.pin(pin).unwrap();
        }
        let pins = builder.settle().unwrap().pins;
        assert_eq!(pins, BTreeMap::from([(1, BTreeSet::from([4, 5]))]));

        let mut builder = named(Era::Y2012);
        builder.cpus("2").unwrap();
        builder.pin("6").unwrap();
        let pins = builder.settle().unwrap().pins;
        let wanted = [(0, BTreeSet::from([6])), (1, BTreeSet::from([7]))];
        assert_eq!(pins, BTreeMap::from(wanted));
        assert_eq!(named(Era::Today).pin("6"), Err(Problem::PinBase));
        assert_eq!(named(Era::Today).pin("0:x"), Err(Problem::Pin));
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let slot = |text: &'static str| move |b: &mut SpecBuilder| b.slot(text).unwrap();
        assert_eq!(
            complaint(Era::Today, slot("3:1,hostbridge")),
            "-s: guests look at a slot's other functions only if it has function 0: \
             fill 0:3:0 first"
        );
        assert_eq!(
            complaint(Era::Today, |b| b.pin("1:0").unwrap()),
            "-p: there is no vCPU 1: 1 CPUs are numbered from 0 to 0"
        );
        assert_eq!(
            complaint(Era::Today, |b| {
                b.lpc("com1,stdio").unwrap();
                b.lpc("com2,stdio").unwrap();
            }),
            "-l: two consoles cannot share standard input and output: \
             connect one of them elsewhere"
        );
        assert_eq!(
            complaint(Era::Today, |b| b.lpc("debugexit,0x3ff").unwrap()),
            "-l: I/O port 0x3ff belongs to com1: take another, as in 0xf4"
        );
        let nameless = SpecBuilder::new(Era::Today).settle().unwrap_err();
        assert_eq!(nameless.problem, Problem::NoName);
    }

    #[test]
    fn a_slot_is_given_once_but_a_variable_may_replace_it() {
        let mut builder = named(Era::Today);
        builder.slot("0,hostbridge").unwrap();
        let taken = Problem::SlotTaken(PciAddress::HOST_BRIDGE);
        assert_eq!(builder.slot("0:0:0,amd_hostbridge"), Err(taken));
        builder
            .variable("pci.0.0.0.device", "amd_hostbridge")
            .unwrap();
        assert_eq!(
            builder.settle().unwrap().slots[0].device,
            SlotDevice::AmdHostBridge
        );
    }

    #[test]
    fn there_is_one_bridge_to_isa_at_most_and_on_bus_0() {
        for (slots, wrong) in [
            (&["31,lpc", "5,lpc"][..], "0:31:0"),
            (&["1:31:0,lpc"], "1:31:0"),
        ] {
            let complaint = complaint(Era::Today, |builder| {
                slots.iter().for_each(|slot| builder.slot(slot).unwrap());
            });
            let text = "-s: a machine has one bridge to ISA, on bus 0: leave lpc at";
            assert_eq!(complaint, format!("{text} {wrong} out"));
        }
        let mut builder = named(Era::Today);
        builder.slot("31,lpc").unwrap();
        assert!(builder.settle().is_ok());
    }

    #[test]
    fn two_names_must_agree() {
        let mut builder = named(Era::Today);
        assert_eq!(builder.variable("name", "guest0"), Ok(()));
        let other = "guest0".parse().unwrap();
        assert_eq!(
            builder.variable("name", "guest1"),
            Err(Problem::TwoNames(other))
        );
    }
}
