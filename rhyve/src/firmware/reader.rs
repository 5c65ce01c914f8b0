//! Reads the tables back as a guest does: scan, checksum, walk. Nothing here knows how they were
//! built; it goes by the standards' offsets alone.

use std::collections::BTreeMap;

use super::{Blob, FirmwareSpec, RSDP_BASE, build};

/// The BIOS area of a guest.
pub(super) struct Bios(Vec<u8>);

/// An SMBIOS structure: its formatted bytes and its strings.
pub(super) type Structure = (Vec<u8>, Vec<String>);

impl Bios {
    pub(super) const BASE: u64 = 0xe_0000;

    pub(super) fn of(spec: &FirmwareSpec) -> Self {
        let mut blobs = build(spec).unwrap();
        blobs.sort_by_key(|blob| blob.gpa);
        let mut end = Self::BASE;
        let mut area = vec![0; 0x2_0000];
        for Blob { gpa, bytes } in blobs {
            assert!(gpa >= end, "blob at {gpa:#x} overlaps the one before");
            end = gpa + bytes.len() as u64;
            assert!(end <= 0x10_0000, "blob at {gpa:#x} ends at {end:#x}");
            let at = (gpa - Self::BASE) as usize;
            area[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        Self(area)
    }

    pub(super) fn bytes(&self, gpa: u64, len: usize) -> &[u8] {
        let at = (gpa - Self::BASE) as usize;
        &self.0[at..at + len]
    }

    pub(super) fn u16(&self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.bytes(gpa, 2).try_into().unwrap())
    }

    pub(super) fn u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.bytes(gpa, 4).try_into().unwrap())
    }

    pub(super) fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.bytes(gpa, 8).try_into().unwrap())
    }

    /// Bytes whose sum must be 0.
    pub(super) fn summed(&self, gpa: u64, len: usize) -> &[u8] {
        let bytes = self.bytes(gpa, len);
        let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0, "checksum of {len} bytes at {gpa:#x}");
        bytes
    }

    /// The one place on a 16-byte boundary from `start` with this signature.
    pub(super) fn scan(&self, start: u64, signature: &[u8]) -> Option<u64> {
        let mut found = (start..0x10_0000)
            .step_by(16)
            .filter(|gpa| self.bytes(*gpa, signature.len().min(16)) == signature);
        let first = found.next();
        assert_eq!(found.next(), None, "{} twice", signature.escape_ascii());
        first
    }

    /// Entries of the MP table by type.
    pub(super) fn mp_entries(&self) -> (String, BTreeMap<u8, Vec<Vec<u8>>>) {
        let pointer = self.scan(0xf_0000, b"_MP_").expect("an MP table");
        let length = usize::from(self.bytes(pointer, 16)[8]) * 16;
        assert_eq!(self.summed(pointer, length)[9], 4, "MP specification 1.4");
        let table = self.u32(pointer + 4).into();
        assert_eq!(self.bytes(table, 4), b"PCMP");
        let length = self.u16(table + 4);
        self.summed(table, length.into());
        assert_eq!(self.u32(table + 36), 0xfee0_0000);
        let id = String::from_utf8(self.bytes(table + 8, 20).to_vec()).unwrap();

        let mut entries = BTreeMap::<u8, Vec<Vec<u8>>>::new();
        let (mut at, end) = (table + 44, table + u64::from(length));
        let mut last = 0;
        for _ in 0..self.u16(table + 34) {
            let kind = self.bytes(at, 1)[0];
            assert!(kind >= last, "entries are sorted by type");
            last = kind;
            let length = if kind == 0 { 20 } else { 8 };
            entries
                .entry(kind)
                .or_default()
                .push(self.bytes(at, length).to_vec());
            at += length as u64;
        }
        assert_eq!(at, end, "the entries end where the table does");
        (id, entries)
    }

    /// Where the ACPI tables are, by signature, as RSDT and XSDT agree and FADT adds.
    pub(super) fn acpi(&self) -> BTreeMap<String, u64> {
        let rsdp = self.scan(Self::BASE, b"RSD PTR ").expect("an RSDP");
        assert_eq!(rsdp, RSDP_BASE);
        self.summed(rsdp, 20);
        assert_eq!((self.bytes(rsdp, 16)[15], self.u32(rsdp + 20)), (2, 36));
        self.summed(rsdp, 36);
        let (rsdt, xsdt) = (self.u32(rsdp + 16).into(), self.u64(rsdp + 24));
        let entries = |table: u64, signature: &[u8], size: u64| -> Vec<u64> {
            let length = self.table(table, signature);
            let places = (36..length).step_by(size as usize);
            let read = |at| {
                if size == 8 {
                    self.u64(table + at)
                } else {
                    self.u32(table + at).into()
                }
            };
            places.map(read).collect()
        };
        let tables = entries(xsdt, b"XSDT", 8);
        assert_eq!(tables, entries(rsdt, b"RSDT", 4));
        let mut found = BTreeMap::new();
        for table in tables {
            let signature = self.bytes(table, 4).to_vec();
            self.table(table, &signature);
            found.insert(String::from_utf8(signature).unwrap(), table);
        }
        let fadt = found["FACP"];
        let (facs, dsdt) = (self.u32(fadt + 36).into(), self.u32(fadt + 40).into());
        assert_eq!(self.u64(fadt + 140), dsdt);
        self.table(dsdt, b"DSDT");
        assert_eq!(
            (self.bytes(facs, 4), self.u32(facs + 4)),
            (&b"FACS"[..], 64)
        );
        assert_eq!(facs % 64, 0);
        found.insert("DSDT".into(), dsdt);
        found
    }

    /// The length of a table with this signature and a good checksum.
    pub(super) fn table(&self, gpa: u64, signature: &[u8]) -> u64 {
        assert_eq!(self.bytes(gpa, 4), signature);
        let length = self.u32(gpa + 4);
        self.summed(gpa, length as usize);
        length.into()
    }

    /// The MADT's structures: type and what follows the length.
    pub(super) fn madt(&self) -> Vec<(u8, Vec<u8>)> {
        let madt = self.acpi()["APIC"];
        let length = self.table(madt, b"APIC");
        assert_eq!((self.u32(madt + 36), self.u32(madt + 40)), (0xfee0_0000, 1));
        let (mut at, mut found) = (44, Vec::new());
        while at < length {
            let length = self.bytes(madt + at, 2)[1];
            let bytes = self.bytes(madt + at, length.into());
            found.push((bytes[0], bytes[2..].to_vec()));
            at += u64::from(length);
        }
        assert_eq!(at, length, "the structures end where the table does");
        found
    }

    /// The AML of the DSDT.
    pub(super) fn aml(&self) -> &[u8] {
        let dsdt = self.acpi()["DSDT"];
        &self.bytes(dsdt, self.table(dsdt, b"DSDT") as usize)[36..]
    }

    /// SMBIOS structures by type: formatted area and strings.
    pub(super) fn smbios(&self) -> BTreeMap<u8, Vec<Structure>> {
        let entry = self.scan(0xf_0000, b"_SM_").expect("an SMBIOS table");
        let length = self.bytes(entry, 6)[5];
        self.summed(entry, length.into());
        assert_eq!(&self.summed(entry + 16, 15)[..5], b"_DMI_");
        let (length, mut at) = (self.u16(entry + 22), u64::from(self.u32(entry + 24)));
        let end = at + u64::from(length);
        let mut found = BTreeMap::<u8, Vec<_>>::new();
        let mut handles = std::collections::BTreeSet::new();
        let mut largest = 0;
        for _ in 0..self.u16(entry + 28) {
            let start = at;
            let formatted = self.bytes(at, self.bytes(at, 2)[1].into()).to_vec();
            assert!(handles.insert(self.u16(at + 2)), "a handle is used once");
            at += formatted.len() as u64;
            let mut strings = Vec::new();
            loop {
                let rest = self.bytes(at, (end - at) as usize);
                let text: Vec<u8> = rest.iter().copied().take_while(|byte| *byte != 0).collect();
                at += text.len() as u64 + 1;
                match text.is_empty() {
                    true => break,
                    false => strings.push(String::from_utf8(text).unwrap()),
                }
            }
            if strings.is_empty() {
                at += 1;
            }
            largest = largest.max(at - start);
            found
                .entry(formatted[0])
                .or_default()
                .push((formatted, strings));
        }
        assert_eq!(at, end, "the structures end where the table does");
        assert_eq!(u64::from(self.u16(entry + 8)), largest);
        assert_eq!(found.keys().last(), Some(&127));
        found
    }
}

