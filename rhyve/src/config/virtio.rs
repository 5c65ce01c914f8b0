//! What `-s` says of virtio devices.

use std::num::NonZeroU64;

use super::SlotError;
use crate::virtio::transport::Transport;

/// A virtio-rnd device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RndSpec {
    /// Its registers.
    pub transport: Transport,
    /// The most bytes a second the guest gets, if there is a limit.
    pub rate: Option<NonZeroU64>,
}

impl RndSpec {
    /// Reads `[virtio=KIND][,rate=BYTES]`.
    ///
    /// # Errors
    /// [`SlotError::Option`] and [`SlotError::Value`].
    pub fn parse(conf: &str) -> Result<Self, SlotError> {
        let mut spec = Self::default();
        for (name, value) in options(conf) {
            match name {
                "virtio" => spec.transport = transport(value)?,
                "rate" => {
                    let rate = value.parse().map_err(|_| SlotError::Value {
                        option: "rate",
                        value: value.to_owned(),
                        wanted: "a number of bytes a second",
                    })?;
                    spec.rate = Some(rate);
                }
                _ => {
                    return Err(SlotError::Option {
                        device: "virtio-rnd",
                        option: name.to_owned(),
                        known: "virtio=legacy|modern|transitional and rate=BYTES",
                    });
                }
            }
        }
        Ok(spec)
    }
}

/// The options of a device: names, and values, which are empty where there is no `=`.
pub(super) fn options(conf: &str) -> impl Iterator<Item = (&str, &str)> {
    conf.split(',')
        .filter(|option| !option.is_empty())
        .map(|option| option.split_once('=').unwrap_or((option, "")))
}

/// The value of `virtio=`, which every virtio device has.
///
/// # Errors
/// [`SlotError::Value`].
pub(super) fn transport(value: &str) -> Result<Transport, SlotError> {
    match value {
        "legacy" => Ok(Transport::Legacy),
        "modern" => Ok(Transport::Modern),
        "transitional" => Ok(Transport::Transitional),
        _ => Err(SlotError::Value {
            option: "virtio",
            value: value.to_owned(),
            wanted: "legacy, modern or transitional",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_explained() {
        assert_eq!(RndSpec::parse(""), Ok(RndSpec::default()));
        let spec = RndSpec {
            transport: Transport::Legacy,
            rate: NonZeroU64::new(4096),
        };
        assert_eq!(RndSpec::parse("rate=4096,virtio=legacy"), Ok(spec));
        let err = |conf| RndSpec::parse(conf).unwrap_err().to_string();
        assert_eq!(
            err("virtio=old"),
            "virtio= is legacy, modern or transitional, not 'old'"
        );
        assert_eq!(
            err("rate=0"),
            "rate= is a number of bytes a second, not '0'"
        );
        assert_eq!(
            err("speed"),
            "virtio-rnd has no option 'speed': there are virtio=legacy|modern|transitional \
             and rate=BYTES"
        );
    }
}
