//! The `vmmctl` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmmctl::main(std::env::args_os()).into()
}
