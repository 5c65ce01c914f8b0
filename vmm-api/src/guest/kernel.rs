//! Which kernel a guest runs, and what it tells.

use std::path::Path;

use serde::Serialize;

use super::linux::log::Ring;
use super::linux::modules::Module;
use super::linux::orc::Unwinder;
use super::linux::vmcoreinfo::VmcoreInfo;
use super::linux::{self, Linux};
use super::{GuestError, SymbolError, Symbols, View, backtrace, freebsd};
use crate::pagewalk::{PagingMode, PhysicalMemory};
use crate::regs::Registers;
use crate::state::BootInfo;

/// A line of a kernel's log, or several lines that were said at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Its number, where messages have one.
    pub sequence: Option<u64>,
    /// Nanoseconds since the kernel's start, where messages have a time.
    pub time_ns: Option<u64>,
    /// syslog's facility, where it is known.
    pub facility: Option<u8>,
    /// syslog's level: 0 is the worst.
    pub level: Option<u8>,
    /// What it says.
    pub text: String,
}

impl Message {
    /// The message as the kernel itself prints it: each line with its time.
    pub fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let time = self.time_ns.map(|ns| {
            let (seconds, micros) = (ns / 1_000_000_000, ns / 1000 % 1_000_000);
            format!("[{seconds:>5}.{micros:06}] ")
        });
        let time = time.unwrap_or_default();
        self.text
            .split('\n')
            .map(move |line| format!("{time}{line}"))
    }
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Its number.
    pub id: u32,
    /// Its parent's, where that is known.
    pub parent: Option<u32>,
    /// What it does, in ps(1)'s letter.
    pub state: Option<char>,
    /// Whose it is, by number.
    pub user: Option<u32>,
    /// The kernel's short name of it.
    pub name: String,
    /// What it was started with; the name in brackets where that is nothing.
    pub command: String,
}

/// A kernel whose names are known.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The vCPU through whose page tables it is seen.
    pub registers: Registers,
    /// Its names, where the guest has them.
    pub symbols: Symbols,
    /// It carries its names with it, so that it is Linux.
    pub carried: bool,
    /// What Linux has loaded; see [`Kernel::with_modules`].
    pub modules: Vec<Module>,
    /// What it tells for dumps, where nothing else is known of it.
    told: Option<VmcoreInfo>,
}

/// The registers of the vCPU that sees the kernel best: the first with 64-bit paging, else the first.
pub fn kernel_view(vcpus: &[Registers]) -> Option<&Registers> {
    let long = |r: &&Registers| matches!(PagingMode::of(r), PagingMode::Long4 | PagingMode::Long5);
    vcpus.iter().find(long).or(vcpus.first())
}

impl Kernel {
    /// Looks for a kernel's names: in `named`, if a file is named; in memory, where Linux carries
    /// them and FreeBSD's loader puts them; in the file that was loaded.
    ///
    /// # Errors
    ///
    /// The named file has none, or there are none anywhere.
    pub fn find(
        memory: &dyn PhysicalMemory,
        vcpus: &[Registers],
        named: Option<&Path>,
        loaded: Option<&BootInfo>,
    ) -> Result<Self, SymbolError> {
        let Some(seen) = kernel_view(vcpus) else {
            return Err(SymbolError::Nowhere);
        };
        let from_file = |path| {
            let symbols = Symbols::read(path)?;
            Ok(Self {
                symbols: backtrace::place(symbols, memory, seen),
                registers: seen.clone(),
                carried: false,
                modules: Vec::new(),
                told: None,
            })
        };
        if let Some(path) = named {
            return from_file(path);
        }
        for registers in [seen, &isolated(seen)] {
            let view = View { memory, registers };
            if let Some(symbols) = linux::symbols(view) {
                return Ok(Self {
                    symbols,
                    registers: registers.clone(),
                    carried: true,
                    modules: Vec::new(),
                    told: None,
                });
            }
        }
        let Some(loaded) = loaded else {
            return Err(SymbolError::Nowhere);
        };
        let tables = loaded.symbols;
        if let Some(symbols) = tables.and_then(|tables| Symbols::handed_over(memory, tables)) {
            return Ok(Self {
                symbols,
                registers: seen.clone(),
                carried: false,
                modules: Vec::new(),
                told: None,
            });
        }
        from_file(Path::new(&loaded.kernel))
    }

