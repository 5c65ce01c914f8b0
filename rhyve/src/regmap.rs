//! Register files as tables: where each register is, how wide, and what reading and writing it does.
//!
//! An access may be of any width at any offset: each register it touches is read once, and written
//! with the bytes that were not touched as they read. What is in no register floats high, and
//! swallows what is written.

/// One register of a `T`; values are little endian in memory.
pub struct Register<T> {
    at: u16,
    width: u8,
    get: fn(&mut T) -> u64,
    set: Option<fn(&mut T, u64)>,
}

impl<T> Register<T> {
    /// A register of `width` bytes at offset `at` which a guest can write.
    pub const fn rw(at: u16, width: u8, get: fn(&mut T) -> u64, set: fn(&mut T, u64)) -> Self {
        Self {
            at,
            width,
            get,
            set: Some(set),
        }
    }

    /// A register which ignores writes. Reading it may change something.
    pub const fn ro(at: u16, width: u8, get: fn(&mut T) -> u64) -> Self {
        Self {
            at,
            width,
            get,
            set: None,
        }
    }

    /// The part of an access to `len` bytes at `offset` that is in this register, as the number of
    /// bytes before it in the access, in the register, and in it.
    fn overlap(&self, offset: u64, len: usize) -> Option<(usize, usize, usize)> {
        let (at, end) = (
            u64::from(self.at),
            u64::from(self.at) + u64::from(self.width),
        );
        let first = offset.max(at);
        let last = offset.saturating_add(len as u64).min(end);
        let count = last.checked_sub(first).filter(|count| *count != 0)?;
        Some((
            (first - offset) as usize,
            (first - at) as usize,
            count as usize,
        ))
    }
}

/// A register file.
pub struct RegisterMap<T: 'static>(&'static [Register<T>]);

impl<T> RegisterMap<T> {
    /// These registers, which do not overlap.
    pub const fn new(registers: &'static [Register<T>]) -> Self {
        Self(registers)
    }

    /// Reads from `offset` on.
    pub fn read(&self, file: &mut T, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        for register in self.0 {
            if let Some((before, inside, count)) = register.overlap(offset, data.len()) {
                let value = (register.get)(file).to_le_bytes();
                let bytes = value.iter().skip(inside).take(count);
                for (to, from) in data.iter_mut().skip(before).zip(bytes) {
                    *to = *from;
                }
            }
        }
    }

    /// Writes from `offset` on.
    pub fn write(&self, file: &mut T, offset: u64, data: &[u8]) {
        for register in self.0 {
            let Some(set) = register.set else { continue };
            if let Some((before, inside, count)) = register.overlap(offset, data.len()) {
                let mut value = if count < usize::from(register.width) {
                    (register.get)(file).to_le_bytes()
                } else {
                    [0; 8]
                };
                let bytes = data.iter().skip(before).take(count);
                for (to, from) in value.iter_mut().skip(inside).zip(bytes) {
                    *to = *from;
                }
                set(file, u64::from_le_bytes(value));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct File {
        word: u16,
        long: u64,
        reads: u32,
    }

    const MAP: RegisterMap<File> = RegisterMap::new(&[
        Register::rw(0, 2, |f| f.word.into(), |f, v| f.word = v as u16),
        Register::ro(2, 1, |f| {
            f.reads += 1;
            f.reads.into()
        }),
        Register::rw(8, 8, |f| f.long, |f, v| f.long = v),
    ]);

    #[test]
    fn accesses_of_any_width_reach_each_register_once() {
        let mut file = File::default();
        MAP.write(&mut file, 0, &[1, 2, 3, 4]);
        MAP.write(&mut file, 1, &[5]);
        MAP.write(&mut file, 12, &[0xef, 0xbe]);
        assert_eq!((file.word, file.long), (0x0501, 0xbeef << 32));
        let mut data = [0; 8];
        MAP.read(&mut file, 0, &mut data);
        assert_eq!(data, [1, 5, 1, 0xff, 0xff, 0xff, 0xff, 0xff]);
        MAP.read(&mut file, 13, &mut data[..2]);
        assert_eq!(data[..2], [0xbe, 0]);
        MAP.read(&mut file, 3, &mut data[..4]);
        assert_eq!((&data[..4], file.reads), (&[0xff; 4][..], 1));
        MAP.write(&mut file, 16, &[7]);
        MAP.write(&mut file, u64::MAX, &[7, 7]);
        assert_eq!(file.long, 0xbeef << 32);
    }
}
