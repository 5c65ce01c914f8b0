//! 2012's long options, and what they come to: a [`Plan`].
//!
//! The options for registers and descriptors are made from vmm-api's lists of them, hidden from the
//! help and described there in one paragraph; shells complete them all the same.

use clap::builder::{IntoResettable, ValueParser};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches, Parser};
use vmm_api::memory::MemSize;
use vmm_api::name::{NameError, VmName};
use vmm_api::regs::{Access, Reg, SegReg};

use crate::number;

mod detail;
mod help;
mod location;
mod look;
mod names;

pub use detail::{Detail, Sets, Show};
pub use location::Location;
pub use look::{Format, Letter, Looks, Place, Syntax, split_format};

use help::details;
use names::{DESCRIPTORS, REGISTERS, UNAVAILABLE_GETS, UNAVAILABLE_SETS};

/// What a command line comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cli {
    /// Say it as JSON.
    pub json: bool,
    /// What to do.
    pub plan: Plan,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// List all VMs.
    List,
    /// Report on this machine.
    Host,
    /// Show all VMs on a terminal, again and again.
    Top,
    /// Work on one VM.
    Work(Box<Work>),
}

/// What to do with one VM, in the order of the fields, which is 2012's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    /// The VM.
    pub vm: VmName,
    /// The vCPU whose registers and statistics are meant.
    pub cpu: u32,
    /// Make it.
    pub create: bool,
    /// New size of lowmem.
    pub lowmem: Option<MemSize>,
    /// New size of highmem.
    pub highmem: Option<MemSize>,
    /// New size of all memory, to be split at 3 GiB.
    pub mem: Option<MemSize>,
    /// Hold its vCPUs.
    pub pause: bool,
    /// New values of registers.
    pub registers: Vec<(Reg, u64)>,
    /// Segments whose hidden part is changed to `desc`.
    pub descriptors: Vec<SegReg>,
    /// What is known of that part.
    pub desc: Desc,
    /// What else is to be changed.
    pub sets: Sets,
    /// What the guest is to lend of its memory.
    pub balloon: Option<MemSize>,
    /// A network card's cable that is to be plugged in or out.
    pub link: Option<Link>,
    /// Disk to resize.
    pub disk: Option<Disk>,
    /// Where it is to be led.
    pub until: Option<Location>,
    /// How many instructions vCPU `cpu` is to execute.
    pub step: Option<u32>,
    /// What is to be shown.
    pub gets: Gets,
    /// A device that was the host's is to be the host's again.
    pub passthru: bool,
    /// Options that set what KVM does not show.
    pub unavailable_sets: Vec<String>,
    /// Count from 0 again.
    pub reset_stats: bool,
    /// Assert this pin of the local APIC.
    pub lapic_lvt: Option<u32>,
    /// Inject an NMI.
    pub nmi: bool,
    /// Let its vCPUs go on.
    pub resume: bool,
    /// Make a copy of it by this name.
    pub snapshot: Option<VmName>,
    /// How it is to end.
    pub end: Option<End>,
    /// Make a VM by this name that shares its memory.
    pub clone: Option<VmName>,
    /// Run it.
    pub run: bool,
    /// Destroy it.
    pub destroy: bool,
}

/// `--set-disk=SLOT=SIZE|now`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Where the disk is, as rhyve's `-s` has it.
    pub slot: String,
    /// How large it is to be; none: as large as its image has become.
    pub size: Option<MemSize>,
}

/// Reads it.
fn disk(text: &str) -> Result<Disk, String> {
    let usage = "write SLOT=SIZE, as in 2=8G, or SLOT=now";
    let parts = text.split_once('=').filter(|(slot, _)| !slot.is_empty());
    let (slot, size) = parts.ok_or(usage)?;
    let size = match size {
        "now" => None,
        size => Some(size.parse().map_err(|error| format!("{error}; {usage}"))?),
    };
    Ok(Disk {
        slot: slot.to_owned(),
        size,
    })
}

