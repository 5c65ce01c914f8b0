//! How numbers and bulk bytes stand in vm.json and on the control socket.
//!
//! 64-bit values are hexadecimal text: JSON numbers lose bits past 2^53 in many readers, and these
//! values are read by people. Bulk is base64.

/// `u64` as `"0x..."`.
pub(crate) mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(value: &u64, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&format_args!("{value:#x}"))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        parse(&text).ok_or_else(|| D::Error::custom(format!("'{text}' is no 0x... number")))
    }

    pub(super) fn parse(text: &str) -> Option<u64> {
        let digits = text.strip_prefix("0x")?;
        // from_str_radix would take a sign.
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        u64::from_str_radix(digits, 16).ok()
    }
}

/// A map from a number to a `u64`, both as `"0x..."`, in the numbers' order.
pub(crate) mod hex_map {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(
        map: &BTreeMap<u32, u64>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        s.collect_map(
            map.iter()
                .map(|(k, v)| (format!("{k:#010x}"), format!("{v:#x}"))),
        )
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<BTreeMap<u32, u64>, D::Error> {
        BTreeMap::<String, String>::deserialize(d)?
            .into_iter()
            .map(|(k, v)| {
                let key = super::hex::parse(&k).and_then(|k| u32::try_from(k).ok());
                let value = super::hex::parse(&v);
                key.zip(value).ok_or_else(|| {
                    D::Error::custom(format!("'{k}: {v}' is no pair of 0x... numbers"))
                })
            })
            .collect()
    }
}

/// Bytes as base64 text.
pub(crate) mod bulk {
    use base64::{Engine, prelude::BASE64_STANDARD};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&BASE64_STANDARD.encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        BASE64_STANDARD
            .decode(text.as_bytes())
            .map_err(D::Error::custom)
    }
}