    /// A Linux none of whose names is known, but which tells of itself for dumps: enough for its
    /// messages.
    pub fn nameless(memory: &dyn PhysicalMemory, vcpus: &[Registers]) -> Option<Self> {
        let seen = kernel_view(vcpus)?;
        let symbols = Symbols::default();
        let views = [seen.clone(), isolated(seen)].into_iter();
        let mut found = views.filter_map(|registers| {
            let view = View {
                memory,
                registers: &registers,
            };
            let told = VmcoreInfo::find(view, &symbols)?;
            Some((registers, told))
        });
        let (registers, told) = found.next()?;
        Some(Self {
            registers,
            symbols: Symbols::default(),
            carried: false,
            modules: Vec::new(),
            told: Some(told),
        })
    }

    /// The kernel with the names of what it has loaded since, as far as it tells: Linux's modules.
    #[must_use]
    pub fn with_modules(mut self, memory: &dyn PhysicalMemory) -> Self {
        let linux = self.linux(self.view(memory));
        let found = linux.and_then(|linux| linux::modules::modules(&linux));
        for (module, names) in found.unwrap_or_default() {
            let names = names.iter().map(|n| (n.address, n.kind, n.name.as_str()));
            self.symbols.learn(&module.name, &module.code, names);
            self.modules.push(module);
        }
        self.symbols = self.symbols.settled();
        self
    }

    /// The kernel's log.
    ///
    /// # Errors
    ///
    /// There is none, or it makes no sense.
    pub fn messages(&self, memory: &dyn PhysicalMemory) -> Result<Vec<Message>, GuestError> {
        let view = self.view(memory);
        if self.symbols.address("msgbufp").is_some() {
            return freebsd::messages(view, &self.symbols);
        }
        let ring = match self.linux(view) {
            Ok(linux) => Ring::of_types(&linux)?,
            Err(error) => Ring::of_vmcoreinfo(view, &self.told(view).ok_or(error)?)?,
        };
        ring.messages(view)
    }

    /// What a FreeBSD kernel has panicked with; nothing while it lives.
    ///
    /// # Errors
    ///
    /// The kernel does not say.
    pub fn panic(&self, memory: &dyn PhysicalMemory) -> Result<Option<String>, GuestError> {
        freebsd::panic(self.view(memory), &self.symbols)
    }

    /// The processes that there are.
    ///
    /// # Errors
    ///
    /// The kernel does not say, or it makes no sense.
    pub fn processes(&self, memory: &dyn PhysicalMemory) -> Result<Vec<Process>, GuestError> {
        let view = self.view(memory);
        if self.symbols.address("allproc").is_some() {
            return freebsd::processes(view, &self.symbols);
        }
        match self.linux(view) {
            Ok(linux) => linux::tasks::processes(&linux),
            // No kernel tells there what a task is made of; but if one does, it is not known here.
            Err(error) => Err(match self.told(view) {
                Some(_) => GuestError::NotTold("OFFSET(task_struct.tasks)".into()),
                None => error,
            }),
        }
    }

    /// What tells callers on the stacks of a kernel without frame pointers.
    pub fn unwinder(&self, memory: &dyn PhysicalMemory) -> Option<Unwinder> {
        Unwinder::new(self.view(memory), &self.symbols, &self.modules)
    }

    /// The kernel with its types, if it is a Linux that carries them.
    fn linux<'a>(&'a self, view: View<'a>) -> Result<Linux<'a>, GuestError> {
        if self.carried || self.symbols.address("init_task").is_some() {
            return Linux::new(view, &self.symbols);
        }
        Err(GuestError::Unknown)
    }

    fn told(&self, view: View<'_>) -> Option<VmcoreInfo> {
        let told = self.told.clone();
        told.or_else(|| VmcoreInfo::find(view, &self.symbols))
    }

    fn view<'a>(&'a self, memory: &'a dyn PhysicalMemory) -> View<'a> {
        View {
            memory,
            registers: &self.registers,
        }
    }
}

/// With page-table isolation a process's tables are 4 KiB behind the kernel's own
/// (arch/x86/include/asm/pgtable.h, PTI_PGTABLE_SWITCH_BIT).
fn isolated(registers: &Registers) -> Registers {
    Registers {
        cr3: registers.cr3 & !0x1fff,
        ..registers.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_a_time_on_each_line() {
        let message = Message {
            sequence: Some(1),
            time_ns: Some(12_345_678_999),
            facility: Some(0),
            level: Some(6),
            text: "one\ntwo".into(),
        };
        let lines: Vec<_> = message.lines().collect();
        assert_eq!(lines, ["[   12.345678] one", "[   12.345678] two"]);
    }
}
