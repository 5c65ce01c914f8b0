//! The command line, and what is printed.

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{ArgAction, ArgGroup, CommandFactory, Parser};
use vmm_api::memory::{MemSize, MemoryLayout};
use vmm_api::name::VmName;
use vmm_api::vm::MemorySetup;

use crate::boot::BootJob;
use crate::freebsd::Via;
use crate::freebsd::env::EnvVar;
use crate::load::{From, Job, KernelJob, Loaded};
use crate::plan::Boot;

const EXAMPLES: &str = "\
Examples:
  rhyveload -m 768M -h /usr/guest guest0
      Boots FreeBSD from /usr/guest/boot: kernel, modules and variables
      as loader.conf says.
  rhyveload -m 1G -d freebsd.img -e boot_verbose=YES guest0
      The same from a disk image (raw or qcow2; GPT, MBR or bare; UFS,
      ext2/3/4 or FAT), with a variable.
  rhyveload -m 512M --kernel vmlinuz --initrd initrd.img \\
        --cmdline 'console=ttyS0' guest0
      Loads Linux into guest0, made if it is not there, with 512 MiB.
  rhyveload --boot pvh --kernel vmlinux guest0
      Enters an ELF kernel where its Xen note says.
  rhyveload --kernel kernel.elf guest0
      Loads a FreeBSD kernel or a plain static ELF64 file, with 256 MiB.
  rhyveload -m 768 -M 2048 -e boot_verbose=YES --kernel kernel guest0
      768 MiB of lowmem, 2 GiB of highmem from 4 GiB on, and a variable.

On a terminal, -h and -d show FreeBSD's boot menu and count down before they boot; Escape leads
to a prompt, whose 'help' lists its commands. Set autoboot_delay=-1 to be asked nothing.

A VM that exists is loaded anew; one that runs is refused. Then run it with rhyve, look into it
with vmmctl --vm=NAME --get-all, and remove it with vmmctl --vm=NAME --destroy.

VMs are directories under $RHYVE_ROOT, by default /dev/shm/rhyve-UID.

Exit status:
  0  the guest is loaded
  1  it is not; one line on standard error says why
  2  the command line is wrong";

/// Load a guest kernel into a named virtual machine
///
/// The VM is made if it is not there: its memory is filled, its first vCPU's registers are
/// set, and it waits for rhyve to run it. /dev/kvm is not needed.
#[derive(Debug, Parser)]
#[command(name = "rhyveload", version, after_long_help = EXAMPLES, verbatim_doc_comment)]
#[command(override_usage = "rhyveload [OPTIONS] -h DIR | -d IMAGE | --kernel FILE VM")]
#[command(disable_help_flag = true)]
#[command(group = ArgGroup::new("from").required(true).multiple(true))]
pub struct Cli {
    /// Boot FreeBSD from this directory, which holds boot/.
    #[arg(
        short = 'h',
        value_name = "DIR",
        group = "from",
        conflicts_with = "kernel"
    )]
    pub host: Option<PathBuf>,

    /// The terminal for FreeBSD's boot menu and prompt: stdio, a device (/dev/pts/3), or pty, a new
    /// pseudo-terminal, whose path is printed and which is waited for until somebody opens it.
    #[arg(short = 'c', value_name = "CONSOLE", default_value = "stdio")]
    pub console: PathBuf,

    /// Boot FreeBSD from this disk image; up to 32, the first with a /boot is taken.
    #[arg(
        short = 'd',
        value_name = "IMAGE",
        group = "from",
        conflicts_with = "kernel"
    )]
    pub disks: Vec<PathBuf>,

    /// Memory, in MiB or with K, M, G or T: lowmem up to 3 GiB, the rest from 4 GiB on.
    #[arg(short = 'm', value_name = "SIZE", default_value = "256M")]
    pub memory: MemSize,

    /// Highmem, from 4 GiB on; -m is then lowmem alone, as in 2012.
    #[arg(short = 'M', value_name = "SIZE")]
    pub highmem: Option<MemSize>,

    /// Allocate all guest memory now.
    #[arg(short = 'S', long)]
    pub wire: bool,

    /// Set a variable of a FreeBSD kernel's environment; may be repeated.
    #[arg(short = 'e', value_name = "NAME=VALUE")]
    pub env: Vec<EnvVar>,

    /// Keep the memory file in this directory (hugetlbfs, another tmpfs), not in the VM.
    #[arg(long, value_name = "DIR")]
    pub mem_path: Option<PathBuf>,

    /// The kernel file; what it is, is recognized by its content.
    #[arg(long, value_name = "FILE", group = "from")]
    pub kernel: Option<PathBuf>,

    /// The initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "kernel", conflicts_with_all = ["host", "disks"])]
    pub initrd: Option<PathBuf>,

    /// The kernel's command line; a FreeBSD or plain kernel gets it as the variable `cmdline`.
    #[arg(long, value_name = "TEXT", requires = "kernel", conflicts_with_all = ["host", "disks"])]
    pub cmdline: Option<String>,

    /// How the kernel is entered; from -h and -d, auto or freebsd is FreeBSD's own way, pvh the other.
    #[arg(long, value_enum, default_value_t, value_name = "PROTOCOL")]
    pub boot: Boot,

    /// Print one JSON object instead of lines.
    #[arg(long)]
    pub json: bool,

    /// Print nothing but errors.
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,

    /// bhyveload's, for the monitor that kept its memory: here that is rhyve.
    #[arg(short = 'C', hide = true)]
    core: bool,

    /// bhyveload's: another loader to run.
    #[arg(short = 'l', value_name = "OS-LOADER", hide = true)]
    os_loader: Option<PathBuf>,

    /// Print help (see a summary with -?)
    #[arg(long, action = ArgAction::HelpLong)]
    help: Option<bool>,

    /// Print a summary of the options
    #[arg(short = '?', action = ArgAction::HelpShort)]
    summary: Option<bool>,

    /// Name of the VM: 1 to 31 of A-Z a-z 0-9 . _ -
    #[arg(value_name = "VM")]
    pub name: VmName,
}

