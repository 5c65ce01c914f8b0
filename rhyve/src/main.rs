//! The `rhyve` program.

fn main() -> std::process::ExitCode {
    rhyve::main(std::env::args_os())
}
