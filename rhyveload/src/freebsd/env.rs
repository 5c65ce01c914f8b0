//! The kernel environment: `name=value` strings that the kernel's tunables and hints come from.

use std::fmt;
use std::str::FromStr;

/// One variable of the kernel environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvVar {
    name: String,
    value: String,
}

/// Why a text is no variable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    /// No equals sign.
    #[error("'{0}' is no variable: give name=value")]
    NoValue(String),
    /// Not a name.
    #[error("'{0}' is no variable name: A-Z a-z 0-9 . _ - / : %, 1 to 127 of them")]
    Name(String),
    /// Longer than the kernel's buffers (KENV_MVALLEN, sys/sys/kenv.h).
    #[error("the value of '{0}' has more than 127 bytes, more than the kernel keeps")]
    Long(String),
}

/// KENV_MNAMELEN and KENV_MVALLEN, without the NUL.
const MAX_LEN: usize = 127;

impl FromStr for EnvVar {
    type Err = EnvError;

    fn from_str(s: &str) -> Result<Self, EnvError> {
        let (name, value) = s
            .split_once('=')
            .ok_or_else(|| EnvError::NoValue(s.to_owned()))?;
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/:%".contains(c);
        if name.is_empty() || name.len() > MAX_LEN || !name.chars().all(allowed) {
            return Err(EnvError::Name(name.to_owned()));
        }
        if value.len() > MAX_LEN {
            return Err(EnvError::Long(name.to_owned()));
        }
        Ok(Self {
            name: name.to_owned(),
            value: value.to_owned(),
        })
    }
}

impl fmt::Display for EnvVar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}

impl EnvVar {
    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value.
    pub fn value(&self) -> &str {
        &self.value
    }
}

/// The loader's variables, which become the kernel's environment. Those of the command line
/// (`-e`) keep their values whatever configuration files say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// By name, as FreeBSD's loader keeps them (lib/libstand/environment.c, env_setenv).
    vars: Vec<Var>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Var {
    name: String,
    value: String,
    pinned: bool,
}

impl Environment {
    /// The variables of the command line; a later one replaces an earlier one of the same name.
    pub fn new(pinned: &[EnvVar]) -> Self {
        let mut env = Self::default();
        for var in pinned {
            env.put(&var.name, &var.value, true);
        }
        env
    }

    /// A variable's value.
    pub fn get(&self, name: &str) -> Option<&str> {
        let var = self.vars.iter().find(|var| var.name == name);
        var.map(|var| var.value.as_str())
    }

    /// Sets a variable, unless the command line did.
    pub fn set(&mut self, name: &str, value: &str) {
        if !self.is_pinned(name) {
            self.put(name, value, false);
        }
    }

    /// Whether the command line set a variable.
    pub fn is_pinned(&self, name: &str) -> bool {
        self.vars.iter().any(|var| var.name == name && var.pinned)
    }

    /// Sets a variable that has no value yet.
    pub fn set_default(&mut self, name: &str, value: &str) {
        if self.get(name).is_none() {
            self.put(name, value, false);
        }
    }

    /// Sets what the loader itself knows better than anybody.
    pub fn force(&mut self, name: &str, value: &str) {
        self.put(name, value, false);
    }

    /// Takes a variable away, whoever set it.
    pub fn unset(&mut self, name: &str) {
        self.vars.retain(|var| var.name != name);
    }

    /// All variables with their values, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.vars
            .iter()
            .map(|var| (var.name.as_str(), var.value.as_str()))
    }

    fn put(&mut self, name: &str, value: &str, pinned: bool) {
        let var = Var {
            name: name.to_owned(),
            value: value.to_owned(),
            pinned,
        };
        match self
            .vars
            .binary_search_by(|var| var.name.as_str().cmp(name))
        {
            Ok(at) => self.vars[at] = var,
            Err(at) => self.vars.insert(at, var),
        }
    }

    /// The kernel's format: strings that end in NUL, and one NUL more.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for var in &self.vars {
            bytes.extend_from_slice(format!("{}={}", var.name, var.value).as_bytes());
            bytes.push(0);
        }
        bytes.push(0);
        bytes
    }

    /// The `howto` word for the variables that are set, and for a kernel's arguments: letters behind
    /// a minus (sys/boot/userboot/userboot/bootinfo.c, bi_getboothowto).
    pub fn howto(&self, args: &str) -> u32 {
        let by_name = FLAGS.iter().filter(|(name, _)| self.get(name).is_some());
        let mut howto = by_name.fold(0, |howto, (_, flag)| howto | flag);
        let mut active = false;
        for letter in args.chars() {
            let flag = LETTERS.iter().find(|(l, _)| active && *l == letter);
            howto |= flag.map_or(0, |(_, flag)| *flag);
            // A second minus ends the letters, as anything does that is none.
            active = flag.is_some() || (!active && letter == '-');
        }
        self.consoles(howto)
    }

    /// Adds what the list of consoles says: the first one is the main one.
    fn consoles(&self, mut howto: u32) -> u32 {
        let consoles = self.get("console").unwrap_or_default();
        let names = || consoles.split([' ', ',']);
        let has = |wanted: &str| names().any(|name| name == wanted);
        if has("comconsole") {
            howto |= RB_SERIAL;
        }
        if has("nullconsole") {
            howto |= RB_MUTE;
        }
        if has("vidconsole") && howto & RB_SERIAL != 0 {
            howto |= RB_MULTIPLE;
        }
        if names().next() == Some("vidconsole") {
            howto &= !RB_SERIAL;
        }
        howto
    }
}