/// The name in `--suspend=NAME`, if there is one.
fn suspend(text: &str) -> Result<Option<VmName>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse()
        .map(Some)
        .map_err(|error: NameError| error.to_string())
}

/// `--set-link=SLOT=up|down`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Where the network card is, as rhyve's `-s` has it.
    pub slot: String,
    /// Plugged in.
    pub up: bool,
}

/// Reads it.
fn link(text: &str) -> Result<Link, String> {
    let parts = text.split_once('=').filter(|(slot, _)| !slot.is_empty());
    let (slot, up) = match parts {
        Some((slot, "up")) => (slot, true),
        Some((slot, "down")) => (slot, false),
        _ => return Err("write SLOT=up or SLOT=down, as in 1=down".into()),
    };
    Ok(Link {
        slot: slot.to_owned(),
        up,
    })
}

/// `--desc-base= --desc-limit= --desc-access=`; what is not given stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    /// Linear base address.
    pub base: Option<u64>,
    /// Limit in bytes.
    pub limit: Option<u32>,
    /// Access rights.
    pub access: Option<Access>,
}

/// What is to be shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gets {
    /// All but the statistics.
    pub all: bool,
    /// Lowmem.
    pub lowmem: bool,
    /// Highmem.
    pub highmem: bool,
    /// These registers.
    pub registers: Vec<Reg>,
    /// These segments' hidden parts.
    pub descriptors: Vec<SegReg>,
    /// What a vCPU and its machine have beyond registers.
    pub details: Detail,
    /// What its memory holds.
    pub looks: Looks,
    /// Devices.
    pub devices: bool,
    /// Statistics.
    pub stats: bool,
    /// This many places that made vCPUs leave the guest.
    pub exits: Option<usize>,
    /// Options that ask for what KVM does not show.
    pub unavailable: Vec<String>,
}

/// How a running VM is told to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Ask the guest, by its power button.
    PowerButton,
    /// As if its reset button were pressed.
    Reset,
    /// As if its plug were pulled.
    PowerOff,
    /// In the middle, to be run again from there; with a name, by another VM of that name.
    Suspend(Option<VmName>),
}

fn flag(name: &'static str, heading: &'static str, help: &'static str) -> Arg {
    Arg::new(name)
        .long(name)
        .action(ArgAction::SetTrue)
        .help(help)
        .help_heading(heading)
}

fn value(name: &'static str, parser: impl IntoResettable<ValueParser>) -> Arg {
    Arg::new(name).long(name).value_parser(parser)
}

fn json() -> Arg {
    Arg::new("json")
        .long("json")
        .action(ArgAction::SetTrue)
        .help("Print one JSON object; for --list an array of them")
}

/// One of the many options that the help describes as a group.
fn hidden(name: &'static str) -> Arg {
    Arg::new(name)
        .long(name)
        .action(ArgAction::SetTrue)
        .hide(true)
}

const SHOW: &str = "Show";
const CHANGE: &str = "Change";
const CONTROL: &str = "Control";

