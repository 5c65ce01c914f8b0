//! The loader's commands (loader(8), sys/boot/common/commands.c and its neighbours).
//!
//! A line is taken apart by [`super::words`], its first word looked up in `COMMANDS`, and the rest
//! handed over. Lines come from the prompt, from files (`include`), and from loader.conf (`exec`,
//! `X_before`, `X_after`, `X_error`).

use super::config::{Config, Host};
use super::loader::{FileError, Loader, LoaderError, chain};
use super::search;
use super::words::{WordsError, words};
use crate::source::{BootFs, FileKind, FsError};

/// Files with commands that read each other.
const DEPTH_MAX: usize = 8;

/// A file with commands may have so many bytes.
const SCRIPT_MAX: u64 = 1 << 20;

/// Of a longer file, `more` shows the beginning.
const MORE_MAX: u64 = 4 << 20;

/// Lines on a terminal that does not say.
const ROWS: usize = 24;

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Another command.
    Next,
    /// The menu.
    Menu,
    /// The kernel is entered.
    Boot,
    /// The loader starts again.
    Reboot,
    /// Nothing is loaded.
    Quit,
}

/// Why a command did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The line.
    #[error(transparent)]
    Words(#[from] WordsError),
    /// No such command.
    #[error("unknown command '{0}': 'help' lists those that there are")]
    Unknown(String),
    /// Arguments.
    #[error("usage: {0}")]
    Usage(&'static str),
    /// A file.
    #[error("{path}: {source}")]
    File {
        /// Its path.
        path: String,
        /// What is wrong.
        source: FsError,
    },
    /// The kernel.
    #[error("{}", chain(.0))]
    Kernel(LoaderError),
    /// A module or another file.
    #[error("{}", chain(.0))]
    Module(FileError),
    /// Files with commands that read each other without end.
    #[error("{0}: not read: {DEPTH_MAX} files include each other already")]
    Depth(String),
    /// A line of a file.
    #[error("{path}:{line}: {source}")]
    Line {
        /// The file.
        path: String,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong with it.
        source: Box<CommandError>,
    },
    /// There is no such variable.
    #[error("variable '{0}' not found")]
    Variable(String),
    /// There is no such device.
    #[error("no device '{0}': 'lsdev' lists those that there are")]
    Device(String),
    /// Nothing is loaded that could be booted.
    #[error("no kernel is loaded")]
    NothingLoaded,
    /// The loader cannot be left from here.
    #[error("not while the configuration is read")]
    NotHere,
    /// The terminal.
    #[error("the terminal is gone")]
    Terminal(#[from] std::io::Error),
}

type Done = Result<Flow, CommandError>;

/// A command.
struct Command {
    name: &'static str,
    usage: &'static str,
    about: &'static str,
    run: fn(&mut Loader<'_, '_>, &[String]) -> Done,
}

/// All commands, in the order of their names.
const COMMANDS: [Command; 20] = [
    Command {
        name: "?",
        usage: "?",
        about: "list the commands",
        run: |loader, _| loader.help(&[]),
    },
    Command {
        name: "autoboot",
        usage: "autoboot [SECONDS]",
        about: "boot after a delay, unless a key is pressed",
        run: |loader, words| loader.autoboot(words),
    },
    Command {
        name: "boot",
        usage: "boot [-aCdDghmprsv] [KERNEL]",
        about: "boot what is loaded, or this kernel",
        run: |loader, words| loader.boot(words),
    },
    Command {
        name: "boot-conf",
        usage: "boot-conf",
        about: "load what the configuration says, and boot it",
        run: |loader, _| {
            loader.load_configured().map_err(CommandError::Kernel)?;
            Ok(Flow::Boot)
        },
    },
    Command {
        name: "echo",
        usage: "echo [-n] [TEXT ...]",
        about: "print a text",
        run: |loader, words| loader.echo(words),
    },
    Command {
        name: "help",
        usage: "help [COMMAND]",
        about: "list the commands, or tell about one",
        run: |loader, words| loader.help(words),
    },
    Command {
        name: "include",
        usage: "include FILE ...",
        about: "run the commands in a file",
        run: |loader, words| loader.include(words),
    },
    Command {
        name: "load",
        usage: "load [-t TYPE] FILE [ARGUMENT ...]",
        about: "load a kernel, a module, or a file of a type",
        run: |loader, words| loader.load(words),
    },
    Command {
        name: "ls",
        usage: "ls [-l] [DIRECTORY]",
        about: "list files",
        run: |loader, words| loader.ls(words),
    },
    Command {
        name: "lsdev",
        usage: "lsdev",
        about: "list disks, their partitions and directories",
        run: |loader, _| {
            let list = loader.devices.list();
            loader.page(&list)
        },
    },
    Command {
        name: "lsmod",
        usage: "lsmod [-v]",
        about: "list what is loaded",
        run: |loader, words| loader.lsmod(words),
    },
    Command {
        name: "menu",
        usage: "menu",
        about: "go to the menu",
        run: |_, _| Ok(Flow::Menu),
    },
    Command {
        name: "more",
        usage: "more FILE ...",
        about: "show text files",
        run: |loader, words| loader.more(words),
    },
    Command {
        name: "quit",
        usage: "quit",
        about: "leave the loader; nothing is loaded",
        run: |_, _| Ok(Flow::Quit),
    },
    Command {
        name: "read-conf",
        usage: "read-conf",
        about: "read the configuration again",
        run: |loader, _| {
            loader.configure();
            Ok(Flow::Next)
        },
    },
    Command {
        name: "reboot",
        usage: "reboot",
        about: "start the loader again",
        run: |_, _| Ok(Flow::Reboot),
    },
    Command {
        name: "set",
        usage: "set NAME[=VALUE]",
        about: "set a variable",
        run: |loader, words| loader.set(words),
    },
    Command {
        name: "show",
        usage: "show [NAME ...]",
        about: "show variables",
        run: |loader, words| loader.show(words),
    },
    Command {
        name: "unload",
        usage: "unload",
        about: "forget everything that was loaded",
        run: |loader, _| {
            loader.unload();
            Ok(Flow::Next)
        },
    },
    Command {
        name: "unset",
        usage: "unset NAME ...",
        about: "take variables away",
        run: |loader, words| loader.unset(words),
    },
];

/// The names of all commands.
pub fn names() -> impl Iterator<Item = &'static str> {
    COMMANDS.iter().map(|command| command.name)
}

fn command(name: &str) -> Result<&'static Command, CommandError> {
    let command = COMMANDS.iter().find(|command| command.name == name);
    command.ok_or_else(|| CommandError::Unknown(name.to_owned()))
}

