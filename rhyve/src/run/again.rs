//! The options a machine is run with: those on the command line, or, for a suspended machine of
//! which nothing but the name is said, those it had.

use std::ffi::OsString;
use std::path::PathBuf;

use vmm_api::state::{Phase, RunInfo, VmState};

use super::{RunError, system};
use crate::cli::{Invocation, parse};
use crate::config::MachineSpec;

/// What the machine is to be, and what is to be remembered of how that was said. `args` have the
/// program's name in front. A suspended machine's relative paths start where they did.
pub(super) fn options(
    spec: MachineSpec,
    args: &[OsString],
    state: &VmState,
) -> Result<(MachineSpec, RunInfo), RunError> {
    let given = args.get(1..).unwrap_or_default();
    let bare = given.len() <= 1;
    match &state.machine.run {
        Some(run) if bare && state.phase == Phase::Suspended => again(spec, run),
        _ => Ok((
            spec,
            RunInfo {
                args: given
                    .iter()
                    .map(|arg| arg.to_string_lossy().into_owned())
                    .collect(),
                at_ns: 0,
                directory: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
            },
        )),
    }
}

fn again(spec: MachineSpec, run: &RunInfo) -> Result<(MachineSpec, RunInfo), RunError> {
    std::env::set_current_dir(&run.directory)
        .map_err(system("go to the directory that the VM was run in"))?;
    let words = std::iter::once("rhyve".to_owned()).chain(run.args.iter().cloned());
    match parse(words).map_err(RunError::Options)? {
        Invocation::Run(then, _) => {
            let then = MachineSpec {
                // A clone has another name than what it is a clone of.
                name: spec.name,
                ..*then
            };
            Ok((then, run.clone()))
        }
        // Such a command line runs nothing, so nothing was suspended that ran by it.
        Invocation::Print(_) | Invocation::Done => Ok((spec, run.clone())),
    }
}
