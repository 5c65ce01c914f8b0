//! The command line of `rhyve`: bhyve(8)'s flags, and a few long ones of ours.
//!
//! A flag is short for a variable of bhyve_config(5) wherever there is one. Each flag works or is
//! refused with a reason; none is accepted and ignored.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;
use vmm_api::cli::{Parsed, UsageError};
use vmm_api::say;

use crate::config::{ConfigError, Era, MachineSpec, Problem, SpecBuilder, lpc_help, slot_help};

/// What follows the options in `--help` and in the man page.
const MORE: &str = "\
Examples:
  rhyveload -m 512M --kernel vmlinuz --initrd initrd.img guest0
  rhyve -c 2 -l com1,stdio guest0
      run what was loaded, on two CPUs, with the console here
  rhyve -c sockets=1,cores=4 -l com1,unix:/run/guest0.com1 guest0
      four cores in one package; the console is a Unix socket
  rhyve -p 0:2 -p 1:3 -c 2 -S -l com1,pty guest0
      each vCPU on a host CPU of its own, guest memory locked

Escape sequence:
  On a terminal (com1,stdio): Enter ~ . stops the VM, Enter ~ ^Z suspends
  rhyve, Enter ~ ? lists these, Enter ~ ~ sends one ~.
  The terminal is set back whatever ends rhyve, but for KILL.

Signals:
  TERM            presses the guest's power button; a second stops the VM
  INT, HUP, QUIT  stop the VM now, with its last state in its object
  KILL            leaves an object to be read, loaded again or destroyed

Exit status:
  0  the guest rebooted: load and run it again
  1  the guest switched itself off
  2  the guest halted: every vCPU waits with interrupts off
  3  a vCPU shut down after a triple fault
  4  an error, a wrong command line among them";

/// Run a virtual machine that rhyveload has loaded
#[derive(Clone, Debug, Default, Parser)]
#[command(
    name = "rhyve",
    version,
    override_usage = "rhyve [OPTIONS] VM",
    args_override_self = true,
    after_long_help = MORE
)]
pub struct Cli {
    /// Number of virtual CPUs, and how they are arranged [default: 1]
    ///
    /// The number must be the product of the other three; without them every CPU is a socket.
    #[arg(short, value_name = "[cpus=]N[,sockets=N][,cores=N][,threads=N]")]
    pub cpus: Option<String>,

    /// Memory the loaded VM is expected to have
    ///
    /// rhyveload settles it; a different size is an error. K, M, G and T are powers of 1024, a
    /// small number without them counts MiB.
    #[arg(short, value_name = "SIZE")]
    pub memory: Option<String>,

    /// Memory it is expected to have from 4 GiB; -m is then that below 4 GiB
    #[arg(short = 'M', value_name = "SIZE")]
    pub highmem: Option<String>,

    /// Put a device into a PCI slot; -s help lists them
    ///
    /// SLOT is slot, slot:function or bus:slot:function.
    #[arg(short, value_name = "SLOT,EMULATION[,CONF]")]
    pub slot: Vec<String>,

    /// Add a serial port or another legacy device; -l help lists them
    #[arg(short, value_name = "DEVICE[,CONF]")]
    pub lpc: Vec<String>,

    /// Connect the BVM console to standard input and output, as -l bvmcons,stdio
    #[arg(short = 'b')]
    pub bvm_console: bool,

    /// Run a vCPU on this host CPU only; repeat it for several
    #[arg(short, value_name = "VCPU:HOSTCPU")]
    pub pin: Vec<String>,

    /// Give the machine this UUID
    ///
    /// Guests find it in the SMBIOS table. Without -U it is made from the VM's name, so that it
    /// stays what it is.
    #[arg(short = 'U', value_name = "UUID")]
    pub uuid: Option<String>,

    /// Set a variable of bhyve_config(5), after all other flags
    #[arg(short = 'o', value_name = "NAME=VALUE")]
    pub variable: Vec<String>,

    /// Make ACPI tables (so it is; -o acpi_tables=false leaves them out)
    #[arg(short = 'A')]
    pub acpi: bool,

    /// Make no Intel MP table
    #[arg(short = 'Y')]
    pub no_mptable: bool,

    /// Offer xAPIC mode only
    #[arg(short = 'a', overrides_with = "x2apic")]
    pub xapic: bool,

    /// Offer x2APIC mode (so it is, but not with --era=2014)
    #[arg(short = 'x')]
    pub x2apic: bool,

    /// Let guest memory into rhyve's core dumps
    #[arg(short = 'C')]
    pub core: bool,

