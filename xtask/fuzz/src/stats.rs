//! KVM's binary statistics: nothing is read that is not in the file.

use vmm_api::stats::{Stat, parse};

/// Bytes of struct kvm_stats_desc, without a name.
const DESCRIPTOR: usize = 16;

/// True if the file describes itself well.
///
/// # Panics
///
/// More came out than is in it, or something that JSON does not bring back.
pub fn check(file: &[u8]) -> bool {
    let Ok(stats) = parse(file) else { return false };
    assert!(stats.len() <= file.len() / DESCRIPTOR);
    for stat in &stats {
        assert!(stat.values.len() <= file.len() / 8);
        assert!(!stat.name.contains('\0'));
    }
    // As many descriptors may point to the same values: not all of them at once.
    for stat in stats.iter().take(16) {
        let text = serde_json::to_vec(stat).unwrap_or_default();
        let again: Option<Stat> = serde_json::from_slice(&text).ok();
        assert_eq!(again.as_ref(), Some(stat));
    }
    true
}

/// A file of three statistics: a counter, an instant value and a histogram.
pub fn seeds() -> Vec<Vec<u8>> {
    const NAME: u32 = 48;
    let stats: [(u32, i16, u16, u32, &str); 3] = [
        (0, 0, 1, 0, "exits"),
        (0x141, 0, 1, 0, "guest_mode"),
        (0x23, -9, 3, 500, "halt_wait_hist"),
    ];
    let (id, descriptors) = (24, 24 + NAME);
    let data = descriptors + 3 * (16 + NAME);
    let mut file: Vec<u8> = [0, NAME, 3, id, descriptors, data]
        .iter()
        .flat_map(|n: &u32| n.to_ne_bytes())
        .collect();
    file.resize(descriptors as usize, b'k');
    let mut offset = 0u32;
    for (flags, exponent, count, bucket, name) in stats {
        file.extend(flags.to_ne_bytes());
        file.extend(exponent.to_ne_bytes());
        file.extend(count.to_ne_bytes());
        file.extend(offset.to_ne_bytes());
        file.extend(bucket.to_ne_bytes());
        let end = file.len() + NAME as usize;
        file.extend(name.as_bytes());
        file.resize(end, 0);
        offset += u32::from(count) * 8;
    }
    file.resize((data + offset) as usize, 7);
    vec![file]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_is_read() {
        assert!(seeds().iter().all(|seed| check(seed)));
        assert_eq!(parse(&seeds()[0]).unwrap().len(), 3);
    }
}
