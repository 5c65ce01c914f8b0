//! What outlives a run of a machine's CMOS clock: how far it is ahead, and its memory.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::encoding::bulk;
use crate::state::{DeviceState, StateError, VmState};

/// The device's name in [`VmState::devices`], and its kind there.
const NAME: &str = "rtc";
const VERSION: u32 = 1;
/// Bytes of CMOS, the clock's registers at their beginning counted.
const SIZE: usize = 128;
/// The clock's registers end here.
const NVRAM: usize = 14;
/// One more of the clock's registers, which FADT names.
const CENTURY: usize = 50;

/// A clock with a battery.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosState {
    /// Seconds that the clock's time zone is ahead of UTC.
    pub base: i64,
    /// Seconds that the clock is ahead of its time zone, because somebody set it.
    pub ahead: i64,
    /// The 128 bytes; those of the clock mean nothing.
    #[serde(with = "bulk")]
    pub nvram: Vec<u8>,
}

impl Default for CmosState {
    fn default() -> Self {
        Self {
            base: 0,
            ahead: 0,
            nvram: vec![0; SIZE],
        }
    }
}

impl CmosState {
    /// What a stored machine has of it; none if it never ran and nobody set it.
    ///
    /// # Errors
    ///
    /// It is damaged, or was written by a newer rhyve.
    pub fn stored(state: &VmState) -> Result<Option<Self>, StateError> {
        let Some(device) = state.devices.get(NAME) else {
            return Ok(None);
        };
        if device.kind != NAME || device.version != VERSION {
            let (kind, version) = (&device.kind, device.version);
            let text = format!("device {NAME}: a {kind} of version {version} is not known here");
            return Err(StateError::Value(text));
        }
        let cmos: Self =
            serde_json::from_value(device.data.clone()).map_err(StateError::Damaged)?;
        if cmos.nvram.len() != SIZE {
            let text = format!("device {NAME}: {} bytes of CMOS", cmos.nvram.len());
            return Err(StateError::Value(text));
        }
        Ok(Some(cmos))
    }

    /// Puts it into a state.
    pub fn store(&self, state: &mut VmState) {
        let device = DeviceState {
            kind: NAME.into(),
            version: VERSION,
            // Numbers and text: this always is a JSON value.
            data: serde_json::to_value(self).unwrap_or_default(),
        };
        state.devices.insert(NAME.into(), device);
    }

    /// What the clock shows now, in seconds since 1970-01-01 00:00 of its own time zone.
    pub fn seconds(&self) -> i64 {
        utc().saturating_add(self.base).saturating_add(self.ahead)
    }

    /// Makes it show this time now.
    pub fn set_seconds(&mut self, seconds: i64) {
        self.ahead = seconds.saturating_sub(utc()).saturating_sub(self.base);
    }

    /// Whether there is memory at this offset, and not the clock or nothing.
    pub fn is_memory(offset: u8) -> bool {
        let offset = usize::from(offset);
        (NVRAM..SIZE).contains(&offset) && offset != CENTURY
    }
}

fn utc() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_goes_on_while_its_machine_is_off() {
        let mut state = VmState::created();
        assert_eq!(CmosState::stored(&state).unwrap(), None);
        let mut cmos = CmosState {
            base: 3600,
            ..CmosState::default()
        };
        cmos.set_seconds(1_000_000);
        cmos.nvram[77] = 7;
        cmos.store(&mut state);
        let back = VmState::from_json(&state.to_json().unwrap()).unwrap();
        let stored = CmosState::stored(&back).unwrap().unwrap();
        assert_eq!(stored, cmos);
        assert!((1_000_000..1_000_100).contains(&stored.seconds()));
    }

    #[test]
    fn a_strange_one_is_refused() {
        let mut state = VmState::created();
        CmosState::default().store(&mut state);
        let whole = state.clone();
        state.devices.get_mut(NAME).unwrap().version = 2;
        assert!(CmosState::stored(&state).is_err());
        let mut state = whole;
        state.devices.get_mut(NAME).unwrap().data["nvram"] = "AAAA".into();
        assert!(CmosState::stored(&state).is_err());
        assert!(CmosState::is_memory(14) && CmosState::is_memory(127));
        assert!(!CmosState::is_memory(13) && !CmosState::is_memory(50));
        assert!(!CmosState::is_memory(128));
    }
}
