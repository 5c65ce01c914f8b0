//! Numbers as strtoul(3) reads them with base 0, but strictly: no sign, nothing behind, no overflow.

/// `0x` and hexadecimal, `0` and octal, or decimal.
///
/// # Errors
///
/// It is none of these, or has more than 64 bits. The text says what is wrong.
pub fn parse(text: &str) -> Result<u64, String> {
    let (digits, radix) = match text.as_bytes() {
        [b'0', b'x' | b'X', ..] => (&text[2..], 16),
        [b'0', _, ..] => (&text[1..], 8),
        _ => (text, 10),
    };
    // from_str_radix would take a sign.
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err("give a number: 0x... is hexadecimal, 0... is octal".into());
    }
    u64::from_str_radix(digits, radix).map_err(|_| "the number has more than 64 bits".into())
}

/// The same with 32 bits.
///
/// # Errors
///
/// As [`parse`].
pub fn parse_u32(text: &str) -> Result<u32, String> {
    u32::try_from(parse(text)?).map_err(|_| "the number has more than 32 bits".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bases_are_told_by_their_prefix() {
        for (text, value) in [
            ("0", 0),
            ("10", 10),
            ("0x1F", 31),
            ("0XfF", 255),
            ("017", 15),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(value), "{text}");
        }
        for text in [
            "",
            "0x",
            "08",
            "-1",
            "+1",
            "1 ",
            "0x1G",
            "x1",
            "é",
            "0é",
            "18446744073709551616",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse_u32("0x100000000").is_err());
    }

    proptest::proptest! {
        #[test]
        fn every_number_is_read_back(n: u64) {
            proptest::prop_assert_eq!(parse(&format!("{n}")), Ok(n));
            proptest::prop_assert_eq!(parse(&format!("{n:#x}")), Ok(n));
            proptest::prop_assert_eq!(parse(&format!("0{n:o}")), Ok(n));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".*") {
            let _ = parse(&text);
        }
    }
}
