//! The `rhyveload` program.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use rhyveload::cli::{Cli, lines};
use rhyveload::freebsd::console::Console;
use rhyveload::load::load;
use rhyveload::progress::Progress;
use vmm_api::root::Root;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rhyveload: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<(), Box<dyn Error>> {
    let (json, quiet) = (cli.json, cli.quiet);
    let mut progress = match quiet {
        true => Progress::hidden(),
        false => Progress::on_terminal(),
    };
    let (mut stdout, mut stderr) = (std::io::stdout(), std::io::stderr());
    let mut nowhere = std::io::sink();
    let mut console = match json || quiet {
        true => Console::new(&mut nowhere, &mut stderr),
        false => Console::new(&mut stdout, &mut stderr),
    };
    let loaded = load(&Root::open()?, &cli.job(), &mut console, &mut progress);
    progress.clear();
    let loaded = loaded?;
    let text = match (json, quiet) {
        (true, _) => serde_json::to_string(&loaded)? + "\n",
        (false, true) => String::new(),
        (false, false) => lines(&loaded),
    };
    // The VM is loaded, whether or not somebody still reads about it.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

/// `outer: cause: its cause`.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
