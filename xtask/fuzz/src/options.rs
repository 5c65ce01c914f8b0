//! The three programs' command lines: what they take makes sense, and reads back what it shows.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::str::FromStr;

use clap::Parser;
use rhyve::config::{ComPort, MachineSpec, PciAddress};
use rhyve::console::ConsoleConf;
use rhyveload::freebsd::env::EnvVar;
use vmm_api::memory::MemSize;
use vmm_api::name::VmName;
use vmm_api::regs::{Reg, SegReg};

/// Lines are arguments, the program's name first. True if that program would do something.
///
/// # Panics
///
/// A machine that cannot be comes of it, or a text reads back as something else.
pub fn check(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    let lines: Vec<&str> = text.split('\n').collect();
    for text in lines.iter().flat_map(|line| line.split(',')) {
        reads_back::<MemSize>(text);
        reads_back::<VmName>(text);
        reads_back::<EnvVar>(text);
        reads_back::<Reg>(text);
        reads_back::<SegReg>(text);
        reads_back::<PciAddress>(text);
        reads_back::<ConsoleConf>(text);
    }
    match lines[0] {
        "rhyve" => match rhyve::cli::Cli::try_parse_from(&lines).map(|cli| cli.machine()) {
            Ok(Ok(spec)) => verify(&spec),
            Ok(Err(error)) => {
                assert!(!error.to_string().contains('\n') || text.contains("\n\n"));
                return false;
            }
            Err(_) => return false,
        },
        "rhyveload" => match rhyveload::cli::Cli::try_parse_from(&lines) {
            // Whatever the sizes are, adding them up must not overflow.
            Ok(cli) => drop(cli.job().map(|job| job.memory.layout.validate())),
            Err(_) => return false,
        },
        "vmmctl" => return vmmctl::cli::Cli::try_parse_from(&lines).is_ok(),
        _ => return false,
    }
    true
}

fn reads_back<T: FromStr + Display + PartialEq>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        let shown = value.to_string();
        assert!(
            shown.parse().is_ok_and(|again: T| again == value),
            "{shown}"
        );
    }
}

/// What [`MachineSpec`] promises.
fn verify(spec: &MachineSpec) {
    let topology = spec.topology;
    let product = u64::from(topology.sockets) * u64::from(topology.cores);
    assert_eq!(
        product * u64::from(topology.threads),
        u64::from(topology.cpus)
    );
    assert!(topology.cpus > 0);
    if topology.cpus <= 256 {
        let ids: BTreeSet<_> = topology.apic_ids().map(|(_, id)| id).collect();
        assert_eq!(ids.len(), usize::from(topology.cpus), "APIC ids differ");
    }
    for (vcpu, hosts) in &spec.pins {
        assert!(*vcpu < topology.cpus && !hosts.is_empty());
    }
    let memory = spec.memory.unwrap_or_default();
    assert!(memory.validate().is_ok());
    let slots: BTreeSet<_> = spec.slots.iter().map(|slot| slot.address).collect();
    assert_eq!(slots.len(), spec.slots.len(), "one function, one device");
    let host_bridge = PciAddress {
        bus: 0,
        slot: 0,
        function: 0,
    };
    assert!(slots.contains(&host_bridge));
    let stdio = |com: &&Option<ConsoleConf>| **com == Some(ConsoleConf::Stdio);
    assert!(spec.com.iter().filter(stdio).count() <= 1);
    let _ = ComPort::io_base;
}

/// Command lines as people type them, and every option at least once.
pub fn seeds() -> Vec<Vec<u8>> {
    let lines = [
        "rhyve -c 2 -l com1,stdio guest0",
        "rhyve -c cpus=8,sockets=2,cores=2,threads=2 -p 0:3 -p 7:1 -p 7:2 -m 5G guest0",
        "rhyve -m 768 -M 2G -s 0,hostbridge -s 31:0,amd_hostbridge -l com2,unix:/tmp/a guest0",
        "rhyve -AYCSewuHPD -a -l com1,tcp=127.0.0.1:4000 -l com4,file:log guest0",
        "rhyve -W -s 31,lpc -s 9:2:0,virtio-rnd,rate=4096 -s 255:31:0,amd_hostbridge guest0",
        "rhyve -U 6c7bf6a1-2d60-4ac1-a7a4-2b1f5cbf2a3d -x --era=2012 -p 2 guest0",
        "rhyve --debug-exit=0x501 --trace rhyve::exit=trace -l com3,pty -o cpus=4 guest0",
        "rhyve -o name=guest0 -o memory.size=1G -o memory.wired=true -o x86.strictio=true",
        "rhyve -o pci.0.0.0.device=hostbridge -o lpc.com1.path=stdio -o rtc.use_localtime=false x",
        "rhyveload -m 768 -M 2048 -S -e boot_verbose=YES --kernel kernel --boot plain guest0",
        "rhyveload -m 512M --kernel a --initrd b --cmdline console=ttyS0 --mem-path /x --json g",
        "vmmctl --vm=guest0 --cpu=1 --get-all --json",
        "vmmctl --vm=guest0 --set-rip=0xfff0 --set-desc-cs --desc-base=0 --desc-access=0x9b",
        "vmmctl --vm=guest0 --create --set-lowmem=256M --set-highmem=1G --get-stats --destroy",
        "vmmctl --list",
        "vmmctl --host --json",
    ];
    let lines = lines.iter().map(|line| line.replace(' ', "\n"));
    lines.map(String::into_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_taken() {
        for seed in seeds() {
            assert!(check(&seed), "{}", String::from_utf8_lossy(&seed));
        }
    }
}
