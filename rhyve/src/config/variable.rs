//! `-o name=value`: the variables of bhyve_config(5).
//!
//! bhyve's flags are short for its variables, and so they are here: a flag and its variable meet in
//! [`SpecBuilder::set`], which is the one place that knows what each of them does.

use std::str::FromStr;

use super::com::{ComPort, ComSpec};
use super::slot::{PciAddress, SlotDevice, SlotSpec};
use super::{Problem, RtcBase, SpecBuilder};

/// Variables that work, as patterns: N stands for a number. Suggestions come from here.
const WORKING: &[&str] = &[
    "acpi_tables",
    "acpi_tables_in_memory",
    "cores",
    "cpus",
    "destroy_on_poweroff",
    "lpc.com1.path",
    "lpc.com2.path",
    "lpc.com3.path",
    "lpc.com4.path",
    "memory.guest_in_core",
    "memory.size",
    "memory.wired",
    "name",
    "pci.N.N.N.device",
    "rtc.use_localtime",
    "sockets",
    "threads",
    "uuid",
    "vcpu.N.cpuset",
    "virtio_msix",
    "x86.mptable",
    "x86.strictio",
    "x86.strictmsr",
    "x86.vmexit_on_hlt",
    "x86.vmexit_on_pause",
    "x86.x2apic",
];

/// Variables bhyve has and rhyve has not yet, and why; one that ends in a dot is a whole tree.
const NOT_YET: &[(&str, &str)] = &[
    ("bios.", "the SMBIOS texts are fixed; -U sets the UUID"),
    ("board.", "the SMBIOS texts are fixed; -U sets the UUID"),
    (
        "bootrom",
        "guests are loaded by rhyveload; firmware images are not run yet",
    ),
    ("chassis.", "the SMBIOS texts are fixed; -U sets the UUID"),
    ("config.dump", "the settings cannot be printed yet"),
    ("fwcfg.", "there is no firmware that would read it"),
    ("gdb.", "write -G [w][ADDRESS:]PORT"),
    ("keyboard.layout", "there is no display and so no keyboard"),
    (
        "lpc.bootrom",
        "guests are loaded by rhyveload; firmware images are not run yet",
    ),
    (
        "lpc.bootvars",
        "guests are loaded by rhyveload; firmware images are not run yet",
    ),
    ("lpc.fwcfg", "there is no firmware that would read it"),
    (
        "lpc.pc-testdev",
        "there is no such device; -l debugexit is there for test guests",
    ),
    ("lpc.pcireg.", "the ISA bridge is always 8086:7000"),
    (
        "pci.",
        "the device has no such setting; only pci.BUS.SLOT.FUNCTION.device is there",
    ),
    ("system.", "the SMBIOS texts are fixed; -U sets the UUID"),
    ("tpm.", "there is no TPM yet"),
    ("x86.verbosemsr", "use --trace rhyve::msr=trace"),
];

impl SpecBuilder {
    /// Sets one variable of bhyve_config(5); a later setting takes the place of an earlier one.
    ///
    /// # Errors
    /// Why the variable or its value cannot be had.
    pub fn variable(&mut self, name: &str, value: &str) -> Result<(), Problem> {
        if value.contains("%(") {
            return Err(Problem::NotYet(
                "values cannot refer to variables: write it out",
            ));
        }
        match name {
            "cpus" | "sockets" | "cores" | "threads" => self.topology.set(name, value)?,
            "name" => self.set_name(value)?,
            "memory.size" => self.memory = Some(value.parse()?),
            "memory.wired" => self.wire_memory = boolean(value)?,
            "memory.guest_in_core" => self.guest_in_core = boolean(value)?,
            "destroy_on_poweroff" => self.destroy_on_poweroff = boolean(value)?,
            "acpi_tables" => self.acpi = Some(boolean(value)?),
            "acpi_tables_in_memory" => {
                fixed(
                    value,
                    true,
                    "without firmware the tables can be nowhere but in memory",
                )?;
            }
            "rtc.use_localtime" => {
                self.rtc = if boolean(value)? {
                    RtcBase::LocalTime
                } else {
                    RtcBase::Utc
                };
            }
            "uuid" => {
                let uuid = uuid::Uuid::parse_str(value);
                self.uuid = Some(uuid.map_err(|_| Problem::Uuid(value.to_owned()))?);
            }
            "virtio_msix" => self.virtio_msix = boolean(value)?,
            "x86.mptable" => self.mptable = Some(boolean(value)?),
            "x86.x2apic" => self.x2apic = Some(boolean(value)?),
            "x86.strictio" => self.strict_io = boolean(value)?,
            "x86.strictmsr" => self.strict_msr = boolean(value)?,
            "x86.vmexit_on_hlt" => fixed(value, true, "under KVM, HLT always yields the CPU")?,
            "x86.vmexit_on_pause" => {
                fixed(
                    value,
                    true,
                    "KVM itself decides when a spinning vCPU yields the CPU",
                )?;
            }
            _ => return self.numbered_variable(name, value),
        }
        Ok(())
    }

