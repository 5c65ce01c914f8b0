//! The grammar of loader.conf(5) and device.hints(5) (sys/boot/forth/support.4th, get_assignment).
//!
//! Line by line: `name = value`, blank, or a comment from `#` on. A value is a word, or anything in
//! double quotes, where a backslash takes the next character as it is. A line that is none of this
//! is an error of its own; the lines around it count.

use std::fmt;

/// One assignment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Number of the line, from 1.
    pub line: usize,
    /// The variable.
    pub name: String,
    /// Its value, without quotes and backslashes.
    pub value: String,
}

/// A line that is no assignment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct SyntaxError {
    /// Number of the line, from 1.
    pub line: usize,
    /// Where in the line, in characters from 0.
    pub column: usize,
    /// What is wrong there.
    pub what: &'static str,
    /// The line, or its beginning.
    pub text: String,
}

/// So much of a line is repeated in an error.
const TEXT_MAX: usize = 76;

impl fmt::Display for SyntaxError {
    /// What is wrong, and in the next two lines where.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "syntax error: {}", self.what)?;
        if self.column < TEXT_MAX {
            write!(f, "\n  {}\n  {:>2$}", self.text, '^', self.column + 1)?;
        }
        Ok(())
    }
}

/// Parses a file's text.
pub fn parse(text: &str) -> impl Iterator<Item = Result<Assignment, SyntaxError>> {
    text.lines()
        .enumerate()
        .filter_map(|(index, line)| Line::new(line, index + 1).assignment().transpose())
}

/// A line while it is taken apart.
struct Line<'a> {
    text: &'a str,
    rest: &'a str,
    number: usize,
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-_.".contains(c)
}

impl<'a> Line<'a> {
    fn new(text: &'a str, number: usize) -> Self {
        Self {
            text,
            rest: text,
            number,
        }
    }

    fn assignment(mut self) -> Result<Option<Assignment>, SyntaxError> {
        self.blanks();
        if self.is_done() {
            return Ok(None);
        }
        let letter = |c: char| c.is_ascii_alphabetic();
        if !self.rest.starts_with(letter) {
            return Err(self.error("a name begins with a letter"));
        }
        let name = self.take(is_word).to_owned();
        self.blanks();
        if !self.skip('=') {
            return Err(self.error("'=' expected after the name"));
        }
        self.blanks();
        let value = match self.skip('"') {
            true => self.quoted()?,
            false => self.word()?,
        };
        self.blanks();
        if !self.is_done() {
            return Err(self.error("only a comment may follow the value; quote the whole value"));
        }
        Ok(Some(Assignment {
            line: self.number,
            name,
            value,
        }))
    }

    fn blanks(&mut self) {
        self.take(|c| c.is_ascii_whitespace());
    }

    /// The end, or a comment.
    fn is_done(&self) -> bool {
        self.rest.is_empty() || self.rest.starts_with('#')
    }

    fn skip(&mut self, c: char) -> bool {
        let rest = self.rest.strip_prefix(c);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn take(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !wanted(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    fn word(&mut self) -> Result<String, SyntaxError> {
        // Today's loader takes a negative number as well: autoboot_delay=-1.
        let digits = self.rest.strip_prefix('-').unwrap_or(self.rest);
        if !digits.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return Err(self.error("a value that is no word must be in double quotes"));
        }
        Ok(self.take(is_word).to_owned())
    }

    fn quoted(&mut self) -> Result<String, SyntaxError> {
        let start = self.rest;
        let mut value = String::new();
        let mut chars = start.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.rest = &start[at + 1..];
                    return Ok(value);
                }
                '\\' => value.extend(chars.next().map(|(_, c)| c)),
                c => value.push(c),
            }
        }
        self.rest = "";
        Err(self.error("the closing quote is missing"))
    }

    fn error(&self, what: &'static str) -> SyntaxError {
        let before = &self.text[..self.text.len() - self.rest.len()];
        let shown = self.text.chars().take(TEXT_MAX);
        SyntaxError {
            line: self.number,
            column: before.chars().count(),
            what,
            // A caret below a tab would be somewhere else.
            text: shown
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn good(text: &str) -> Vec<(usize, String, String)> {
        parse(text)
            .map(|line| line.unwrap())
            .map(|a| (a.line, a.name, a.value))
            .collect()
    }

    #[test]
    fn assignments_are_read() {
        let text = "# comment\n\n  a=b\nhint.uart.0.at = \"isa\" # why\nx\t=\t\"a \\\"b\\\\ #c\"\n\
                    autoboot_delay=-1\ne=\"\"\r\n";
        let found = good(text);
        let found: Vec<_> = found
            .iter()
            .map(|(l, n, v)| (*l, n.as_str(), v.as_str()))
            .collect();
        assert_eq!(
            found,
            [
                (3, "a", "b"),
                (4, "hint.uart.0.at", "isa"),
                (5, "x", "a \"b\\ #c"),
                (6, "autoboot_delay", "-1"),
                (7, "e", ""),
            ]
        );
    }

    #[test]
    fn errors_point_at_the_place_and_spare_the_other_lines() {
        let text = "a=1\n  b \"2\"\nc=\"open\nd=x y\n9=z\nf=/boot\ng=\nh=8";
        let lines: Vec<_> = parse(text).collect();
        let errors: Vec<_> = lines.iter().filter_map(|l| l.as_ref().err()).collect();
        let places: Vec<_> = errors.iter().map(|e| (e.line, e.column)).collect();
        assert_eq!(places, [(2, 4), (3, 7), (4, 4), (5, 0), (6, 2), (7, 2)]);
        assert_eq!(lines.iter().filter(|l| l.is_ok()).count(), 2);
        assert_eq!(
            errors[0].to_string(),
            "syntax error: '=' expected after the name\n    b \"2\"\n      ^"
        );
    }

    #[test]
    fn a_very_long_line_is_no_burden() {
        let long = format!("a=\"{}", "x".repeat(4 << 20));
        let error = parse(&long).next().unwrap().unwrap_err();
        assert_eq!(
            error.to_string(),
            "syntax error: the closing quote is missing"
        );
    }

    proptest! {
        #[test]
        fn what_is_quoted_reads_back(name in "[a-z][a-z0-9_.]{0,20}", value in "[^\n\r]{0,40}") {
            let escaped = value.replace('\\', "\\\\").replace('"', "\\\"");
            let text = format!("{name} = \"{escaped}\" # end");
            assert_eq!(good(&text), [(1, name, value)]);
        }

        #[test]
        fn any_text_is_lines_or_errors(text in any::<String>()) {
            assert!(parse(&text).count() <= text.lines().count());
        }
    }
}
