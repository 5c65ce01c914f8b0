//! Runs a virtual machine: vCPU threads, exits and device models.
//!
//! [`cli`] and [`config`] turn the command line into a plain specification; [`builder`] makes a
//! [`machine`] of it: buses, devices, firmware tables, and a thread a vCPU ([`sequencer`]);
//! [`run`] sees it through to its end.

#![deny(unsafe_op_in_unsafe_fn)]
// They panic where nobody reads: see `say!`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use vmm_api::cli::UsageError;
use vmm_api::name::VmName;
use vmm_api::say;
use vmm_api::state::StopReason;

use crate::cli::Invocation;
use crate::sequencer::{Cause, EXIT_ERROR};

pub mod block;
pub mod bootprofile;
pub mod builder;
pub mod bus;
pub mod bvm;
pub mod cli;
pub mod config;
pub mod console;
mod control;
mod dump;
pub mod firmware;
pub mod gdb;
pub mod irq;
pub mod isa;
pub mod lifecycle;
pub mod machine;
pub mod mevent;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod regmap;
mod report;
pub mod run;
pub mod saving;
pub mod sequencer;
pub mod suspend;
#[cfg(test)]
pub mod testing;
pub mod thread;
pub mod unix_socket;
pub mod virtio;

/// An error and its sources on one line: `outer: cause`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text += &format!(": {source}");
        next = source.source();
    }
    text
}

/// The whole program: reads its command line, runs the machine, and says how it ended.
///
/// The exit status is bhyve's: 0 reboot, 1 power-off, 2 halt, 3 triple fault, 4 error.
pub fn main(args: impl IntoIterator<Item = std::ffi::OsString>) -> ExitCode {
    let args: Vec<_> = args.into_iter().collect();
    let (spec, extras) = match cli::parse(args.iter().cloned()) {
        Ok(Invocation::Run(spec, extras)) => (spec, extras),
        Ok(Invocation::Print(text)) => {
            return match vmm_api::cli::print(&text) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    UsageError::from(error).print("rhyve");
                    ExitCode::from(EXIT_ERROR)
                }
            };
        }
        Ok(Invocation::Done) => return ExitCode::SUCCESS,
        Err(error) => {
            error.print();
            return ExitCode::from(EXIT_ERROR);
        }
    };
    if let Err(error) = tracing(extras.trace.as_deref()) {
        say!("rhyve: --trace: {error}");
        return ExitCode::from(EXIT_ERROR);
    }
    let name = spec.name.clone();
    match run::run(*spec, &args, extras.boot_profile.as_deref()) {
        Ok(cause) => {
            tell(&name, &cause);
            ExitCode::from(cause.status)
        }
        Err(error) => {
            say!("rhyve: {}", chain(&error));
            ExitCode::from(EXIT_ERROR)
        }
    }
}

/// Says how the guest ended, unless it was by its own will and there is no report of it.
fn tell(name: &VmName, cause: &Cause) {
    let words = cause.words();
    match (&cause.written, cause.reason) {
        (Some(path), _) => say!("rhyve: {name}: {words}; see {}", path.display()),
        (None, StopReason::Reset | StopReason::PowerOff) => {}
        (None, _) => say!("rhyve: {name}: {words}"),
    }
    if let Some(report) = &cause.report {
        say!("{}", report.trim_end());
    }
}

fn tracing(filter: Option<&str>) -> Result<(), tracing_subscriber::filter::ParseError> {
    // Not EnvFilter: its regular expressions are as large as the rest of rhyve.
    let filter: Targets = filter.unwrap_or("warn").parse()?;
    let format = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        // Colours are a feature that is not compiled in.
        .with_ansi(false)
        // It would be told where nobody listens, by a panic.
        .log_internal_errors(false);
    tracing_subscriber::registry()
        .with(format.with_filter(filter))
        .init();
    Ok(())
}
