//! What a serial line is connected to, as given by `-l comN,CONF`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// The host's end of a console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleConf {
    /// `stdio`: standard input and output; a terminal is put into raw mode.
    Stdio,
    /// `pty`: a new pseudo-terminal, whose path is printed.
    Pty,
    /// `/dev/...`: an existing terminal device.
    Tty(PathBuf),
    /// `unix:PATH`: a socket that is made there, for one client at a time.
    Unix(PathBuf),
    /// `tcp=[127.0.0.1:]PORT`: a port of the loopback interface, for one client at a time.
    Tcp(SocketAddr),
    /// `file:PATH`: output is appended there, input there is none.
    File(PathBuf),
}

/// Why a console's configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfError {
    /// Not one of the forms of [`ConsoleConf`].
    #[error(
        "console {0:?}: expected stdio, pty, /dev/TTY, unix:PATH, tcp=[127.0.0.1:]PORT or file:PATH"
    )]
    Unknown(String),
    /// Not a port, or not an address and a port.
    #[error("console {0:?}: not [ADDRESS:]PORT with a numeric address and a port up to 65535")]
    Address(String),
    /// A port that others could reach.
    #[error(
        "console {0:?}: only loopback addresses are served, because a console asks for no password; \
         forward the port with ssh -L to reach it from elsewhere"
    )]
    NotLoopback(String),
}

impl FromStr for ConsoleConf {
    type Err = ConfError;

    fn from_str(text: &str) -> Result<Self, ConfError> {
        let path = |path: &str| (!path.is_empty()).then(|| PathBuf::from(path));
        let unknown = || ConfError::Unknown(text.to_owned());
        match text {
            "stdio" => Ok(Self::Stdio),
            "pty" => Ok(Self::Pty),
            _ => {
                if text.len() > "/dev/".len() && text.starts_with("/dev/") {
                    Ok(Self::Tty(text.into()))
                } else if let Some(rest) = text.strip_prefix("unix:") {
                    path(rest).map(Self::Unix).ok_or_else(unknown)
                } else if let Some(rest) = text.strip_prefix("file:") {
                    path(rest).map(Self::File).ok_or_else(unknown)
                } else if let Some(rest) = text.strip_prefix("tcp=") {
                    tcp(text, rest)
                } else {
                    Err(unknown())
                }
            }
        }
    }
}

fn tcp(text: &str, address: &str) -> Result<ConsoleConf, ConfError> {
    let address = match address.parse::<u16>() {
        Ok(port) => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port),
        Err(_) => address
            .parse()
            .map_err(|_| ConfError::Address(text.to_owned()))?,
    };
    if address.ip().is_loopback() {
        Ok(ConsoleConf::Tcp(address))
    } else {
        Err(ConfError::NotLoopback(text.to_owned()))
    }
}

impl fmt::Display for ConsoleConf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::Pty => f.write_str("pty"),
            Self::Tty(path) => write!(f, "{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp={address}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_back() {
        for text in [
            "stdio",
            "pty",
            "/dev/pts/3",
            "unix:/tmp/a",
            "tcp=127.0.0.1:4000",
            "tcp=[::1]:4000",
            "file:log",
        ] {
            assert_eq!(text.parse::<ConsoleConf>().unwrap().to_string(), text);
        }
        let short: ConsoleConf = "tcp=4000".parse().unwrap();
        assert_eq!(short.to_string(), "tcp=127.0.0.1:4000");
    }

    #[test]
    fn what_is_refused() {
        for text in ["", "/dev/", "unix:", "file:", "com1", "stdio "] {
            assert_eq!(
                text.parse::<ConsoleConf>(),
                Err(ConfError::Unknown(text.into()))
            );
        }
        for text in ["tcp=", "tcp=65536", "tcp=localhost:1", "tcp=127.0.0.1"] {
            assert_eq!(
                text.parse::<ConsoleConf>(),
                Err(ConfError::Address(text.into()))
            );
        }
        for text in ["tcp=0.0.0.0:1", "tcp=192.168.1.1:1", "tcp=[::]:1"] {
            assert_eq!(
                text.parse::<ConsoleConf>(),
                Err(ConfError::NotLoopback(text.into()))
            );
        }
    }
}
