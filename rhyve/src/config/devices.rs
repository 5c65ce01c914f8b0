//! What `-s` says of the virtio devices that have an end on the host: ports, memory, sockets, files.

use std::path::PathBuf;

use super::SlotError;
use super::virtio::{options, transport};
use crate::console::ConsoleConf;
use crate::virtio::transport::Transport;

/// The most ports of a virtio-console.
pub const CONSOLE_PORTS: usize = 16;

/// A virtio-console device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleSpec {
    /// Its registers.
    pub transport: Transport,
    /// At least one, at most `CONSOLE_PORTS`.
    pub ports: Vec<PortSpec>,
}

/// A port of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// What the guest calls it.
    pub name: String,
    /// The host's end.
    pub conf: ConsoleConf,
}

impl PortSpec {
    /// Whether the guest is to take it for a console and not for a plain port.
    pub fn is_console(&self) -> bool {
        self.name.starts_with("console")
    }
}

impl ConsoleSpec {
    /// Reads `NAME=CONF[,NAME=CONF]...[,virtio=KIND]`; a CONF that is a path, as in bhyve, is that
    /// of a socket.
    ///
    /// # Errors
    /// [`SlotError::Option`], [`SlotError::Value`] and [`SlotError::Wanted`].
    pub fn parse(conf: &str) -> Result<Self, SlotError> {
        let mut spec = Self::default();
        for (name, value) in options(conf) {
            if name == "virtio" {
                spec.transport = transport(value)?;
                continue;
            }
            let bad = |wanted| SlotError::Wanted {
                device: "a port of virtio-console",
                given: format!("{name}={value}"),
                wanted,
            };
            if !is_name(name) || spec.ports.iter().any(|port| port.name == name) {
                return Err(bad(
                    "a name of its own (letters, digits, '.', '_', '-') and a console",
                ));
            }
            let conf = if value.starts_with('/') && !value.starts_with("/dev/") {
                Ok(ConsoleConf::Unix(value.into()))
            } else {
                value.parse()
            };
            let conf = conf.map_err(|_| {
                bad("a name and stdio, pty, /dev/TTY, unix:PATH, tcp=PORT or file:PATH")
            })?;
            spec.ports.push(PortSpec {
                name: name.to_owned(),
                conf,
            });
        }
        if (1..=CONSOLE_PORTS).contains(&spec.ports.len()) {
            Ok(spec)
        } else {
            Err(SlotError::Wanted {
                device: "virtio-console",
                given: conf.to_owned(),
                wanted: "1 to 16 ports, as in console=stdio,agent=unix:/run/agent",
            })
        }
    }
}

/// A virtio-balloon device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonSpec {
    /// Its registers.
    pub transport: Transport,
    /// The guest tells of memory it does not use, and that goes back to the host.
    pub reporting: bool,
}

impl BalloonSpec {
    /// Reads `[virtio=KIND][,reporting=on|off]`.
    ///
    /// # Errors
    /// [`SlotError::Option`], [`SlotError::Value`] and [`SlotError::Wanted`].
    pub fn parse(conf: &str) -> Result<Self, SlotError> {
        let mut spec = Self {
            transport: Transport::default(),
            reporting: true,
        };
        for (name, value) in options(conf) {
            match (name, value) {
                ("virtio", _) => spec.transport = transport(value)?,
                ("reporting", "on") => spec.reporting = true,
                ("reporting", "off") => spec.reporting = false,
                ("reporting", _) => {
                    return Err(SlotError::Value {
                        option: "reporting",
                        value: value.to_owned(),
                        wanted: "on or off",
                    });
                }
                _ => {
                    return Err(SlotError::Option {
                        device: "virtio-balloon",
                        option: name.to_owned(),
                        known: "virtio=legacy|modern|transitional and reporting=on|off",
                    });
                }
            }
        }
        Ok(spec)
    }
}

/// A virtio-vsock device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockSpec {
    /// The guest's context id.
    pub cid: u32,
    /// The socket to which programs of the host connect; those that listen are beside it.
    pub path: PathBuf,
}

impl VsockSpec {
    /// Reads `path=SOCKET[,cid=N][,virtio=modern]`.
    ///
    /// # Errors
    /// [`SlotError::Option`], [`SlotError::Value`] and [`SlotError::Wanted`].
    pub fn parse(conf: &str) -> Result<Self, SlotError> {
        let bad = |option, value: &str, wanted| SlotError::Value {
            option,
            value: value.to_owned(),
            wanted,
        };
        let (mut cid, mut path) = (3, None);
        for (name, value) in options(conf) {
            match name {
                "path" if !value.is_empty() => path = Some(PathBuf::from(value)),
                "cid" => {
                    // 0 to 2 and the last are not a guest's (vsock(7)).
                    let number = value.parse().ok();
                    cid = number
                        .filter(|cid| (3..u32::MAX).contains(cid))
                        .ok_or_else(|| bad("cid", value, "a number from 3 to 4294967294"))?;
                }
                "virtio" if transport(value)? != Transport::Modern => {
                    let wanted = "modern, for there are no older registers of this device";
                    return Err(bad("virtio", value, wanted));
                }
                "virtio" => {}
                _ => {
                    return Err(SlotError::Option {
                        device: "virtio-vsock",
                        option: name.to_owned(),
                        known: "path=SOCKET, cid=N and virtio=modern",
                    });
                }
            }
        }
        let path = path.ok_or_else(|| SlotError::Wanted {
            device: "virtio-vsock",
            given: conf.to_owned(),
            wanted: "path=SOCKET, where the host's end is to be",
        })?;
        Ok(Self { cid, path })
    }
}