impl CommandFactory for Cli {
    fn command() -> Command {
        let size = || clap::value_parser!(MemSize);
        let mut command = Command::new("vmmctl")
            .version(env!("CARGO_PKG_VERSION"))
            .about("Show and change what the hypervisor knows of a virtual machine")
            .override_usage(
                "vmmctl --vm=NAME [--cpu=N] OPTION...\n       vmmctl --list | --host | top",
            )
            .after_help("Registers: --get-REG, --set-REG=VALUE, --get-desc-SEG, --set-desc-SEG; see --help.")
            .after_long_help(details())
            .max_term_width(100)
            .args_override_self(true)
            .arg_required_else_help(true)
            .arg(
                value("vm", clap::value_parser!(VmName))
                    .value_name("NAME")
                    .help("The VM, whether it was created, is loaded, runs or has ended"),
            )
            .arg(
                value("cpu", number::parse_u32)
                    .value_name("N")
                    .help("The vCPU whose registers and statistics are meant [default: 0]"),
            )
            .arg(json())
            .arg(
                Arg::new("command")
                    .value_name("top")
                    .value_parser(["top"])
                    .hide_possible_values(true)
                    .help("Show all VMs on this terminal: processor time, exits, devices, memory; keys sort, pause, look into one"),
            )
            .arg(flag("list", SHOW, "List all VMs: name, phase, memory, vCPUs, pid and uptime"))
            .arg(flag("host", SHOW, "Report what this machine has of what rhyve needs, and what to do about the rest"))
            .arg(flag("get-all", SHOW, "Show memory, registers and descriptors"))
            .arg(flag("get-stats", SHOW, "Show what a running VM has counted: bhyve's list, rhyve's own, KVM's"))
            .arg(
                value("get-exits", clap::value_parser!(u16).range(1..))
                    .value_name("TOP")
                    .num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("10")
                    .help_heading(SHOW)
                    .help("Show what made each vCPU leave the guest: the 10 or TOP places that took rhyve longest, and the guest's functions that did it"),
            )
            .arg(flag("get-devices", SHOW, "Show a running VM's devices: slot, kind, transport, features, queues, and what they have served"))
            .arg(flag("get-lowmem", SHOW, "Show the memory below 3 GiB"))
            .arg(flag("get-highmem", SHOW, "Show the memory from 4 GiB on"))
            .arg(flag("create", CHANGE, "Make the VM, without memory"))
            .arg(
                value("set-lowmem", size())
                    .value_name("MB")
                    .help_heading(CHANGE)
                    .help("Give it new, empty memory below 3 GiB, in whole 2 MiB"),
            )
            .arg(
                value("set-highmem", size())
                    .value_name("MB")
                    .help_heading(CHANGE)
                    .help("Give it new, empty memory from 4 GiB on, in whole 2 MiB"),
            )
            .arg(
                value("set-mem", size())
                    .value_name("MB")
                    .help_heading(CHANGE)
                    .conflicts_with_all(["set-lowmem", "set-highmem"])
                    .help("Give it new, empty memory: up to 3 GiB of it as lowmem, the rest as highmem"),
            )
            .arg(
                value("set-balloon", size())
                    .value_name("MB")
                    .help_heading(CHANGE)
                    .help("Ask a running guest to lend this much of its memory in all; 0 gives all of it back"),
            )
            .arg(
                value("set-disk", disk)
                    .value_name("SLOT=SIZE|now")
                    .help_heading(CHANGE)
                    .help("Make the disk in this slot of a running guest larger, its image as well; now: as large as its image has become"),
            )
            .arg(
                value("set-link", link)
                    .value_name("SLOT=up|down")
                    .help_heading(CHANGE)
                    .help("Plug the cable of the network card in this slot of a running guest in, or out"),
            )
            .arg(flag("destroy", CHANGE, "Destroy the VM, its memory and all; not while it runs"))
            .arg(flag("reset-stats", CONTROL, "Count exits, times and accesses from 0 again; KVM's own statistics go on"))
            .arg(flag("run", CONTROL, "Run it here, by rhyve NAME"))
            .arg(flag("pause", CONTROL, "Hold its vCPUs"))
            .arg(
                value("until", clap::value_parser!(Location))
                    .value_name("SYMBOL|ADDR")
                    .help_heading(CONTROL)
                    .help("Let it run until a vCPU comes to this function of its kernel, SYMBOL+OFFSET or linear address; then it is paused"),
            )
            .arg(
                value("step", clap::value_parser!(u32).range(1..=65_536))
                    .value_name("N")
                    .num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("1")
                    .help_heading(CONTROL)
                    .help("Have vCPU --cpu execute one instruction, or N, while the others wait, and show each and the next; then it is paused"),
            )
            .arg(flag("resume", CONTROL, "Let its vCPUs go on"))
            .arg(flag("inject-nmi", CONTROL, "Inject a non-maskable interrupt into vCPU --cpu"))
            .arg(
                value("assert-lapic-lvt", detail::lvt_pin)
                    .value_name("PIN")
                    .help_heading(CONTROL)
                    .help("Assert a pin of vCPU --cpu's local APIC: 0 timer, 1 LINT0, 2 LINT1, 3 error, 4 performance counters, 5 thermal, 6 CMCI"),
            )
            .arg(flag("power-button", CONTROL, "Press its ACPI power button: the guest may switch itself off"))
            .arg(
                flag("force-reset", CONTROL, "Reset it, and wait until rhyve has ended")
                    .conflicts_with("power-button"),
            )
            .arg(
                flag("force-poweroff", CONTROL, "Switch it off, and wait until rhyve has ended")
                    .conflicts_with_all(["power-button", "force-reset"]),
            )
            .arg(
                value("suspend", suspend)
                    .value_name("NAME")
                    .num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("")
                    .help_heading(CONTROL)
                    .help("Stop it in the middle and keep all of it: rhyve VM goes on from there; with NAME, as --snapshot=NAME, and switch it off")
                    .conflicts_with_all(["power-button", "force-reset", "force-poweroff"]),
            )
            .arg(
                value("snapshot", clap::value_parser!(VmName))
                    .visible_alias("checkpoint")
                    .value_name("NAME")
                    .help_heading(CONTROL)
                    .help("Make a VM of this name that is as this one is now, with copies of its memory and of the disks that its guest writes to, and goes on from there; this one goes on as well"),
            )
            .arg(
                value("clone", clap::value_parser!(VmName))
                    .value_name("NAME")
                    .help_heading(CONTROL)
                    .help("Make a VM of this name that shares the memory of this one, loaded or suspended, until one of them writes to it, and has disks of its own"),
            )
            .arg(value("unassign-pptdev", clap::value_parser!(String)).value_name("BUS/SLOT/FUNC").hide(true))
            .arg(value("desc-base", number::parse).value_name("VALUE").hide(true))
            .arg(value("desc-limit", number::parse_u32).value_name("VALUE").hide(true))
            .arg(value("desc-access", number::parse_u32).value_name("VALUE").hide(true));
        command = look::options(detail::options(command));
        for named in REGISTERS.iter() {
            command = command.arg(hidden(&named.get));
            if let Some(set) = &named.set {
                command = command.arg(value(set, number::parse).value_name("VALUE").hide(true));
            }
        }
        for named in DESCRIPTORS.iter() {
            command = command.arg(hidden(&named.get));
            command = command.args(named.set.iter().map(|set| hidden(set)));
        }
        command = command.args(UNAVAILABLE_GETS.iter().map(|&name| hidden(name)));
        let sets = UNAVAILABLE_SETS.iter();
        command.args(sets.map(|&name| value(name, number::parse).value_name("VALUE").hide(true)))
    }