    /// The variables with a number in their name, and the refusal of all others.
    fn numbered_variable(&mut self, name: &str, value: &str) -> Result<(), Problem> {
        let parts: Vec<&str> = name.split('.').collect();
        match parts[..] {
            ["lpc", port, "path"] if ComPort::from_str(port).is_ok() => {
                let spec = ComSpec {
                    port: port.parse()?,
                    backend: value.parse().map_err(super::LpcError::from)?,
                };
                self.com[spec.port.index()] = Some(spec.backend);
            }
            ["pci", bus, slot, function, "device"] => {
                let address = match [bus, slot, function].map(str::parse) {
                    [Ok(bus), Ok(slot), Ok(function)] => PciAddress::new(bus, slot, function)?,
                    _ => return Err(Problem::Unknown(hint(name))),
                };
                // Unlike two -s for one place, which is a slip, setting a variable anew is meant.
                self.slots.insert(
                    address,
                    SlotSpec {
                        address,
                        device: SlotDevice::parse(value)?,
                    },
                );
            }
            ["vcpu", vcpu, "cpuset"] => {
                let vcpu = vcpu.parse().map_err(|_| Problem::Unknown(hint(name)))?;
                self.pins.insert(vcpu, cpuset(value)?);
            }
            _ => {
                let not_yet = NOT_YET.iter().find(|(known, _)| {
                    *known == name || (known.ends_with('.') && name.starts_with(known))
                });
                return Err(match not_yet {
                    Some((_, why)) => Problem::NotYet(why),
                    None => Problem::Unknown(hint(name)),
                });
            }
        }
        Ok(())
    }
}

/// bhyve_config(5)'s booleans.
fn boolean(value: &str) -> Result<bool, Problem> {
    match value {
        "true" | "on" | "yes" | "1" => Ok(true),
        "false" | "off" | "no" | "0" => Ok(false),
        _ => Err(Problem::Boolean(value.to_owned())),
    }
}

/// Accepts only the value that is true of every machine here.
fn fixed(value: &str, truth: bool, why: &'static str) -> Result<(), Problem> {
    if boolean(value)? == truth {
        Ok(())
    } else {
        Err(Problem::Fixed(why))
    }
}

/// Reads a set of host CPUs, `0-3,8`, as cpuset(1) does.
fn cpuset(value: &str) -> Result<std::collections::BTreeSet<usize>, Problem> {
    let bad = || Problem::CpuSet(value.to_owned());
    let mut set = std::collections::BTreeSet::new();
    for item in value.split(',') {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let first: u16 = first.parse().map_err(|_| bad())?;
        let last: u16 = last.parse().map_err(|_| bad())?;
        if last < first {
            return Err(bad());
        }
        set.extend((first..=last).map(usize::from));
    }
    Ok(set)
}

/// The variable that was probably meant.
fn hint(name: &str) -> String {
    let nearest = WORKING
        .iter()
        .map(|known| (strsim::jaro_winkler(known, name), known));
    match nearest.rev().max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((likeness, known)) if likeness > 0.8 => format!("; did you mean {known}?"),
        _ => format!("; there are {}", WORKING.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder() -> SpecBuilder {
        SpecBuilder::new(super::super::Era::Today)
    }

    /// A value each kind of variable takes.
    fn sample(name: &str) -> &'static str {
        match name {
            "cpus" | "sockets" | "cores" | "threads" | "vcpu.0.cpuset" => "1",
            "memory.size" => "1G",
            "name" => "guest0",
            "uuid" => "6c7bf6a1-2d60-4ac1-a7a4-2b1f5cbf2a3d",
            "pci.0.0.0.device" => "hostbridge",
            name if name.starts_with("lpc.") => "stdio",
            _ => "true",
        }
    }

    #[test]
    fn every_variable_that_is_said_to_work_works() {
        for pattern in WORKING {
            let name = pattern.replace('N', "0");
            assert_eq!(builder().variable(&name, sample(&name)), Ok(()), "{name}");
        }
    }

    #[test]
    fn every_variable_that_is_not_there_yet_says_why() {
        for (name, why) in NOT_YET {
            let name = format!("{name}{}", if name.ends_with('.') { "0.x" } else { "" });
            assert_eq!(
                builder().variable(&name, "x"),
                Err(Problem::NotYet(why)),
                "{name}"
            );
        }
    }

    #[test]
    fn an_unknown_variable_gets_a_suggestion() {
        let err = |name| builder().variable(name, "1").unwrap_err().to_string();
        assert_eq!(err("cpu"), "there is no such variable; did you mean cpus?");
        assert_eq!(
            err("memory_size"),
            "there is no such variable; did you mean memory.size?"
        );
        assert_eq!(
            err("lpc.com5.path"),
            "there is no such variable; did you mean lpc.com1.path?"
        );
        assert!(err("qqq").starts_with("there is no such variable; there are acpi_tables "));
    }

    #[test]
    fn cpu_sets_are_read() {
        let set = |text| cpuset(text).map(|set| set.into_iter().collect::<Vec<_>>());
        assert_eq!(set("3"), Ok(vec![3]));
        assert_eq!(set("0-2,8"), Ok(vec![0, 1, 2, 8]));
        for text in ["", "3-1", "x", "1,,2", "0-99999"] {
            assert_eq!(set(text), Err(Problem::CpuSet(text.into())));
        }
    }

    #[test]
    fn what_kvm_fixes_can_be_confirmed_but_not_changed() {
        assert_eq!(builder().variable("x86.vmexit_on_hlt", "on"), Ok(()));
        let err = builder().variable("x86.vmexit_on_hlt", "off").unwrap_err();
        assert_eq!(
            err.to_string(),
            "cannot be changed: under KVM, HLT always yields the CPU"
        );
    }
}
