//! PCI slots: what `-s` puts where.

use std::fmt;
use std::str::FromStr;

use super::{BalloonSpec, BlkSpec, BlockConfError, ConsoleSpec, RndSpec, ShareSpec, VsockSpec};
use super::{NetConfError, NetSpec};

/// The place of a PCI function: bus, device (bhyve says slot) and function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Bus, 0 to 255.
    pub bus: u8,
    /// Device on the bus, 0 to 31.
    pub slot: u8,
    /// Function of the device, 0 to 7.
    pub function: u8,
}

/// What stands in a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotDevice {
    /// The host bridge, 1275:1275.
    HostBridge,
    /// The host bridge with AMD's identity, 1022:7432: some guests enable MSI only behind a bridge
    /// they know.
    AmdHostBridge,
    /// The bridge to ISA, 8086:7000.
    Lpc,
    /// A disk.
    VirtioBlk(BlkSpec),
    /// Serial ports of virtio's kind.
    VirtioConsole(ConsoleSpec),
    /// Takes memory from the guest and gives it back.
    VirtioBalloon(BalloonSpec),
    /// A directory of the host.
    Virtio9p(ShareSpec),
    /// Sockets between guest and host.
    VirtioVsock(VsockSpec),
    /// A network card.
    VirtioNet(NetSpec),
    /// Random numbers of the host.
    VirtioRnd(RndSpec),
}

/// One `-s slot,emulation[,conf]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotSpec {
    /// Where.
    pub address: PciAddress,
    /// What.
    pub device: SlotDevice,
}

