//! A program's manual page: clap_mangen's, but for what follows the options in the help, which it
//! would run together in one section.
//!
//! There a line that ends with a colon begins a section, what is indented below it stays as it is,
//! and paragraphs of text behind that are notes.

use std::io::{self, Write};

use clap::Command;
use clap_mangen::Man;

/// Writes the page.
///
/// # Errors
/// Those of `out`.
pub(super) fn write(command: Command, mut out: &mut dyn Write) -> io::Result<()> {
    let help = command.get_after_long_help().map(ToString::to_string);
    let man = Man::new(command).section("8");
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    man.render_options_section(&mut out)?;
    out.write_all(sections(&help.unwrap_or_default()).as_bytes())?;
    man.render_version_section(&mut out)
}

fn sections(help: &str) -> String {
    let (mut page, mut notes) = (String::new(), false);
    for block in help.split("\n\n") {
        let mut lines = block.lines().peekable();
        match lines.peek().and_then(|line| line.strip_suffix(':')) {
            Some(title) if !title.starts_with(' ') => {
                page += &format!(".SH \"{}\"\n", roff(title).to_uppercase());
                lines.next();
                notes = false;
            }
            _ if block.starts_with(' ') => page += ".PP\n",
            _ if notes => page += ".PP\n",
            _ => {
                page += ".SH NOTES\n";
                notes = true;
            }
        }
        let verbatim = lines.peek().is_some_and(|line| line.starts_with(' '));
        page += if verbatim { ".nf\n" } else { "" };
        for line in lines {
            page += &roff(line.strip_prefix("  ").unwrap_or(line));
            page.push('\n');
        }
        page += if verbatim { ".fi\n" } else { "" };
    }
    page
}

/// Text as roff has it.
fn roff(text: &str) -> String {
    let mut line = String::new();
    for letter in text.chars() {
        match letter {
            '\\' => line += "\\e",
            '-' => line += "\\-",
            '~' => line += "\\(ti",
            '^' => line += "\\(ha",
            '\'' => line += "\\(aq",
            '`' => line += "\\(ga",
            '.' if line.is_empty() => line += "\\&.",
            letter => line.push(letter),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headings_are_sections_and_lines_stay() {
        let page = sections(
            "Examples:\n  tool -x ~ \\\n      does it\n\n  .more\n\nA VM is\na directory.\n\nMore.\n\nExit status:\n  0  all",
        );
        assert_eq!(
            page,
            ".SH \"EXAMPLES\"\n.nf\ntool \\-x \\(ti \\e\n    does it\n.fi\n\
             .PP\n.nf\n\\&.more\n.fi\n\
             .SH NOTES\nA VM is\na directory.\n.PP\nMore.\n\
             .SH \"EXIT STATUS\"\n.nf\n0  all\n.fi\n"
        );
    }
}
