//! FreeBSD kernel modules: whatever is laid out comes out of the file, behind the place it was given.

use rhyveload::freebsd::module::Module;

use crate::freebsd_files::{Meta, module};

/// The last byte says where in memory, the others are the module. True if it can be loaded.
///
/// # Panics
///
/// A part leaves the file, lies in front of its place, or over another.
pub fn check(data: &[u8]) -> bool {
    let Some((&place, file)) = data.split_last() else {
        return false;
    };
    let dest = u64::from(place) << 22;
    let Ok(module) = Module::place(&file.to_vec(), dest) else {
        return false;
    };
    let end = dest.saturating_add(module.records.size);
    let mut ranges = Vec::new();
    for segment in &module.segments {
        let in_file = segment.offset.checked_add(segment.filesz);
        assert!(in_file.is_some_and(|end| end <= file.len() as u64));
        assert!(segment.filesz <= segment.memsz && segment.gpa >= dest);
        // What is too long for any memory is refused later, by its whole size.
        if end < u64::MAX {
            let last = segment.gpa.checked_add(segment.memsz);
            assert!(last.is_some_and(|last| last <= end), "{segment:x?}");
            ranges.push((segment.gpa, segment.memsz));
        }
    }
    ranges.retain(|(_, len)| *len != 0);
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "overlap: {pair:x?}");
    }
    true
}

/// Modules that provide and need others.
pub fn seeds() -> Vec<Vec<u8>> {
    let needy = [
        Meta::Version("if_vtnet", 1),
        Meta::Depend("virtio", [1, 1, 1]),
        Meta::Depend("kernel", [900, 1000, 1100]),
    ];
    let mut seeds = vec![module(&[]), module(&needy)];
    seeds.iter_mut().for_each(|seed| seed.push(1));
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_laid_out() {
        assert!(seeds().iter().all(|seed| check(seed)));
    }
}