/// A virtio-9p device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareSpec {
    /// Its registers.
    pub transport: Transport,
    /// What the guest mounts it by.
    pub tag: String,
    /// The directory.
    pub path: PathBuf,
    /// The guest may not change it.
    pub read_only: bool,
}

impl ShareSpec {
    /// Reads `TAG=DIRECTORY[,ro][,virtio=KIND]`, as bhyve does.
    ///
    /// # Errors
    /// [`SlotError::Option`], [`SlotError::Value`] and [`SlotError::Wanted`].
    pub fn parse(conf: &str) -> Result<Self, SlotError> {
        let (mut share, mut kind, mut read_only) = (None, Transport::default(), false);
        for (name, value) in options(conf) {
            match (name, value) {
                ("ro", "") => read_only = true,
                ("virtio", _) => kind = transport(value)?,
                _ if share.is_none() && is_name(name) && !value.is_empty() => {
                    share = Some((name.to_owned(), PathBuf::from(value)));
                }
                _ => {
                    return Err(SlotError::Option {
                        device: "virtio-9p",
                        option: name.to_owned(),
                        known: "one TAG=DIRECTORY, ro and virtio=legacy|modern|transitional",
                    });
                }
            }
        }
        let (tag, path) = share.ok_or_else(|| SlotError::Wanted {
            device: "virtio-9p",
            given: conf.to_owned(),
            wanted: "TAG=DIRECTORY, as in src=/usr/src",
        })?;
        Ok(Self {
            transport: kind,
            tag,
            path,
            read_only,
        })
    }
}

fn is_name(name: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=63).contains(&name.len()) && name.bytes().all(fine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_have_names_and_ends() {
        let spec = ConsoleSpec::parse("console=stdio,a=/run/a,b=tcp=4000,virtio=modern").unwrap();
        assert_eq!(spec.transport, Transport::Modern);
        let ports = spec.ports.iter();
        let shown: Vec<_> = ports
            .map(|port| (&*port.name, port.conf.to_string(), port.is_console()))
            .collect();
        let port = |name, conf: &str, console| (name, conf.to_owned(), console);
        assert_eq!(
            shown,
            [
                port("console", "stdio", true),
                port("a", "unix:/run/a", false),
                port("b", "tcp=127.0.0.1:4000", false)
            ]
        );
        for bad in [
            "",
            "virtio=modern",
            "a",
            "a=",
            "=stdio",
            "a=b",
            "a=pty,a=pty",
            "a b=pty",
        ] {
            assert!(ConsoleSpec::parse(bad).is_err(), "{bad}");
        }
        let many: Vec<_> = (0..17).map(|n| format!("p{n}=pty")).collect();
        assert!(ConsoleSpec::parse(&many[..16].join(",")).is_ok());
        assert!(ConsoleSpec::parse(&many.join(",")).is_err());
    }

    #[test]
    fn the_others_are_read_and_explained() {
        assert!(BalloonSpec::parse("").unwrap().reporting);
        assert!(
            !BalloonSpec::parse("reporting=off,virtio=legacy")
                .unwrap()
                .reporting
        );
        let vsock = VsockSpec::parse("path=/run/v,cid=7").unwrap();
        assert_eq!((vsock.cid, vsock.path), (7, "/run/v".into()));
        assert!(VsockSpec::parse("path=/run/v,virtio=modern").is_ok());
        let share = ShareSpec::parse("src=/usr/src,ro").unwrap();
        assert_eq!((&*share.tag, share.read_only), ("src", true));
        let errors = [
            BalloonSpec::parse("reporting=1").unwrap_err().to_string(),
            VsockSpec::parse("cid=3").unwrap_err().to_string(),
            VsockSpec::parse("path=a,cid=2").unwrap_err().to_string(),
            VsockSpec::parse("path=a,virtio=legacy")
                .unwrap_err()
                .to_string(),
            ShareSpec::parse("ro").unwrap_err().to_string(),
            ShareSpec::parse("a=/b,c=/d").unwrap_err().to_string(),
        ];
        assert_eq!(
            errors,
            [
                "reporting= is on or off, not '1'",
                "virtio-vsock is given by path=SOCKET, where the host's end is to be, not by 'cid=3'",
                "cid= is a number from 3 to 4294967294, not '2'",
                "virtio= is modern, for there are no older registers of this device, not 'legacy'",
                "virtio-9p is given by TAG=DIRECTORY, as in src=/usr/src, not by 'ro'",
                "virtio-9p has no option 'c': there are one TAG=DIRECTORY, ro and \
                 virtio=legacy|modern|transitional",
            ]
        );
    }
}
