//! What the programs' command lines share: one way to parse, to fail, and to make the man page
//! and the shells' completions.
//!
//! Each program derives a [`clap::Parser`] and calls [`parse`], which adds a hidden
//! `--generate man|bash|zsh|fish` to it. The programs' exit statuses have meanings of their own
//! (2 is a halted guest), so the status of a wrong command line is the caller's.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write};

use clap::builder::PossibleValue;
use clap::error::ErrorKind;
use clap::{Command, CommandFactory, Parser, ValueEnum};
use clap_complete::Shell;

mod man;

/// The hidden option.
const GENERATE: &str = "--generate";

/// Says a line on standard error, as [`eprintln!`] does. Where nobody hears it, as behind a pipe that
/// was closed, there is nowhere to say so; and a machine that runs does not end by that.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => {
        $crate::cli::say(format_args!($($text)*))
    };
}

/// What [`say!`](crate::say) does.
pub fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// What a command line comes to.
#[derive(Debug)]
pub enum Parsed<T> {
    /// Something to do.
    Run(T),
    /// Everything was said: help, the version or a generated file is on standard output.
    Done,
}

/// Why there is nothing to do.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// The command line is wrong. The text is clap's, of several lines, with the usage.
    #[error("{0}")]
    Usage(clap::Error),
    /// Standard output cannot be written to.
    #[error("standard output")]
    Output(#[from] io::Error),
}

/// Parses a command line (with the program's name in front) and prints what only wants printing.
///
/// # Errors
/// [`UsageError::Usage`] for a wrong command line, which is to be shown with
/// [`UsageError::print`]; [`UsageError::Output`] if help could not be printed.
pub fn parse<T: Parser>(
    args: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<Parsed<T>, UsageError> {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let mut command = T::command();
    // Apart, as nothing that the program requires is required for it.
    if args.get(1).is_some_and(|arg| arg == GENERATE) {
        let kind = args.get(2).and_then(|kind| kind.to_str());
        let kind = kind.and_then(|kind| Generate::from_str(kind, false).ok());
        let Some(kind) = kind.filter(|_| args.len() == 3) else {
            let text = "--generate takes one of man, bash, zsh and fish, and nothing else";
            return Err(UsageError::Usage(
                command.error(ErrorKind::InvalidValue, text),
            ));
        };
        read_on(kind.write::<T>(&mut io::stdout().lock()))?;
        return Ok(Parsed::Done);
    }
    let parsed = command.try_get_matches_from_mut(args);
    match parsed.and_then(|mut matches| T::from_arg_matches_mut(&mut matches)) {
        Ok(args) => Ok(Parsed::Run(args)),
        Err(error) if error.use_stderr() => Err(UsageError::Usage(error.format(&mut command))),
        Err(help) => {
            read_on(help.print())?;
            Ok(Parsed::Done)
        }
    }
}

/// Prints on standard output, all of it and at once.
///
/// # Errors
/// Those of standard output, but for a reader who has closed the pipe.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    read_on(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// Whoever closed the pipe (`--help | head`) has read what they wanted.
fn read_on(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

impl UsageError {
    /// Shows the error on standard error, in colour if that is a terminal.
    pub fn print(&self, program: &str) {
        match self {
            // There is nowhere to say that standard error is gone.
            Self::Usage(error) => drop(error.print()),
            Self::Output(error) => drop(writeln!(io::stderr(), "{program}: {self}: {error}")),
        }
    }
}

/// What can be made from a command line's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generate {
    /// The man page, in roff.
    Man,
    /// A shell's completions.
    Completions(Shell),
}

impl ValueEnum for Generate {
    fn value_variants<'a>() -> &'a [Self] {
        &[
            Self::Man,
            Self::Completions(Shell::Bash),
            Self::Completions(Shell::Zsh),
            Self::Completions(Shell::Fish),
        ]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            Self::Man => Some(PossibleValue::new("man")),
            Self::Completions(shell) => shell.to_possible_value(),
        }
    }
}