    fn command_for_update() -> Command {
        Self::command()
    }
}

impl FromArgMatches for Cli {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let json = matches.get_flag("json");
        let report = match (matches.get_flag("list"), matches.get_flag("host")) {
            (false, false) => None,
            (true, false) => Some(Plan::List),
            (false, true) => Some(Plan::Host),
            (true, true) => return Err(wrong("--list and --host are two calls")),
        };
        let top = matches.contains_id("command");
        let report = match (report, top) {
            (Some(_), true) => return Err(wrong("top, --list and --host are calls of their own")),
            (None, true) if json => {
                return Err(wrong(
                    "top is drawn on a terminal: --list --json and --get-exits --json tell programs",
                ));
            }
            (None, true) => Some(Plan::Top),
            (report, false) => report,
        };
        let asked = matches.ids().any(|id| {
            matches.value_source(id.as_str()) == Some(ValueSource::CommandLine)
                && !["json", "list", "host", "command", "vm", "cpu"].contains(&id.as_str())
        });
        let plan = match (report, matches.get_one::<VmName>("vm")) {
            (Some(report), None) if !asked => report,
            (Some(_), _) => {
                return Err(wrong(
                    "--list, --host and top go with no other option but --json",
                ));
            }
            (None, None) => return Err(wrong("say which VM: --vm=NAME")),
            (None, Some(_)) if !asked => {
                return Err(wrong("say what to do with the VM, as --get-all"));
            }
            (None, Some(vm)) => Plan::Work(Box::new(work(vm.clone(), matches)?)),
        };
        Ok(Self { json, plan })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Parser for Cli {}

fn wrong(text: &str) -> clap::Error {
    clap::Error::raw(ErrorKind::ArgumentConflict, text)
}

fn work(vm: VmName, matches: &ArgMatches) -> Result<Work, clap::Error> {
    let given = |name: &str| matches.get_flag(name);
    let number = |name: &str| matches.get_one::<u64>(name).copied();
    let short = |name: &str| matches.get_one::<u32>(name).copied();
    let size = |name: &str| matches.get_one::<MemSize>(name).copied();
    let owned = |name: &&str| format!("--{name}");
    let desc = Desc {
        base: number("desc-base"),
        limit: short("desc-limit"),
        access: short("desc-access").map(Access),
    };
    let descriptors: Vec<SegReg> = DESCRIPTORS
        .iter()
        .filter(|n| n.set.as_deref().is_some_and(given))
        .map(|n| n.what)
        .collect();
    match (descriptors.is_empty(), desc == Desc::default()) {
        (true, false) => {
            return Err(wrong(
                "say which descriptor is to be changed, as --set-desc-cs",
            ));
        }
        (false, true) => {
            return Err(wrong(
                "say what the descriptor is to be: --desc-base= --desc-limit= --desc-access=",
            ));
        }
        _ => {}
    }
    let ends = [
        ("power-button", End::PowerButton),
        ("force-reset", End::Reset),
        ("force-poweroff", End::PowerOff),
    ];
    let suspended = matches.get_one::<Option<VmName>>("suspend").cloned();
    let passthru = matches.contains_id("unassign-pptdev");
    Ok(Work {
        vm,
        cpu: short("cpu").unwrap_or(0),
        create: given("create"),
        lowmem: size("set-lowmem"),
        highmem: size("set-highmem"),
        mem: size("set-mem"),
        pause: given("pause"),
        registers: REGISTERS
            .iter()
            .filter_map(|n| Some((n.what, number(n.set.as_deref()?)?)))
            .collect(),
        descriptors,
        desc,
        sets: detail::sets(matches)?,
        balloon: size("set-balloon"),
        disk: matches.get_one("set-disk").cloned(),
        link: matches.get_one("set-link").cloned(),
        until: matches.get_one("until").cloned(),
        step: short("step"),
        snapshot: matches.get_one("snapshot").cloned(),
        clone: matches.get_one("clone").cloned(),
        gets: Gets {
            all: given("get-all"),
            lowmem: given("get-lowmem"),
            highmem: given("get-highmem"),
            registers: REGISTERS
                .iter()
                .filter(|n| given(&n.get))
                .map(|n| n.what)
                .collect(),
            descriptors: DESCRIPTORS
                .iter()
                .filter(|n| given(&n.get))
                .map(|n| n.what)
                .collect(),
            details: detail::gets(matches)?,
            looks: look::looks(matches)?,
            devices: given("get-devices"),
            stats: given("get-stats"),
            exits: matches.get_one::<u16>("get-exits").map(|&top| top.into()),
            unavailable: UNAVAILABLE_GETS
                .iter()
                .filter(|name| given(name))
                .map(owned)
                .collect(),
        },
        passthru,
        unavailable_sets: UNAVAILABLE_SETS
            .iter()
            .filter(|name| number(name).is_some())
            .map(owned)
            .collect(),
        reset_stats: given("reset-stats"),
        lapic_lvt: short("assert-lapic-lvt"),
        nmi: given("inject-nmi"),
        resume: given("resume"),
        end: ends
            .into_iter()
            .find_map(|(name, end)| given(name).then_some(end))
            .or_else(|| suspended.map(End::Suspend)),
        run: given("run"),
        destroy: given("destroy"),
    })
}

#[cfg(test)]
mod tests {
    use vmm_api::regs::Registers;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(["vmmctl"].into_iter().chain(line.split_whitespace()))
    }

