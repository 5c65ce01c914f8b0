//! Options that look into memory: `--x/FMT`, `--disasm`, `--core`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, ArgMatches, Command};

use super::{Location, wrong};
use crate::number;

/// Units and instructions that are shown at most.
const COUNT_MAX: u32 = 65_536;

/// What is to be looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Looks {
    /// Memory.
    pub memory: Option<(Format, Place)>,
    /// Instructions, from the instruction pointer on if there is no place.
    pub disasm: Option<Option<Place>>,
    /// In this syntax.
    pub syntax: Syntax,
    /// How each vCPU got where it is.
    pub backtrace: bool,
    /// The kernel's log.
    pub dmesg: bool,
    /// The processes.
    pub processes: bool,
    /// Why it died.
    pub panic: bool,
    /// A file with names for addresses; none: what is in memory, or the kernel that was loaded.
    pub symbols: Option<PathBuf>,
    /// All of it, as a core file.
    pub core: Option<PathBuf>,
}

/// Where something is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Linear, by the vCPU's page tables.
    Linear(Location),
    /// Guest-physical.
    Physical(u64),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("phys:") {
            Some(address) => number::parse(address).map(Self::Physical),
            None => text.parse().map(Self::Linear),
        }
    }
}

/// How memory is shown: gdb's `x/FMT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// How many.
    pub count: u32,
    /// As what.
    pub letter: Letter,
    /// Bytes of each: 1, 2, 4 or 8. Of no account for text and instructions.
    pub size: u8,
}

/// As what memory is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Letter {
    /// `x`
    Hex,
    /// `d`
    Signed,
    /// `u`
    Unsigned,
    /// `o`
    Octal,
    /// `c`
    Char,
    /// `s`: text that a zero ends
    Text,
    /// `i`
    Instruction,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write [COUNT][x|d|u|o|c|s|i][b|h|w|g], as in 16xg".to_owned();
        let letters = text.trim_start_matches(|c: char| c.is_ascii_digit());
        let digits = &text[..text.len() - letters.len()];
        let count = match digits {
            "" => 1,
            digits => digits.parse().map_err(|_| wrong())?,
        };
        if count == 0 || count > COUNT_MAX {
            return Err(format!("between 1 and {COUNT_MAX} can be shown"));
        }
        let (mut letter, mut size) = (None, None);
        for c in letters.chars() {
            let seen = match c {
                'x' => letter.replace(Letter::Hex).is_some(),
                'd' => letter.replace(Letter::Signed).is_some(),
                'u' => letter.replace(Letter::Unsigned).is_some(),
                'o' => letter.replace(Letter::Octal).is_some(),
                'c' => letter.replace(Letter::Char).is_some(),
                's' => letter.replace(Letter::Text).is_some(),
                'i' => letter.replace(Letter::Instruction).is_some(),
                'b' => size.replace(1).is_some(),
                'h' => size.replace(2).is_some(),
                'w' => size.replace(4).is_some(),
                'g' => size.replace(8).is_some(),
                _ => true,
            };
            if seen {
                return Err(wrong());
            }
        }
        let letter = letter.unwrap_or(Letter::Hex);
        let usual = if letter == Letter::Char { 1 } else { 8 };
        Ok(Self {
            count,
            letter,
            size: size.unwrap_or(usual),
        })
    }
}

/// How instructions are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Syntax {
    /// Destination first, as Intel's manuals have it.
    #[default]
    Nasm,
    /// Source first, as AT&T had it.
    Gas,
}

/// `--x/16xg ADDR` is gdb's way to say it: for clap it becomes `--x 16xg ADDR`.
pub fn split_format(args: impl IntoIterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    args.into_iter().flat_map(|arg| {
        let format = arg.to_str().and_then(|text| text.strip_prefix("--x/"));
        match format {
            Some(format) => vec!["--x".into(), format.into()],
            None => vec![arg],
        }
    })
}

