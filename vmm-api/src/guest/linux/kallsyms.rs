//! Linux's own symbol table, found by its shape in the kernel's image.
//!
//! What scripts/kallsyms.c of Linux 5.x and 6.x leaves in .rodata, each part aligned to 8 bytes:
//!
//! - `num_syms` (32 bits), `names`: of each symbol a length (1 byte, or 2 as ULEB128 since 6.1) and
//!   that many tokens, the first of which begins with nm's letter of its kind; `markers`: where in
//!   `names` each 256th symbol is (32 bits each);
//! - `token_table`: 256 texts; `token_index`: where each of them begins (16 bits each);
//! - `offsets` (32 bits each) and `relative_base` (64 bits): before `num_syms` up to 6.3, behind
//!   `token_index` since 6.4.
//!
//! The search begins at the token table, in which the digits stand for themselves one after the other,
//! and believes nothing that another part does not confirm.

use memchr::memmem;

use crate::guest::symbols::{Kind, Symbols};

/// A kernel has more symbols than the one, and fewer than the other.
const SYMBOLS: std::ops::RangeInclusive<u32> = 500..=4_000_000;
/// How far before the token table `num_syms` may be.
const NAMES_MAX: usize = 64 << 20;
/// Longest token.
const TOKEN_MAX: usize = 128;
/// What a table can be told by: the digits as tokens.
pub const SIGN: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
/// The token that is the first digit.
const FIRST_DIGIT: usize = b'0' as usize;

/// The symbols in a part of a kernel's image that begins at an address which is a multiple of 8.
pub fn find(image: &[u8]) -> Option<Symbols> {
    let hits = memmem::find_iter(image, SIGN);
    hits.filter_map(|hit| table(image, hit)).next()
}

fn table(image: &[u8], digits: usize) -> Option<Symbols> {
    let tokens = Tokens::at(image, digits)?;
    let before = tokens.start & !7;
    let lowest = before.saturating_sub(NAMES_MAX);
    let places = (lowest..before).rev().step_by(8).map(|at| at & !7);
    places
        .filter_map(|at| Names::at(image, at, tokens.start))
        .find_map(|names| symbols(image, &tokens, &names))
}

struct Tokens<'a> {
    start: usize,
    /// Behind the index.
    end: usize,
    texts: Vec<&'a [u8]>,
}

impl<'a> Tokens<'a> {
    fn at(image: &'a [u8], digits: usize) -> Option<Self> {
        let mut end = digits;
        for _ in FIRST_DIGIT..256 {
            end += token(image, end)?.len() + 1;
        }
        let index = end.next_multiple_of(8);
        let starts: Vec<usize> = image
            .get(index..index.checked_add(512)?)?
            .as_chunks()
            .0
            .iter()
            .map(|&word| u16::from_le_bytes(word).into())
            .collect();
        let start = digits.checked_sub(*starts.get(FIRST_DIGIT)?)?;
        let mut texts = Vec::with_capacity(256);
        let mut at = 0;
        for &begins in &starts {
            if begins != at {
                return None;
            }
            let text = token(image, start + at)?;
            at += text.len() + 1;
            texts.push(text);
        }
        Some(Self {
            start,
            end: index + 512,
            texts,
        })
    }
}

fn token(image: &[u8], at: usize) -> Option<&[u8]> {
    let rest = image.get(at..)?;
    let len = rest.iter().take(TOKEN_MAX).position(|&b| b == 0)?;
    rest.get(..len)
}

struct Names<'a> {
    /// Where `num_syms` is.
    start: usize,
    /// The tokens of each symbol.
    names: Vec<&'a [u8]>,
}

impl<'a> Names<'a> {
    /// Names, if a table of them begins here and is confirmed by its markers before `limit`.
    fn at(image: &'a [u8], start: usize, limit: usize) -> Option<Self> {
        let count = half(image, start)?;
        if !SYMBOLS.contains(&count) || half(image, start + 4)? != 0 {
            return None;
        }
        let first = start + 8;
        let count = count as usize;
        let mut names = Vec::new();
        let mut markers = Vec::new();
        let mut at = first;
        for n in 0..count {
            if n % 256 == 0 {
                markers.push(u32::try_from(at - first).ok()?);
            }
            let low = *image.get(at)?;
            let (len, head) = match low {
                0 => return None,
                1..0x80 => (low.into(), 1),
                _ => {
                    let high: usize = (*image.get(at + 1)?).into();
                    (usize::from(low & 0x7f) | high << 7, 2)
                }
            };
            let from = at + head;
            at = from + len;
            if at > limit {
                return None;
            }
            names.push(image.get(from..at)?);
        }
        let confirmed = (at.next_multiple_of(8)..)
            .step_by(4)
            .zip(&markers)
            .all(|(at, &marker)| half(image, at) == Some(marker));
        confirmed.then_some(Self { start, names })
    }
}

fn symbols(image: &[u8], tokens: &Tokens, names: &Names) -> Option<Symbols> {
    let size = (4 * names.names.len()).next_multiple_of(8);
    // Up to 6.3, and since.
    let before = names.start.checked_sub(8);
    let before = before.and_then(|base| Some((base.checked_sub(size)?, base)));
    let behind = tokens.end.next_multiple_of(8);
    let behind = Some((behind, behind + size));
    let addresses = [before, behind]
        .into_iter()
        .flatten()
        .find_map(|(offsets, base)| addresses(image, offsets, base, names.names.len()))?;
    let mut symbols = Symbols::default();
    let mut name = Vec::new();
    for (address, encoded) in addresses.into_iter().zip(&names.names) {
        name.clear();
        for &token in *encoded {
            name.extend_from_slice(tokens.texts.get(usize::from(token))?);
        }
        let (&kind, name) = name.split_first()?;
        symbols.add(address, Kind::of(kind), &String::from_utf8_lossy(name));
    }
    symbols.settle()
}