// sys/sys/reboot.h.
const RB_ASKNAME: u32 = 0x1;
const RB_SINGLE: u32 = 0x2;
const RB_DFLTROOT: u32 = 0x20;
const RB_KDB: u32 = 0x40;
const RB_VERBOSE: u32 = 0x800;
const RB_SERIAL: u32 = 0x1000;
const RB_CDROM: u32 = 0x2000;
const RB_GDB: u32 = 0x8000;
const RB_MUTE: u32 = 0x1_0000;
const RB_PAUSE: u32 = 0x10_0000;
const RB_MULTIPLE: u32 = 0x2000_0000;

/// Boot flags by the variable that sets them, whatever its value (sys/sys/boot.h).
const FLAGS: [(&str, u32); 11] = [
    ("boot_askname", RB_ASKNAME),
    ("boot_cdrom", RB_CDROM),
    ("boot_ddb", RB_KDB),
    ("boot_dfltroot", RB_DFLTROOT),
    ("boot_gdb", RB_GDB),
    ("boot_multicons", RB_MULTIPLE),
    ("boot_mute", RB_MUTE),
    ("boot_pause", RB_PAUSE),
    ("boot_serial", RB_SERIAL),
    ("boot_single", RB_SINGLE),
    ("boot_verbose", RB_VERBOSE),
];

/// Boot flags by the letter of a kernel's arguments.
const LETTERS: [(char, u32); 11] = [
    ('a', RB_ASKNAME),
    ('C', RB_CDROM),
    ('d', RB_KDB),
    ('D', RB_MULTIPLE),
    ('m', RB_MUTE),
    ('g', RB_GDB),
    ('h', RB_SERIAL),
    ('p', RB_PAUSE),
    ('r', RB_DFLTROOT),
    ('s', RB_SINGLE),
    ('v', RB_VERBOSE),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn vars(texts: &[&str]) -> Vec<EnvVar> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn variables_are_checked() {
        let var = |text: &str| text.parse::<EnvVar>();
        assert_eq!(var("a=b=c").unwrap().to_string(), "a=b=c");
        assert_eq!(var("hint.uart.0.at=").unwrap().value, "");
        assert_eq!(var("novalue"), Err(EnvError::NoValue("novalue".into())));
        for bad in ["=x", "a b=x", "a\n=x"] {
            assert!(matches!(var(bad), Err(EnvError::Name(_))), "{bad:?}");
        }
        assert!(var(&format!("a={}", "x".repeat(127))).is_ok());
        assert!(matches!(
            var(&format!("a={}", "x".repeat(128))),
            Err(EnvError::Long(_))
        ));
    }

    #[test]
    fn the_command_line_wins_and_a_nul_ends_it() {
        let mut env = Environment::new(&vars(&["a=1", "b=2", "a=3"]));
        env.set("b", "file");
        env.set("c", "file");
        env.set("c", "later");
        env.set_default("c", "default");
        env.set_default("d", "default");
        assert_eq!(env.encode(), b"a=3\0b=2\0c=later\0d=default\0\0");
        env.force("b", "forced");
        assert_eq!(env.get("b"), Some("forced"));
        assert_eq!(Environment::default().encode(), b"\0");
    }

    #[test]
    fn boot_flags_are_set_by_presence_and_by_arguments() {
        let howto = |texts: &[&str], args: &str| Environment::new(&vars(texts)).howto(args);
        assert_eq!(howto(&["boot_verbose=NO", "boot_single=YES"], ""), 0x802);
        assert_eq!(howto(&["x=1"], "-sv kernel -a s"), 0x803);
        assert_eq!(howto(&[], "-s-v --a"), 0x2);
        assert_eq!(howto(&["console=comconsole"], ""), 0x1000);
        assert_eq!(howto(&["console=comconsole vidconsole"], ""), 0x2000_1000);
        assert_eq!(howto(&["console=vidconsole,comconsole"], ""), 0x2000_0000);
        assert_eq!(
            howto(&["console=vidconsole", "boot_serial=1"], ""),
            0x2000_0000
        );
        assert_eq!(howto(&["console=nullconsole"], ""), 0x1_0000);
    }
}
