//! PCI as a guest's kernel finds it, by the probe kernel's ports and memory.

use crate::disks::disk;
use crate::guests::{ask, start_probe};
use crate::support::{Place, Process};

/// What a port reads.
fn input(guest: &mut Process, port: u32, size: u32) -> u32 {
    let said = ask(guest, &format!("in {port:#x} {size}"));
    hex(said.split_whitespace().last().unwrap())
}

fn output(guest: &mut Process, port: u32, value: u32, size: u32) {
    ask(guest, &format!("out {port:#x} {value:#x} {size}"));
}

fn hex(word: &str) -> u32 {
    u32::from_str_radix(word.trim_start_matches("0x"), 16).unwrap_or_else(|_| panic!("{word}"))
}

/// Words of memory, one after the other.
fn memory(guest: &mut Process, address: u64, bytes: u64) -> Vec<u32> {
    let said = ask(guest, &format!("mem {address:#x} {bytes}"));
    let rows = said.lines().filter_map(|line| line.split_once(": "));
    rows.flat_map(|(_, words)| words.split_whitespace().map(hex))
        .collect()
}

/// A function, by the address that 0xcf8 takes.
#[derive(Clone, Copy)]
struct Function(u32);

impl Function {
    fn at(bus: u32, slot: u32, function: u32) -> Self {
        Self(1 << 31 | bus << 16 | slot << 11 | function << 8)
    }

    fn read(self, guest: &mut Process, register: u32) -> u32 {
        output(guest, 0xcf8, self.0 | register, 4);
        input(guest, 0xcfc, 4)
    }

    fn write(self, guest: &mut Process, register: u32, value: u32) {
        output(guest, 0xcf8, self.0 | register, 4);
        output(guest, 0xcfc, value, 4);
    }
}

const COMMAND: u32 = 0x04;
const BAR0: u32 = 0x10;
const BAR1: u32 = 0x14;
const BAR2: u32 = 0x18;
const BAR4: u32 = 0x20;
const ABSENT: u32 = 0xffff_ffff;

/// The disk serves its driver by these registers, which the driver looks up.
fn served(guest: &mut Process, kind: &str, seed: u32) {
    let opened = ask(guest, &format!("blk {kind}"));
    assert!(opened.contains(&format!("{kind} sectors 2048")), "{opened}");
    for command in ["write", "read"] {
        let done = ask(guest, &format!("blk {command} 7 2 {seed}"));
        assert!(done.contains(&format!("{command} 2 ok")), "{kind}: {done}");
    }
}

#[test]
fn a_guest_sizes_bars_moves_them_and_switches_them_off() {
    let place = Place::new();
    let path = disk(&place, "disk.img");
    let run = format!("-s 2,virtio-blk,{} -s 3,virtio-rnd", path.display());
    let (mut guest, _) = start_probe(&place, &run);
    let guest = &mut guest;
    let (blk, rnd) = (Function::at(0, 2, 0), Function::at(0, 3, 0));
    // One of each kind: ports, memory below 4 GiB, memory anywhere.
    for (bar, placed, sized) in [
        (BAR0, 0x2001, 0xffff_ff81),
        (BAR1, 0xc000_0000, 0xffff_e000),
        (BAR2, 0x2081, 0xffff_fffd),
        (BAR4, 0xc000_400c, 0xffff_c00c),
        (BAR4 + 4, 0, 0xffff_ffff),
        (0x1c, 0, 0),
    ] {
        assert_eq!(blk.read(guest, bar), placed, "BAR at {bar:#x}");
        blk.write(guest, bar, ABSENT);
        assert_eq!(blk.read(guest, bar), sized, "BAR at {bar:#x}");
        blk.write(guest, bar, placed);
    }
    served(guest, "legacy", 1);

    // To other ports; the old ones float.
    let features = input(guest, 0x2000, 4);
    blk.write(guest, BAR0, 0x5000);
    assert_eq!(
        (input(guest, 0x2000, 4), input(guest, 0x5000, 4)),
        (ABSENT, features)
    );
    served(guest, "legacy", 2);
    // Onto another's: that one stays, and when it goes there is room.
    let ports = 0x4000;
    rnd.write(guest, BAR0, ports);
    let other = input(guest, ports, 4);
    assert_ne!(other, features);
    blk.write(guest, BAR0, ports);
    assert_eq!(
        (input(guest, ports, 4), input(guest, 0x5000, 4)),
        (other, ABSENT)
    );
    rnd.write(guest, BAR0, 0x6000);
    assert_eq!(
        (input(guest, 0x6000, 4), input(guest, ports, 4)),
        (other, features)
    );
    served(guest, "legacy", 3);

    // Onto RAM, which is what is there; then beyond 4 GiB, where the modern registers are found.
    let ram = memory(guest, 0x40_0000, 32);
    blk.write(guest, BAR4, 0x40_0000);
    assert_eq!(memory(guest, 0x40_0000, 32), ram);
    blk.write(guest, BAR4, 0xd000_0000);
    served(guest, "modern", 4);
    blk.write(guest, BAR4 + 4, 1);
    served(guest, "legacy", 5);
    assert_eq!(memory(guest, 0xd000_0000, 4), [ABSENT]);
    // Onto configuration space, which stays.
    blk.write(guest, BAR4, 0xe000_0000);
    blk.write(guest, BAR4 + 4, 0);
    assert_eq!(memory(guest, 0xe000_0000, 4), [0x1275_1275]);
    blk.write(guest, BAR4, 0xc000_4000);

    // Switched off, and on again by the driver.
    blk.write(guest, COMMAND, 0);
    assert_eq!(input(guest, ports, 4), ABSENT);
    assert_eq!(memory(guest, 0xc000_4000, 4), [ABSENT]);
    for (kind, seed) in [("legacy", 6), ("modern", 7)] {
        served(guest, kind, seed);
    }
    guest.console.send("poweroff");
    assert_eq!(guest.wait().status, Some(1));
}