/// Why a slot is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// No emulation is named.
    #[error("write SLOT,EMULATION, as in 0,hostbridge; -s help lists the emulations")]
    Syntax,
    /// The slot is not `slot`, `slot:function` or `bus:slot:function`.
    #[error("'{0}' is not a place: write slot, slot:function or bus:slot:function in decimal")]
    Place(String),
    /// A part of the place is too large.
    #[error("{part} {value} is too large: at most {max}")]
    Range {
        /// `bus`, `slot` or `function`.
        part: &'static str,
        /// What was given.
        value: u32,
        /// The largest there is.
        max: u8,
    },
    /// bhyve has it, rhyve has not.
    #[error("emulation '{0}' is not supported yet: {1}")]
    NotYet(String, &'static str),
    /// Nobody has it.
    #[error("there is no emulation '{0}': -s help lists them")]
    Unknown(String),
    /// The emulation takes no configuration.
    #[error("emulation '{0}' takes no configuration, but has '{1}': leave it out")]
    Conf(String, String),
    /// The emulation has no such option.
    #[error("{device} has no option '{option}': there are {known}")]
    Option {
        /// The emulation.
        device: &'static str,
        /// What was given.
        option: String,
        /// What there is.
        known: &'static str,
    },
    /// What the emulation cannot do without is missing or wrong.
    #[error("{device} is given by {wanted}, not by '{given}'")]
    Wanted {
        /// The emulation.
        device: &'static str,
        /// What was given.
        given: String,
        /// What it takes.
        wanted: &'static str,
    },
    /// A disk cannot be so.
    #[error(transparent)]
    Block(#[from] BlockConfError),
    /// A network card cannot be so.
    #[error(transparent)]
    Net(#[from] NetConfError),
    /// An option cannot have this value.
    #[error("{option}= is {wanted}, not '{value}'")]
    Value {
        /// The option.
        option: &'static str,
        /// What was given.
        value: String,
        /// What it can be.
        wanted: &'static str,
    },
}

/// bhyve(8)'s emulations which are not there yet, and why.
const NOT_YET: &[(&str, &str)] = &[
    ("ahci", "it is not there yet; disks are virtio-blk"),
    ("ahci-cd", "it is not there yet; disks are virtio-blk"),
    ("ahci-hd", "it is not there yet; disks are virtio-blk"),
    ("e1000", "it is not there yet; network cards are virtio-net"),
    ("fbuf", "there is no display; the console is -l com1,stdio"),
    ("hda", "there are no sound devices"),
    ("nvme", "it is not there yet; disks are virtio-blk"),
    ("passthru", "host devices cannot be handed to a guest yet"),
    (
        "uart",
        "there are no PCI serial ports; use -l com1 to -l com4",
    ),
    ("virtio-input", "there are no input devices"),
    ("virtio-scsi", "it is not there yet; disks are virtio-blk"),
    ("xhci", "there is no USB"),
];

/// What `-s help` prints.
pub fn help() -> String {
    let mut text = String::from("Emulations for -s:\n");
    for (name, about) in [
        (
            "hostbridge",
            "host bridge; stands in slot 0 unless another does",
        ),
        ("amd_hostbridge", "host bridge with AMD's identity"),
        (
            "lpc",
            "bridge to ISA, for guests that look for one; -l's ports need none",
        ),
        ("virtio-blk", "disk with the image PATH"),
        ("virtio-net", "network card at BACKEND"),
        (
            "virtio-console",
            "ports NAME=stdio|pty|unix:PATH|file:PATH|tcp=PORT; console... is a console",
        ),
        (
            "virtio-balloon",
            "takes memory back (vmmctl --set-balloon=); reporting=off: only then",
        ),
        (
            "virtio-9p",
            "the host's DIRECTORY, by TAG=DIRECTORY; ro: it cannot be changed",
        ),
        (
            "virtio-vsock",
            "sockets: path=SOCKET on the host, cid=N of the guest (3)",
        ),
        (
            "virtio-rnd",
            "random numbers of the host; rate=BYTES a second at most",
        ),
    ] {
        text += &format!("  {name:<16}{about}\n");
    }
    text += super::block::HELP;
    text += super::net::HELP;
    text += "virtio devices have the registers that virtio= says:\n";
    text += "  legacy          those of virtio 0.9.5\n";
    text += "  modern          those of virtio 1.0 and later\n";
    text += "  transitional    both; the default\n";
    text += "Not supported yet:\n";
    for (name, why) in NOT_YET {
        text += &format!("  {name:<16}{why}\n");
    }
    text
}

impl SlotDevice {
    /// bhyve's word for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::HostBridge => "hostbridge",
            Self::AmdHostBridge => "amd_hostbridge",
            Self::Lpc => "lpc",
            Self::VirtioBlk(_) => "virtio-blk",
            Self::VirtioConsole(_) => "virtio-console",
            Self::VirtioBalloon(_) => "virtio-balloon",
            Self::Virtio9p(_) => "virtio-9p",
            Self::VirtioVsock(_) => "virtio-vsock",
            Self::VirtioNet(_) => "virtio-net",
            Self::VirtioRnd(_) => "virtio-rnd",
        }
    }

    /// Reads `emulation[,conf]`.
    ///
    /// # Errors
    /// Those of [`SlotError`] which are about emulations.
    pub fn parse(text: &str) -> Result<Self, SlotError> {
        let (name, conf) = text.split_once(',').unwrap_or((text, ""));
        let device = match name {
            "" => return Err(SlotError::Syntax),
            "hostbridge" => Self::HostBridge,
            "amd_hostbridge" => Self::AmdHostBridge,
            "lpc" => Self::Lpc,
            "virtio-blk" => return BlkSpec::parse(conf).map(Self::VirtioBlk),
            "virtio-console" => return ConsoleSpec::parse(conf).map(Self::VirtioConsole),
            "virtio-balloon" => return BalloonSpec::parse(conf).map(Self::VirtioBalloon),
            "virtio-9p" => return ShareSpec::parse(conf).map(Self::Virtio9p),
            "virtio-vsock" => return VsockSpec::parse(conf).map(Self::VirtioVsock),
            "virtio-net" => return NetSpec::parse(conf).map(Self::VirtioNet),
            "virtio-rnd" => return RndSpec::parse(conf).map(Self::VirtioRnd),
            _ => {
                let known = NOT_YET.iter().find(|(known, _)| *known == name);
                return Err(match known {
                    Some((_, why)) => SlotError::NotYet(name.to_owned(), why),
                    None => SlotError::Unknown(name.to_owned()),
                });
            }
        };
        if conf.is_empty() {
            Ok(device)
        } else {
            Err(SlotError::Conf(name.to_owned(), conf.to_owned()))
        }
    }
}

impl PciAddress {
    /// Where the host bridge stands by custom.
    pub const HOST_BRIDGE: Self = Self {
        bus: 0,
        slot: 0,
        function: 0,
    };

    /// The address whose device and function number are those of the wire.
    pub fn on_wire(bus: u8, devfn: u8) -> Self {
        Self {
            bus,
            slot: devfn >> 3,
            function: devfn & 7,
        }
    }

