//! Options for what a vCPU and its machine have beyond registers: bhyvectl's, and 2012's pinning
//! and capabilities.

use std::collections::BTreeSet;

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Command};
use vmm_api::inspect::{CAPABILITIES, CmosState};

use super::wrong;
use crate::number;

/// One thing that is shown whole, without a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// Segments of memory.
    Memseg,
    /// What lies where in guest-physical space.
    Memmap,
    /// Where its thread may run.
    Pinning,
    /// Mode of the local APIC.
    X2apic,
    /// What is added to the host's time stamp counter.
    TscOffset,
    /// IA32_PAT.
    Pat,
    /// IA32_SYSENTER_*.
    Sysenter,
    /// Why it left the guest last.
    ExitReason,
    /// The CMOS clock.
    RtcTime,
    /// vCPUs that were started.
    ActiveCpus,
    /// vCPUs that are held.
    SuspendedCpus,
    /// Events on their way.
    Intinfo,
    /// Sockets, cores and threads.
    Topology,
}

/// Option, what it shows, help; in the order in which they are shown.
const SHOWS: [(&str, Show, &str); 13] = [
    ("get-memseg", Show::Memseg, "Show the segments of memory"),
    (
        "get-memmap",
        Show::Memmap,
        "Show what lies where in guest-physical space: memory, devices, holes",
    ),
    (
        "get-pinning",
        Show::Pinning,
        "Show the host processors that vCPU --cpu is pinned to; -1 if it is not",
    ),
    (
        "get-x2apic-state",
        Show::X2apic,
        "Show whether its local APIC is in x2APIC mode",
    ),
    (
        "get-tsc-offset",
        Show::TscOffset,
        "Show what is added to the host's time stamp counter",
    ),
    ("get-guest-pat", Show::Pat, "Show its page attribute table"),
    (
        "get-guest-sysenter",
        Show::Sysenter,
        "Show where its SYSENTER leads",
    ),
    (
        "get-exit-reason",
        Show::ExitReason,
        "Show why it left the guest last, as KVM's KVM_EXIT_ number",
    ),
    (
        "get-rtc-time",
        Show::RtcTime,
        "Show the time of the CMOS clock",
    ),
    (
        "get-active-cpus",
        Show::ActiveCpus,
        "Show which vCPUs were started",
    ),
    (
        "get-suspended-cpus",
        Show::SuspendedCpus,
        "Show which of them are held",
    ),
    (
        "get-intinfo",
        Show::Intinfo,
        "Show the event that waits for vCPU --cpu, and the one on its way into it",
    ),
    (
        "get-cpu-topology",
        Show::Topology,
        "Show how many sockets, cores and threads there are",
    ),
];

/// 2012's names of what has another today.
fn alias(name: &str) -> Option<&'static str> {
    match name {
        "get-tsc-offset" => Some("get-vmcs-tsc-offset"),
        "get-guest-pat" => Some("get-vmcs-guest-pat"),
        "get-guest-sysenter" => Some("get-vmcs-guest-sysenter"),
        _ => None,
    }
}

/// What is to be shown of a vCPU and its machine beyond registers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detail {
    /// These, in this order.
    pub shows: Vec<Show>,
    /// This byte of CMOS memory.
    pub rtc_nvram: Option<u8>,
    /// This capability, or all.
    pub capability: Option<Option<String>>,
    /// The page-table entries on the way from this linear address.
    pub pmap: Option<u64>,
}

/// What is to be changed of a vCPU and its machine beyond registers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    /// Host processors to run on; any, if the set is empty.
    pub pinning: Option<BTreeSet<usize>>,
    /// x2APIC mode on or off.
    pub x2apic: Option<bool>,
    /// A capability and its new value.
    pub capability: Option<(String, bool)>,
    /// A byte of CMOS memory: offset and new value.
    pub rtc_nvram: Option<(u8, u8)>,
    /// Time of the CMOS clock, in seconds since 1970.
    pub rtc_time: Option<i64>,
}

/// Adds the options.
pub(super) fn options(mut command: Command) -> Command {
    for (name, _, help) in SHOWS {
        let arg = super::flag(name, super::SHOW, help);
        command = command.arg(match alias(name) {
            Some(old) => arg.alias(old),
            None => arg,
        });
    }
    let change = |name, value, help| -> Arg {
        Arg::new(name)
            .long(name)
            .value_name(value)
            .help_heading(super::CHANGE)
            .help(help)
    };
    command
        .arg(
            Arg::new("get-gpa-pmap")
                .long("get-gpa-pmap")
                .value_name("ADDR")
                .value_parser(number::parse)
                .help_heading(super::SHOW)
                .help("Show where the guest's page tables lead linear address ADDR, and through which entries; KVM shows none of its own tables"),
        )
        .arg(super::flag("get-rtc-nvram", super::SHOW, "Show byte --rtc-nvram-offset of the CMOS memory"))
        .arg(super::flag("getcap", super::SHOW, "Show capability --capname, or all"))
        .arg(
            change("capname", "NAME", "The capability that --getcap and --setcap mean")
                .value_parser(PossibleValuesParser::new(CAPABILITIES)),
        )
        .arg(change("setcap", "0|1", "Change capability --capname: KVM has each of them fixed").value_parser(switch))
        .arg(
            change("set-pinning", "HOSTCPU|-1", "Move vCPU --cpu's thread to a host processor (or several, as 0,2), or let it run on any")
                .value_parser(pinning)
                .allow_hyphen_values(true),
        )
        .arg(change("set-x2apic-state", "0|1", "Turn its local APIC's x2APIC mode on or off").value_parser(switch))
        .arg(change("set-rtc-time", "SECONDS", "Set the CMOS clock, in seconds since 1970").value_parser(seconds))
        .arg(change("set-rtc-nvram", "VALUE", "Write byte --rtc-nvram-offset of the CMOS memory").value_parser(byte))
        .arg(
            change("rtc-nvram-offset", "OFFSET", "The byte of CMOS memory that is meant")
                .value_parser(byte)
                .action(ArgAction::Set),
        )
}

