//! How a device outlives its process: it is frozen, tells its state, and another process's device
//! of the same make goes on from there.
//!
//! ```text
//!           freeze            save            thaw
//!  running --------> frozen --------> frozen --------> running        a snapshot
//!                                        |
//!                                        +--> the process ends        suspended
//!  new ----------------- restore -------------------> running         run again
//! ```
//!
//! Who calls: `suspend` and `snapshot` of the control thread, with every vCPU held, so that no guest
//! access comes meanwhile; `restore` the builder, before the first entry into the guest. Each device
//! is called by one thread at a time.

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmm_api::state::{DeviceState, StateError};

/// A device whose state can be told and taken.
pub trait Lifecycle: Send + Sync {
    /// Stops what the device does by itself. When it returns, every request that it took from its
    /// guest is answered, and until [`Lifecycle::thaw`] it neither reads nor writes guest memory, its
    /// queues or its backend. May wait for host I/O that is under way, and for nothing else. Timers
    /// that only drive an interrupt line may go on.
    fn freeze(&self) {}

    /// Goes on where [`Lifecycle::freeze`] stopped; looks for what came in between.
    fn thaw(&self) {}

    /// What a device of the same configuration needs to go on in another process. Called when it is
    /// frozen; changes nothing.
    ///
    /// # Errors
    ///
    /// It cannot be told now, and why, as in "a request is under way".
    fn save(&self) -> Result<DeviceState, String>;

    /// Goes on from a stored state, which may have come from anywhere: whatever is in it, this does
    /// not panic, and a guest cannot do more harm by it than by driving the device. Called once, on a
    /// device as it was made. Interrupt lines that were asserted are asserted again.
    ///
    /// For a device on virtio it is the part that the transport does not know, and comes before
    /// `activate`.
    ///
    /// # Errors
    ///
    /// It is of another kind or a newer version, damaged, or does not fit this device.
    fn restore(&self, state: &DeviceState) -> Result<(), StateError>;
}

/// A state of this kind and version.
///
/// # Errors
///
/// It is no JSON value.
pub fn save(kind: &str, version: u32, data: &impl Serialize) -> Result<DeviceState, String> {
    Ok(DeviceState {
        kind: kind.to_owned(),
        version,
        data: serde_json::to_value(data).map_err(|error| error.to_string())?,
    })
}

/// What [`save`] made, if it is of this kind and of no newer version.
///
/// # Errors
///
/// It is not, or is damaged.
pub fn load<T: DeserializeOwned>(
    kind: &str,
    version: u32,
    state: &DeviceState,
) -> Result<T, StateError> {
    if state.kind != kind {
        return Err(StateError::Value(format!(
            "a {} where a {kind} is",
            state.kind
        )));
    }
    if state.version == 0 || state.version > version {
        return Err(StateError::Value(format!(
            "{kind}: version {} of its state, this rhyve reads 1-{version}",
            state.version
        )));
    }
    T::deserialize(&state.data).map_err(|error| StateError::Value(format!("{kind}: {error}")))
}

/// Bytes in a stored state, as hexadecimal text.
pub mod bytes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// As `serde(with)` wants it.
    ///
    /// # Errors
    ///
    /// The serializer's.
    pub fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&crate::lifecycle::Digits(bytes))
    }

    /// Likewise.
    ///
    /// # Errors
    ///
    /// It is no such text.
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        let digits: Option<Vec<u8>> = text
            .chars()
            .map(|c| c.to_digit(16).map(|digit| digit as u8))
            .collect();
        let (pairs, odd) = digits
            .as_deref()
            .ok_or_else(|| D::Error::custom("no hexadecimal digits"))?
            .as_chunks::<2>();
        if !odd.is_empty() {
            return Err(D::Error::custom("an odd number of digits"));
        }
        Ok(pairs.iter().map(|[high, low]| high << 4 | low).collect())
    }
}

struct Digits<'a>(&'a [u8]);

impl std::fmt::Display for Digits<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    struct Bytes(#[serde(with = "bytes")] Vec<u8>);

    #[test]
    fn a_state_is_taken_by_its_kind_and_version() {
        let bytes = Bytes(vec![0, 0x7f, 0xff]);
        let state = save("thing", 2, &bytes).unwrap();
        assert_eq!(state.data, "007fff");
        assert_eq!(load::<Bytes>("thing", 3, &state).unwrap(), bytes);
        let refused = |kind, version| {
            load::<Bytes>(kind, version, &state)
                .unwrap_err()
                .to_string()
        };
        assert!(refused("thing", 1).contains("version 2 of its state, this rhyve reads 1-1"));
        assert!(refused("other", 2).contains("a thing where a other is"));
        for data in ["0", "0x", "é0"] {
            let state = DeviceState {
                data: data.into(),
                ..state.clone()
            };
            assert!(load::<Bytes>("thing", 2, &state).is_err());
        }
    }
}