    /// An address from its three numbers, if there can be such a function.
    ///
    /// # Errors
    /// [`SlotError::Range`].
    pub fn new(bus: u32, slot: u32, function: u32) -> Result<Self, SlotError> {
        let part = |part, value, max| match u8::try_from(value) {
            Ok(value) if value <= max => Ok(value),
            _ => Err(SlotError::Range { part, value, max }),
        };
        Ok(Self {
            bus: part("bus", bus, 255)?,
            slot: part("slot", slot, 31)?,
            function: part("function", function, 7)?,
        })
    }
}

impl FromStr for PciAddress {
    type Err = SlotError;

    /// Reads `slot`, `slot:function` or `bus:slot:function`, decimal, as bhyve(8) does.
    fn from_str(text: &str) -> Result<Self, SlotError> {
        let numbers: Result<Vec<u32>, _> = text.split(':').map(str::parse).collect();
        match numbers.as_deref() {
            Ok(&[slot]) => Self::new(0, slot, 0),
            Ok(&[slot, function]) => Self::new(0, slot, function),
            Ok(&[bus, slot, function]) => Self::new(bus, slot, function),
            _ => Err(SlotError::Place(text.to_owned())),
        }
    }
}

impl fmt::Display for PciAddress {
    /// `bus:slot:function`, decimal, as `-s` reads it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.bus, self.slot, self.function)
    }
}

impl FromStr for SlotSpec {
    type Err = SlotError;

    fn from_str(text: &str) -> Result<Self, SlotError> {
        let (place, device) = text.split_once(',').ok_or(SlotError::Syntax)?;
        Ok(Self {
            address: place.parse()?,
            device: SlotDevice::parse(device)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_forms_of_a_place_are_read() {
        let at = |bus, slot, function| {
            Ok(PciAddress {
                bus,
                slot,
                function,
            })
        };
        assert_eq!("0".parse(), at(0, 0, 0));
        assert_eq!("31:7".parse(), at(0, 31, 7));
        assert_eq!("0:5:1".parse(), at(0, 5, 1));
        assert_eq!("255:2:0".parse(), at(255, 2, 0));
    }

    #[test]
    fn bad_places_are_refused() {
        let err = |s: &str| s.parse::<PciAddress>().unwrap_err();
        for text in [
            "", "x", "1:", "0:0:0:0", "-1", "0x1", "1:2:", "a:2:0", "1.2.0",
        ] {
            assert_eq!(err(text), SlotError::Place(text.into()));
        }
        assert_eq!(
            err("32"),
            SlotError::Range {
                part: "slot",
                value: 32,
                max: 31
            }
        );
        assert_eq!(
            err("1:8"),
            SlotError::Range {
                part: "function",
                value: 8,
                max: 7
            }
        );
        assert_eq!(
            err("256:0:0"),
            SlotError::Range {
                part: "bus",
                value: 256,
                max: 255
            }
        );
    }

    #[test]
    fn emulations_are_known_unknown_or_not_there_yet() {
        let err = |s: &str| s.parse::<SlotSpec>().unwrap_err();
        let bridge = SlotSpec {
            address: PciAddress::HOST_BRIDGE,
            device: SlotDevice::HostBridge,
        };
        assert_eq!("0,hostbridge".parse(), Ok(bridge));
        assert_eq!(err("0"), SlotError::Syntax);
        assert_eq!(err("0,"), SlotError::Syntax);
        assert_eq!(err("3,floppy"), SlotError::Unknown("floppy".into()));
        assert_eq!(
            err("0,hostbridge,x"),
            SlotError::Conf("hostbridge".into(), "x".into())
        );
        for (name, why) in NOT_YET {
            let text = format!("3,{name},conf");
            assert_eq!(err(&text), SlotError::NotYet(name.to_string(), why));
        }
    }

    proptest::proptest! {
        #[test]
        fn display_reads_back(bus: u8, devfn: u8) {
            let address = PciAddress::on_wire(bus, devfn);
            proptest::prop_assert_eq!(address.to_string().parse(), Ok(address));
        }

        #[test]
        fn any_text_is_answered(text in ".{0,40}") {
            if let Ok(spec) = text.parse::<SlotSpec>() {
                proptest::prop_assert!(spec.address.slot < 32);
            }
        }
    }
}