/// The symbols' addresses, which ascend.
fn addresses(image: &[u8], offsets: usize, base: usize, count: usize) -> Option<Vec<u64>> {
    let base = u64::from_le_bytes(*image.get(base..)?.first_chunk()?);
    // The upper half of the address space.
    if base >> 47 != 0x1_ffff {
        return None;
    }
    let offsets = image.get(offsets..offsets.checked_add(4 * count)?)?;
    let offsets = || offsets.as_chunks().0.iter().map(|&o| i32::from_le_bytes(o));
    // CONFIG_KALLSYMS_ABSOLUTE_PERCPU: what is not negative is no address but a value.
    let signed = 2 * offsets().filter(|&o| o < 0).count() > count;
    let mut last = 0;
    let mut addresses = Vec::with_capacity(count);
    for offset in offsets() {
        let address = match (signed, offset) {
            (true, 0..) => {
                addresses.push(offset as u64);
                continue;
            }
            (true, _) => base.wrapping_add(offset.unsigned_abs().into()) - 1,
            (false, _) => base.wrapping_add((offset as u32).into()),
        };
        if address < last {
            return None;
        }
        last = address;
        addresses.push(address);
    }
    Some(addresses)
}

fn half(image: &[u8], at: usize) -> Option<u32> {
    let bytes = image.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A table as scripts/kallsyms.c makes it, with one token a letter.
    pub(crate) fn table(symbols: &[(i32, String)], base: u64, new: bool) -> Vec<u8> {
        let mut out = Vec::new();
        let align = |out: &mut Vec<u8>| out.resize(out.len().next_multiple_of(8), 0);
        let offsets = |out: &mut Vec<u8>| {
            out.extend(symbols.iter().flat_map(|(offset, _)| offset.to_le_bytes()));
            align(out);
            out.extend(base.to_le_bytes());
        };
        out.extend([0x5a; 24]);
        if !new {
            offsets(&mut out);
        }
        out.extend((symbols.len() as u64).to_le_bytes());
        let start = out.len();
        let mut markers = Vec::new();
        for (n, (_, name)) in symbols.iter().enumerate() {
            if n % 256 == 0 {
                markers.push((out.len() - start) as u32);
            }
            match name.len() {
                len @ 0..0x80 => out.push(len as u8),
                len => out.extend([len as u8 | 0x80, (len >> 7) as u8]),
            }
            out.extend(name.as_bytes());
        }
        align(&mut out);
        out.extend(markers.iter().flat_map(|m| m.to_le_bytes()));
        align(&mut out);
        let mut index = Vec::new();
        let start = out.len();
        for token in 0..=255u8 {
            index.extend(((out.len() - start) as u16).to_le_bytes());
            match token {
                b'!'..=b'~' => out.push(token),
                _ => out.extend(b"zz"),
            }
            out.push(0);
        }
        align(&mut out);
        out.extend(index);
        align(&mut out);
        if new {
            offsets(&mut out);
        }
        out.extend([0xa5; 40]);
        out
    }

    pub(crate) fn sample(count: i32) -> Vec<(i32, String)> {
        let name = |n: i32| match n {
            0 => "Agdt_page".to_owned(),
            5 => format!("t{}", "long".repeat(50)),
            n if n % 3 == 0 => format!("Ddata_{n}"),
            n => format!("Tfunction_{n}"),
        };
        let offset = |n| if n == 0 { 0x6000 } else { -1 - 0x100 * n };
        (0..count).map(|n| (offset(n), name(n))).collect()
    }

    #[test]
    fn a_table_of_either_order_is_found_and_read() {
        let base = 0xffff_ffff_8100_0000;
        for new in [false, true] {
            let image = table(&sample(700), base, new);
            let symbols = find(&image).unwrap();
            assert_eq!(symbols.address("data_600"), Some(base + 0x100 * 600));
            assert_eq!(
                symbols.name(base + 0x100 * 601 + 5).as_deref(),
                Some("function_601+0x5")
            );
            assert_eq!(symbols.address("gdt_page"), Some(0x6000));
            assert!(symbols.address(&"long".repeat(50)).is_some());
        }
    }

    #[test]
    fn without_absolute_values_offsets_have_no_sign() {
        let mut symbols = sample(700);
        for (offset, _) in &mut symbols {
            *offset = if *offset < 0 { -1 - *offset } else { 0 };
        }
        let image = table(&symbols, 0xffff_ffff_8100_0000, true);
        let found = find(&image).unwrap();
        assert_eq!(found.address("data_3"), Some(0xffff_ffff_8100_0300));
    }

    proptest::proptest! {
        #[test]
        fn no_change_makes_it_panic(at: proptest::sample::Index, word: u32, new: bool) {
            let mut image = table(&sample(520), 0xffff_ffff_8100_0000, new);
            let at = at.index(image.len() - 4);
            image[at..at + 4].copy_from_slice(&word.to_le_bytes());
            let _ = find(&image);
            let _ = find(&image[..at]);
        }
    }
}