fn usage<T>(name: &str) -> Result<T, CommandError> {
    Err(CommandError::Usage(command(name)?.usage))
}

impl Loader<'_, '_> {
    /// Runs a line. A blank one and a comment do nothing.
    ///
    /// # Errors
    ///
    /// See [`CommandError`].
    pub fn execute(&mut self, line: &str) -> Done {
        let line = line.trim();
        if line.starts_with(['#', '\\']) {
            return Ok(Flow::Next);
        }
        let words = words(line, |name| self.env().get(name))?;
        match words.split_first() {
            None => Ok(Flow::Next),
            Some((name, arguments)) => (command(name)?.run)(self, arguments),
        }
    }

    /// Runs a line of the configuration at `origin`: what goes wrong is said, and the rest goes on.
    pub(super) fn obey(&mut self, origin: &str, line: &str) {
        self.depth += 1;
        let done = self.execute(line);
        self.depth -= 1;
        let error = match done {
            Ok(Flow::Next) => return,
            Ok(_) => CommandError::NotHere,
            Err(error) => error,
        };
        self.console.complain(&format!("{origin}: {line}: {error}"));
    }

    /// Lines that fit on the terminal.
    fn rows(&self) -> usize {
        let rows = self.env().get("LINES").and_then(|rows| rows.parse().ok());
        rows.unwrap_or(ROWS)
    }

    fn page(&mut self, text: &str) -> Done {
        let rows = self.rows();
        self.console.page(text, rows)?;
        Ok(Flow::Next)
    }

    fn help(&mut self, arguments: &[String]) -> Done {
        let line = |command: &Command| format!("  {:<36}{}\n", command.usage, command.about);
        let text = match arguments {
            [] => COMMANDS.iter().map(line).collect(),
            [name, ..] => line(command(name)?),
        };
        self.page(&text)
    }

    fn echo(&mut self, arguments: &[String]) -> Done {
        match arguments {
            [first, rest @ ..] if first == "-n" => self.console.print(&rest.join(" ")),
            all => self.console.say(&all.join(" ")),
        }
        Ok(Flow::Next)
    }