impl Generate {
    /// Writes the file for `T`'s command line.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write<T: CommandFactory>(self, out: &mut dyn Write) -> io::Result<()> {
        let mut command: Command = T::command();
        match self {
            Self::Man => man::write(command, out),
            Self::Completions(shell) => {
                let name = command.get_name().to_owned();
                command = completed(&command);
                // Into memory first: clap_complete panics when its writer fails.
                let mut text = Vec::new();
                clap_complete::generate(shell, &mut command, name, &mut text);
                let text = String::from_utf8_lossy(&text);
                out.write_all(complete_names(shell, &text, &command).as_bytes())
            }
        }
    }
}

/// The command with what is to be completed. What the help describes as a group is, one by one; a
/// hidden letter is there to be refused, and clap_complete takes no heed of what is hidden.
fn completed(command: &Command) -> Command {
    // clap wants it for as long as the program runs, which is not much longer.
    let name: &'static str = command.get_name().to_owned().leak();
    let args = command.get_arguments();
    let args = args.filter(|arg| arg.get_long().is_some() || !arg.is_hide_set());
    let offered = Command::new(name)
        .disable_help_flag(command.is_disable_help_flag_set())
        .args(args.map(|arg| arg.clone().hide(false)));
    match command.get_version() {
        // Without any there would be no option that shows it.
        Some(_) => offered.version(""),
        None => offered,
    }
}

/// Shell code that lists the VMs there are.
const NAMES: &str = r#"ls "${RHYVE_ROOT:-/dev/shm/rhyve-$(id -u)}" 2>/dev/null"#;
const NAMES_FISH: &str =
    "set -q RHYVE_ROOT; and ls $RHYVE_ROOT 2>/dev/null; or ls /dev/shm/rhyve-(id -u) 2>/dev/null";