    fn plan(line: &str) -> Work {
        match parse(line).map(|cli| cli.plan) {
            Ok(Plan::Work(work)) => *work,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn clap_finds_the_description_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_teaches() {
        insta::assert_snapshot!("help_short", Cli::command().render_help());
        insta::assert_snapshot!("help_long", Cli::command().render_long_help());
    }

    #[test]
    fn every_register_and_descriptor_has_its_options() {
        for reg in Reg::all() {
            let name = reg.name().replace('_', "-");
            let work = plan(&format!("--vm=a --get-{name}"));
            assert_eq!(work.gets.registers, [reg]);
            let set = parse(&format!("--vm=a --set-{name}=0x10"));
            let expected = Registers::reset().set(reg, 1).is_ok();
            assert_eq!(set.is_ok(), expected, "{reg}");
        }
        for seg in SegReg::ALL {
            assert_eq!(
                plan(&format!("--vm=a --get-desc-{seg}")).gets.descriptors,
                [seg]
            );
            let work = plan(&format!("--vm=a --set-desc-{seg} --desc-limit=010"));
            assert_eq!((work.descriptors, work.desc.limit), (vec![seg], Some(8)));
        }
        for name in UNAVAILABLE_GETS {
            let work = plan(&format!("--vm=a --{name}"));
            assert_eq!(work.gets.unavailable, [format!("--{name}")]);
        }
    }

    #[test]
    fn options_are_combined_and_the_last_of_two_counts() {
        let work = plan("--destroy --set-rip=1 --vm a --cpu 3 --set-rip 2 --set-lowmem=64 --run");
        assert!(work.destroy && work.run && !work.create);
        assert_eq!(work.registers, [(Reg::Rip, 2)]);
        assert_eq!((work.cpu, work.lowmem), (3, Some(MemSize(64 << 20))));
    }

    #[test]
    fn a_wrong_line_says_what_is_wrong() {
        let mut text = String::new();
        for line in [
            "--get-all",
            "--vm=a",
            "--vm=a --cpu=1 --json",
            "--vm=a/b --get-all",
            "--vm=a --get-eip",
            "--vm=a --set-rip=here",
            "--vm=a --set-rip=",
            "--vm=a --set-pdpte0=1",
            "--vm=a --cpu=-1 --get-all",
            "--vm=a --set-desc-cs",
            "--vm=a --desc-base=0",
            "--vm=a --list",
            "--list --host",
            "--host --get-all",
            "top --json",
            "--vm=a --force-reset --force-poweroff",
            "--vm=a --set-lowmem=much",
            "--vm=a --set-mem=64 --set-lowmem=64",
            "--vm=a --capname=hlt_exit",
            "--vm=a --capname=hlt --getcap",
            "--vm=a --setcap=1",
            "--vm=a --set-x2apic-state=2",
            "--vm=a --get-rtc-nvram",
            "--vm=a --get-rtc-nvram --rtc-nvram-offset=50",
            "--vm=a --rtc-nvram-offset=14 --get-all",
            "--vm=a --set-pinning=-2",
            "--vm=a --assert-lapic-lvt=7",
            "--vm=a --step=0",
            "--vm=a --step=many",
            "--vm=a --until=",
            "--vm=a --until=panic+",
            "guest0",
        ] {
            let error = parse(line).unwrap_err().to_string();
            text += &format!("$ vmmctl {line}\n{}\n\n", error.trim_end());
        }
        insta::assert_snapshot!("refusals", text);
    }
}