    /// Lock guest memory in RAM
    #[arg(short = 'S')]
    pub wire: bool,

    /// Stop the VM when it uses an I/O port nobody answers
    #[arg(short = 'e')]
    pub strict_io: bool,

    /// Let unknown MSRs read 0 and ignore writes, instead of faulting
    #[arg(short = 'w')]
    pub ignore_msrs: bool,

    /// Keep the CMOS clock in UTC, as Linux guests want it, instead of local time
    #[arg(short = 'u')]
    pub utc: bool,

    /// Yield the host CPU when a vCPU halts (under KVM this is always so)
    #[arg(short = 'H')]
    pub yield_on_hlt: bool,

    /// Yield the host CPU when a vCPU spins (under KVM this is always so)
    #[arg(short = 'P')]
    pub yield_on_pause: bool,

    /// Destroy the VM object once the guest has switched itself off
    #[arg(short = 'D')]
    pub destroy_on_poweroff: bool,

    /// Let virtio devices interrupt by MSI, one message a device, instead of MSI-X
    #[arg(short = 'W')]
    pub virtio_msi: bool,

    /// Let gdb connect there; w: and wait for it before the first instruction
    ///
    /// Its threads are the vCPUs. Whoever can connect owns the guest: without an address it is
    /// this host only.
    #[arg(short = 'G', value_name = "[w][ADDR:]PORT|[w]unix:PATH")]
    pub debug_server: Option<String>,

    /// Connect the BVM debug port to this TCP port of loopback
    ///
    /// gdb connects there and talks to the guest kernel's own stub. 0: no debug port.
    #[arg(short = 'g', value_name = "PORT")]
    pub gdb_port: Option<String>,

    /// Which bhyve to look like
    ///
    /// It settles what the flags leave open: 2012 has no ACPI tables unless -A, no I/O APIC in
    /// the MP table and its ids, virtio 0.9.5 with that year's features, the BVM console here and
    /// a BVM debug port, and takes -p HOSTCPU for all vCPUs; 2014 has virtio 0.9.5, and wants -A
    /// and -x said.
    #[arg(long, value_enum, default_value_t)]
    pub era: Era,

    /// Add isa-debug-exit at an I/O port: a byte written there ends the VM
    #[arg(
        long,
        value_name = "PORT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "0xf4"
    )]
    pub debug_exit: Option<String>,

    /// Log to standard error what matches, as in rhyve::exit=trace
    #[arg(long, value_name = "FILTER")]
    pub trace: Option<String>,

    /// Write where the boot's time goes to FILE, as JSON, and a flame graph beside it
    ///
    /// Until init runs, or the guest ends: how long loading, the firmware tables, the way to the
    /// first entry into the guest, to the first byte on a console and to init took, and which
    /// functions the vCPUs were in meanwhile. The flame graph's name ends in .svg.
    #[arg(long, value_name = "FILE")]
    pub boot_profile: Option<PathBuf>,

    /// The VM to run
    #[arg(value_name = "VM")]
    pub vm: Option<String>,
}

/// What a command line of `rhyve` comes to.
#[derive(Debug)]
pub enum Invocation {
    /// Run a machine.
    Run(Box<MachineSpec>, Extras),
    /// Print this, and be done.
    Print(String),
    /// Everything was said.
    Done,
}

/// What is to be known of a run; the machine is none the wiser.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// What is logged.
    pub trace: Option<String>,
    /// Where the boot's profile goes.
    pub boot_profile: Option<PathBuf>,
}

/// Why a command line cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// It is none.
    #[error(transparent)]
    Usage(#[from] UsageError),
    /// It describes no machine.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl CliError {
    /// Shows the error on standard error.
    pub fn print(&self) {
        match self {
            Self::Usage(error) => error.print("rhyve"),
            Self::Config(error) => say!("rhyve: {error}"),
        }
    }
}

