//! What a program has in memory and does not need.
//!
//! A monitor runs for weeks by a twentieth of its text: options, tables and checks are needed once.
//! The kernel maps 64 KiB around each place that runs, and takes nothing back before memory is short.
//! The allocator likewise keeps much of what was freed: megabytes, once a kernel's names were read.

use std::ffi::c_void;
use std::fs;
use std::ptr;

use nix::sys::mman::{MmapAdvise, madvise};

/// Gives back the pages of text that are mapped now, the libraries' as well, and what was freed on the
/// heap. What runs on is mapped again as it runs, from the page cache.
pub fn give_back() {
    text();
    // SAFETY: it gives back what is not allocated, whatever other threads do (malloc_trim(3), MT-Safe).
    #[cfg(target_env = "gnu")]
    let _ = unsafe { nix::libc::malloc_trim(0) };
}

fn text() {
    // Without /proc they stay.
    for line in fs::read_to_string("/proc/self/maps")
        .iter()
        .flat_map(|maps| maps.lines())
    {
        let Some((start, end)) = text_at(line) else {
            continue;
        };
        let start_of = ptr::with_exposed_provenance_mut::<c_void>(start);
        if let Some(start) = ptr::NonNull::new(start_of) {
            // SAFETY: what is mapped from a file, privately and not writable, has the file's content
            // when it is mapped again. (Only a debugger's breakpoints get lost.) That the kernel
            // refuses it changes nothing.
            let _ = unsafe { madvise(start, end - start.addr().get(), MmapAdvise::MADV_DONTNEED) };
        }
    }
}

/// Where the text is that a line of /proc/PID/maps tells of.
fn text_at(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let of_a_file = words.next()? == "r-xp" && words.nth(3)?.starts_with('/');
    let address = |text| usize::from_str_radix(text, 16).ok();
    Some((address(start)?, address(end)?)).filter(|(start, end)| of_a_file && start < end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_what_runs_of_files() {
        let line = "55d0c0a35000-55d0c0dc0000 r-xp 000d7000 fe:00 1838 /usr/bin/rhyve";
        assert_eq!(text_at(line), Some((0x55d0_c0a3_5000, 0x55d0_c0dc_0000)));
        for other in [
            "55d0c0a35000-55d0c0dc0000 rw-p 000d7000 fe:00 1838 /usr/bin/rhyve",
            "7ffd1c7f9000-7ffd1c7fb000 r-xp 00000000 00:00 0 [vdso]",
            "7ffd1c7f9000-7ffd1c7fb000 r-xp 00000000 00:00 0",
            "7ffd1c7fb000-7ffd1c7f9000 r-xp 00000000 fe:00 1 /x",
            "x-y r-xp 0 0 0 /x",
            "",
        ] {
            assert_eq!(text_at(other), None, "{other}");
        }
    }

    #[test]
    fn a_program_goes_on_without_its_text() {
        give_back();
        let own = fs::read_to_string("/proc/self/maps").unwrap();
        assert!(own.lines().any(|line| text_at(line).is_some()));
    }
}
