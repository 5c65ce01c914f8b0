//! Shows and changes what the hypervisor knows of a virtual machine: 2012's vmmctl.
//!
//! [`cli`] reads the options into a plan; [`work`] does it in 2012's order ([`detail`] what goes
//! beyond registers, [`look`] what is in memory), on a VM that [`target`]
//! found stored in its object or running behind its control socket; [`output`] gathers what there is
//! to say, as text or as one JSON object. [`list`], [`host`] and [`top`] are about no single VM.

#![forbid(unsafe_code)]

pub mod cli;
pub mod detail;
mod devices;
pub mod error;
pub mod exits;
pub mod host;
mod interrupt;
pub mod list;
pub mod look;
pub mod number;
pub mod output;
pub mod stepping;
pub mod target;
pub mod top;
pub mod work;

use std::ffi::OsString;

use vmm_api::cli::Parsed;
use vmm_api::say;

use cli::{Cli, Plan};
use error::Status;
use output::Output;

/// The whole program: does what a command line says and gives its exit status.
pub fn main(args: impl IntoIterator<Item = OsString>) -> Status {
    let cli: Cli = match vmm_api::cli::parse(cli::split_format(args)) {
        Ok(Parsed::Run(cli)) => cli,
        Ok(Parsed::Done) => return Status::Done,
        Err(error) => {
            error.print("vmmctl");
            return Status::Usage;
        }
    };
    let mut output = Output::new(cli.json);
    let result = match cli.plan {
        Plan::List => list::list(&mut output),
        Plan::Host => Ok(host::host(&mut output)),
        Plan::Top => top::top(),
        Plan::Work(work) => work::work(&work, &mut output),
    };
    // What went wrong first is what is said.
    let printed = output.print();
    let result = result.and_then(|status| printed.map(|()| status));
    result.unwrap_or_else(|error| {
        say!("vmmctl: {}", error::chain(&error));
        error.status()
    })
}
