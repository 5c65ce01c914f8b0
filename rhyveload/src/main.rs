//! The `rhyveload` program.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use rhyveload::cli::{Cli, On, lines};
use rhyveload::freebsd::console::Console;
use rhyveload::load::load;
use rhyveload::progress::Progress;
use rhyveload::pty::Pty;
use rhyveload::terminal::{Tty, use_device};
use vmm_api::cli::{Parsed, parse};
use vmm_api::root::Root;
use vmm_api::say;

/// Exit status for a wrong command line.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = match parse(std::env::args_os()) {
        Ok(Parsed::Run(cli)) => cli,
        Ok(Parsed::Done) => return ExitCode::SUCCESS,
        Err(error) => {
            error.print("rhyveload");
            return USAGE.into();
        }
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say!("rhyveload: {}", chain(error.as_ref()));
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
    let on = cli.on();
    let job = cli.job().unwrap_or_else(|error| error.exit());
    // Whoever wants silence or JSON is not asked anything.
    let asks = !json && !quiet && job.asks();
    let mut pty = None;
    match &on {
        On::Stdio => {}
        On::Device(path) => use_device(path)
            .map_err(|error| format!("{}: cannot be the console: {error}", path.display()))?,
        On::Pty if !asks => {}
        On::Pty => {
            let made = Pty::open().map_err(|error| format!("no pseudo-terminal: {error}"))?;
            let made = pty.insert(made);
            say!("rhyveload: the console is at {}", made.path().display());
            made.wait();
        }
    }
    let mut terminal = match asks {
        true => Tty::new(),
        false => None,
    };
    let (mut stdout, mut stderr) = (std::io::stdout(), std::io::stderr());
    // What goes wrong is to be seen where the prompt is.
    let mut shown = std::io::stdout();
    let mut nowhere = std::io::sink();
    let out: &mut dyn Write = match json || quiet {
        true => &mut nowhere,
        false => &mut stdout,
    };
    let errors: &mut dyn Write = match on != On::Stdio && terminal.is_some() {
        true => &mut shown,
        false => &mut stderr,
    };
    let mut console = Console::new(out, errors);
    if let Some(terminal) = &mut terminal {
        console = console.with_terminal(terminal);
    }
    let loaded = load(&Root::open()?, &job, &mut console, &mut progress);
    progress.clear();
    let loaded = loaded?;
    let text = match (json, quiet) {
        (true, _) => serde_json::to_string(&loaded)? + "\n",
        (false, true) => String::new(),
        (false, false) => lines(&loaded),
    };
    // The VM is loaded, whether or not somebody still reads about it.
    let _ = std::io::stdout().write_all(text.as_bytes());
    drop(pty);
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