    fn ls(&mut self, arguments: &[String]) -> Done {
        let long = arguments.first().is_some_and(|first| first == "-l");
        let path = match &arguments[usize::from(long)..] {
            [] => "/",
            [path] if !path.starts_with('-') => path,
            _ => return usage("ls"),
        };
        let wrong = |source| CommandError::File {
            path: path.to_owned(),
            source,
        };
        let mut text = String::new();
        if self.devices.stat(path).map_err(wrong)?.kind == FileKind::File {
            let size = self.devices.stat(path).map_err(wrong)?.size;
            text = entry(long.then_some(size), FileKind::File, path);
        } else {
            for found in self.devices.read_dir(path).map_err(wrong)? {
                let inside = format!("{}/{}", path.trim_end_matches('/'), found.name);
                let size = long.then(|| self.devices.stat(&inside).map_or(0, |stat| stat.size));
                text += &entry(size, found.kind, &printable(&found.name));
            }
        }
        self.page(&text)
    }

    fn more(&mut self, arguments: &[String]) -> Done {
        if arguments.is_empty() {
            return usage("more");
        }
        for path in arguments {
            let wrong = |source| CommandError::File {
                path: path.clone(),
                source,
            };
            let file = self.devices.open(path).map_err(wrong)?;
            let bytes = file.head(MORE_MAX as usize);
            let bytes = bytes.map_err(|error| wrong(error.into()))?;
            self.page(&printable(&String::from_utf8_lossy(&bytes)))?;
            if file.size() > MORE_MAX {
                self.console.say(&format!("({path} goes on)"));
            }
        }
        Ok(Flow::Next)
    }

    fn load(&mut self, arguments: &[String]) -> Done {
        let (kind, rest) = match arguments {
            [flag, kind, rest @ ..] if flag == "-t" => (Some(kind), rest),
            rest => (None, rest),
        };
        let Some((file, arguments)) = rest
            .split_first()
            .filter(|(file, _)| !file.starts_with('-'))
        else {
            return usage("load");
        };
        let arguments = arguments.join(" ");
        if let Some(kind) = kind {
            let loaded = self.load_raw(file, kind, &arguments);
            loaded.map_err(CommandError::Module)?;
        } else if self.files.is_empty() {
            let path = search::find_file(self.devices, self.env(), file, &[""]);
            let path =
                path.ok_or_else(|| CommandError::Module(FileError::NotFound(file.clone())))?;
            let loaded = self.kernel_file(&path, arguments);
            loaded.map_err(CommandError::Kernel)?;
        } else {
            let loaded = self.load_kld(file, &arguments);
            loaded.map_err(CommandError::Module)?;
        }
        Ok(Flow::Next)
    }

    fn lsmod(&mut self, arguments: &[String]) -> Done {
        let verbose = match arguments {
            [] => false,
            [flag] if flag == "-v" => true,
            _ => return usage("lsmod"),
        };
        let mut text = String::new();
        for file in &self.files {
            let records = &file.records;
            let (addr, size) = (records.addr, records.size);
            text += &format!(
                " {addr:#x}: {} ({}, {size:#x})\n",
                records.name, records.kind
            );
            if !records.args.is_empty() {
                text += &format!("    args: {}\n", records.args);
            }
            let modules = &file.modules;
            if !modules.provides.is_empty() {
                let provides = modules.provides.iter();
                let provides = provides.map(|(name, version)| format!(" {name}.{version}"));
                text += &format!("  modules:{}\n", provides.collect::<String>());
            }
            for need in modules.needs.iter().filter(|_| verbose) {
                let versions = need.versions;
                text += &format!(
                    "    needs {} {}-{}, best {}\n",
                    need.name, versions.minimum, versions.maximum, versions.preferred
                );
            }
        }
        self.page(&text)
    }

    /// Whether the command line has set a variable that a file is about to change.
    fn is_settled(&self, name: &str) -> bool {
        self.depth != 0 && self.env().is_pinned(name)
    }

    fn set(&mut self, arguments: &[String]) -> Done {
        let [assignment] = arguments else {
            return usage("set");
        };
        let (name, value) = assignment.split_once('=').unwrap_or((assignment, ""));
        if name.is_empty() {
            return usage("set");
        }
        if matches!(name, "currdev" | "loaddev") {
            if !self.devices.select(value) {
                return Err(CommandError::Device(value.to_owned()));
            }
            let name = self.devices.current().to_owned();
            self.config.env.force("currdev", &name);
            self.config.env.force("loaddev", &name);
        } else if !self.is_settled(name) {
            self.config.env.force(name, value);
        }
        Ok(Flow::Next)
    }

    fn unset(&mut self, arguments: &[String]) -> Done {
        if arguments.is_empty() {
            return usage("unset");
        }
        for name in arguments {
            if self.env().get(name).is_none() {
                return Err(CommandError::Variable(name.clone()));
            }
            if !self.is_settled(name) {
                self.config.env.unset(name);
            }
        }
        Ok(Flow::Next)
    }