/// Makes clap_complete's text complete the names of VMs, where one is `--vm` or the only argument.
fn complete_names(shell: Shell, text: &str, command: &Command) -> String {
    let option = command
        .get_arguments()
        .any(|arg| arg.get_long() == Some("vm"));
    let name = command.get_name();
    match shell {
        Shell::Bash => {
            let words = format!("COMPREPLY=($(compgen -W \"$({NAMES})\" -- \"${{cur}}\"))");
            let files = r#"COMPREPLY=($(compgen -f "${cur}"))"#;
            // bash takes = for a word of its own.
            let previous = concat!(
                "    prev=\"$3\"\n",
                "    [[ \"${cur}\" == = ]] && cur=\"\"\n",
                "    if [[ \"${COMP_WORDS[COMP_CWORD]}\" == = ]]; then\n",
                "        prev=\"${COMP_WORDS[COMP_CWORD-1]}\"\n",
                "    elif [[ \"${prev}\" == = ]]; then\n",
                "        prev=\"${COMP_WORDS[COMP_CWORD-2]}\"\n",
                "    fi\n",
            );
            let text = text.replacen("    prev=\"$3\"\n", previous, 1);
            if option {
                let (from, to) = (
                    format!("--vm)\n{:20}{files}", ""),
                    format!("--vm)\n{:20}{words}", ""),
                );
                return text.replace(&from, &to);
            }
            // Options are offered first, and alone, only to who has begun one.
            let text = text.replacen(" || ${COMP_CWORD} -eq 1 ", " ", 1);
            let none = "*)\n                    COMPREPLY=()";
            let names = format!(
                "*)\n                    {words}\n                    [[ \"${{cur}}\" != -* && ${{#COMPREPLY[@]}} -gt 0 ]] && return 0"
            );
            text.replacen(none, &names, 1)
        }
        Shell::Zsh => {
            let function =
                format!("_rhyve_vms() {{\n    compadd -- ${{(f)\"$({NAMES})\"}}\n}}\n\n");
            let mut lines = String::new();
            for line in text.lines() {
                let names = line.starts_with("'--vm=") || !option && line.starts_with("':");
                let line = if names {
                    line.replace(":_default'", ":_rhyve_vms'")
                } else {
                    line.to_owned()
                };
                if line == format!("_{name}() {{") {
                    lines += &function;
                }
                lines += &line;
                lines.push('\n');
            }
            lines
        }
        Shell::Fish => {
            // fish takes it for a pattern.
            let mut text = text.replace(" -s ? ", " -s '?' ");
            let words = command.get_positionals();
            for word in words.flat_map(|arg| arg.get_possible_values()) {
                let word = word.get_name();
                text += &format!("complete -c {name} -n __fish_use_subcommand -f -a {word}\n");
            }
            let place = if option { "-l vm -x" } else { "-f" };
            text + &format!("complete -c {name} {place} -a '({NAMES_FISH})'\n")
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "tool", version)]
    struct Tool {
        /// Say nothing.
        #[arg(long, short = '?')]
        quiet: bool,
        /// Another's, to be refused.
        #[arg(short = 'x', hide = true)]
        refused: bool,
        /// A thing it needs.
        thing: String,
    }

    #[test]
    fn a_wrong_command_line_is_an_error_and_a_right_one_runs() {
        let Err(UsageError::Usage(error)) = parse::<Tool>(["tool"]) else {
            panic!("a thing is missing");
        };
        assert!(error.to_string().contains("<THING>"), "{error}");
        let Ok(Parsed::Run(tool)) = parse::<Tool>(["tool", "x"]) else {
            panic!("a thing is there");
        };
        assert_eq!(tool.thing, "x");
    }

    #[test]
    fn a_reader_who_leaves_early_is_no_error_and_a_full_disk_is() {
        let written = |kind: io::ErrorKind| read_on(Err(kind.into()));
        assert!(written(io::ErrorKind::BrokenPipe).is_ok());
        let full = written(io::ErrorKind::StorageFull).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn shells_complete_the_name_of_a_vm_as_an_argument() {
        let text = |shell| {
            let mut text = Vec::new();
            let kind = Generate::Completions(shell);
            kind.write::<Tool>(&mut text).unwrap();
            String::from_utf8(text).unwrap()
        };
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("guest0")).unwrap();
        let complete = |words: &str, current: &str, previous: &str| {
            let count = words.split(' ').count() - 1;
            let script = text(Shell::Bash);
            let line = format!(
                "{script}\nCOMP_WORDS=({words}); COMP_CWORD={count}; _tool tool '{current}' '{previous}'; echo ${{COMPREPLY[@]}}"
            );
            let output = std::process::Command::new("bash")
                .env("RHYVE_ROOT", root.path())
                .args(["--norc", "-c", &line])
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        };
        assert_eq!(complete("tool g", "g", "tool"), "guest0");
        assert_eq!(complete("tool --quiet g", "g", "--quiet"), "guest0");
        assert_eq!(complete("tool --q", "--q", "tool"), "--quiet");
        assert_eq!(
            complete("tool -", "-", "tool"),
            "-? -h -V --quiet --help --version"
        );
        assert!(text(Shell::Zsh).contains(":_rhyve_vms'"));
        assert!(text(Shell::Fish).contains("complete -c tool -s '?' "));
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            // Each describes options in its own way: what is refused is in none.
            assert!(!text(shell).contains("to be refused"), "{shell}");
            assert!(!text(shell).contains("-x"), "{shell}");
        }
    }

    #[test]
    fn a_file_is_generated_for_each_kind() {
        for kind in Generate::value_variants() {
            let mut text = Vec::new();
            kind.write::<Tool>(&mut text).unwrap();
            let text = String::from_utf8(text).unwrap();
            assert!(text.contains("tool"), "{kind:?}: {text}");
            assert!(!text.contains(GENERATE), "{kind:?}: {text}");
        }
    }
}
