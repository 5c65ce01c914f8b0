//! A loader command's words (sys/boot/common/interp_parse.c): quotes, backslashes, variables.

/// Why a line is no command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WordsError {
    /// A quote without its counterpart.
    #[error("the closing {0} is missing")]
    Quote(char),
    /// `${` without `}`.
    #[error("the closing }} is missing")]
    Brace,
    /// A line that grew beyond all bounds.
    #[error("the line is longer than {LINE_MAX} bytes with its variables")]
    Long,
}

/// Variables could make a line much longer.
const LINE_MAX: usize = 64 << 10;

/// Takes a line apart. Blanks separate words; quotes, single or double, keep them together; a
/// backslash takes the next character as it is; `$name` and `${name}` are what `variable` says,
/// but not between single quotes.
///
/// # Errors
///
/// See [`WordsError`].
pub fn words<'v>(
    line: &str,
    variable: impl Fn(&str) -> Option<&'v str>,
) -> Result<Vec<String>, WordsError> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut total = 0;
    let mut rest = line;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '\\' if quote != Some('\'') => {
                let next = rest.chars().next();
                rest = &rest[next.map_or(0, char::len_utf8)..];
                let next = match next {
                    Some('n') => Some('\n'),
                    Some('t') => Some('\t'),
                    other => other,
                };
                word.get_or_insert_default().extend(next);
            }
            '"' | '\'' if quote.is_none() => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            c if quote == Some(c) => quote = None,
            '$' if quote != Some('\'') => {
                let (name, after) = name(rest)?;
                rest = after;
                let value = match name {
                    "" => "$",
                    name => variable(name).unwrap_or_default(),
                };
                total += value.len();
                if total > LINE_MAX {
                    return Err(WordsError::Long);
                }
                word.get_or_insert_default().push_str(value);
            }
            c if c.is_whitespace() && quote.is_none() => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    match quote {
        None => Ok(words),
        Some(quote) => Err(WordsError::Quote(quote)),
    }
}

/// The name of a variable behind a dollar sign, and what follows it.
fn name(rest: &str) -> Result<(&str, &str), WordsError> {
    match rest.strip_prefix('{') {
        Some(rest) => rest.split_once('}').ok_or(WordsError::Brace),
        None => {
            let part = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
            let end = rest.find(|c| !part(c)).unwrap_or(rest.len());
            Ok(rest.split_at(end))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(line: &str) -> Result<Vec<String>, WordsError> {
        words(line, |name| match name {
            "kernel" => Some("/boot/my kernel"),
            "a.b" => Some("x"),
            _ => None,
        })
    }

    #[test]
    fn words_are_quoted_escaped_and_expanded() {
        for (line, expected) in [
            (
                "  load  -t md_image\t/boot/mdroot ",
                &["load", "-t", "md_image", "/boot/mdroot"][..],
            ),
            (
                "set a=\"b c\" 'd $kernel' ''",
                &["set", "a=b c", "d $kernel", ""],
            ),
            ("a\\ b \\\"c\\\\", &["a b", "\"c\\"]),
            (
                "load $kernel/x ${a.b}y $a.b $none$",
                &["load", "/boot/my kernel/x", "xy", "x", "$"],
            ),
            ("", &[]),
        ] {
            assert_eq!(of(line).unwrap(), expected, "{line}");
        }
        assert_eq!(of("a \"b"), Err(WordsError::Quote('"')));
        assert_eq!(of("a 'b"), Err(WordsError::Quote('\'')));
        assert_eq!(of("a ${b"), Err(WordsError::Brace));
        assert_eq!(of(&"$kernel".repeat(1 << 14)), Err(WordsError::Long));
    }

    proptest! {
        #[test]
        fn any_line_is_words_or_an_error(line in any::<String>()) {
            let _ = of(&line);
        }
    }
}
