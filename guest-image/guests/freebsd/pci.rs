//! virtio devices on PCI bus 0, as FreeBSD's drivers name them when they attach.

use crate::console::{Hex, Print, print, say};
use crate::cpu::{inb, inl, inw, outl};

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const VIRTIO: u32 = 0x1af4;

/// Feature bits by FreeBSD's names (sys/dev/virtio).
const COMMON: [(u32, &str); 4] = [
    (29, "EventIdx"),
    (28, "RingIndirect"),
    (27, "AnyLayout"),
    (24, "NotifyOnEmpty"),
];
const NET: [(u32, &str); 7] = [
    (17, "ControlVq"),
    (16, "Status"),
    (15, "MrgRxBuf"),
    (6, "TxGSO"),
    (5, "MacAddress"),
    (1, "RxChecksum"),
    (0, "TxChecksum"),
];
const BLOCK: [(u32, &str); 10] = [
    (14, "WriteZeroes"),
    (13, "Discard"),
    (12, "MultiQueue"),
    (11, "ConfigWCE"),
    (10, "Topology"),
    (9, "FlushCmd"),
    (6, "BlockSize"),
    (5, "ReadOnly"),
    (2, "MaxNumSegs"),
    (1, "MaxSegSize"),
];

fn config(slot: u32, register: u32) -> u32 {
    outl(ADDRESS, 1 << 31 | slot << 11 | register);
    inl(DATA)
}

/// A byte of a MAC address: two hexadecimal digits.
struct Octet(u8);

impl Print for Octet {
    fn print(&self) {
        for digit in [self.0 >> 4, self.0 & 15] {
            let letter = if digit < 10 {
                b'0' + digit
            } else {
                b'a' - 10 + digit
            };
            crate::terminal::write(&[letter]);
        }
    }
}

/// Prints the features by name, highest first.
fn features(bits: u32, own: &[(u32, &'static str)]) {
    let mut between = "<";
    for &(bit, name) in COMMON.iter().chain(own) {
        if bits >> bit & 1 != 0 {
            print!(between, name);
            between = ",";
        }
    }
    say!(">");
}

/// Tells of all virtio devices that have legacy registers.
pub fn scan() {
    let mut unit = 0u32;
    for slot in 0..32 {
        let ident = config(slot, 0);
        if ident & 0xffff != VIRTIO {
            continue;
        }
        // A legacy device: 0x1000 to 0x103f, revision 0, its type in the subsystem's id.
        let (device, revision) = (ident >> 16, config(slot, 8) & 0xff);
        if !(0x1000..=0x103f).contains(&device) || revision != 0 {
            say!(
                "none",
                slot,
                ": virtio device ",
                Hex(device.into()),
                " is not a legacy one"
            );
            continue;
        }
        let kind = config(slot, 0x2c) >> 16;
        let bar = config(slot, 0x10);
        let base = (bar & 0xfffc) as u16;
        outl(ADDRESS, 1 << 31 | slot << 11 | 0x10);
        outl(DATA, u32::MAX);
        let size = !(inl(DATA) & 0xffff_fffc) + 1;
        outl(DATA, bar);
        let (name, own): (&str, &[(u32, &str)]) = match kind {
            1 => ("Network", &NET),
            2 => ("Block", &BLOCK),
            4 => ("Entropy", &[]),
            5 => ("Balloon", &[]),
            _ => ("Unknown", &[]),
        };
        say!(
            "virtio_pci",
            unit,
            ": <VirtIO PCI ",
            name,
            " adapter> port ",
            Hex(base.into()),
            "-",
            Hex(u64::from(base) + u64::from(size) - 1),
            " at device ",
            slot,
            ".0 on pci0"
        );
        let host = inl(base);
        print!(
            "virtio_pci",
            unit,
            ": host features: ",
            Hex(host.into()),
            " "
        );
        features(host, own);
        match kind {
            1 => network(base + 20),
            2 => block(base + 20, inw(base + 12)),
            _ => {}
        }
        unit += 1;
    }
}

fn network(config: u16) {
    print!("vtnet0: Ethernet address: ");
    for index in 0..6 {
        if index > 0 {
            print!(":");
        }
        Octet(inb(config + index)).print();
    }
    say!();
}

fn block(config: u16, queue: u16) {
    let sectors = u64::from(inl(config + 4)) << 32 | u64::from(inl(config));
    say!(
        "vtblk0: ",
        sectors / 2048,
        "MB (",
        sectors,
        " 512 byte sectors)"
    );
    say!(
        "vtblk0: queue of ",
        u32::from(queue),
        " segments ",
        inl(config + 12)
    );
}
