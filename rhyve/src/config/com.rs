//! `-l`: serial ports, the BVM console, and what is at their other end.

use std::str::FromStr;

use crate::console::{ConfError, ConsoleConf};

/// One of the four serial ports a PC has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ComPort {
    /// `com1`.
    Com1,
    /// `com2`.
    Com2,
    /// `com3`.
    Com3,
    /// `com4`.
    Com4,
}

/// One `-l comN,CONF`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ComSpec {
    /// The port.
    pub port: ComPort,
    /// What it is connected to.
    pub backend: ConsoleConf,
}

/// One `-l` argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LpcSpec {
    /// `comN,CONF`.
    Com(ComSpec),
    /// `bvmcons,CONF`: the BVM console.
    BvmCons(ConsoleConf),
    /// `debugexit[,PORT]`: the I/O port of an isa-debug-exit device.
    DebugExit(u16),
}

/// Why an `-l` argument is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LpcError {
    /// A serial port without its other end.
    #[error("say what {0} is connected to, as in {0},stdio; -l help lists what there is")]
    NoBackend(String),
    /// The other end cannot be.
    #[error(transparent)]
    Console(#[from] ConfError),
    /// Not an I/O port.
    #[error("'{0}' is not an I/O port: write a number from 0 to 0xffff, as in debugexit,0xf4")]
    Port(String),
    /// bhyve has it, rhyve has not.
    #[error("'{0}' is not supported yet: {1}")]
    NotYet(String, &'static str),
    /// Nobody has it.
    #[error("there is no '{0}': -l help lists what there is")]
    Unknown(String),
}

/// bhyve(8)'s `-l` devices which are not there yet, and why.
const NOT_YET: &[(&str, &str)] = &[
    (
        "bootrom",
        "guests are loaded by rhyveload; firmware images are not run yet",
    ),
    (
        "bootvars",
        "guests are loaded by rhyveload; firmware images are not run yet",
    ),
    ("fwcfg", "there is no firmware that would read it"),
    (
        "pc-testdev",
        "there is no such device; debugexit is there for test guests",
    ),
    ("tpm", "there is no TPM yet"),
];

/// Where a debugexit device is when nothing else is said: the usual `iobase` for test kernels.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// What `-l help` prints.
pub fn help() -> String {
    let mut text = String::from(
        "Devices for -l:
  com1,CONF ... com4,CONF  serial port (16550A), connected to one of
      stdio                standard input and output
      pty                  a new pseudo-terminal; its name is printed
      /dev/TTY             a terminal that exists
      unix:PATH            a Unix socket that rhyve listens on
      tcp=[ADDR:]PORT      a TCP port on loopback that rhyve listens on
      file:PATH            a file; the guest reads nothing
  bvmcons,CONF             the BVM console (I/O port 0x220) of FreeBSD's
                           `device bvmconsole`, connected as above
  debugexit[,PORT]         isa-debug-exit at I/O port PORT (0xf4): ends the VM
Not supported yet:
",
    );
    for (name, why) in NOT_YET {
        text += &format!("  {name:<25}{why}\n");
    }
    text
}

impl ComPort {
    /// All four, in order.
    pub const ALL: [Self; 4] = [Self::Com1, Self::Com2, Self::Com3, Self::Com4];

    /// `com1` to `com4`.
    pub fn name(self) -> &'static str {
        ["com1", "com2", "com3", "com4"][self.index()]
    }

    /// 0 to 3.
    pub fn index(self) -> usize {
        self as usize
    }

    /// First of the port's eight I/O ports, as every PC has them.
    pub fn io_base(self) -> u16 {
        [0x3f8, 0x2f8, 0x3e8, 0x2e8][self.index()]
    }

    /// The port's ISA interrupt; com3 shares com1's and com4 shares com2's.
    pub fn irq(self) -> u8 {
        [4, 3, 4, 3][self.index()]
    }
}

impl FromStr for ComPort {
    type Err = LpcError;

    fn from_str(text: &str) -> Result<Self, LpcError> {
        let port = Self::ALL.into_iter().find(|port| port.name() == text);
        port.ok_or_else(|| LpcError::Unknown(text.to_owned()))
    }
}

/// Reads an I/O port, decimal or with 0x.
///
/// # Errors
/// [`LpcError::Port`].
pub fn io_port(text: &str) -> Result<u16, LpcError> {
    let number = match text.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16),
        None => text.parse(),
    };
    number.map_err(|_| LpcError::Port(text.to_owned()))
}

impl FromStr for LpcSpec {
    type Err = LpcError;

    fn from_str(text: &str) -> Result<Self, LpcError> {
        let (device, conf) = match text.split_once(',') {
            Some((device, conf)) => (device, Some(conf)),
            None => (text, None),
        };
        if device == "debugexit" {
            return Ok(Self::DebugExit(conf.map_or(Ok(DEBUG_EXIT_PORT), io_port)?));
        }
        if let Some((_, why)) = NOT_YET.iter().find(|(known, _)| *known == device) {
            return Err(LpcError::NotYet(device.to_owned(), why));
        }
        let backend = || conf.ok_or_else(|| LpcError::NoBackend(device.to_owned()));
        if device == "bvmcons" {
            return Ok(Self::BvmCons(backend()?.parse()?));
        }
        let port = device.parse()?;
        let conf = backend()?;
        Ok(Self::Com(ComSpec {
            port,
            backend: conf.parse()?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_is_read() {
        let com2 = ComSpec {
            port: ComPort::Com2,
            backend: ConsoleConf::Pty,
        };
        assert_eq!("com2,pty".parse(), Ok(LpcSpec::Com(com2)));
        assert_eq!(
            "bvmcons,pty".parse(),
            Ok(LpcSpec::BvmCons(ConsoleConf::Pty))
        );
        assert_eq!("debugexit".parse(), Ok(LpcSpec::DebugExit(0xf4)));
        assert_eq!("debugexit,0x501".parse(), Ok(LpcSpec::DebugExit(0x501)));
    }

    #[test]
    fn each_mistake_is_named() {
        let err = |s: &str| s.parse::<LpcSpec>().unwrap_err();
        assert_eq!(err("com1"), LpcError::NoBackend("com1".into()));
        assert_eq!(err("bvmcons"), LpcError::NoBackend("bvmcons".into()));
        assert!(matches!(err("com1,nmdm"), LpcError::Console(_)));
        assert_eq!(err("com5,stdio"), LpcError::Unknown("com5".into()));
        assert_eq!(err("debugexit,65536"), LpcError::Port("65536".into()));
        for (name, why) in NOT_YET {
            assert_eq!(
                err(&format!("{name},x")),
                LpcError::NotYet(name.to_string(), why)
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_answered(text in "(com1,)?.{0,40}") {
            if let Ok(LpcSpec::Com(spec)) = text.parse() {
                proptest::prop_assert_eq!(spec.port, ComPort::Com1);
            }
        }
    }
}
