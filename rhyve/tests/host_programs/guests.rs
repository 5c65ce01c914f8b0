//! The guests of these tests: the probe kernel, and machine code of a few bytes.

use std::path::{Path, PathBuf};

use crate::support::{Place, Process, VM};

/// Where a plain kernel's code lies.
pub const ENTRY: u64 = 0x20_0000;

/// The probe kernel's file.
pub fn probe(place: &Place) -> PathBuf {
    let path = place.path("probe");
    std::fs::write(&path, guest_image::probe::PROBE).unwrap();
    path
}

/// Loads the probe kernel and runs it up to its prompt; returns its report as well.
pub fn start_probe(place: &Place, options: &str) -> (Process, String) {
    load(place, "-m 64M", &probe(place));
    let mut guest = place.start(options);
    let report = guest.console.expect("probe> ");
    (guest, report)
}

/// Loads a kernel, which has to succeed; `options` come before the VM's name.
pub fn load(place: &Place, options: &str, kernel: &Path) {
    let mut load = place.command(&format!("rhyveload {options} --kernel"));
    load.arg(kernel).arg(VM);
    let ended = Process::start(load).wait();
    assert_eq!(ended.status, Some(0), "rhyveload {options}: {ended:?}");
}

/// Types a command into the probe's prompt; returns what it prints.
pub fn ask(guest: &mut Process, command: &str) -> String {
    guest.console.send(command);
    // The echo of what was typed.
    guest.console.expect("\n");
    guest.console.expect("probe> ")
}

/// Loads code to be entered in long mode, in ring 0, with the first GiB mapped where it is.
pub fn load_code(place: &Place, code: &[u8]) {
    let path = place.path("code");
    std::fs::write(&path, elf(code)).unwrap();
    load(place, "-m 16M", &path);
}

/// A static ELF64 file with one segment (System V ABI, chapters 4 and 5).
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    const LOAD: u32 = 1;
    const READ_EXECUTE: u32 = 5;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2u16, 62].into_iter().flat_map(u16::to_le_bytes));
    file.extend(1u32.to_le_bytes());
    file.extend([ENTRY, 64, 0].into_iter().flat_map(u64::to_le_bytes));
    file.extend(0u32.to_le_bytes());
    file.extend(
        [64u16, 56, 1, 0, 0, 0]
            .into_iter()
            .flat_map(u16::to_le_bytes),
    );
    file.extend([LOAD, READ_EXECUTE].into_iter().flat_map(u32::to_le_bytes));
    let length = code.len() as u64;
    let words = [HEADERS, ENTRY, ENTRY, length, length, 4096];
    file.extend(words.into_iter().flat_map(u64::to_le_bytes));
    file.extend(code);
    file
}