    fn show(&mut self, arguments: &[String]) -> Done {
        let mut text = String::new();
        if arguments.is_empty() {
            let mut lines: Vec<_> = self
                .env()
                .iter()
                .map(|(n, v)| format!("{n}={v}\n"))
                .collect();
            lines.sort();
            text = lines.concat();
        }
        for name in arguments {
            let value = self.env().get(name);
            let value = value.ok_or_else(|| CommandError::Variable(name.clone()))?;
            text += &format!("{value}\n");
        }
        self.page(&printable(&text))
    }

    fn boot(&mut self, arguments: &[String]) -> Done {
        let (flags, names): (Vec<_>, Vec<_>) =
            arguments.iter().partition(|word| word.starts_with('-'));
        let wrong = CommandError::Kernel;
        match names.as_slice() {
            [] if self.files.is_empty() => self.load_configured().map_err(wrong)?,
            [] => {}
            [name] => {
                self.config.env.force("kernel", name);
                self.load_configured().map_err(wrong)?;
            }
            _ => return usage("boot"),
        }
        let Some(kernel) = self.files.first_mut() else {
            return Err(CommandError::NothingLoaded);
        };
        for flag in flags {
            let args = &mut kernel.records.args;
            let blank = if args.is_empty() { "" } else { " " };
            *args = format!("{args}{blank}{flag}");
        }
        Ok(Flow::Boot)
    }

    fn autoboot(&mut self, arguments: &[String]) -> Done {
        let seconds = match arguments {
            [] => None,
            [seconds] => match seconds.parse() {
                Ok(seconds) => Some(seconds),
                Err(_) => return usage("autoboot"),
            },
            _ => return usage("autoboot"),
        };
        if self.files.is_empty() {
            self.load_configured().map_err(CommandError::Kernel)?;
        }
        let seconds = seconds.unwrap_or_else(|| self.delay().unwrap_or(0));
        match self.countdown(seconds)? {
            true => Ok(Flow::Boot),
            false => Ok(Flow::Next),
        }
    }

    fn include(&mut self, arguments: &[String]) -> Done {
        if arguments.is_empty() {
            return usage("include");
        }
        for path in arguments {
            if self.depth >= DEPTH_MAX {
                return Err(CommandError::Depth(path.clone()));
            }
            let read = self.devices.read_file(path, SCRIPT_MAX);
            let text = read.map_err(|source| CommandError::File {
                path: path.clone(),
                source,
            })?;
            self.depth += 1;
            let done = self.script(path, &String::from_utf8_lossy(&text));
            self.depth -= 1;
            match done? {
                Flow::Next => {}
                other => return Ok(other),
            }
        }
        Ok(Flow::Next)
    }

    /// Runs the lines of a file. One that begins with `-` may fail; `@` would keep it from being
    /// shown, which it is not anyway (sys/boot/common/interp.c).
    fn script(&mut self, path: &str, text: &str) -> Done {
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            let line = line.strip_prefix('@').unwrap_or(line);
            let (may_fail, line) = match line.strip_prefix('-') {
                Some(rest) => (true, rest),
                None => (false, line),
            };
            match self.execute(line) {
                Ok(Flow::Next) => {}
                Ok(other) => return Ok(other),
                Err(error) if may_fail => self.console.complain(&error.to_string()),
                Err(error) => {
                    return Err(CommandError::Line {
                        path: path.to_owned(),
                        line: index + 1,
                        source: Box::new(error),
                    });
                }
            }
        }
        Ok(Flow::Next)
    }
}

/// A line of ls.
fn entry(size: Option<u64>, kind: FileKind, name: &str) -> String {
    let kind = match kind {
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        _ => ' ',
    };
    match size {
        None => format!(" {kind} {name}\n"),
        Some(size) => format!(" {kind} {size:>10} {name}\n"),
    }
}

/// A file's text without what would make a terminal do things.
fn printable(text: &str) -> String {
    let keep = |c: char| matches!(c, '\n' | '\t') || !c.is_control();
    text.chars()
        .filter(|&c| c != '\r')
        .map(|c| if keep(c) { c } else { '\u{fffd}' })
        .collect()
}

impl Host for Loader<'_, '_> {
    fn fs(&self) -> &dyn BootFs {
        self.devices
    }

    fn config(&mut self) -> &mut Config {
        &mut self.config
    }

    fn complain(&mut self, text: &str) {
        self.console.complain(text);
    }

    fn command(&mut self, origin: &str, command: &str) {
        self.obey(origin, command);
    }
}