#[test]
fn ports_and_memory_show_the_same_configuration_and_what_is_not_there_floats() {
    let place = Place::new();
    let run = "-s 0,amd_hostbridge -s 3,virtio-rnd -s 3:5,virtio-rnd,virtio=modern \
               -s 7:9:0,virtio-rnd,virtio=legacy -s 31,lpc";
    let (mut guest, report) = start_probe(&place, run);
    assert!(report.contains("MCFG"), "{report}");
    let guest = &mut guest;
    for (bus, slot, function, ident) in [
        (0, 0, 0, 0x7432_1022),
        (0, 3, 0, 0x1005_1af4),
        (0, 3, 5, 0x1044_1af4),
        (7, 9, 0, 0x1005_1af4),
        (0, 31, 0, 0x7000_8086),
        (0, 4, 0, ABSENT),
        (0, 3, 1, ABSENT),
        (1, 0, 0, ABSENT),
    ] {
        let ports = Function::at(bus, slot, function);
        let address = 0xe000_0000 | u64::from(bus << 20 | slot << 15 | function << 12);
        let shown = memory(guest, address, 256);
        assert_eq!(shown[0], ident);
        for register in [
            0x00, 0x04, 0x08, 0x0c, 0x10, 0x18, 0x20, 0x2c, 0x34, 0x3c, 0x40, 0x60,
        ] {
            let read = ports.read(guest, register);
            assert_eq!(
                read,
                shown[register as usize / 4],
                "{bus}:{slot}:{function} {register:#x}"
            );
        }
        // Nothing is behind the 256 bytes of a function that is not of PCI Express.
        assert_eq!(memory(guest, address + 256, 4), [ABSENT]);
    }
    // Function 0 says that there are others.
    let several = Function::at(0, 3, 0).read(guest, 0x0c);
    assert_eq!(several >> 16 & 0x80, 0x80);
    assert_eq!(Function::at(0, 0, 0).read(guest, 0x0c) >> 16 & 0x80, 0);
    // What is written to nobody is gone, and an access that is none is nobody's.
    Function::at(0, 4, 0).write(guest, COMMAND, 7);
    assert_eq!(Function::at(0, 4, 0).read(guest, COMMAND), ABSENT);
    output(guest, 0xcf8, 0x1800, 4);
    assert_eq!(input(guest, 0xcfc, 4), ABSENT, "not enabled");
    assert_eq!(input(guest, 0x7777, 4), ABSENT);
    assert_eq!(memory(guest, 0xd800_0000, 8), [ABSENT; 2]);
    // Whatever is written to an identity, it stays.
    for function in [
        Function::at(0, 0, 0),
        Function::at(7, 9, 0),
        Function::at(0, 31, 0),
    ] {
        let before = [0x00, 0x08, 0x2c].map(|register| function.read(guest, register));
        for register in [0x00, 0x08, 0x2c] {
            function.write(guest, register, 0x1234_5678);
        }
        let after = [0x00, 0x08, 0x2c].map(|register| function.read(guest, register));
        assert_eq!(before, after);
    }
    guest.console.send("poweroff");
    assert_eq!(guest.wait().status, Some(1));
}