/// What the options say is to be shown.
pub(super) fn gets(matches: &ArgMatches) -> Result<Detail, clap::Error> {
    let capname = matches.get_one::<String>("capname").cloned();
    let (getcap, setcap) = (matches.get_flag("getcap"), matches.contains_id("setcap"));
    if capname.is_some() && !getcap && !setcap {
        return Err(wrong("--capname goes with --getcap or --setcap"));
    }
    let shows = SHOWS.iter().filter(|(name, ..)| matches.get_flag(name));
    let rtc_nvram = matches.get_flag("get-rtc-nvram");
    Ok(Detail {
        shows: shows.map(|&(_, show, _)| show).collect(),
        rtc_nvram: rtc_nvram.then(|| offset(matches)).transpose()?,
        capability: getcap.then_some(capname),
        pmap: matches.get_one::<u64>("get-gpa-pmap").copied(),
    })
}

/// What the options say is to be changed.
pub(super) fn sets(matches: &ArgMatches) -> Result<Sets, clap::Error> {
    let capability = match (
        matches.get_one::<String>("capname"),
        matches.get_one::<bool>("setcap"),
    ) {
        (None, Some(_)) => return Err(wrong("say which capability: --capname=hlt_exit")),
        (name, value) => name.cloned().zip(value.copied()),
    };
    let value = matches.get_one::<u8>("set-rtc-nvram").copied();
    let rtc_nvram = value.map(|value| Ok::<_, clap::Error>((offset(matches)?, value)));
    let given = matches.contains_id("rtc-nvram-offset");
    if given && value.is_none() && !matches.get_flag("get-rtc-nvram") {
        let text = "--rtc-nvram-offset goes with --get-rtc-nvram or --set-rtc-nvram";
        return Err(wrong(text));
    }
    Ok(Sets {
        pinning: matches.get_one::<BTreeSet<usize>>("set-pinning").cloned(),
        x2apic: matches.get_one::<bool>("set-x2apic-state").copied(),
        capability,
        rtc_nvram: rtc_nvram.transpose()?,
        rtc_time: matches.get_one::<i64>("set-rtc-time").copied(),
    })
}

/// `--rtc-nvram-offset`, which must be there.
fn offset(matches: &ArgMatches) -> Result<u8, clap::Error> {
    let offset = matches.get_one::<u8>("rtc-nvram-offset").copied();
    let offset = offset.ok_or_else(|| wrong("say which byte: --rtc-nvram-offset=14 to 127"))?;
    if CmosState::is_memory(offset) {
        return Ok(offset);
    }
    Err(wrong(
        "--rtc-nvram-offset: the memory is at 14 to 127, but for 50, which is the clock's",
    ))
}

/// A pin of a local APIC's vector table.
pub(super) fn lvt_pin(text: &str) -> Result<u32, String> {
    let pin = number::parse_u32(text)?;
    if pin > 6 {
        return Err("a local APIC has pins 0 to 6".into());
    }
    Ok(pin)
}

fn switch(text: &str) -> Result<bool, String> {
    match number::parse(text)? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err("give 0 or 1".into()),
    }
}

fn byte(text: &str) -> Result<u8, String> {
    u8::try_from(number::parse(text)?).map_err(|_| "the number has more than 8 bits".into())
}

fn seconds(text: &str) -> Result<i64, String> {
    // Year 9999, the last that the clock's registers show.
    const LAST: u64 = 253_402_300_799;
    match number::parse(text)? {
        seconds if seconds <= LAST => Ok(seconds as i64),
        _ => Err("the clock ends with the year 9999".into()),
    }
}

fn pinning(text: &str) -> Result<BTreeSet<usize>, String> {
    if text == "-1" {
        return Ok(BTreeSet::new());
    }
    let cpu = |text| {
        let cpu = number::parse_u32(text)?;
        Ok(usize::try_from(cpu).unwrap_or(usize::MAX))
    };
    text.split(',').map(cpu).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_strictly() {
        assert_eq!(pinning("-1"), Ok([].into()));
        assert_eq!(pinning("3"), Ok([3].into()));
        assert_eq!(pinning("0,2"), Ok([0, 2].into()));
        for text in ["", "-2", "1,", "1-3", "0x100000000"] {
            assert!(pinning(text).is_err(), "{text}");
        }
        assert_eq!((switch("1"), switch("0")), (Ok(true), Ok(false)));
        assert!(switch("2").is_err() && byte("256").is_err() && lvt_pin("7").is_err());
        assert!(seconds("253402300800").is_err());
    }
}