/// Adds the options.
pub(super) fn options(command: Command) -> Command {
    let arg = |name, help| -> Arg {
        Arg::new(name)
            .long(name)
            .help_heading(super::SHOW)
            .help(help)
    };
    command
        .arg(
            arg("x", "Show memory as gdb's x does: --x/16xg ADDR, --x/s linux_banner; phys:ADDR is guest-physical, else vCPU --cpu's page tables lead there")
                .value_names(["FMT", "SYMBOL|ADDR"])
                .num_args(2),
        )
        .arg(
            arg("disasm", "Show 16 instructions, from vCPU --cpu's next one on")
                .value_name("SYMBOL|ADDR")
                .num_args(0..=1)
                .require_equals(true)
                .value_parser(ValueParser::new(|text: &str| text.parse::<Place>())),
        )
        .arg(
            arg("syntax", "How instructions are written")
                .value_parser(clap::value_parser!(Syntax))
                .default_value("nasm"),
        )
        .arg(
            arg("bt", "Show how each vCPU got where it is; callers with a question mark are guesses; a VM that runs is held meanwhile")
                .action(ArgAction::SetTrue),
        )
        .arg(
            arg("dmesg", "Show the kernel's log: Linux's (5.11 and later), FreeBSD's")
                .action(ArgAction::SetTrue),
        )
        .arg(
            arg("ps", "Show the processes that the kernel has").action(ArgAction::SetTrue),
        )
        .arg(
            arg("panic", "Show why the guest died, or where it is stuck: its kernel's last words, and where each vCPU is; a VM that runs is held meanwhile")
                .action(ArgAction::SetTrue),
        )
        .arg(
            arg("symbols", "Where names of the kernel's are: an ELF file or a System.map [default: what Linux carries with it in memory and FreeBSD was handed there, or else the kernel that was loaded]")
                .value_name("FILE")
                .value_parser(clap::value_parser!(PathBuf)),
        )
        .arg(
            arg("core", "Write memory and all vCPUs' registers as an ELF core file, which gdb opens; a VM that runs is held meanwhile")
                .value_name("FILE")
                .action(ArgAction::Set)
                .value_parser(clap::value_parser!(PathBuf)),
        )
}

/// What the options say.
pub(super) fn looks(matches: &ArgMatches) -> Result<Looks, clap::Error> {
    let mut x = matches.get_many::<String>("x").into_iter().flatten();
    let memory = match (x.next(), x.next()) {
        (Some(format), Some(place)) => {
            let bad = |text: String| wrong(&format!("--x/{format} {place}: {text}"));
            Some((format.parse().map_err(bad)?, place.parse().map_err(bad)?))
        }
        _ => None,
    };
    let disasm = matches.contains_id("disasm");
    Ok(Looks {
        memory,
        disasm: disasm.then(|| matches.get_one::<Place>("disasm").cloned()),
        syntax: matches
            .get_one::<Syntax>("syntax")
            .copied()
            .unwrap_or_default(),
        backtrace: matches.get_flag("bt"),
        dmesg: matches.get_flag("dmesg"),
        processes: matches.get_flag("ps"),
        panic: matches.get_flag("panic"),
        symbols: matches.get_one::<PathBuf>("symbols").cloned(),
        core: matches.get_one::<PathBuf>("core").cloned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_gdbs() {
        let read = |text: &str| text.parse::<Format>().map(|f| (f.count, f.letter, f.size));
        assert_eq!(read(""), Ok((1, Letter::Hex, 8)));
        assert_eq!(read("16xw"), Ok((16, Letter::Hex, 4)));
        assert_eq!(read("4bx"), Ok((4, Letter::Hex, 1)));
        assert_eq!(read("3c"), Ok((3, Letter::Char, 1)));
        assert_eq!(read("i"), Ok((1, Letter::Instruction, 8)));
        for text in ["0x", "65537", "99999999999", "xx", "bg", "z", "x4", "é"] {
            assert!(read(text).is_err(), "{text}");
        }
        assert_eq!("phys:0x10".parse(), Ok(Place::Physical(16)));
        assert!("phys:".parse::<Place>().is_err());
        assert!("phys:jiffies".parse::<Place>().is_err());
        let text = "jiffies".parse();
        assert_eq!("jiffies".parse(), text.map(Place::Linear));
    }

    proptest::proptest! {
        #[test]
        fn no_format_makes_it_panic(text in ".*") {
            let _ = text.parse::<Format>();
            let _ = text.parse::<Place>();
        }
    }

    #[test]
    fn gdbs_way_to_write_it_is_split() {
        let args = ["vmmctl", "--x/4xg", "0x10"].map(OsString::from);
        let split: Vec<_> = split_format(args).collect();
        assert_eq!(split, ["vmmctl", "--x", "4xg", "0x10"]);
    }
}
