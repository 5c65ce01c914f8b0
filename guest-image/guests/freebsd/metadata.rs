//! The preloaded metadata, read as FreeBSD reads it (sys/kern/subr_module.c): records {u32 type, u32
//! length, payload padded to 8}, one group a file, which its name begins.

use crate::memory::{peek8, peek32, peek64};

pub const MODINFO_END: u32 = 0;
pub const MODINFO_NAME: u32 = 1;
pub const MODINFO_TYPE: u32 = 2;
pub const MODINFO_ADDR: u32 = 3;
pub const MODINFO_SIZE: u32 = 4;
pub const MODINFO_ARGS: u32 = 6;
pub const ELFHDR: u32 = 0x8002;
pub const SSYM: u32 = 0x8003;
pub const ESYM: u32 = 0x8004;
pub const DYNAMIC: u32 = 0x8005;
pub const ENVP: u32 = 0x8006;
pub const HOWTO: u32 = 0x8007;
pub const KERNEND: u32 = 0x8008;
pub const SHDR: u32 = 0x8009;
pub const SMAP: u32 = 0x9001;

/// More records than any loader writes.
const MAX_RECORDS: u32 = 1024;

/// One record.
#[derive(Clone, Copy)]
pub struct Record {
    pub kind: u32,
    pub length: u64,
    /// Physical address.
    pub payload: u64,
}

impl Record {
    fn at(address: u64) -> Option<Self> {
        Some(Self {
            kind: peek32(address)?,
            length: peek32(address + 4)?.into(),
            payload: address + 8,
        })
    }

    fn next(&self) -> u64 {
        self.payload + (self.length + 7 & !7)
    }

    /// Its payload as a number.
    pub fn number(&self) -> Option<u64> {
        match self.length {
            4 => peek32(self.payload).map(u64::from),
            8 => peek64(self.payload),
            _ => None,
        }
    }

    /// Its payload's length as text, without the NUL that has to be there.
    pub fn text(&self) -> Option<u64> {
        let length = self.length.checked_sub(1)?;
        (peek8(self.payload + length) == Some(0)).then_some(length)
    }

    /// Whether its payload is this text.
    pub fn is(&self, text: &str) -> bool {
        let bytes = (self.payload..).zip(text.bytes());
        self.text() == Some(text.len() as u64) && { bytes }
            .all(|(at, byte)| peek8(at) == Some(byte))
    }
}

/// All records: well-formed once they are read.
#[derive(Clone, Copy)]
pub struct Metadata {
    modulep: u64,
    /// Behind the record that ends them.
    pub end: u64,
    pub records: u32,
}

impl Metadata {
    /// Walks the records; an error says what is wrong with them.
    pub fn read(modulep: u64) -> Result<Self, &'static str> {
        // Nothing makes modulep a round number: GRUB's is not.
        if modulep == 0 {
            return Err("modulep is 0");
        }
        let mut at = modulep;
        for records in 0..MAX_RECORDS {
            let record = Record::at(at).ok_or("records end in unmapped memory")?;
            if record.kind == MODINFO_END {
                if record.length != 0 {
                    return Err("the last record has a length");
                }
                return Ok(Self {
                    modulep,
                    end: record.payload,
                    records,
                });
            }
            if record.length > 1 << 20 {
                return Err("a record of more than 1 MiB");
            }
            let mut pad = record.payload + record.length;
            at = record.next();
            while pad < at {
                if peek8(pad) != Some(0) {
                    return Err("padding that is not 0");
                }
                pad += 1;
            }
            let named = records > 0 || record.kind == MODINFO_NAME;
            if !named {
                return Err("the first record is no name");
            }
        }
        Err("records do not end")
    }

    /// The records from one on.
    fn from(&self, mut at: u64) -> impl Iterator<Item = Record> {
        core::iter::from_fn(move || {
            let record = Record::at(at).filter(|record| record.kind != MODINFO_END)?;
            at = record.next();
            Some(record)
        })
    }

    /// All records, in order.
    pub fn iter(&self) -> impl Iterator<Item = Record> {
        self.from(self.modulep)
    }

    /// The files, in order.
    pub fn files(&self) -> impl Iterator<Item = File> {
        let metadata = *self;
        self.iter()
            .filter(|record| record.kind == MODINFO_NAME)
            .map(move |name| File { metadata, name })
    }

    /// The first file of a type: preload_search_by_type.
    pub fn by_type(&self, text: &str) -> Option<File> {
        self.files().find(|file| file.is(text))
    }
}

/// One file's records.
#[derive(Clone, Copy)]
pub struct File {
    metadata: Metadata,
    pub name: Record,
}

impl File {
    /// Its first record of a kind: preload_search_info.
    pub fn info(&self, kind: u32) -> Option<Record> {
        self.metadata
            .from(self.name.next())
            .take_while(|record| record.kind != MODINFO_NAME)
            .find(|record| record.kind == kind)
    }

    /// A record that is a number.
    pub fn number(&self, kind: u32) -> Option<u64> {
        self.info(kind)?.number()
    }

    /// Whether it is of this type.
    pub fn is(&self, text: &str) -> bool {
        self.info(MODINFO_TYPE).is_some_and(|kind| kind.is(text))
    }

    /// Its place in memory: address and end.
    pub fn place(&self) -> Option<[u64; 2]> {
        let address = self.number(MODINFO_ADDR)?;
        Some([address, address.checked_add(self.number(MODINFO_SIZE)?)?])
    }
}