/// Names of AML objects with their values' bytes, `Scope.Device.NAME`; knows only what a static
/// DSDT needs: Name, Scope, Device over integers, buffers and packages (ACPI 6.5, 20.2).
pub(super) fn aml_names(mut aml: &[u8], prefix: &str, found: &mut BTreeMap<String, Vec<u8>>) {
    while let Some((op, rest)) = aml.split_first() {
        let name = |bytes: &[u8]| format!("{prefix}{}", bytes[..4].escape_ascii());
        match (op, rest) {
            (0x08, rest) => {
                let length = aml_data_length(&rest[4..]);
                let (value, after) = rest[4..].split_at(length);
                assert!(
                    found.insert(name(rest), value.to_vec()).is_none(),
                    "{}",
                    name(rest)
                );
                aml = after;
            }
            (0x10, rest) | (0x5b, [0x82, rest @ ..]) => {
                let (length, header) = aml_package_length(rest);
                let (inside, after) = rest.split_at(length);
                let inside = &inside[header..];
                aml_names(&inside[4..], &format!("{}.", name(inside)), found);
                aml = after;
            }
            _ => panic!("AML {op:#x} in {prefix}"),
        }
    }
}

/// PkgLength: what it says, and its own bytes (20.2.4).
fn aml_package_length(aml: &[u8]) -> (usize, usize) {
    let more = usize::from(aml[0] >> 6);
    if more == 0 {
        return (usize::from(aml[0]), 1);
    }
    let tail = aml[1..=more]
        .iter()
        .rev()
        .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    (tail << 4 | usize::from(aml[0] & 0xf), more + 1)
}

/// Bytes of a data object.
fn aml_data_length(aml: &[u8]) -> usize {
    match aml[0] {
        0x00 | 0x01 | 0xff => 1,
        0x0a => 2,
        0x0b => 3,
        0x0c => 5,
        0x0e => 9,
        0x11 | 0x12 => 1 + aml_package_length(&aml[1..]).0,
        op => panic!("AML data {op:#x}"),
    }
}

/// The resource descriptors of a _CRS buffer: tag and payload (6.4).
pub(super) fn resources(buffer: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let (length, header) = aml_package_length(&buffer[1..]);
    assert_eq!(buffer.len(), 1 + length);
    let size = aml_data_length(&buffer[1 + header..]);
    let mut rest = &buffer[1 + header + size..];
    let mut found = Vec::new();
    loop {
        let (tag, at, length) = match rest[0] {
            large if large & 0x80 != 0 => (
                large,
                3,
                usize::from(u16::from_le_bytes([rest[1], rest[2]])),
            ),
            small => (small >> 3, 1, usize::from(small & 7)),
        };
        if tag == 0x0f {
            assert_eq!(rest.len(), 2, "the end tag is last");
            return found;
        }
        found.push((tag, rest[at..at + length].to_vec()));
        rest = &rest[at + length..];
    }
}