/// A terminal for FreeBSD's boot menu and prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum On {
    /// Standard input and output.
    Stdio,
    /// A new pseudo-terminal.
    Pty,
    /// A terminal device.
    Device(PathBuf),
}

impl Cli {
    /// What the menu and the prompt are on.
    pub fn on(&self) -> On {
        match self.console.to_str() {
            Some("stdio") => On::Stdio,
            Some("pty") => On::Pty,
            _ => On::Device(self.console.clone()),
        }
    }

    /// The job that these options describe.
    ///
    /// # Errors
    ///
    /// Options that do not go together, as clap says it.
    pub fn job(self) -> Result<Job, clap::Error> {
        self.check_bhyveload()?;
        let via = match (&self.kernel, self.boot) {
            (Some(_), _) | (None, Boot::Auto | Boot::Freebsd) => Via::LongMode,
            (None, Boot::Pvh) => Via::Pvh,
            (None, Boot::Linux64 | Boot::Plain) => {
                let text = "-h and -d load FreeBSD: --boot is auto, freebsd or pvh with them";
                return Err(Self::command().error(ErrorKind::ArgumentConflict, text));
            }
        };
        let layout = match self.highmem {
            None => MemoryLayout::split(self.memory),
            Some(highmem) => MemoryLayout {
                lowmem: self.memory.0,
                highmem: highmem.0,
            },
        };
        Ok(Job {
            name: self.name,
            memory: MemorySetup {
                layout,
                wire: self.wire,
                path: self.mem_path,
            },
            env: self.env,
            from: match self.kernel {
                Some(kernel) => From::Kernel(KernelJob {
                    kernel,
                    initrd: self.initrd,
                    cmdline: self.cmdline,
                    boot: self.boot,
                }),
                None => From::Boot(BootJob {
                    directory: self.host,
                    disks: self.disks,
                    via,
                }),
            },
        })
    }

    /// Refuses what bhyveload takes and nothing here would heed.
    fn check_bhyveload(&self) -> Result<(), clap::Error> {
        let text = match self {
            Self { core: true, .. } => {
                "-C is rhyve's here, whose core files it is about: rhyve -C VM"
            }
            Self {
                os_loader: Some(_), ..
            } => "-l is not supported: rhyveload is the loader itself, and runs no userboot.so",
            _ => return Ok(()),
        };
        Err(Self::command().error(ErrorKind::InvalidValue, text))
    }
}

/// What bhyveload prints of a load, and where it starts.
pub fn lines(loaded: &Loaded) -> String {
    let mut text = String::new();
    // FreeBSD's loader has said its lines already.
    if !loaded.summary.is_empty() {
        text += &format!("{} {}\n", loaded.kernel, loaded.summary);
    }
    if let Some(initrd) = &loaded.initrd {
        text += &format!(
            "{} size {:#x} at {:#x}\n",
            initrd.path, initrd.size, initrd.gpa
        );
    }
    text + &format!("entry={:#x} protocol={}\n", loaded.entry, loaded.protocol)
}
