//! `cargo xtask man`: the manual pages: of the programs, as they write them themselves, and of the
//! library, vmm-api(3), made of docs/libvmmapi.md and the example program.

use std::fmt::Write as _;
use std::fs;
use std::process::{Command, ExitCode};

use clap::Args;

use crate::project::{build, root, target_dir};
use crate::{TaskResult, chain};

/// The programs, which write their own.
const PROGRAMS: [&str; 3] = ["rhyve", "rhyveload", "vmmctl"];

/// Make the manual pages in target/man
///
/// Look at one with `man -l target/man/vmmctl.8`.
#[derive(Debug, Args)]
pub struct Man {}

impl Man {
    /// Makes them.
    pub fn run(self) -> TaskResult {
        let out = target_dir().join("man");
        fs::create_dir_all(&out)?;
        let programs = build(&PROGRAMS, false)?;
        for program in PROGRAMS {
            let made = Command::new(programs.join(program))
                .args(["--generate", "man"])
                .output()?;
            if !made.status.success() {
                return Err(format!("{program} --generate man: {}", made.status).into());
            }
            fs::write(out.join(format!("{program}.8")), made.stdout)?;
        }
        let read = |path: &str| {
            let read = fs::read_to_string(root().join(path));
            read.map_err(|error| format!("{path}: {}", chain(&error)))
        };
        let page = library(
            &read("docs/libvmmapi.md")?,
            &read("vmm-api/examples/hello.rs")?,
        );
        fs::write(out.join("vmm-api.3"), page)?;
        println!("{}", out.display());
        Ok(ExitCode::SUCCESS)
    }
}

/// vmm-api(3): the tables of the document as lists, its headings as sections.
fn library(document: &str, example: &str) -> String {
    let mut page = String::from(
        ".TH vmm-api 3 \"\" rhyve\n.SH NAME\nvmm-api \\- virtual machines on KVM: libvmmapi in Rust\n\
         .SH DESCRIPTION\n",
    );
    for line in document.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            let _ = writeln!(page, ".SH {}", roff(heading).to_uppercase());
        } else if line.starts_with("# ") || line.starts_with("|---") || line == "| C | here | |" {
            continue;
        } else if let Some(row) = line.strip_prefix("| ") {
            let cells: Vec<_> = row.trim_end_matches('|').split(" | ").map(roff).collect();
            let cell = |n: usize| cells.get(n).map_or("", |cell| cell.trim());
            let _ = writeln!(page, ".TP\n.B {}\n{}", cell(0), cell(1));
            if !cell(2).is_empty() {
                let _ = writeln!(page, ".br\n{}", cell(2));
            }
        } else if let Some(item) = line.strip_prefix("- ") {
            let _ = writeln!(page, ".IP \\(bu 2\n{}", roff(item));
        } else if line.is_empty() {
            page.push_str(".PP\n");
        } else {
            let _ = writeln!(page, "{}", roff(line.trim_start()));
        }
    }
    page.push_str(".SH EXAMPLE\n.nf\n");
    for line in example.lines() {
        let line = line.replace('\\', "\\e");
        let guard = if line.starts_with(['.', '\'']) {
            "\\&"
        } else {
            ""
        };
        let _ = writeln!(page, "{guard}{line}");
    }
    page.push_str(".fi\n.SH SEE ALSO\n.BR rhyve (8),\n.BR rhyveload (8),\n.BR vmmctl (8)\n");
    page
}

/// Text as roff has it; Markdown's marks are left out.
fn roff(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace("**", "").replace('`', "");
    let text = text.replace('-', "\\-");
    match text.strip_prefix(['.', '\'']) {
        Some(_) => format!("\\&{text}"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_become_lists() {
        let page = library(
            "# Title\n\nText of `it`.\n\n- **kept**: so\n\n## Life\n\n| C | here | |\n|---|---|---|\n| `vm_open` | `Vm::open` | kept |\n",
            "fn main() {\n    let s = \"\\n\";\n}\n.x",
        );
        for part in [
            "Text of it.\n",
            ".IP \\(bu 2\nkept: so\n",
            ".SH LIFE\n",
            ".TP\n.B vm_open\nVm::open\n.br\nkept\n",
            "    let s = \"\\en\";\n",
            "\\&.x\n",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert!(!page.contains("|---"));
    }
}
