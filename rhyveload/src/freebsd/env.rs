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

/// The environment in the kernel's format: strings that end in NUL, and one NUL more. A later
/// variable replaces an earlier one of the same name; a command line becomes `cmdline`.
pub fn encode(vars: &[EnvVar], cmdline: Option<&str>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (index, var) in vars.iter().enumerate() {
        let replaced = vars[index + 1..].iter().any(|later| later.name == var.name);
        let is_cmdline = cmdline.is_some() && var.name == "cmdline";
        if !replaced && !is_cmdline {
            bytes.extend_from_slice(var.to_string().as_bytes());
            bytes.push(0);
        }
    }
    if let Some(cmdline) = cmdline {
        bytes.extend_from_slice(b"cmdline=");
        bytes.extend_from_slice(cmdline.as_bytes());
        bytes.push(0);
    }
    bytes.push(0);
    bytes
}

/// Boot flags by the variable that sets them, whatever its value (sys/sys/reboot.h, sys/sys/boot.h).
const FLAGS: [(&str, u32); 11] = [
    ("boot_askname", 0x1),
    ("boot_cdrom", 0x2000),
    ("boot_ddb", 0x40),
    ("boot_dfltroot", 0x20),
    ("boot_gdb", 0x8000),
    ("boot_multicons", 0x2000_0000),
    ("boot_mute", 0x1_0000),
    ("boot_pause", 0x10_0000),
    ("boot_serial", 0x1000),
    ("boot_single", 0x2),
    ("boot_verbose", 0x800),
];

/// The `howto` word for the variables that are set.
pub fn howto(vars: &[EnvVar]) -> u32 {
    let set = |name: &str| vars.iter().any(|var| var.name == name);
    FLAGS
        .iter()
        .filter(|(name, _)| set(name))
        .fold(0, |howto, (_, flag)| howto | flag)
}

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
    fn the_last_value_wins_and_a_nul_ends_it() {
        let vars = vars(&["a=1", "cmdline=x", "b=2", "a=3"]);
        assert_eq!(encode(&vars, Some("y z")), b"b=2\0a=3\0cmdline=y z\0\0");
        assert_eq!(encode(&[], None), b"\0");
    }

    #[test]
    fn boot_flags_are_set_by_presence() {
        assert_eq!(howto(&vars(&["boot_verbose=NO", "boot_single=YES"])), 0x802);
        assert_eq!(howto(&vars(&["x=1"])), 0);
    }
}
