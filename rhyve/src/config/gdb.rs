//! Where the debug server listens: bhyve's `-G [w][addr:]port`, and Unix sockets.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// A debug server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GdbSpec {
    /// The machine waits for a debugger before its first instruction.
    pub wait: bool,
    /// Where it listens.
    pub place: GdbPlace,
}

/// Where a debug server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GdbPlace {
    /// TCP; port 0 takes any that is free.
    Tcp(SocketAddr),
    /// A Unix socket of this path.
    Unix(PathBuf),
}

impl fmt::Display for GdbPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A text that says no such place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no place for a debug server: write [w][ADDRESS:]PORT or [w]unix:PATH, as in 1234"
)]
pub struct GdbConfError(pub String);

impl FromStr for GdbSpec {
    type Err = GdbConfError;

    fn from_str(text: &str) -> Result<Self, GdbConfError> {
        let rest = text.strip_prefix('w');
        let place = rest.unwrap_or(text);
        let place = match place.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => GdbPlace::Unix(path.into()),
            _ => {
                // Whoever reaches it owns the guest: not the whole network, unless that is said.
                let here = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
                let port = place.parse().map(here);
                let address = port.or_else(|_| place.parse());
                GdbPlace::Tcp(address.map_err(|_| GdbConfError(text.to_owned()))?)
            }
        };
        Ok(Self {
            wait: rest.is_some(),
            place,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_bhyve_reads_them() {
        let read = |text: &str| text.parse::<GdbSpec>().map(|g| (g.wait, g.place));
        let tcp = |text: &str| GdbPlace::Tcp(text.parse().unwrap());
        assert_eq!(read("1234"), Ok((false, tcp("127.0.0.1:1234"))));
        assert_eq!(read("w0.0.0.0:1"), Ok((true, tcp("0.0.0.0:1"))));
        assert_eq!(read("[::1]:1"), Ok((false, tcp("[::1]:1"))));
        assert_eq!(read("wunix:/a"), Ok((true, GdbPlace::Unix("/a".into()))));
        for bad in ["", "w", "x1", "70000", "unix:", "ww1", "host:1"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