/// Reads a command line, the program's name in front.
///
/// # Errors
/// [`CliError`]; the program then exits with status 4.
pub fn parse(
    args: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<Invocation, CliError> {
    let cli: Cli = match vmm_api::cli::parse(args)? {
        Parsed::Run(cli) => cli,
        Parsed::Done => return Ok(Invocation::Done),
    };
    if cli.slot.iter().any(|slot| slot == "help") {
        return Ok(Invocation::Print(slot_help()));
    }
    if cli.lpc.iter().any(|device| device == "help") {
        return Ok(Invocation::Print(lpc_help()));
    }
    let extras = Extras {
        trace: cli.trace.clone(),
        boot_profile: cli.boot_profile.clone(),
    };
    Ok(Invocation::Run(Box::new(cli.machine()?), extras))
}

impl Cli {
    /// The machine these words describe.
    ///
    /// # Errors
    /// The first thing that cannot be had.
    pub fn machine(&self) -> Result<MachineSpec, ConfigError> {
        let mut builder = SpecBuilder::new(self.era);
        for (given, flag, variable, value) in [
            (self.acpi, "-A", "acpi_tables", "true"),
            (self.no_mptable, "-Y", "x86.mptable", "false"),
            (self.xapic, "-a", "x86.x2apic", "false"),
            (self.x2apic, "-x", "x86.x2apic", "true"),
            (self.core, "-C", "memory.guest_in_core", "true"),
            (self.wire, "-S", "memory.wired", "true"),
            (self.strict_io, "-e", "x86.strictio", "true"),
            (self.ignore_msrs, "-w", "x86.strictmsr", "false"),
            (self.utc, "-u", "rtc.use_localtime", "false"),
            (self.yield_on_hlt, "-H", "x86.vmexit_on_hlt", "true"),
            (self.yield_on_pause, "-P", "x86.vmexit_on_pause", "true"),
            (
                self.destroy_on_poweroff,
                "-D",
                "destroy_on_poweroff",
                "true",
            ),
            (self.virtio_msi, "-W", "virtio_msix", "false"),
        ] {
            if given {
                builder.variable(variable, value).map_err(at(flag))?;
            }
        }
        if self.bvm_console {
            builder.bvm_console();
        }
        type Read = fn(&mut SpecBuilder, &str) -> Result<(), Problem>;
        let values: [(&[String], &str, Read); 10] = [
            (
                self.debug_server.as_slice(),
                "-G ",
                SpecBuilder::debug_server,
            ),
            (self.gdb_port.as_slice(), "-g ", SpecBuilder::bvm_debug),
            (self.cpus.as_slice(), "-c ", SpecBuilder::cpus),
            (self.memory.as_slice(), "-m ", |b, text| {
                b.variable("memory.size", text)
            }),
            (self.highmem.as_slice(), "-M ", SpecBuilder::highmem),
            (&self.pin, "-p ", SpecBuilder::pin),
            (&self.slot, "-s ", SpecBuilder::slot),
            (&self.lpc, "-l ", SpecBuilder::lpc),
            (self.uuid.as_slice(), "-U ", |b, text| {
                b.variable("uuid", text)
            }),
            (
                self.debug_exit.as_slice(),
                "--debug-exit=",
                SpecBuilder::debug_exit,
            ),
        ];
        for (texts, flag, read) in values {
            for text in texts {
                read(&mut builder, text).map_err(at(format!("{flag}{text}")))?;
            }
        }
        for text in &self.variable {
            let set = match text.split_once('=') {
                Some((name, value)) => builder.variable(name, value),
                None => Err(Problem::NoValue),
            };
            set.map_err(at(format!("-o {text}")))?;
        }
        if let Some(name) = &self.vm {
            builder.set_name(name).map_err(at("VM"))?;
        }
        builder.settle()
    }
}

/// Says where a problem is.
fn at(flag: impl Into<String>) -> impl FnOnce(Problem) -> ConfigError {
    |problem| ConfigError {
        at: flag.into(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use clap::CommandFactory;

    use super::*;
    use crate::bvm::DebugPort;
    use crate::config::RtcBase;
    use crate::console::ConsoleConf;

    fn invoke(line: &str) -> Result<Invocation, CliError> {
        parse(std::iter::once("rhyve").chain(line.split_whitespace()))
    }

    fn machine(line: &str) -> MachineSpec {
        match invoke(line) {
            Ok(Invocation::Run(spec, _)) => *spec,
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
    fn lists_are_printed() {
        for (line, name) in [("-s help", "help_slots"), ("-l help", "help_lpc")] {
            let Ok(Invocation::Print(text)) = invoke(line) else {
                panic!("{line} prints")
            };
            insta::assert_snapshot!(name, text);
        }
    }

    #[test]
    fn every_flag_reaches_the_machine() {
        let plain = machine("guest0");
        assert!(machine("-A --era=2012 guest0").acpi);
        assert!(!machine("-Y guest0").mptable);
        assert!(plain.x2apic && !machine("-a guest0").x2apic);
        assert!(machine("-x --era=2014 guest0").x2apic);
        assert!(machine("-C guest0").guest_in_core);
        assert!(machine("-S guest0").wire_memory);
        assert!(machine("-e guest0").strict_io);
        assert!(!machine("-w guest0").strict_msr);
        assert!(plain.virtio_msix && !machine("-W guest0").virtio_msix);
        assert_eq!(machine("-u guest0").rtc, RtcBase::Utc);
        assert!(machine("-D guest0").destroy_on_poweroff);
        assert_eq!(
            machine("-HP guest0"),
            plain,
            "what is always so changes nothing"
        );
        assert_eq!(machine("-c 8,cores=4,sockets=2 guest0").topology.cores, 4);
        assert_eq!(
            machine("-m 5G guest0").memory.map(|m| m.total()),
            Some(5 << 30)
        );
        assert_eq!(
            machine("-m 768 -M 2G guest0").memory.map(|m| m.highmem),
            Some(2 << 30)
        );
        assert_eq!(machine("-p 0:3 guest0").pins[&0].first(), Some(&3));
        assert_eq!(
            machine("-l com2,pty guest0").com[1],
            Some(crate::console::ConsoleConf::Pty)
        );
        assert_eq!(machine("-s 31,amd_hostbridge guest0").slots.len(), 2);
        assert_eq!(machine("-b guest0").bvmcons, Some(ConsoleConf::Stdio));
        assert_eq!(machine("-g 1234 guest0").bvmdbg, DebugPort::At(1234));
        assert_eq!(machine("-g 0 --era=2012 guest0").bvmdbg, DebugPort::Absent);
        assert_eq!(machine("--debug-exit guest0").debug_exit, Some(0xf4));
        assert_eq!(machine("--debug-exit=0x501 guest0").debug_exit, Some(0x501));
        let uuid = "6c7bf6a1-2d60-4ac1-a7a4-2b1f5cbf2a3d";
        assert_eq!(
            machine(&format!("-U {uuid} guest0")).uuid,
            uuid.parse().ok()
        );
        assert_eq!(machine("-o name=guest0"), plain);
    }

    #[test]
    fn the_last_word_counts() {
        assert!(!machine("-x -a guest0").x2apic);
        assert!(machine("-a -x guest0").x2apic);
        assert_eq!(machine("-c 2 -c 3 guest0").topology.cpus, 3);
        assert_eq!(machine("-o cpus=4 -c 2 guest0").topology.cpus, 4);
    }

    #[test]
    fn the_trace_filter_is_passed_on() {
        let Ok(Invocation::Run(_, extras)) = invoke("--trace rhyve::exit=trace guest0") else {
            panic!("it runs")
        };
        assert_eq!(extras.trace.as_deref(), Some("rhyve::exit=trace"));
    }

    #[test]
    fn refusals_say_what_where_and_what_to_do() {
        let mut text = String::new();
        for line in [
            "",
            "a/b",
            "--bogus guest0",
            "-z 100 guest0",
            "guest0 guest1",
            "-o name=guest1 guest0",
            "-c 0 guest0",
            "-c 4,sockets=3 guest0",
            "-m 1X guest0",
            "-M 1G guest0",
            "-p 1:0 guest0",
            "-p 3 guest0",
            "-s 3,virtio-blk guest0",
            "-s 3,virtio-blk,disk.img,rw guest0",
            "-s 30,lpc -s 31,lpc guest0",
            "-s 4:9,hostbridge guest0",
            "-s 256:2:0,virtio-rnd guest0",
            "-s 1.2.0,virtio-rnd guest0",
            "-s 0,hostbridge -s 0:0,hostbridge guest0",
            "-l com1 guest0",
            "-l com1,/dev/nmdm0A,x -l com1,stdio -l com2,stdio guest0",
            "-l com1,tcp=0.0.0.0:5000 guest0",
            "-l bootrom,uefi.fd guest0",
            "--debug-exit=0x3f8 guest0",
            "-U 12 guest0",
            "-G wx guest0",
            "-g 65536 guest0",
            "-b -l com1,stdio guest0",
            "--era=2013 guest0",
            "-o cpus guest0",
            "-o cpu=2 guest0",
            "-o gdb.port=1234 guest0",
            "-o x86.strictio=maybe guest0",
            "-o x86.vmexit_on_hlt=false guest0",
            "-o pci.0.3.0.path=disk.img guest0",
            "-o lpc.com1.path=unix:/run/%(name) guest0",
        ] {
            let error = match invoke(line) {
                Err(CliError::Config(error)) => error.to_string(),
                Err(CliError::Usage(UsageError::Usage(error))) => error.to_string(),
                other => panic!("{line}: {other:?}"),
            };
            writeln!(text, "$ rhyve {line}\n{}\n", error.trim_end()).unwrap();
        }
        insta::assert_snapshot!("refusals", text);
    }
}
